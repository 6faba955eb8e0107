#![doc = include_str!("../README.md")]
#![no_std]

#[cfg(any(test, feature = "std"))]
extern crate std;

pub mod costs {
    #![doc = include_str!("../docs/costs.md")]
}
mod desk;
mod holder;
mod intent;
mod keeper;
pub mod embedding {
    #![doc = include_str!("../docs/embedding.md")]
}
mod member;
mod mmu;
#[cfg(feature = "model")]
pub mod model;
mod no_views;
#[cfg(peregrine_loom)]
mod parts;
mod pool;
#[cfg(feature = "process")]
pub mod process;
mod radix;
mod record;
pub mod refcache;
mod sizes;
mod space;
mod spaces;
mod step;

pub use desk::{Member, NoPlace};
pub use holder::{Holder, OperationKind};
pub use member::{Generation, MAX_MEMBERS, MemberId, MemberSet, SharedSet};
pub use mmu::{Change, Contents, FrameId, Frames, Mmu, SpaceId};
pub use no_views::NoViews;
pub use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
pub use record::{Access, Backing, Entry, Mapping, Place};
pub use sizes::{ArenaError, Sizes};
pub use space::{
    AddressSpace, CreateError, Entries, FaultError, Filled, ForkError, MapAdmitError, MapError, ProtectError,
    Recovered, SPACE_END, Stopped, UnmapError,
};
pub use spaces::{Arena, Spaces};
pub use step::{Hook, Step};
