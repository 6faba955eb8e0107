//! What can go wrong with a call, told apart by what the caller can do about it.
//!
//! ```text
//! never began        Unreachable  Refused  Version  TooLarge  BadArgument      nothing was executed
//! began, unfinished  DomainDied   Terminated  Deadline  Stopped   may have been executed, in part or in whole
//! came back          Callee  Panicked  BadReply                   the domain lives
//! ```
//!
//! Each error belongs to one level of a chain: when A called B and B called C, the death of C is B's error; A sees what B's
//! handler makes of it.

use crate::portal::PortalId;
use peregrine_sys::raw::Errno;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Why a call did not return its results.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// There is no domain at the end of the path or descriptor.
    #[error("no domain at {at}: {reason}; start it, or check the path and its permissions")]
    Unreachable {
        /// The socket path, or `descriptor`.
        at: PathBuf,
        /// What the kernel or the peer said.
        reason: String,
    },
    /// The domain, or this library on its behalf, said no before anything was executed.
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    /// The portal speaks another version of the interface.
    #[error(
        "portal {portal:?}: this client speaks version {ours:#x}, the domain {theirs:#x}; build both from one interface"
    )]
    Version {
        /// The portal's name.
        portal: String,
        /// The version asked for.
        ours: u64,
        /// The version that the domain exports.
        theirs: u64,
    },
    /// The arguments or the declared results are beyond a limit.
    #[error(
        "{what}: {asked_bytes}{} asked for, and the limit is {limit_bytes}; {}",
        unit(what),
        remedy(what)
    )]
    TooLarge {
        /// Which limit.
        what: &'static str,
        /// Bytes asked for.
        asked_bytes: u64,
        /// Bytes allowed.
        limit_bytes: u64,
    },
    /// An argument of a typed call can't be made into bytes.
    #[error("an argument can't be passed: {0}")]
    BadArgument(&'static str),
    /// The domain's process ended before the reply; the call may have been executed.
    #[error("the domain died before it replied; the call may or may not have been executed")]
    DomainDied,
    /// The domain lives and gave this call up: it is shutting down, or the callee's activation was terminated.
    #[error("the call was terminated by its domain")]
    Terminated,
    /// The deadline passed first: while the call was being set up, or waited for an activation, and then it is not executed any more; or while
    /// the callee worked, which may go on, and its reply is dropped.
    #[error(
        "the deadline passed first: the call was not begun, or may still run; allow more time, or see what keeps the domain busy"
    )]
    Deadline,
    /// The domain's process has been stopped, by a signal or a debugger, for as long as this client has
    /// [patience](crate::Client::set_patience), and the call has no deadline. It may be executed, in part or in whole, now or when the domain
    /// goes on; its reply is dropped.
    #[error(
        "the domain (process {pid}) has been stopped for {patience:?} or more; let it go on (kill -CONT {pid}), or give the call a deadline, or the client more patience"
    )]
    Stopped {
        /// The domain's process.
        pid: u32,
        /// For how long it was waited for.
        patience: Duration,
    },
    /// The callee's own error.
    #[error("{0}")]
    Callee(Failure),
    /// The handler panicked. Its domain lives.
    #[error("the handler panicked: {0}")]
    Panicked(String),
    /// What the domain wrote as its reply contradicts what was declared. The domain is broken or hostile.
    #[error("the domain's reply is not valid: {0}")]
    BadReply(&'static str),
    /// A system call failed: one of our own, or of the domain's, where `what` says so. It has no memory or no descriptor left, mostly. Nothing was
    /// executed, unless `what` speaks of results.
    #[error("{what}: {errno}{}", shortage_remedy(*errno))]
    System {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
}

/// Why a call was refused. Nothing was executed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The credentials don't satisfy the domain's access rule.
    #[error("the domain does not admit this user: its access rule decides (`DomainBuilder::access`)")]
    NotAdmitted,
    /// The credentials don't satisfy the portal's access rule.
    #[error("this user may not call the portal: its access rule decides (`DomainBuilder::portal_for`)")]
    Access(PortalId),
    /// The portal was found in another domain, or in one that was at the same path before.
    #[error("the portal was found in another domain than is called; look it up by name in this one")]
    OtherDomain,
    /// The domain has no such portal.
    #[error("the domain exports no portal {0:?}; check the name, and whether it is the right domain")]
    NoPortal(String),
    /// As many clients are connected as the domain allows.
    #[error("the domain serves {limit} clients already; raise its `Limits::clients`, or close connections")]
    Clients {
        /// The limit.
        limit: usize,
    },
    /// The chain of nested calls is as deep as the domain allows.
    #[error(
        "the chain of calls is {depth} deep, and the domain's limit is {limit}; nest fewer, or raise it (`Limits::depth`)"
    )]
    Depth {
        /// Depth that this call would have.
        depth: u32,
        /// The limit.
        limit: u32,
    },
    /// The peer speaks another protocol, or sent what the protocol does not allow.
    #[error("protocol: {0}")]
    Protocol(String),
    /// The gift is still writable by the one who gave it, so it can't be sealed.
    #[error("the gift is still mapped writable by the giver")]
    GiftInUse,
    /// A lent buffer or gift is not known to the domain.
    #[error("the domain does not know buffer {0}")]
    NoBuffer(u32),
}

/// What is too large when the bytes of a client's buffers are: what it lends, and what its large arguments and results take.
pub(crate) const BUFFER_BYTES: &str = "buffers and room for large arguments";

