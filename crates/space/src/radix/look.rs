//! Lookups: no lock, no waiting, and no write but one: the first look at a page of a node in which another member works by itself
//! notes that, so that the records there come to be kept apart ([`super::slot`]).
//!
//! A record in a locked slot may be about to change as part of an operation on many pages. So that such an operation takes
//! effect for all of them at one moment, its holder publishes an *intent* before it changes the first record, and a lookup
//! that meets a lock asks the intent what the record is going to be:
//!
//! ```text
//!  the holder's intent is     pending: the record is what the slot holds
//!                             committed: the record is what the operation makes of it, changed already or not
//!                             of another operation: the lock is gone; look again
//! ```
//!
//! A slot whose word said "terminal" may have been expanded by the time its record is read; the record is then an old one, but one
//! that held after the lookup began, which is all that a lookup promises.
//!
//! The descent goes through nodes that may collapse meanwhile. A member that is in the epoch keeps them from being used
//! anew; one that fell out of it (it was stopped) finds that out at the end and looks again.

use super::slot::Shape;
use super::{BITS, FANOUT, Tree};
use crate::member::MemberSet;
use crate::record::Value;
use crate::refcache::Handle;
use core::ops::Range;
use peregrine_base::sync::spin_loop;

/// What a lookup found: the record, and the pages of the slot that holds it.
#[derive(Clone)]
pub(crate) struct Found {
    pub(crate) value: Value,
    pub(crate) pages: Range<u64>,
    /// What the record's region says: object and base.
    pub(crate) object: u64,
    pub(crate) base: u64,
}

impl Tree<'_, '_> {
    pub(crate) fn look(&self, me: &Handle, page: u64) -> Found {
        loop {
            let turn = self.spaces.refcache().enter(me);
            if let Some(found) = self.look_once(me, page)
                && self.spaces.refcache().is_still_in(me, turn)
            {
                return found;
            }
            // Somebody else went on meanwhile, so this is not waiting; a model checker wants to be told.
            spin_loop();
        }
    }

    /// Who may have the page in view, as of some moment since the lookup began.
    pub(crate) fn viewers(&self, me: &Handle, page: u64) -> MemberSet {
        loop {
            let turn = self.spaces.refcache().enter(me);
            let mut at = self.top();
            let found = loop {
                let index = (page >> (BITS * at.level)) as usize & (FANOUT - 1);
                let (slot, word) = self.slot(at, index);
                match word.shape() {
                    Shape::Child { .. } if at.level == 0 => break None,
                    Shape::Child { node, .. } => at = at.child(index, node),
                    Shape::Terminal(_) => break Some(slot.members_in(word)),
                }
            };
            if let Some(found) = found
                && self.spaces.refcache().is_still_in(me, turn)
            {
                return found;
            }
            spin_loop();
        }
    }

    fn look_once(&self, me: &Handle, page: u64) -> Option<Found> {
        let mut at = self.top();
        loop {
            let index = (page >> (BITS * at.level)) as usize & (FANOUT - 1);
            let (slot, word) = self.slot(at, index);
            match word.shape() {
                Shape::Child { node, .. } => {
                    if at.level == 0 {
                        return None;
                    }
                    at = at.child(index, node);
                }
                Shape::Terminal(owner) => {
                    if at.level == 0 {
                        self.spaces.nodes[at.node as usize].head.is_looked_at(me.id());
                    }
                    let held = slot.value();
                    let value = match owner {
                        None => held,
                        Some(owner) => self.spaces.intent(owner.member).outcome(owner, page, held)?,
                    };
                    let (object, base) = self.spaces.region(value);
                    return Some(Found { value, pages: at.pages_of(index), object, base });
                }
            }
        }
    }
}
