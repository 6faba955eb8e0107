//! Range locks.
//!
//! Taken at the bottom-most slots there are, from left to right, the range rounded out to slots. A lock is won by one
//! compare-and-swap on a word that also says that the slot is terminal, so nothing need be checked again afterwards but this: that
//! the member was in the epoch all the way down. If it was not (it was stopped and the others went on), the node may
//! have been used anew; the lock just taken is undone and the operation begins again.
//!
//! Each lock held in a node counts as one use of it, so a node in which somebody holds a lock does not collapse, however long the
//! holder is stopped. The count goes up before the slot is locked and down after it is unlocked.
//!
//! Waiting ends when the holder unlocks, when a recovery asks everybody to stand back, or when the waiter itself fell
//! out of the epoch; in the latter two cases what was locked so far is released by the caller.

use super::slot::{Owner, Shape, Slot, SlotWord};
use super::{At, Spot, Tree};
use crate::refcache::{Handle, ObjectId};
use crate::step::Step;
use core::ops::Range;

/// The lock was not taken: all slots before this page are locked, none from it on.
pub(crate) struct Interrupted {
    pub(crate) locked_up_to: u64,
}

/// One attempt at a lock.
pub(crate) struct Attempt<'a> {
    pub(crate) me: &'a Handle,
    pub(crate) by: Owner,
    /// The turn in which the descent began.
    pub(crate) turn: u16,
    /// Serves shootdowns while `Owner` holds a slot; `false` to give up.
    pub(crate) wait: &'a dyn Fn(Owner) -> bool,
}

impl<'m> Tree<'m> {
    /// Locks the slots that meet `pages`.
    pub(crate) fn lock(&self, attempt: &Attempt<'_>, pages: &Range<u64>) -> Result<(), Interrupted> {
        self.lock_node(attempt, self.top(), pages)
    }

    fn lock_node(&self, attempt: &Attempt<'_>, at: At, pages: &Range<u64>) -> Result<(), Interrupted> {
        let slots = at.slots(pages);
        let end = slots.end;
        // Uses of this node: taken before its first slot is locked, for all slots that may follow; what is too much goes at the end.
        let (mut pinned, mut locked) = (0, 0);
        let mut result = Ok(());
        'slots: for index in slots {
            let slot = self.slot(at, index);
            let interrupted = Err(Interrupted { locked_up_to: at.pages_of(index).start });
            loop {
                let word = slot.word();
                match word.shape() {
                    Shape::Child { node, dying } => {
                        if dying && !slot.exchange(word, SlotWord::child(node, false)) {
                            continue;
                        }
                        if at.level == 0 {
                            // A node used anew, at another level: this member has fallen out of the epoch.
                            result = interrupted;
                            break 'slots;
                        }
                        result = self.lock_node(attempt, at.child(index, node), pages);
                        if result.is_err() {
                            break 'slots;
                        }
                        break;
                    }
                    Shape::Terminal(Some(owner)) => {
                        let in_epoch = self.spaces.refcache().is_still_in(attempt.me, attempt.turn);
                        if !in_epoch || !(attempt.wait)(owner) {
                            result = interrupted;
                            break 'slots;
                        }
                    }
                    Shape::Terminal(None) => {
                        if pinned == locked {
                            let more = (end - index) as i32;
                            self.count(attempt.me, at.node, more);
                            pinned += more;
                        }
                        if !slot.exchange(word, SlotWord::locked(attempt.by)) {
                            continue;
                        }
                        if !self.spaces.refcache().is_still_in(attempt.me, attempt.turn) {
                            release(slot, attempt.by);
                            result = interrupted;
                            break 'slots;
                        }
                        locked += 1;
                        attempt.me.step(Step::Locked);
                        break;
                    }
                }
            }
        }
        if pinned != locked {
            self.count(attempt.me, at.node, locked - pinned);
        }
        result
    }

    /// Unlocks what `by` has locked of the slots that meet `pages`.
    pub(crate) fn unlock(&self, me: &Handle, by: Owner, pages: &Range<u64>) {
        if !pages.is_empty() {
            self.unlock_node(me, by, self.top(), pages);
        }
    }

    fn unlock_node(&self, me: &Handle, by: Owner, at: At, pages: &Range<u64>) {
        let mut unlocked = 0;
        for index in at.slots(pages) {
            let slot = self.slot(at, index);
            match slot.word().shape() {
                Shape::Child { node, .. } => self.unlock_node(me, by, at.child(index, node), pages),
                Shape::Terminal(Some(owner)) if owner == by => {
                    slot.set_word(SlotWord::FREE);
                    unlocked += 1;
                    me.step(Step::Unlocked);
                }
                Shape::Terminal(_) => {}
            }
        }
        if unlocked != 0 {
            self.count(me, at.node, -unlocked);
        }
    }

    /// Calls `f` for each slot that meets `pages` and that `by` holds, from left to right.
    pub(crate) fn each_locked(&self, by: Owner, pages: &Range<u64>, f: &mut dyn FnMut(Spot<'m>)) {
        self.each_locked_in(by, self.top(), pages, f);
    }

    fn each_locked_in(&self, by: Owner, at: At, pages: &Range<u64>, f: &mut dyn FnMut(Spot<'m>)) {
        for index in at.slots(pages) {
            let slot = self.slot(at, index);
            match slot.word().shape() {
                Shape::Child { node, .. } => self.each_locked_in(by, at.child(index, node), pages, f),
                Shape::Terminal(Some(owner)) if owner == by => f(Spot { at, index, slot }),
                Shape::Terminal(_) => {}
            }
        }
    }

    pub(crate) fn count(&self, me: &Handle, node: u32, delta: i32) {
        self.spaces.refcache().add(me, &self.spaces, ObjectId(node), delta);
    }
}

/// Takes a lock back from a slot that may not be what it was: if it still shows this lock, it is ours to remove.
fn release(slot: &Slot, by: Owner) {
    slot.exchange(SlotWord::locked(by), SlotWord::FREE);
}