/// What it is counted in.
fn unit(what: &str) -> &'static str {
    match what {
        "calls in flight" | "buffers" => "",
        _ => " bytes",
    }
}

/// What to do about what is too large.
fn remedy(what: &str) -> &'static str {
    match what {
        "arguments" => "send less, or raise the domain's `Limits::argument_bytes`",
        "result" => {
            "declare more room for it in the call (`reply_bytes`, `#[out(bytes = N)]` of an interface), or raise the domain's `Limits::argument_bytes`"
        }
        "access to a buffer" => "stay within it, or make a larger one",
        "calls in flight" => "wait for one, or raise the domain's `Limits::calls_in_flight`",
        "buffers" => "drop some, or raise the domain's `Limits::buffers`",
        BUFFER_BYTES => "drop some, or raise the domain's `Limits::buffer_bytes`",
        _ => "send less, or raise the domain's `Limits`",
    }
}

/// The callee's own error: a number and bytes whose meaning is the interface's.
#[derive(Clone, PartialEq, Eq, Debug, Default, thiserror::Error)]
pub struct Failure {
    /// What kind of failure.
    pub code: u32,
    /// The rest of it, in whatever encoding the interface uses. At most [`Failure::MAX_DETAIL`] bytes reach the caller.
    pub detail: Vec<u8>,
}

impl Failure {
    /// Bytes of detail that travel; the rest is cut off.
    pub const MAX_DETAIL: usize = 16 * 1024;

    /// The code of a handler that was given other arguments than it expects.
    pub const ARGUMENTS: u32 = u32::MAX;

    /// The code of a typed handler whose result or error can't be passed; the detail says why.
    pub const REPLY: u32 = u32::MAX - 1;

    pub(crate) const fn arguments() -> Self {
        Self { code: Self::ARGUMENTS, detail: Vec::new() }
    }

    /// A failure with this code and detail.
    pub fn new(code: u32, detail: impl Into<Vec<u8>>) -> Self {
        Self { code, detail: detail.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Self::ARGUMENTS => f.write_str(
                "the handler was given other arguments than it expects: check their order, and what each is (input, output, lend, give)",
            ),
            Self::REPLY => write!(f, "the callee's reply can't be passed: {}", self.detail.escape_ascii()),
            code => write!(f, "the callee failed with code {code}, {} bytes of detail", self.detail.len()),
        }
    }
}

/// Why a domain could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DomainError {
    /// A system call failed.
    #[error("{what}: {errno}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// No socket can be made at the path.
    #[error("no socket can be made at {path}: {what}: {errno}{}", place_remedy(*errno))]
    Place {
        /// The path.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// Another domain serves this path, or it is not a socket.
    #[error("{0} is served by a living process, or is not a socket; stop it or take another path")]
    PathInUse(PathBuf),
    /// A socket path does not fit the kernel's 107 bytes.
    #[error("{0} is too long for a socket path (107 bytes)")]
    PathTooLong(PathBuf),
    /// What was asked for makes no sense together.
    #[error("configuration: {0}")]
    Config(String),
}

/// What to do about what a process, here or there, has not enough of.
fn shortage_remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::EMFILE => {
            "; that process has no descriptor left: raise its `RLIMIT_NOFILE`, or have it close some"
        }
        Errno::ENFILE => "; the machine has no open file left: raise `fs.file-max`, or close some",
        Errno::ENOMEM => {
            "; that process has no memory left, or no mapping: free some, or raise `vm.max_map_count`"
        }
        _ => "",
    }
}

/// What to do where no socket can be made.
fn place_remedy(errno: Errno) -> &'static str {
    use peregrine_sys::rustix::io::Errno as E;
    match E::from_raw_os_error(errno.0) {
        E::NOENT | E::NOTDIR => "; make its directory first, or take another path",
        E::ACCESS | E::PERM | E::ROFS => "; take a path in a directory that this user may write",
        _ => "",
    }
}

pub(crate) fn system(what: &'static str) -> impl Fn(peregrine_sys::rustix::io::Errno) -> CallError {
    move |e| CallError::System { what, errno: Errno(e.raw_os_error()) }
}

pub(crate) fn setup(what: &'static str) -> impl Fn(peregrine_sys::rustix::io::Errno) -> DomainError {
    move |e| DomainError::System { what, errno: Errno(e.raw_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_say_what_to_do() {
        let too_large = |what| CallError::TooLarge { what, asked_bytes: 5, limit_bytes: 2 }.to_string();
        assert_eq!(
            too_large("result"),
            "result: 5 bytes asked for, and the limit is 2; declare more room for it in the call (`reply_bytes`, `#[out(bytes = N)]` of an interface), or raise the domain's `Limits::argument_bytes`"
        );
        assert!(too_large("calls in flight").starts_with("calls in flight: 5 asked for"));
        let confused = CallError::Callee(Failure::arguments()).to_string();
        assert!(confused.contains("other arguments than it expects"), "{confused}");
        let unsayable = CallError::Callee(Failure::new(Failure::REPLY, *b"a file")).to_string();
        assert_eq!(unsayable, "the callee's reply can't be passed: a file");
        let own = CallError::Callee(Failure::new(7, *b"why")).to_string();
        assert_eq!(own, "the callee failed with code 7, 3 bytes of detail");
    }
}
