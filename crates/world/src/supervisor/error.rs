//! Why a World could not be made or had to end.

use super::{DurableError, OutputError};
use crate::contract::ContractError;
use crate::control::MAX_NODES;
use crate::memory::MemoryError;
use crate::zygote::ZygoteError;
use peregrine_sys::descriptors::{LEAST_LIMIT, USUAL_LIMIT};
use peregrine_sys::rustix;
use peregrine_thread::template::TemplateError;
use peregrine_thread::window::WindowsError;

/// Why a World could not be made or had to end.
#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    /// No memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The program can't be taken apart.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The settings of the windows can't be.
    #[error(transparent)]
    Windows(#[from] WindowsError),
    /// No processes.
    #[error(transparent)]
    Zygote(#[from] ZygoteError),
    /// Addresses can't be fixed.
    #[error(transparent)]
    Contract(#[from] ContractError),
    /// The store can't be used.
    #[error(transparent)]
    Durable(#[from] DurableError),
    /// The file named for output can't be used.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The store refuses any further image.
    #[error("the World was stopped, for its store can't go on: {0}")]
    Store(peregrine_store::StoreError),
    /// So few descriptors are allowed that the program's can't be told from the runtime's.
    #[error(
        "the limit on open files is {hard}, hard, and a World needs {LEAST_LIMIT}, to tell its own from the threads' when it takes these back: raise it (ulimit -Hn {USUAL_LIMIT}; of a service LimitNOFILE={USUAL_LIMIT}, of a container --ulimit nofile={USUAL_LIMIT})"
    )]
    Descriptors {
        /// The hard limit (`RLIMIT_NOFILE`).
        hard: u64,
    },
    /// `main` could not be started.
    #[error("cannot start the main thread: {0}")]
    Main(#[from] crate::error::SpawnError),
    /// The kernel refused something that everything rests on.
    #[error("{what}: {source}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// `main` has ended, and what keeps a node from pausing can't be ended either.
    #[error(
        "main has ended, but a node can't be paused and the end can't be stored: image {image} is the last; resume it"
    )]
    Blocked {
        /// The newest image.
        image: u64,
    },
    /// More threads crash their nodes before an image holds them than can be told apart from others.
    #[error(
        "more than {most} threads brought down every node that ran them before an image held them, the last because {last}; take images more often (PEREGRINE_IMAGE_INTERVAL), so that those threads can be left out one by one"
    )]
    TooManyCrash {
        /// How many can be left out.
        most: usize,
        /// What the last one did.
        last: String,
    },
    /// More nodes and domains than a World can have.
    #[error(
        "{nodes} nodes and the {domains} domains of the image are more than the {MAX_NODES} that a World can have together: set PEREGRINE_NODES lower"
    )]
    Nodes {
        /// Nodes asked for.
        nodes: u32,
        /// Domains that the image has.
        domains: u32,
    },
    /// Nodes die faster than they can be replaced.
    #[error("{deaths} nodes died before one could run: {last}")]
    CannotStart {
        /// How many.
        deaths: u32,
        /// How the last one ended.
        last: String,
    },
}

pub(super) fn kernel(what: &'static str) -> impl Fn(rustix::io::Errno) -> WorldError {
    move |e| WorldError::Kernel { what, source: e.into() }
}
