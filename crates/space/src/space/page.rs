//! `map_and_admit` and `unmap` of one page whose node one of the member's last walks came to: what members do most, and whoever compares
//! an address space with the bare calls to the kernel does nothing else.
//!
//! The shape is that of [`super`], step for step, with the slot in hand from the lock to the unlock: one slot of a node of
//! single pages has no edges to narrow, nothing to gather, and no other record to be seen half done with. It is worth a file of its own
//! because the general way, with a walk for each step and results that are handed on through memory, takes 230 ns longer: over
//! processes, that is a tenth of mapping and unmapping a page. It inlines well, too: a return behind a system call is dear.
//!
//! What is out of the ordinary (somebody has the slot, the member fell out of the epoch, a recovery is on) is
//! left to the general operation, with nothing changed.

use super::{AddressSpace, range_of};
use crate::desk::Member;
use crate::intent::Doing;
use crate::mmu::{Change, Contents, Frames, Mmu};
use crate::radix::slot::{Owner, Slot};
use crate::radix::{PAGES, Spot};
use crate::record::{Backing, Kind, Mapping, Value};
use crate::step::Step;
use peregrine_base::{PAGE_SHIFT, PageRange, VirtAddr};

impl<'m, M: Mmu, F: Frames> AddressSpace<'m, M, F> {
    /// Intends, and locks the page's slot; `None`: nothing was done, begin as any operation does.
    #[inline]
    fn begin_page(&self, member: &mut Member<'m>, doing: Doing, page: u64) -> Option<(Owner, Spot<'m>)> {
        if page >= PAGES || !self.tree().was_here(&member.handle, page) || !member.try_enter() {
            return None;
        }
        let by = self.intend(member, doing, &(page..page + 1));
        let turn = self.spaces.refcache().enter(&member.handle);
        match self.tree().lock_page(&member.handle, by, turn, page) {
            Some(spot) => Some((by, spot)),
            None => {
                self.over(member, by);
                None
            }
        }
    }

    #[inline]
    fn unlock_page(&self, member: &Member<'m>, slot: Slot<'m>) {
        slot.unlock();
        member.handle.step(Step::Unlocked);
    }

    /// Maps the home page at `start`, where nothing is mapped, and fills the member's view of it; `None` if that is not what is to be
    /// done, or not done so easily.
    #[inline]
    pub(super) fn map_page(
        &self,
        member: &mut Member<'m>,
        start: VirtAddr,
        mapping: &Mapping,
    ) -> Option<Result<(), M::Error>> {
        let Backing::Home { object } = mapping.backing else { return None };
        let value = Value::home(mapping.rights, u32::try_from(object).ok()?);
        let page = (start.as_usize() >> PAGE_SHIFT) as u64;
        if !start.is_page_aligned() {
            return None;
        }
        let (by, Spot { at, slot, .. }) = self.begin_page(member, Doing::Set(value), page)?;
        if slot.value().is_mapped() {
            self.unlock_page(member, slot);
            self.tree().count(&member.handle, at.node, -1);
            self.over(member, by);
            return None;
        }
        self.commit(member, by);
        let me = &member.handle;
        self.spaces.intent(by.member).plant(by.operation);
        me.step(Step::Planting);
        slot.only(me.id());
        self.tree().replace(me, slot, value, |_| ());
        let range = range_of(&(page..page + 1));
        let filled = self.mmu.fill(self.id, me.id(), range, Contents::Home, value.view_rights());
        me.step(Step::Filled);
        // The lock's use of the node becomes the record's.
        self.unlock_page(member, slot);
        self.over(member, by);
        Some(filled)
    }

    /// Unmaps a page; `false` if it is not done so easily.
    #[inline]
    pub(super) fn unmap_page(&self, member: &mut Member<'m>, range: PageRange) -> bool {
        let page = (range.start().as_usize() >> PAGE_SHIFT) as u64;
        let doing = Doing::Set(Value::UNMAPPED);
        let Some((by, Spot { at, slot, .. })) = self.begin_page(member, doing, page) else { return false };
        let old = slot.value();
        let mut uses = -1;
        if old.is_mapped() {
            self.shoot(member, &(page..page + 1), &slot.members(), Change::Drop);
            self.commit(member, by);
            if old.kind() == Kind::Home {
                self.frames.vacated(self.id, member.id(), range);
            }
            slot.clear_members();
            uses += self.tree().replace(&member.handle, slot, Value::UNMAPPED, |_| ());
        }
        self.unlock_page(member, slot);
        self.tree().count(&member.handle, at.node, uses);
        self.over(member, by);
        true
    }
}
