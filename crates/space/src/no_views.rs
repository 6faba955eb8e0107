//! For those who want the records alone.

use crate::member::{MemberId, MemberSet};
use crate::mmu::{Change, Contents, Frames, Mmu, SpaceId};
use core::convert::Infallible;
use peregrine_base::{PageRange, Protection};

/// An [`Mmu`] without views, and [`Frames`] that hands out none: the address space as a concurrent map of what is where. Sets of
/// members are kept as ever. Waiting is spinning.
///
/// ```
/// use peregrine_space::model::HeapArena;
/// use peregrine_space::{AddressSpace, Backing, Mapping, NoViews, PageCount, Place, Protection, Sizes, VirtAddr};
///
/// let arena = HeapArena::new(&Sizes { members: 1, spaces: 1, nodes: 50, regions: 1, frames: 0 });
/// let mut me = arena.spaces().join()?;
/// let space = AddressSpace::create(&mut me, NoViews, NoViews)?;
/// let mine = Mapping { backing: Backing::Home { object: 7 }, rights: Protection::ReadWrite };
/// let addr = VirtAddr::new(0x10_0000);
/// space.map(&mut me, Place::FixedNoReplace(addr), PageCount::new(300), &mine)?;
/// assert_eq!(space.query(&mut me, addr).map(|entry| entry.backing), Some(mine.backing));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NoViews;

impl Mmu for NoViews {
    type Error = Infallible;

    #[inline]
    fn fill(
        &self,
        _: SpaceId,
        _: MemberId,
        _: PageRange,
        _: Contents,
        _: Protection,
    ) -> Result<(), Infallible> {
        Ok(())
    }

    #[inline]
    fn shootdown(&self, _: SpaceId, _: MemberId, _: PageRange, _: &MemberSet, _: Change) {}

    fn wait(&self, _: MemberId, _: MemberId) {}
}

impl Frames for NoViews {}
