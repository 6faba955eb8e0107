//! Changing what is under the lock: records, and the fineness of the tree.
//!
//! Counts follow each change: a node counts its used slots, a region the slots that name it, a frame the records that
//! have it. References are taken before the word that holds them is written, and dropped after it is overwritten.

use super::slot::{Owner, Shape, Slot, SlotWord, view_of};
use super::{At, FANOUT, Spot, Tree};
use crate::intent::Doing;
use crate::record::Value;
use crate::refcache::{Handle, ObjectId};
use crate::step::Step;
use core::ops::Range;
use peregrine_base::sync::Ordering;

/// The pool of nodes is empty.
#[derive(Debug)]
pub(crate) struct NoNodes;

impl<'m> Tree<'_, 'm> {
    /// Writes a record into a slot that the member has locked.
    pub(crate) fn set(&self, me: &Handle, spot: &Spot<'m>, new: Value) {
        let used = self.replace(me, spot.slot, new, |used| {
            if used > 0 {
                self.count(me, spot.at.node, used);
            }
        });
        if used < 0 {
            self.count(me, spot.at.node, used);
        }
    }

    /// Writes a record into a locked slot and moves its references; `before` is told how many uses of the node that adds,
    /// before it does. Tells the same. The caller counts them; a lock held in the node counts meanwhile.
    #[inline]
    pub(crate) fn replace(&self, me: &Handle, slot: Slot<'m>, new: Value, before: impl FnOnce(i32)) -> i32 {
        let old = slot.value();
        if old == new {
            return 0;
        }
        let used = i32::from(new.is_mapped()) - i32::from(old.is_mapped());
        self.refer(me, new, 1);
        before(used);
        slot.set_value(new);
        me.step(Step::Changed);
        self.refer(me, old, -1);
        me.step(Step::Dropped);
        used
    }

    /// Does `doing` to the records of `pages` that `by` has locked, and unlocks each as it is done; then counts what a node's
    /// slots and locks have come to, all at once. `leaves` is told of each record before it is overwritten.
    ///
    /// By an operation that has committed: whoever finds a slot unlocked finds its new record, and whoever finds it
    /// locked asks the intent.
    #[inline]
    pub(crate) fn settle(
        &self,
        me: &Handle,
        by: Owner,
        at: At,
        pages: &Range<u64>,
        doing: Doing,
        leaves: &impl Fn(&Spot<'m>),
    ) {
        let mut uses = 0;
        if at.level == 0 && pages.start >= at.base && pages.end <= at.base + FANOUT as u64 {
            let key = SlotWord::FREE.locked(by);
            for index in at.pages_among(pages) {
                let (slot, word) = self.slot(at, index);
                if word.is_locked_with(key) {
                    uses += self.settle_slot(me, Spot { at, index, slot }, doing, true, leaves);
                }
            }
            if uses != 0 {
                self.count(me, at.node, uses);
            }
            return;
        }
        for index in at.slots(pages) {
            let (slot, word) = self.slot(at, index);
            match word.shape() {
                Shape::Child { node, .. } => {
                    self.settle_below(me, by, at.child(index, node), pages, doing, leaves);
                }
                Shape::Terminal(Some(owner)) if owner == by => {
                    let spot = Spot { at, index, slot };
                    let own = spot.pages();
                    // Else: rounded out over pages that are not mapped, and stay so.
                    let within = own.start >= pages.start && own.end <= pages.end;
                    uses += self.settle_slot(me, spot, doing, within, leaves);
                }
                Shape::Terminal(_) => {}
            }
        }
        if uses != 0 {
            self.count(me, at.node, uses);
        }
    }

    /// Settles one slot, and tells how many more uses of its node that makes.
    #[inline]
    fn settle_slot(
        &self,
        me: &Handle,
        mut spot: Spot<'m>,
        doing: Doing,
        changes: bool,
        leaves: &impl Fn(&Spot<'m>),
    ) -> i32 {
        let mut uses = -1;
        if changes {
            let new = doing.apply(spot.slot.value());
            spot.slot = self.keep_apart(me, spot.at, spot.slot, new.is_mapped());
            leaves(&spot);
            uses += self.replace(me, spot.slot, new, |_| ());
        }
        spot.slot.unlock();
        me.step(Step::Unlocked);
        uses
    }

    fn settle_below(
        &self,
        me: &Handle,
        by: Owner,
        at: At,
        pages: &Range<u64>,
        doing: Doing,
        leaves: &dyn Fn(&Spot<'m>),
    ) {
        self.settle(me, by, at, pages, doing, &leaves);
    }

    /// Does `doing` to the records of `pages` that `by` has locked, none of which is mapped: they become used, which is counted when
    /// they are unlocked ([`Tree::unlock`]). `me` is in the set of each.
    pub(crate) fn plant_all(&self, me: &Handle, by: Owner, at: At, pages: &Range<u64>, new: Value) {
        self.each_locked(by, at, pages, &mut |spot| {
            let slot = self.keep_apart(me, spot.at, spot.slot, true);
            slot.only(me.id());
            self.replace(me, slot, new, |_| ());
        });
    }

    /// Takes or drops the references of a record.
    #[inline]
    pub(crate) fn refer(&self, me: &Handle, value: Value, delta: i32) {
        let refcache = self.spaces.refcache();
        if let Some(region) = value.region() {
            refcache.add(me, self.spaces, self.spaces.region_id(region), delta);
        }
        if let Some(frame) = value.frame() {
            refcache.add(me, self.spaces, self.spaces.frame_id(frame), delta);
        }
    }

    /// Makes the slots that meet `pages` fine enough that none reaches beyond, if they hold a record or `all` of them
    /// are to get one. The locks beyond `pages` are released with that. `at` spans them.
    pub(crate) fn narrow(
        &self,
        me: &Handle,
        by: Owner,
        at: At,
        pages: &Range<u64>,
        all: bool,
    ) -> Result<(), NoNodes> {
        if at.level == 0 {
            // Nothing is finer than a page.
            return Ok(());
        }
        let slots = at.slots(pages);
        let Some(last) = slots.clone().next_back() else { return Ok(()) };
        // Only a slot at the edge can reach out, and only its child can be too coarse.
        self.narrow_slot(me, by, at, slots.start, pages, all)?;
        if last != slots.start {
            self.narrow_slot(me, by, at, last, pages, all)?;
        }
        Ok(())
    }

    fn narrow_slot(
        &self,
        me: &Handle,
        by: Owner,
        at: At,
        index: usize,
        pages: &Range<u64>,
        all: bool,
    ) -> Result<(), NoNodes> {
        let own = at.pages_of(index);
        if own.start >= pages.start && own.end <= pages.end {
            return Ok(());
        }
        let (slot, word) = self.slot(at, index);
        let node = match word.shape() {
            Shape::Child { node, .. } => node,
            Shape::Terminal(_) if !all && !slot.value().is_mapped() => return Ok(()),
            Shape::Terminal(_) => self.expand(me, by, &Spot { at, index, slot }, pages)?,
        };
        self.narrow(me, by, at.child(index, node), pages, all)
    }

    /// Puts a child in place of a slot that the member has locked. The child's slots inherit the record and the members;
    /// those that meet `pages` inherit the lock.
    fn expand(&self, me: &Handle, by: Owner, spot: &Spot<'m>, pages: &Range<u64>) -> Result<u32, NoNodes> {
        let node = self.spaces.node_pool(|pool| pool.take(me)).ok_or(NoNodes)?;
        let descriptor = &self.spaces.node_descriptors[node as usize];
        descriptor.first.store(u64::from(spot.at.node) << 32 | spot.index as u64, Ordering::Relaxed);
        let (word, value, members) = (spot.slot.word(), spot.slot.value(), spot.slot.members());
        let at = spot.at.child(spot.index, node);
        let locked = at.slots(pages);
        let made = &self.spaces.nodes[node as usize];
        made.head.make(Some(me.id()), &members);
        let free = view_of(&members);
        for (index, cell) in made.cells.iter().enumerate() {
            cell.make(if locked.contains(&index) { free.locked(by) } else { free }, value);
        }
        let used = if value.is_mapped() { FANOUT as i32 } else { 0 };
        self.count(me, node, used + locked.len() as i32);
        if let Some(region) = value.region() {
            let id: ObjectId = self.spaces.region_id(region);
            self.spaces.refcache().add(me, self.spaces, id, FANOUT as i32 - 1);
        }
        // The slot's lock is gone from its node, and the slot is used now if it was not.
        let linked = spot.slot.exchange(word, SlotWord::child(node, false));
        debug_assert!(linked, "a slot changes under its lock only (S6)");
        self.count(me, spot.at.node, if value.is_mapped() { -1 } else { 0 });
        me.step(Step::Expanded);
        Ok(node)
    }
}
