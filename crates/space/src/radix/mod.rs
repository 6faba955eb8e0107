//! The radix array: one record a page, compressed.
//!
//! ```text
//!  level 5     root ── 64 slots, each spans 64^5 pages
//!                        │ child
//!  level 4     node ── 64 slots …
//!     …                  │
//!  level 0     node ── 64 slots, each one page          a node is 17 lines: its head and 64 cells of 16 bytes
//! ```
//!
//! **Folding.** A slot at any level can hold a record for all its pages, or none, so a mapping of a terabyte is a few slots.
//! The first page that differs unfolds its slot: [`change`] builds a child that inherits record and lock, and links it.
//!
//! **Range locks** ([`lock`]) take the bottom-most slots there are, from left to right, and so never wait in a circle.
//!
//! **Runs** ([`run`]) of pages where the member worked before are locked all at once or not at all.
//!
//! **Lookups** ([`look`]) take no lock and write nothing.
//!
//! **Collapse** ([`collapse`]). A node counts its used slots, and the locks held in it, with Refcache; its parent's link is
//! weak. Two epochs after the last one went, the link is cut and, two more epochs later, the node is free. Whoever comes through
//! the link in between, to lock something, revives the node.
//!
//! **Apart.** Slots are packed as long as one member works with them, and get a line each when a second one comes
//! ([`slot`], [`Tree::keep_apart`]): this is the expansion that the paper allows to conflict, once a slot.
//!
//! Six bits a level where the paper has nine: most nodes are sparse, and a page that is touched alone costs one of each level. The
//! record lies in the slot, at every level: nothing is allocated for a folded record, so nothing of it can be freed under a
//! reader, which the published code does.

pub(crate) mod change;
pub(crate) mod collapse;
pub(crate) mod lock;
pub(crate) mod look;
pub(crate) mod run;
pub(crate) mod slot;

use crate::member::{MemberId, SharedSet};
use crate::refcache::Handle;
use crate::spaces::Spaces;
use crate::step::Step;
use core::ops::Range;
use peregrine_base::sync::{AtomicU32, Ordering};
use slot::{Cell, Slot, SlotWord};

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
pub(crate) struct Node {
    pub(crate) head: Head,
    pub(crate) cells: [Cell; FANOUT],
}

/// What all cells of a node have in common: read at every lock, written when the node is made and when a second member comes.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Head {
    /// The one member that works in the node: its number + 1; 0: none yet; [`SEVERAL`].
    worker: AtomicU32,
    /// See [`slot`].
    pub(crate) inherited: SharedSet,
}

const SEVERAL: u32 = u32::MAX;

#[cfg(not(peregrine_loom))]
const _: () = assert!(size_of::<Node>() == 17 * 64);

impl Head {
    /// By the maker of the node, before it is linked.
    pub(crate) fn make(&self, worker: Option<MemberId>, inherited: &crate::MemberSet) {
        self.worker.store(worker.map_or(0, |m| m.index() as u32 + 1), Ordering::Relaxed);
        self.inherited.store(inherited);
    }

    /// Whether nobody but `member` works in the node. A second one that asks makes it "several" for good. Who acts on an answer
    /// that is no longer true shares a line once more, and no harm is done.
    #[inline]
    pub(crate) fn is_alone(&self, member: MemberId) -> bool {
        let mine = member.index() as u32 + 1;
        match self.worker.load(Ordering::Relaxed) {
            worker if worker == mine => true,
            SEVERAL => false,
            0 => self.worker.compare_exchange(0, mine, Ordering::Relaxed, Ordering::Relaxed).is_ok(),
            _ => {
                self.worker.store(SEVERAL, Ordering::Relaxed);
                false
            }
        }
    }

    /// `member` looks at a record of the node: from now on who writes it keeps it apart.
    #[inline]
    pub(crate) fn is_looked_at(&self, member: MemberId) {
        let worker = self.worker.load(Ordering::Relaxed);
        if worker != 0 && worker != SEVERAL && worker != member.index() as u32 + 1 {
            self.worker.store(SEVERAL, Ordering::Relaxed);
        }
    }
}

impl Node {
    #[cfg_attr(not(peregrine_loom), allow(dead_code, reason = "elsewhere nodes lie in zeroed memory"))]
    pub(crate) fn new() -> Self {
        Self {
            head: Head { worker: AtomicU32::new(0), inherited: SharedSet::new() },
            cells: core::array::from_fn(|_| Cell::new()),
        }
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

    /// The slots of `pages` in a node of single pages that spans them.
    #[inline]
    pub(crate) const fn pages_among(self, pages: &Range<u64>) -> Range<usize> {
        (pages.start - self.base) as usize..(pages.end - self.base) as usize
    }

    /// The pages of a slot.
    #[inline]
    pub(crate) const fn pages_of(self, slot: usize) -> Range<u64> {
        let start = self.base + slot as u64 * span(self.level);
        start..start + span(self.level)
    }

    #[inline]
    pub(crate) const fn child(self, slot: usize, node: u32) -> Self {
        Self { node, level: self.level - 1, base: self.pages_of(slot).start }
    }
}

/// A terminal slot that a walk came to.
#[derive(Clone, Copy)]
pub(crate) struct Spot<'m> {
    pub(crate) at: At,
    pub(crate) index: usize,
    pub(crate) slot: Slot<'m>,
}

impl Spot<'_> {
    #[inline]
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
    #[inline]
    pub(crate) const fn top(&self) -> At {
        At { node: self.root, level: LEVELS - 1, base: 0 }
    }

    /// A slot and its word.
    #[inline]
    pub(crate) fn slot(&self, at: At, index: usize) -> (Slot<'m>, SlotWord) {
        self.spaces.slot(at.node, index)
    }

    /// Gives a slot that the member has locked a line of its own, if others may come near it: tells where it is then.
    ///
    /// In the nodes of single pages that is so once a second member works in the node. In those above, through which everybody
    /// passes, it is so as soon as the slot is `used`, that is, has a record.
    #[inline]
    pub(crate) fn keep_apart(&self, me: &Handle, at: At, slot: Slot<'m>, used: bool) -> Slot<'m> {
        let packed = slot.has_line()
            || if at.level == 0 { self.spaces.nodes[at.node as usize].head.is_alone(me.id()) } else { !used };
        if packed { slot } else { self.give_line(me, slot) }
    }

    #[cold]
    fn give_line(&self, me: &Handle, slot: Slot<'m>) -> Slot<'m> {
        let moved = slot.move_to(self.spaces.take_line(me), self.spaces.lines);
        me.step(Step::Expanded);
        moved
    }

    /// Enters the member among those that may have the pages of a locked slot in view.
    #[inline]
    pub(crate) fn admit(&self, me: &Handle, slot: Slot<'m>) {
        if !slot.admit(me.id()) {
            let admitted = self.give_line(me, slot).admit(me.id());
            debug_assert!(admitted, "a line takes any set");
        }
    }
}
