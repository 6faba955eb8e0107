//! Runs: pages of one node of single pages to which one of the member's last walks came, taken and let go all at once.
//!
//! What members do most is done to such a run. It needs no walk, no waiting and no edges; each slot is visited once for each thing that must
//! have happened to all of them before the next.
//!
//! **Uses.** A lock is a use of its node, and so is a record. Slots that all hold a record when their locks are won need no further use: a
//! record changes under its lock alone, so it keeps the node there as long as the lock is held, and its use goes when both are gone. Only a
//! run that holds nothing is counted, before the first lock and for good, for it is about to hold records.

use super::slot::{Cell, Owner, Slot, SlotWord};
use super::{Head, Tree};
use crate::refcache::Handle;
use crate::step::Step;
use core::ops::Range;

/// Pages of one node.
pub(crate) struct Run<'m> {
    node: u32,
    head: &'m Head,
    cells: &'m [Cell],
    /// In which it was found: see [`Refcache::enter`](crate::refcache::Refcache::enter).
    turn: u16,
}

impl Run<'_> {
    /// The number of its node.
    #[inline]
    pub(crate) const fn node(&self) -> u32 {
        self.node
    }

    /// How many pages, as uses are counted.
    #[inline]
    pub(crate) const fn uses(&self) -> i32 {
        self.cells.len() as i32
    }
}

impl<'m> Tree<'_, 'm> {
    /// The run of `pages`, if they lie where one of the member's last walks ended, and that still holds.
    #[inline(always)]
    pub(crate) fn run(&self, me: &Handle, pages: &Range<u64>) -> Option<Run<'m>> {
        let last = self.last_at(me, pages)?;
        let refcache = self.spaces.refcache();
        let turn = refcache.enter(me);
        if last.moment != refcache.moment(me) {
            return None;
        }
        let node = &self.spaces.nodes[last.node as usize];
        let cells = node.cells.get((pages.start - last.base) as usize..(pages.end - last.base) as usize)?;
        Some(Run { node: last.node, head: &node.head, cells, turn })
    }

    /// A run's slots, from left to right.
    #[inline(always)]
    pub(crate) fn slots(&self, run: &Run<'m>) -> impl Iterator<Item = (Slot<'m>, SlotWord)> + use<'m> {
        let (inherited, lines) = (&run.head.inherited, self.spaces.lines);
        run.cells.iter().map(move |cell| Slot::find(cell, inherited, lines))
    }

    /// Locks a run if nobody has any of it, and all of it is mapped (`held`), or none. If not, nothing is locked. Unless `held`, its uses are
    /// counted.
    #[inline(always)]
    pub(crate) fn lock_run(&self, me: &Handle, by: Owner, run: &Run<'m>, held: bool) -> bool {
        for (slot, word) in self.slots(run) {
            let won = word.is_free() && slot.exchange(word, word.locked(by));
            if !won || slot.value().is_mapped() != held {
                self.give_up_run(by, run);
                return false;
            }
            me.step(Step::Locked);
        }
        if !self.spaces.refcache().is_still_in(me, run.turn) {
            self.give_up_run(by, run);
            return false;
        }
        if !run.head.is_alone(me.id()) {
            self.keep_run_apart(me, run);
        }
        true
    }

    #[cold]
    fn keep_run_apart(&self, me: &Handle, run: &Run<'m>) {
        for (slot, _) in self.slots(run) {
            if !slot.has_line() {
                self.give_line(me, slot);
            }
        }
    }

    /// Takes the locks back. The node may not be what it was: what still shows this operation's lock is ours to remove, and nothing else.
    #[cold]
    fn give_up_run(&self, by: Owner, run: &Run<'m>) {
        let key = SlotWord::FREE.locked(by);
        for (slot, word) in self.slots(run) {
            if word.is_locked_with(key) {
                slot.exchange(word, word.unlocked());
            }
        }
    }
}
