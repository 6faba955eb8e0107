#![doc = include_str!("../README.md")]
#![no_std]

#[cfg(any(test, feature = "std"))]
extern crate std;

mod member;
mod mmu;
mod record;

pub use member::{Generation, MAX_MEMBERS, MemberId, MemberSet, SharedSet};
pub use mmu::{Change, Contents, FrameId, Frames, Mmu, SpaceId};
pub use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
pub use record::{Access, Backing, Entry, Mapping, Place};
