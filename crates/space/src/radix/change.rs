//! Changing what is under the lock: records, and the fineness of the tree.
//!
//! Counts follow each change: a node counts its used slots, a region the slots that name it, a frame the records that
//! have it. References are taken before the word that holds them is written, and dropped after it is overwritten.

use super::slot::{Owner, SlotWord};
use super::{At, FANOUT, Spot, Tree};
use crate::record::Value;
use crate::refcache::{Handle, ObjectId};
use crate::step::Step;
use core::ops::Range;
use peregrine_base::sync::Ordering;

/// The pool of nodes is empty.
#[derive(Debug)]
pub(crate) struct NoNodes;

impl<'m> Tree<'m> {
    /// Writes a record into a slot that the member has locked.
    pub(crate) fn set(&self, me: &Handle, spot: &Spot<'m>, new: Value) {
        let old = spot.slot.value();
        if old == new {
            return;
        }
        self.refer(me, new, 1);
        if new.is_mapped() && !old.is_mapped() {
            self.count(me, spot.at.node, 1);
        }
        spot.slot.set_value(new);
        me.step(Step::Changed);
        if old.is_mapped() && !new.is_mapped() {
            self.count(me, spot.at.node, -1);
        }
        self.refer(me, old, -1);
        me.step(Step::Dropped);
    }

    /// Takes or drops the references of a record.
    fn refer(&self, me: &Handle, value: Value, delta: i32) {
        let refcache = self.spaces.refcache();
        if let Some(region) = value.region() {
            refcache.add(me, &self.spaces, self.spaces.region_id(region), delta);
        }
        if let Some(frame) = value.frame() {
            refcache.add(me, &self.spaces, self.spaces.frame_id(frame), delta);
        }
    }

    /// Makes the slots that meet `pages` fine enough that none reaches beyond, if they hold a record or `all` of them
    /// are to get one. The locks beyond `pages` are released with that.
    pub(crate) fn narrow(
        &self,
        me: &Handle,
        by: Owner,
        pages: &Range<u64>,
        all: bool,
    ) -> Result<(), NoNodes> {
        self.narrow_node(me, by, self.top(), pages, all)
    }

    fn narrow_node(
        &self,
        me: &Handle,
        by: Owner,
        at: At,
        pages: &Range<u64>,
        all: bool,
    ) -> Result<(), NoNodes> {
        for index in at.slots(pages) {
            let slot = self.slot(at, index);
            let node = match slot.word().shape() {
                super::slot::Shape::Child { node, .. } => node,
                super::slot::Shape::Terminal(_) => {
                    let own = at.pages_of(index);
                    let reaches_out = own.start < pages.start || own.end > pages.end;
                    if !reaches_out || !(all || slot.value().is_mapped()) {
                        continue;
                    }
                    self.expand(me, by, &Spot { at, index, slot }, pages)?
                }
            };
            // Only a slot at the edge can reach out, and only its child can be too coarse.
            let own = at.pages_of(index);
            if own.start < pages.start || own.end > pages.end {
                self.narrow_node(me, by, at.child(index, node), pages, all)?;
            }
        }
        Ok(())
    }

    /// Puts a child in place of a slot that the member has locked. The child's slots inherit the record and the members;
    /// those that meet `pages` inherit the lock.
    fn expand(&self, me: &Handle, by: Owner, spot: &Spot<'m>, pages: &Range<u64>) -> Result<u32, NoNodes> {
        let node = self.spaces.node_pool(|pool| pool.take(me)).ok_or(NoNodes)?;
        let descriptor = &self.spaces.node_descriptors[node as usize];
        descriptor.first.store(u64::from(spot.at.node) << 32 | spot.index as u64, Ordering::Relaxed);
        let (value, members) = (spot.slot.value(), spot.slot.members.load());
        let at = spot.at.child(spot.index, node);
        let locked = at.slots(pages);
        for (index, slot) in self.spaces.nodes[node as usize].slots.iter().enumerate() {
            slot.set_value(value);
            slot.members.store(&members);
            slot.set_word(if locked.contains(&index) { SlotWord::locked(by) } else { SlotWord::FREE });
        }
        let used = if value.is_mapped() { FANOUT as i32 } else { 0 };
        self.count(me, node, used + locked.len() as i32);
        if let Some(region) = value.region() {
            let id: ObjectId = self.spaces.region_id(region);
            self.spaces.refcache().add(me, &self.spaces, id, FANOUT as i32 - 1);
        }
        // The slot's lock is gone from its node, and the slot is used now if it was not.
        let linked = spot.slot.exchange(SlotWord::locked(by), SlotWord::child(node, false));
        debug_assert!(linked, "a slot changes under its lock only (S6)");
        self.count(me, spot.at.node, if value.is_mapped() { -1 } else { 0 });
        me.step(Step::Expanded);
        Ok(node)
    }
}
