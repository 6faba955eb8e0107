//! `map_and_admit`, `unmap` and home faults in one node that one of the member's last walks came to: what members do most, and whoever compares
//! an address space with the bare calls to the kernel does nothing else.
//!
//! The shape is that of [`super`], step for step, with the node in hand from the lock to the unlock: slots of single pages have no edges to
//! narrow, and what all of them hold was seen when they were locked. It is worth a file of its own because the general way, with a walk for
//! each step and results that are handed on through memory, takes 230 ns longer for a page, and 400 for sixteen: over processes, that is a
//! tenth of mapping and unmapping them. It inlines well, too: a return behind a system call is dear.
//!
//! What is out of the ordinary (somebody has a slot, a part of the pages is mapped and another is not, the member fell out of the epoch, a
//! recovery is on) is left to the general operation, with nothing changed.

use super::{AddressSpace, FaultError, Filled, pages_of, range_of};
use crate::desk::Member;
use crate::intent::Doing;
use crate::member::MemberSet;
use crate::mmu::{Change, Contents, Frames, Mmu};
use crate::radix::run::Run;
use crate::radix::slot::{Owner, SlotWord};
use crate::record::{Backing, Kind, Mapping, Value};
use crate::step::Step;
use core::ops::Range;
use peregrine_base::{PageCount, PageRange, Protection, VirtAddr};

impl<'m, M: Mmu, F: Frames> AddressSpace<'m, M, F> {
    /// Intends, and locks the pages, all of which are mapped (`held`), or none; `None`: nothing was done, begin as any operation does.
    #[inline(always)]
    fn begin_run(
        &self,
        member: &mut Member<'m>,
        doing: Doing,
        pages: &Range<u64>,
        held: bool,
    ) -> Option<(Owner, Run<'m>)> {
        let tree = self.tree();
        let run = tree.run(&member.handle, pages)?;
        if !member.try_enter() {
            return None;
        }
        let by = self.intend(member, doing, pages);
        let me = &member.handle;
        if !held {
            tree.count(me, run.node(), run.uses());
        }
        if tree.lock_run(me, by, &run, held) {
            return Some((by, run));
        }
        if !held {
            tree.count(me, run.node(), -run.uses());
        }
        self.over(member, by);
        None
    }

    /// Maps home pages, where nothing is mapped, and fills the member's view of them; `None` if that is not what is to be done, or not done so
    /// easily.
    #[inline]
    pub(super) fn map_run(
        &self,
        member: &mut Member<'m>,
        start: VirtAddr,
        pages: PageCount,
        mapping: &Mapping,
    ) -> Option<Result<(), M::Error>> {
        let Backing::Home { object } = mapping.backing else { return None };
        let value = Value::home(mapping.rights, u32::try_from(object).ok()?);
        if !start.is_page_aligned() {
            return None;
        }
        let range = PageRange::new(start, pages);
        let pages = pages_of(range)?;
        let (by, run) = self.begin_run(member, Doing::Set(value), &pages, false)?;
        // Nothing goes, so nobody loses anything, and nothing lies between the commit and the planting.
        self.spaces.intent(by.member).plant(by.operation);
        let (me, tree) = (&member.handle, self.tree());
        me.step(Step::Planting);
        for (slot, _) in tree.slots(&run) {
            slot.only(me.id());
            slot.set_value(value);
            me.step(Step::Changed);
        }
        let filled = self.mmu.fill(self.id, me.id(), range, Contents::Home, value.view_rights());
        me.step(Step::Filled);
        // The locks' uses of the node become the records'.
        for (slot, word) in tree.slots(&run) {
            slot.set_word(word.unlocked());
            me.step(Step::Unlocked);
        }
        self.over(member, by);
        Some(filled)
    }

    /// Unmaps pages; `false` if it is not done so easily.
    #[inline]
    pub(super) fn unmap_run(&self, member: &mut Member<'m>, range: PageRange) -> bool {
        let Some(pages) = pages_of(range) else { return false };
        let Some((by, run)) = self.begin_run(member, Doing::Set(Value::UNMAPPED), &pages, true) else {
            return false;
        };
        let tree = self.tree();
        let (mut losers, mut homes, mut seen) = (MemberSet::EMPTY, 0, None);
        for (slot, word) in tree.slots(&run) {
            homes += i32::from(slot.value().kind() == Kind::Home);
            // Most often one member has all of them in view.
            let view = slot.view_in(word);
            if view.is_none() || view != seen {
                losers.union_with(&slot.members_in(word));
                seen = view;
            }
        }
        self.shoot(member, &pages, &losers, Change::Drop);
        self.commit(member, by);
        if homes == run.uses() {
            self.frames.vacated(self.id, member.id(), range);
        } else if homes != 0 {
            for ((slot, _), page) in tree.slots(&run).zip(pages) {
                if slot.value().kind() == Kind::Home {
                    self.frames.vacated(self.id, member.id(), range_of(&(page..page + 1)));
                }
            }
        }
        let (me, key) = (&member.handle, SlotWord::FREE.locked(by));
        for (slot, _) in tree.slots(&run) {
            let old = slot.value();
            slot.empty(key);
            me.step(Step::Changed);
            if old.has_references() {
                tree.refer(me, old, -1);
            }
            me.step(Step::Dropped);
            slot.set_word(SlotWord::FREE);
            me.step(Step::Unlocked);
        }
        tree.count(me, run.node(), -run.uses());
        self.over(member, by);
        true
    }

    /// Fills a block of home pages that all are of one mapping which allows the access; `None` if it is not done so easily.
    #[inline]
    pub(super) fn fault_run(
        &self,
        member: &mut Member<'m>,
        pages: &Range<u64>,
        needed: Protection,
    ) -> Option<Result<Filled, FaultError<M::Error>>> {
        let (by, run) = self.begin_run(member, Doing::Fault, pages, true)?;
        let (me, tree) = (&member.handle, self.tree());
        let mut values = tree.slots(&run).map(|(slot, _)| slot.value());
        let value = values.next().unwrap_or(Value::UNMAPPED);
        let alike = value.kind() == Kind::Home && value.rights() >= needed && values.all(|v| v == value);
        let filled = alike.then(|| {
            tree.slots(&run).for_each(|(slot, _)| tree.admit(me, slot));
            let (range, rights) = (range_of(pages), value.rights());
            self.mmu.fill(self.id, me.id(), range, Contents::Home, rights).map_err(FaultError::Mmu)?;
            me.step(Step::Filled);
            Ok(Filled { range, contents: Contents::Home, rights })
        });
        for (slot, word) in tree.slots(&run) {
            slot.set_word(word.unlocked());
            me.step(Step::Unlocked);
        }
        self.over(member, by);
        filled
    }
}
