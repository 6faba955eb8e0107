//! Collapse: the parts that Refcache calls when a node has had no use for a while.
//!
//! ```text
//!  count 0 ─▶ mark: parent's slot (child n, dying) ─▶ two epochs ─▶ sever: (child n, dying) → empty ─▶ two epochs ─▶ free
//!                          └── a lock walk comes through: (child n) ── sever fails: the node lives
//! ```
//!
//! A lookup goes through a dying link without reviving the node: it holds nothing when it is done. What keeps the node
//! from being used anew under it are the two epochs after the cut.

use super::slot::{Shape, Slot, SlotWord};
use crate::refcache::{Handle, ObjectId, Severed};
use crate::spaces::Spaces;
use crate::step::Step;
use peregrine_base::sync::Ordering;

/// What a root has in place of a parent: it does not collapse.
pub(crate) const NO_PARENT: u64 = u64::MAX;
/// What the root of a space that was taken down has: nothing leads to it any more.
pub(crate) const RETIRED: u64 = u64::MAX - 1;

impl<'m> Spaces<'m> {
    /// The slot that leads to a node, its word, and the parent's number.
    fn link(&self, node: u32) -> Option<(u32, Slot<'m>, SlotWord)> {
        let link = self.node_descriptors[node as usize].first.load(Ordering::Relaxed);
        (link < RETIRED).then(|| {
            let parent = (link >> 32) as u32;
            let (slot, word) = self.slot(parent, link as u32 as usize);
            (parent, slot, word)
        })
    }

    /// Sets or clears the mark of the link to `node`, if there is one.
    pub(crate) fn mark_link(&self, node: u32, dying: bool) {
        // A slot that leads to a child does not move.
        while let Some((_, slot, word)) = self.link(node) {
            if word.shape() != (Shape::Child { node, dying: !dying })
                || slot.exchange(word, SlotWord::child(node, dying))
            {
                return;
            }
        }
    }

    /// Cuts the link to `node` if it is still marked.
    pub(crate) fn sever_link(&self, me: &Handle, node: u32) -> Severed {
        let Some((parent, slot, found)) = self.link(node) else {
            let link = self.node_descriptors[node as usize].first.load(Ordering::Relaxed);
            return if link == RETIRED { Severed::AfterGrace } else { Severed::Revived };
        };
        let word = SlotWord::child(node, true);
        if found != word {
            return Severed::Revived;
        }
        // What a slow reader may still find here, which saw the slot before it had a child. All pages of it are unmapped now. Nobody
        // else writes these fields while the slot has a child, and nobody else severs this node.
        slot.empty_behind_child();
        if !slot.exchange(word, SlotWord::FREE) {
            return Severed::Revived;
        }
        me.step(Step::Severed);
        self.refcache().add(me, self, ObjectId(parent), -1);
        Severed::AfterGrace
    }
}
