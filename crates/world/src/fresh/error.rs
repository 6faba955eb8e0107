//! What can go wrong with a fresh call of a Peregrine thread: in words that an image can hold.

use peregrine_call::{CallError, Failure};
use serde::{Deserialize, Serialize};

/// Why a fresh call of a Peregrine thread did not return its result.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum FreshCallError {
    /// The call came from outside.
    #[error("not in a Peregrine thread: use peregrine_call::Client there")]
    NoThread,
    /// The caller was rolled back, or resumed from disk, while its call was under way.
    #[error(
        "the caller went back to an image while its call was under way; the call may or may not have been executed"
    )]
    RolledBack,
    /// Nobody serves the path. Nothing was executed.
    #[error("{0}")]
    Unreachable(String),
    /// The domain said no. Nothing was executed.
    #[error("{0}")]
    Refused(String),
    /// The portal speaks another version. Nothing was executed.
    #[error(
        "portal {portal}: this client speaks version {ours:#x}, the domain {theirs:#x}; build both from one interface"
    )]
    Version {
        /// The portal.
        portal: String,
        /// Asked for.
        ours: u64,
        /// Exported.
        theirs: u64,
    },
    /// The domain's process ended before the reply; the call may have been executed.
    #[error("the domain died before it replied; the call may or may not have been executed")]
    DomainDied,
    /// The domain gave the call up.
    #[error("the call was terminated by its domain")]
    Terminated,
    /// The deadline passed first.
    #[error(
        "the deadline passed first: the call was not begun, or may still run; allow more time, or see what keeps the domain busy"
    )]
    Deadline,
    /// The callee's own error.
    #[error("the callee failed with code {code}, {} bytes of detail", .detail.len())]
    Callee {
        /// What kind.
        code: u32,
        /// The rest of it.
        detail: Vec<u8>,
    },
    /// The handler panicked. Its domain lives.
    #[error("the handler panicked: {0}")]
    Panicked(String),
    /// This node's connections and calls have as many descriptors open as the supervisor can close after it. Nothing was executed.
    #[error(
        "the calls of this node have {open} descriptors open, of {most} at most: call fewer domains at once"
    )]
    TooMany {
        /// Open now.
        open: usize,
        /// The most.
        most: usize,
    },
    /// The domain has been stopped, by a signal or a debugger, for ten seconds, and the call has no deadline. It may be executed when the
    /// domain goes on.
    #[error(
        "the domain (process {pid}) is stopped; let it go on (kill -CONT {pid}), or give the call a deadline"
    )]
    Stopped {
        /// The domain's process.
        pid: u32,
    },
    /// What was to be lent is gone: the domain that it was made for died, or the caller went back to an image or was resumed from disk. Nothing was
    /// executed; make it anew and fill it.
    #[error(
        "the memory to be lent is gone, with the domain that it was made for or the life that it was made in: make it anew and fill it"
    )]
    LoanLost,
    /// Anything else that `peregrine-call` reports.
    #[error("{0}")]
    Other(String),
}

impl From<CallError> for FreshCallError {
    fn from(e: CallError) -> Self {
        match e {
            CallError::Unreachable { .. } => Self::Unreachable(e.to_string()),
            CallError::Refused(_) => Self::Refused(e.to_string()),
            CallError::Version { portal, ours, theirs } => Self::Version { portal, ours, theirs },
            CallError::DomainDied => Self::DomainDied,
            CallError::Terminated => Self::Terminated,
            CallError::Deadline => Self::Deadline,
            CallError::Stopped { pid, .. } => Self::Stopped { pid },
            CallError::Callee(f) => Self::Callee { code: f.code, detail: f.detail },
            CallError::Panicked(text) => Self::Panicked(text),
            other => Self::Other(other.to_string()),
        }
    }
}

impl FreshCallError {
    /// The callee's own failure, if that is what it is.
    pub(super) fn own(self) -> Result<Failure, Self> {
        match self {
            Self::Callee { code, detail } => Ok(Failure { code, detail }),
            other => Err(other),
        }
    }
}
