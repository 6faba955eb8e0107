//! Every Linux call that the Peregrine crates make, typed.
//!
//! Two styles live here. What runs in ordinary code is re-exported from `rustix` (as [`rustix`]). What runs in
//! a signal handler, on a node's own stack or between two threads ([`raw`], [`uffd::UffdRef`],
//! [`pagemap::PagemapRef`], [`guard`], [`mem`]) touches no thread-local, no static and no allocator, for at that
//! point all three belong to somebody else.
//!
//! [`capabilities`] finds out what this kernel lets this process do.

pub mod capabilities;
mod errno;
pub mod fault;
pub mod guard;
pub mod io;
pub mod mem;
pub mod memfd;
pub mod pagemap;
pub mod raw;
pub mod uffd;

pub use linux_raw_sys;
pub use rustix;
