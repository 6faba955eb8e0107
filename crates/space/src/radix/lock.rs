//! Range locks.
//!
//! Taken at the bottom-most slots there are, from left to right, the range rounded out to slots. A lock is won by one
//! compare-and-swap on a word that also says that the slot is terminal, so nothing need be checked again afterwards but this: that
//! the member was in the epoch all the way down. If it was not (it was stopped and the others went on), the node may
//! have been used anew; the lock just taken is undone and the operation begins again.
//!
//! **Where walks begin.** The way down to the lowest node that spans the range is gone once, when the lock is taken; all
//! later walks of the operation begin there ([`Tree::lock`] tells where). It can't go meanwhile: a lock in it or under it is a use.
//!
//! **Where the last walks ended.** A member often works where it did before, so it notes the node of single pages that its walk came
//! to, and the state of its part in the epoch before the walk. As long as that is the same, the member has flushed nothing
//! since and was not expelled; so the epoch has moved on by one at most, the node's link, whose mark the walk took away,
//! can't have been cut, and the next operation there begins at the node. It notes a few, for who works at its own places and at a
//! neighbour's in turn.
//!
//! Each lock held in a node counts as one use of it, so a node in which somebody holds a lock does not collapse, however long the
//! holder is stopped. The count goes up before the slot is locked and down after it is unlocked.
//!
//! Waiting ends when the holder unlocks, when a recovery asks everybody to stand back, or when the waiter itself fell
//! out of the epoch; in the latter two cases what was locked so far is released by the caller.

use super::slot::{Owner, Shape, Slot, SlotWord};
use super::{At, BITS, FANOUT, Spot, Tree};
use crate::refcache::{Handle, Last, ObjectId};
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

/// Why a free slot's lock was not taken.
enum Lost {
    /// Somebody was faster.
    Race,
    /// The member has fallen out of the epoch.
    Outside,
}

