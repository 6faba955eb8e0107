//! One host of Peregrine: a World of threads, and the processes that run them.
//!
//! A *supervisor* (the process that was started) forks a *zygote*, the zygote forks *nodes*; nodes run threads, whose slots lie
//! in memory that all of them map at the same addresses. See ARCHITECTURE.md for the whole picture.

mod address_space;
mod archive;
mod arena;
mod blocks;
mod carried;
mod channel;
mod config;
mod context;
mod contract;
mod control;
mod dirty;
mod dispositions;
mod ends;
mod entry;
mod error;
mod frames;
mod fresh;
mod join;
#[cfg(feature = "killpoints")]
pub mod killpoint;
#[cfg(not(feature = "killpoints"))]
mod killpoint;
mod local;
mod lock;
mod memory;
mod models;
mod node;
mod output;
mod packed;
mod records;
pub mod costs {
    #![doc = include_str!("../docs/costs.md")]
}
pub mod region;
mod rendezvous;
mod room;
mod sched;
mod shadow;
mod spawn;
mod status;
mod supervisor;
mod tables;
mod thread;
mod transit;
mod windows;
mod zygote;

pub use address_space::{in_view_of, unmapped_from};
pub use arena::{Limited, OutOfMemory};
pub use carried::{TrustedDomain, TrustedDomainError};
pub use channel::{Receiver, RecvError, SendError, Sender, channel};
pub use config::{Config, ConfigError};
pub use context::{MoveError, checkpoint, current, migrate_to, node_count, node_id, sleep, yield_now};
pub use contract::{Contract, ContractError, build_id, fix_addresses, is_fixed};
pub use entry::{Packing, Tally, packing, run_with, tally, window_costs};
pub use error::{JoinError, SpawnError};
pub use fresh::{FreshCallError, Loan, Portal};
pub use memory::MemoryError;
pub use peregrine_store::{BuildId, Sequence, Store, StoreError};
pub use peregrine_thread::stack_kind::StackKind;
pub use peregrine_thread::window::WindowsError;
pub use rendezvous::{RendezvousError, connect_all};
pub use shadow::Misfit;
pub use spawn::{Builder, JoinHandle, spawn};
pub use status::{NodeStatus, Reply, Request, ThreadStatus, WorldStatus};
pub use supervisor::{
    DurableError, Ended, OutputError, Resumed, Stats, WorldError, median_ms, percentile_ms, resume, run,
};
pub use thread::ThreadId;
pub use zygote::ZygoteError;

/// A node or a thread has something for the supervisor.
pub(crate) const SIG_NOTIFY: i32 = peregrine_sys::signal::number::RT_BASE + 4;
