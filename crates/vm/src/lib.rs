#![doc = include_str!("../README.md")]

pub mod alias;
pub mod capabilities {
    //! What this kernel lets this process do, found by asking it.
    pub use peregrine_sys::capabilities::{Capabilities, Capability, Lack, Simulate, UnknownCapability};
}
mod claims;
pub mod costs {
    #![doc = include_str!("../docs/costs.md")]
}
pub mod dirty;
pub mod guard;
pub mod io {
    //! System calls as trap code may make them: no `errno`, no allocation.
    pub use peregrine_sys::io::{complain, read_at, read_at_ptr, write_at_ptr, yield_now};
}
mod mapping;
mod process;
pub mod region;
pub mod semantics {
    #![doc = include_str!("../docs/semantics.md")]
}
pub mod sys_errno {
    //! The kernel's error numbers, as this crate's errors carry them.
    pub use peregrine_sys::raw::Errno;
}
pub mod trap;
mod volatile;

pub use capabilities::{Capabilities, Capability};
pub use claims::Claimed;
pub use dirty::{DirtyMechanism, ObjectDirty, TrackError, Tracker, UnionTracker, ViewDirty};
pub use mapping::{Backing, MapError, Mapping, PageKind, PrivateMemory};
pub use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
pub use process::Forked;
pub use region::{BuildError, Inline, InlineHandler, Mechanism, PagerHandler, Region, RegionError, Trap};
pub use trap::{Access, AltStack, Decision};
pub use volatile::{OutOfBounds, Volatile};
