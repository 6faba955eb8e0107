//! What a process's views and frames are to the address space: every record is [`Home`](crate::Backing::Home).

use super::seat::{FillError, OPEN_PAGES, Seat};
use super::table::{Lowering, MEMBERS, MemberIndex};
use crate::{Change, Contents, MemberId, MemberSet, Mmu, SpaceId};
use peregrine_base::{PageRange, Protection};

/// What a process's views and frames are to the address space. It stays where its seat is.
#[derive(Clone, Copy)]
pub(super) struct Views(pub(super) *const Seat);

impl Views {
    #[inline]
    fn seat(&self) -> &Seat {
        // SAFETY: the seat lives in a box of the member that holds the address space, and longer than it (field order in `Inner`).
        unsafe { &*self.0 }
    }
}

impl Mmu for Views {
    type Error = FillError;
    const BLOCK_PAGES: usize = OPEN_PAGES;

    fn block_pages(&self) -> usize {
        self.seat().block_pages()
    }

    #[inline]
    fn fill(
        &self,
        _: SpaceId,
        _: MemberId,
        range: PageRange,
        contents: Contents,
        rights: Protection,
    ) -> Result<(), FillError> {
        match contents {
            Contents::Home => self.seat().open(range, rights),
            Contents::Frame(_) => Err(FillError::NotHome { range }),
        }
    }

    #[inline]
    fn shootdown(&self, _: SpaceId, _: MemberId, range: PageRange, targets: &MemberSet, change: Change) {
        let what = match change {
            Change::Restrict(Protection::ReadWrite) => return,
            Change::Restrict(Protection::Read) => Lowering::ReadOnly,
            Change::Drop | Change::Restrict(Protection::None) => Lowering::Close,
        };
        self.seat().take_away(range, targets.words()[0], what);
    }

    fn wait(&self, _: MemberId, _: MemberId) {
        self.seat().let_time_pass();
    }

    fn is_dead(&self, member: MemberId) -> bool {
        let index = member.index();
        // Whoever has a place in the structures took it in the table first (`Ground::reserve`).
        index < MEMBERS
            && self.seat().table.member(MemberIndex(index as u8)).who().pid() != 0
            && self.seat().is_gone(index)
    }

    fn views_die_with_members(&self) -> bool {
        true
    }

    fn gives_up(&self, _: MemberId, _: MemberId, turns: u32) -> bool {
        self.seat().has_waited_enough(turns)
    }

    fn process_of(&self, member: MemberId) -> Option<u32> {
        let index = member.index();
        (index < MEMBERS)
            .then(|| self.seat().table.member(MemberIndex(index as u8)).who().pid())
            .filter(|pid| *pid != 0)
    }
}

impl crate::Frames for Views {
    #[inline]
    fn vacated(&self, _: SpaceId, _: MemberId, range: PageRange) {
        self.seat().vacated(range);
    }
}
