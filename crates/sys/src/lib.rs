//! Every Linux call that the Peregrine crates make, typed.
//!
//! Two styles live here. What runs in ordinary code is re-exported from `rustix` (as [`rustix`]). What runs in
//! a signal handler, on a node's own stack or between two threads ([`raw`] and the modules built on it, such as
//! [`uffd::UffdRef`], [`pagemap::PagemapRef`], [`guard`], [`mem`], [`fault`], [`io`]) touches no thread-local, no
//! static and no allocator, for at that point all three belong to somebody else.
//!
//! [`capabilities`] finds out what this kernel lets this process do.

pub mod capabilities;
pub mod cpu;
pub mod descriptors;
pub mod elsewhere;
mod errno;
pub mod fault;
pub mod futex;
pub mod guard;
pub mod io;
pub mod mem;
pub mod memfd;
pub mod other;
pub mod pagemap;
pub mod peer;
pub mod process;
pub mod random;
pub mod raw;
pub mod signal;
#[cfg(target_arch = "x86_64")]
pub mod step;
pub mod timer;
#[cfg(target_arch = "x86_64")]
pub mod trace;
pub mod uffd;

pub use linux_raw_sys;
pub use rustix;
