//! The radix array: one record a page, compressed.
//!
//! ```text
//!  level 5     root ── 64 slots, each spans 64^5 pages
//!                        │ child
//!  level 4     node ── 64 slots …
//!     …                  │
//!  level 0     node ── 64 slots, each one page          a node is 64 lines: one page
//! ```
//!
//! **Folding.** A slot at any level can hold a record for all its pages, or none, so a mapping of a terabyte is a few slots.
//! The first page that differs unfolds its slot: [`change`] builds a child that inherits record and lock, and links it.
//!
//! **Range locks** ([`lock`]) take the bottom-most slots there are, from left to right, and so never wait in a circle.
//!
//! **Lookups** ([`look`]) take no lock and write nothing.
//!
//! **Collapse** ([`collapse`]). A node counts its used slots, and the locks held in it, with Refcache; its parent's link is
//! weak. Two epochs after the last one went, the link is cut and, two more epochs later, the node is free. Whoever comes through
//! the link in between, to lock something, revives the node.
//!
//! Six bits a level where the paper has nine: a slot is a whole line here (no two members share one by being neighbours),
//! and this keeps a node one page. The record lies in the slot, at every level: nothing is allocated for a folded record, so
//! nothing of it can be freed under a reader, which the published code does.

pub(crate) mod change;
pub(crate) mod collapse;
pub(crate) mod lock;
pub(crate) mod look;
pub(crate) mod slot;

use crate::spaces::Spaces;
use core::ops::Range;
use slot::Slot;

/// Binary logarithm of a node's slots. Under a model checker, the smallest tree that has both kinds of node.
pub(crate) const BITS: u32 = if cfg!(peregrine_loom) { 1 } else { 6 };
pub(crate) const FANOUT: usize = 1 << BITS;
pub(crate) const LEVELS: u32 = if cfg!(peregrine_loom) { 2 } else { 6 };
/// Pages that a tree spans.
pub(crate) const PAGES: u64 = 1 << (BITS * LEVELS);

/// Pages that a slot of a level spans.
pub(crate) const fn span(level: u32) -> u64 {
    1 << (BITS * level)
}

/// A node.
#[derive(Debug)]
#[repr(C)]
#[cfg_attr(not(peregrine_loom), repr(align(4096)))]
pub(crate) struct Node {
    pub(crate) slots: [Slot; FANOUT],
}

#[cfg(not(peregrine_loom))]
const _: () = assert!(size_of::<Node>() == 4096);

impl Node {
    #[cfg_attr(not(peregrine_loom), allow(dead_code, reason = "elsewhere nodes lie in zeroed memory"))]
    pub(crate) fn new() -> Self {
        Self { slots: core::array::from_fn(|_| Slot::new()) }
    }
}

/// A node's place: which pages it stands for.
#[derive(Clone, Copy)]
pub(crate) struct At {
    pub(crate) node: u32,
    pub(crate) level: u32,
    pub(crate) base: u64,
}

impl At {
    /// The slots that meet these pages.
    #[inline]
    pub(crate) fn slots(self, pages: &Range<u64>) -> Range<usize> {
        // Shifts: this is asked at every level of every walk, and a division costs as much as the rest.
        let shift = BITS * self.level;
        let first = pages.start.saturating_sub(self.base) >> shift;
        let last = (pages.end.saturating_sub(self.base) + (span(self.level) - 1)) >> shift;
        (first as usize).min(FANOUT)..(last as usize).min(FANOUT)
    }

    /// The pages of a slot.
    #[inline]
    pub(crate) const fn pages_of(self, slot: usize) -> Range<u64> {
        let start = self.base + slot as u64 * span(self.level);
        start..start + span(self.level)
    }

    pub(crate) const fn child(self, slot: usize, node: u32) -> Self {
        Self { node, level: self.level - 1, base: self.pages_of(slot).start }
    }
}

/// A terminal slot that a walk came to.
#[derive(Clone, Copy)]
pub(crate) struct Spot<'m> {
    pub(crate) at: At,
    pub(crate) index: usize,
    pub(crate) slot: &'m Slot,
}

impl Spot<'_> {
    pub(crate) const fn pages(&self) -> Range<u64> {
        self.at.pages_of(self.index)
    }
}

/// One address space's tree.
#[derive(Clone, Copy)]
pub(crate) struct Tree<'a, 'm> {
    pub(crate) spaces: &'a Spaces<'m>,
    pub(crate) root: u32,
}

impl<'m> Tree<'_, 'm> {
    /// The root: where a walk begins that holds no lock.
    pub(crate) const fn top(&self) -> At {
        At { node: self.root, level: LEVELS - 1, base: 0 }
    }

    #[inline]
    pub(crate) fn slot(&self, at: At, index: usize) -> &'m Slot {
        &self.spaces.nodes[at.node as usize].slots[index]
    }
}
