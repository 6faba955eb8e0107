//! A space on simulated cores, and the cycle of operations that each core does on pages of its own.

use super::base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use super::space::model::{HeapArena, ModelFrames, ModelMmu};
use super::space::{AddressSpace, Backing, Mapping, Member, Place, Sizes};

pub type Space<'a> = AddressSpace<'a, &'a ModelMmu, &'a ModelFrames>;
pub type Step = for<'a> fn(&Space<'a>, &mut Member<'a>, usize);

pub const ANONYMOUS: Mapping = Mapping { backing: Backing::Anonymous, rights: Protection::ReadWrite };

pub const fn addr(page: usize) -> VirtAddr {
    VirtAddr::new(page * PAGE_SIZE)
}

pub const fn range(page: usize, count: usize) -> PageRange {
    PageRange::new(addr(page), PageCount::new(count))
}

pub const fn sizes(cores: usize, frames: usize) -> Sizes {
    Sizes { members: cores, spaces: 1, nodes: nodes_for(cores), regions: 8, frames }
}

/// Nodes for a few pages of each core, wherever they are, and those of their earlier nodes that are under review.
pub const fn nodes_for(cores: usize) -> usize {
    cores * 40 + 1024
}

/// The operations of one page's life.
pub const CYCLE: &[(&str, Step)] = &[
    ("map", |s, m, page| {
        s.map(m, Place::Fixed(addr(page)), PageCount::new(1), &ANONYMOUS).expect("room in the arena");
    }),
    ("fault", |s, m, page| {
        s.store(m, addr(page), 1).expect("a frame");
    }),
    ("lookup", |s, m, page| {
        s.query(m, addr(page)).expect("mapped");
    }),
    ("protect", |s, m, page| s.protect(m, range(page, 1), Protection::Read).expect("mapped")),
    ("unmap", |s, m, page| s.unmap(m, range(page, 1)).expect("a range")),
];

/// An arena, and frames, for `cores` cores.
pub fn arena(cores: usize, frames: usize) -> (HeapArena, ModelFrames) {
    arena_of(&sizes(cores, frames))
}

pub fn arena_of(sizes: &Sizes) -> (HeapArena, ModelFrames) {
    (HeapArena::new(sizes), ModelFrames::new(sizes.members, sizes.frames))
}

/// Members for all cores, and the space.
pub fn open<'a>(
    arena: &'a HeapArena,
    mmu: &'a ModelMmu,
    frames: &'a ModelFrames,
    cores: usize,
) -> (Space<'a>, Vec<Member<'a>>) {
    let mut members: Vec<_> = (0..cores).map(|_| arena.spaces().join().expect("a place")).collect();
    let space = AddressSpace::create(&mut members[0], mmu, frames).expect("room in the arena");
    (space, members)
}
