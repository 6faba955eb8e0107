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

use super::slot::{Shape, Slot, SlotWord};
use super::{At, BITS, FANOUT, Tree};
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

/// A terminal slot as a lookup finds it.
#[derive(Clone, Copy)]
struct Terminal<'m> {
    at: At,
    index: usize,
    slot: Slot<'m>,
    word: SlotWord,
}

impl<'m> Tree<'_, 'm> {
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
            let found = self.terminal(page).map(|found| found.slot.members_in(found.word));
            if let Some(found) = found
                && self.spaces.refcache().is_still_in(me, turn)
            {
                return found;
            }
            spin_loop();
        }
    }

    /// The pages of `within` around `page` with its record, without a hole, in slots of the same node that nobody has locked; its own may
    /// be. `None` unless the record `is_wanted`. Each slot for itself, as of some moment.
    pub(crate) fn alike(
        &self,
        me: &Handle,
        page: u64,
        within: &Range<u64>,
        is_wanted: impl Fn(Value) -> bool,
    ) -> Option<Range<u64>> {
        loop {
            let turn = self.spaces.refcache().enter(me);
            if let Some(found) = self.alike_once(me, page, within, &is_wanted)
                && self.spaces.refcache().is_still_in(me, turn)
            {
                return found;
            }
            spin_loop();
        }
    }

    /// The inner `None` as of [`Tree::alike`], the outer one: look again.
    fn alike_once(
        &self,
        me: &Handle,
        page: u64,
        within: &Range<u64>,
        is_wanted: impl Fn(Value) -> bool,
    ) -> Option<Option<Range<u64>>> {
        let home = self.terminal(page)?;
        let value = self.note_and_value(me, page, home)?;
        if !is_wanted(value) {
            return Some(None);
        }
        let own = home.at.pages_of(home.index);
        let mut run = own.start.max(within.start)..own.end.min(within.end);
        if !home.word.is_free() {
            return Some(Some(run));
        }
        let is_alike = |index: &usize| {
            let (slot, word) = self.slot(home.at, *index);
            word.is_free() && slot.value() == value
        };
        let slots = home.at.slots(within);
        for index in (home.index + 1..slots.end).take_while(is_alike) {
            run.end = home.at.pages_of(index).end.min(within.end);
        }
        for index in (slots.start..home.index).rev().take_while(is_alike) {
            run.start = home.at.pages_of(index).start.max(within.start);
        }
        Some(Some(run))
    }

    /// The terminal slot of a page; `None`: look again.
    fn terminal(&self, page: u64) -> Option<Terminal<'m>> {
        let mut at = self.top();
        loop {
            let index = (page >> (BITS * at.level)) as usize & (FANOUT - 1);
            let (slot, word) = self.slot(at, index);
            match word.shape() {
                Shape::Child { .. } if at.level == 0 => return None,
                Shape::Child { node, .. } => at = at.child(index, node),
                Shape::Terminal(_) => return Some(Terminal { at, index, slot, word }),
            }
        }
    }

    /// What the record of a page is going to be, of which this member's look is noted; `None`: look again.
    fn note_and_value(&self, me: &Handle, page: u64, found: Terminal<'m>) -> Option<Value> {
        if found.at.level == 0 {
            self.spaces.nodes[found.at.node as usize].head.is_looked_at(me.id());
        }
        let held = found.slot.value();
        match found.word.shape() {
            Shape::Terminal(Some(owner)) => self.spaces.intent(owner.member).outcome(owner, page, held),
            _ => Some(held),
        }
    }

    fn look_once(&self, me: &Handle, page: u64) -> Option<Found> {
        let found = self.terminal(page)?;
        let value = self.note_and_value(me, page, found)?;
        let (object, base) = self.spaces.region(value);
        Some(Found { value, pages: found.at.pages_of(found.index), object, base })
    }
}
