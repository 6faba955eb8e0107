//! Why a mapping could not be made or changed, and what to do about the kernel's answers.

use peregrine_base::{PageCount, PageRange};
use peregrine_sys::raw::Errno;

/// A mapping could not be made or changed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The kernel refused.
    #[error("{call} of {pages} pages: {errno}; {remedy}", pages = pages.get())]
    Kernel {
        /// Which call.
        call: &'static str,
        /// How many pages.
        pages: PageCount,
        /// What it answered.
        errno: Errno,
        /// What would help.
        remedy: &'static str,
    },
    /// Frames of private memory have no second address.
    #[error(
        "{range:?} is private anonymous memory, whose frames have no name: alias needs a memfd or a file"
    )]
    Private {
        /// The mapping.
        range: PageRange,
    },
    /// The part asked for does not lie in the mapping.
    #[error("{asked:?} does not lie in the mapping {range:?}")]
    Outside {
        /// What was asked for.
        asked: PageRange,
        /// The mapping.
        range: PageRange,
    },
    /// Part of a page of the pool.
    #[error("{} pages are not whole pages of the pool, each of which is 512", pages.get())]
    Pool {
        /// How many were asked for.
        pages: PageCount,
    },
    /// Evicting private anonymous memory would lose it.
    #[error(
        "{range:?} is private anonymous memory: evicting it would lose its contents; use `discard` to mean that"
    )]
    WouldLose {
        /// The part asked for.
        range: PageRange,
    },
}

pub(crate) fn remedy_for(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOMEM => {
            "raise sysctl vm.max_map_count or the memory limit, or use a mechanism that splits no mapping (userfaultfd, guards)"
        }
        Errno::EACCES | Errno::EPERM => "open the file for what the mapping needs, unsealed",
        Errno::EMFILE | Errno::ENFILE => "raise the limit of open files (ulimit -n)",
        Errno::ENODEV | Errno::ENOENT => "that kind of file or page is not configured",
        Errno::EBUSY => "another userfaultfd owns the range: drop its region or tracker first",
        _ => "see the call's manual page",
    }
}