impl<'m> Tree<'_, 'm> {
    /// Locks the slots that meet `pages`, and tells the lowest node that spans them: it stays as long as the locks.
    #[inline]
    pub(crate) fn lock(&self, attempt: &Attempt<'_>, pages: &Range<u64>) -> Result<At, Interrupted> {
        let Some(at) = self.revisit(attempt.me, pages) else {
            let at = self.descend(attempt.me, pages);
            return self.lock_node(attempt, at, pages).map(|()| at);
        };
        self.lock_node(attempt, at, pages).map(|()| at)
    }

    /// Takes the lock of a free slot, a use of whose node is counted; tells where the slot is then.
    #[inline]
    fn win(
        &self,
        me: &Handle,
        by: Owner,
        turn: u16,
        at: At,
        slot: Slot<'m>,
        word: SlotWord,
    ) -> Result<Slot<'m>, Lost> {
        if !slot.exchange(word, word.locked(by)) {
            return Err(Lost::Race);
        }
        if !self.spaces.refcache().is_still_in(me, turn) {
            // The slot may not be what it was: if it still shows this lock, it is ours to remove.
            slot.exchange(word.locked(by), word);
            return Err(Lost::Outside);
        }
        me.step(Step::Locked);
        Ok(self.keep_apart(me, at, slot, slot.value().is_mapped()))
    }

    /// Where one of the member's last walks ended, if that node spans `pages`. Whether it still holds is not asked.
    #[inline]
    pub(super) fn last_at(&self, me: &Handle, pages: &Range<u64>) -> Option<Last> {
        me.last.iter().map(core::cell::Cell::get).find(|last| {
            last.root == self.root && pages.start >= last.base && pages.end <= last.base + FANOUT as u64
        })
    }

    /// The node of single pages to which one of the member's last walks came, if that still holds and spans `pages`.
    #[inline]
    fn revisit(&self, me: &Handle, pages: &Range<u64>) -> Option<At> {
        let last = self.last_at(me, pages)?;
        let holds = last.moment == self.spaces.refcache().moment(me);
        holds.then_some(At { node: last.node, level: 0, base: last.base })
    }

    /// The lowest node that spans `pages`, reviving what it comes through.
    fn descend(&self, me: &Handle, pages: &Range<u64>) -> At {
        let moment = self.spaces.refcache().moment(me);
        let At { mut node, mut level, .. } = self.top();
        // Where this has no bit above a level's, one slot of that level spans all pages.
        let differ = pages.start ^ (pages.end - 1);
        loop {
            let shift = BITS * level;
            let found = At { node, level, base: pages.start >> (shift + BITS) << (shift + BITS) };
            if differ >> shift != 0 || level == 0 {
                if level == 0 {
                    me.note_walk(Last { root: self.root, node, base: found.base, moment });
                }
                return found;
            }
            let (slot, word) = self.slot(found, (pages.start >> shift) as usize % FANOUT);
            match word.shape() {
                Shape::Terminal(_) => return found,
                Shape::Child { node: child, dying } => {
                    if dying && !slot.exchange(word, SlotWord::child(child, false)) {
                        continue;
                    }
                    (node, level) = (child, level - 1);
                }
            }
        }
    }

    fn lock_node(&self, attempt: &Attempt<'_>, at: At, pages: &Range<u64>) -> Result<(), Interrupted> {
        let slots = at.slots(pages);
        let end = slots.end;
        // Uses of this node: taken before its first slot is locked, for all slots that may follow; what is too much goes at the end.
        let (mut pinned, mut locked) = (0, 0);
        let mut result = Ok(());
        'slots: for index in slots {
            let interrupted = Err(Interrupted { locked_up_to: at.pages_of(index).start });
            loop {
                let (slot, word) = self.slot(at, index);
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
                        match self.win(attempt.me, attempt.by, attempt.turn, at, slot, word) {
                            Err(Lost::Race) => continue,
                            Err(Lost::Outside) => {
                                result = interrupted;
                                break 'slots;
                            }
                            Ok(_) => locked += 1,
                        }
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

    /// Unlocks what `by` has locked of the slots that meet `pages`, from `at` on. With `became_used`, each of them held nothing
    /// before and holds a record now, which was not counted: the lock's use of the node becomes the record's.
    pub(crate) fn unlock(&self, me: &Handle, by: Owner, at: At, pages: &Range<u64>, became_used: bool) {
        let mut unlocked = 0;
        for index in at.slots(pages) {
            let (slot, word) = self.slot(at, index);
            match word.shape() {
                Shape::Child { node, .. } => {
                    self.unlock(me, by, at.child(index, node), pages, became_used);
                }
                Shape::Terminal(Some(owner)) if owner == by => {
                    slot.set_word(word.unlocked());
                    unlocked += 1;
                    me.step(Step::Unlocked);
                }
                Shape::Terminal(_) => {}
            }
        }
        if unlocked != 0 && !became_used {
            self.count(me, at.node, -unlocked);
        }
    }

    /// Calls `f` for each slot that meets `pages` and that `by` holds, from left to right, from `at` on.
    #[inline]
    pub(crate) fn each_locked(&self, by: Owner, at: At, pages: &Range<u64>, f: &mut impl FnMut(Spot<'m>)) {
        if at.level == 0 {
            let key = SlotWord::FREE.locked(by);
            for index in at.pages_among(pages) {
                let (slot, word) = self.slot(at, index);
                if word.is_locked_with(key) {
                    f(Spot { at, index, slot });
                }
            }
            return;
        }
        for index in at.slots(pages) {
            let (slot, word) = self.slot(at, index);
            match word.shape() {
                Shape::Child { node, .. } => self.each_below(by, at.child(index, node), pages, f),
                Shape::Terminal(Some(owner)) if owner == by => f(Spot { at, index, slot }),
                Shape::Terminal(_) => {}
            }
        }
    }

    fn each_below(&self, by: Owner, at: At, pages: &Range<u64>, f: &mut dyn FnMut(Spot<'m>)) {
        for index in at.slots(pages) {
            let (slot, word) = self.slot(at, index);
            match word.shape() {
                Shape::Child { node, .. } => self.each_below(by, at.child(index, node), pages, f),
                Shape::Terminal(Some(owner)) if owner == by => f(Spot { at, index, slot }),
                Shape::Terminal(_) => {}
            }
        }
    }

    #[inline]
    pub(crate) fn count(&self, me: &Handle, node: u32, delta: i32) {
        self.spaces.refcache().add(me, self.spaces, ObjectId(node), delta);
    }
}
