//! `unmap`, `protect`, and what all operations that change records have in common.

use super::{AddressSpace, Operation, RUN_PAGES, pages_of, range_of};
use crate::desk::Member;
use crate::holder::Holder;
use crate::intent::Doing;
use crate::member::MemberSet;
use crate::mmu::{Change, Frames, Mmu};
use crate::radix::slot::Owner;
use crate::radix::{At, Spot};
use crate::record::{Kind, Value};
use crate::step::Step;
use core::ops::Range;
use peregrine_base::{PAGE_SHIFT, PageRange, Protection, VirtAddr};

/// Why nothing was unmapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UnmapError {
    /// The MMU [gave up](crate::Mmu::gives_up) waiting for a member that holds a lock.
    #[error(
        "waited in vain: {0}; let it go on if it is stopped, or kill it: what a dead member holds is taken over"
    )]
    Held(Holder),
    /// The range ends beyond [`SPACE_END`](super::SPACE_END).
    #[error("{0:?} reaches beyond an address space of 2^48 bytes")]
    BadRange(PageRange),
    /// Splitting a mapping needs a node, and the arena has none left.
    #[error("the arena's {0} nodes are in use: unmap the whole mapping, or make the arena for more")]
    NoNodes(usize),
}

/// Why no rights were changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProtectError {
    /// The MMU [gave up](crate::Mmu::gives_up) waiting for a member that holds a lock.
    #[error(
        "waited in vain: {0}; let it go on if it is stopped, or kill it: what a dead member holds is taken over"
    )]
    Held(Holder),
    /// The range ends beyond [`SPACE_END`](super::SPACE_END).
    #[error("{0:?} reaches beyond an address space of 2^48 bytes")]
    BadRange(PageRange),
    /// A page of the range is not mapped.
    #[error("{range:?} has a hole at {first_hole}")]
    Unmapped {
        /// The range asked for.
        range: PageRange,
        /// The first page that is not mapped.
        first_hole: VirtAddr,
    },
    /// Splitting a mapping needs a node, and the arena has none left.
    #[error("the arena's {0} nodes are in use: make it for more")]
    NoNodes(usize),
}

/// What a look over the locked range found.
pub(super) struct Gathered {
    pub(super) first_mapped: Option<u64>,
    first_hole: Option<u64>,
    /// Members whose views have something that the change takes away.
    pub(super) losers: MemberSet,
    /// The pages that are home, if they are one run.
    home: Homes,
}

/// Which of the pages are home.
#[derive(Clone, PartialEq, Eq)]
enum Homes {
    None,
    Run(Range<u64>),
    Several,
}

impl Homes {
    #[inline]
    fn add(&mut self, pages: Range<u64>) {
        match self {
            Self::None => *self = Self::Run(pages),
            Self::Run(run) if run.end == pages.start => run.end = pages.end,
            _ => *self = Self::Several,
        }
    }
}

impl<'m, M: Mmu, F: Frames> AddressSpace<'m, M, F> {
    /// Unmaps the range: when this returns, no member's access reaches any of it. Unmapped pages in it are left alone.
    ///
    /// # Errors
    /// See [`UnmapError`]; nothing has changed.
    #[inline]
    pub fn unmap(&self, member: &mut Member<'m>, range: PageRange) -> Result<(), UnmapError> {
        if let 1..=RUN_PAGES = range.pages().get()
            && self.unmap_run(member, range)
        {
            return Ok(());
        }
        self.unmap_range(member, range)
    }

    #[inline(never)]
    fn unmap_range(&self, member: &mut Member<'m>, range: PageRange) -> Result<(), UnmapError> {
        let pages = pages_of(range).ok_or(UnmapError::BadRange(range))?;
        if pages.is_empty() {
            return Ok(());
        }
        let doing = Doing::Set(Value::UNMAPPED);
        let operation = self.begin(member, doing, pages).map_err(UnmapError::Held)?;
        let (me, by) = (&member.handle, operation.by);
        let narrowed = self.tree().narrow(me, by, operation.at, &operation.pages, false);
        if narrowed.is_err() {
            self.finish(member, &operation);
            return Err(UnmapError::NoNodes(self.spaces.nodes.len()));
        }
        let found = self.gather(&operation, |_| true);
        if found.first_mapped.is_none() {
            self.finish(member, &operation);
            return Ok(());
        }
        self.shoot(member, &operation.pages, &found.losers, Change::Drop);
        self.commit(member, operation.by);
        self.settle(member, &operation, doing, &found);
        self.over(member, operation.by);
        Ok(())
    }

    /// Gives all pages of the range these rights. Only pages that lose some interrupt anybody.
    ///
    /// # Errors
    /// See [`ProtectError`]; nothing has changed.
    pub fn protect(
        &self,
        member: &mut Member<'m>,
        range: PageRange,
        rights: Protection,
    ) -> Result<(), ProtectError> {
        let pages = pages_of(range).ok_or(ProtectError::BadRange(range))?;
        if pages.is_empty() {
            return Ok(());
        }
        let operation = self.begin(member, Doing::Rights(rights), pages).map_err(ProtectError::Held)?;
        let result = self.protect_locked(member, &operation, rights, range);
        if result.is_err() {
            self.finish(member, &operation);
        } else {
            self.over(member, operation.by);
        }
        result
    }

    /// Unlocks, unless it fails.
    fn protect_locked(
        &self,
        member: &Member<'m>,
        operation: &Operation,
        rights: Protection,
        range: PageRange,
    ) -> Result<(), ProtectError> {
        let found = self.gather(operation, |value| value.rights() > rights);
        if let Some(page) = found.first_hole {
            let first_hole = VirtAddr::new((page as usize) << PAGE_SHIFT);
            return Err(ProtectError::Unmapped { range, first_hole });
        }
        self.tree()
            .narrow(&member.handle, operation.by, operation.at, &operation.pages, false)
            .map_err(|_| ProtectError::NoNodes(self.spaces.nodes.len()))?;
        self.shoot(member, &operation.pages, &found.losers, Change::Restrict(rights));
        self.commit(member, operation.by);
        self.settle(member, operation, Doing::Rights(rights), &found);
        Ok(())
    }

    #[inline]
    pub(super) fn gather(&self, operation: &Operation, loses: impl Fn(Value) -> bool) -> Gathered {
        let mut found =
            Gathered { first_mapped: None, first_hole: None, losers: MemberSet::EMPTY, home: Homes::None };
        self.tree().each_locked(operation.by, operation.at, &operation.pages, &mut |spot| {
            let value = spot.slot.value();
            let page = spot.pages().start.max(operation.pages.start);
            if !value.is_mapped() {
                found.first_hole.get_or_insert(page);
                return;
            }
            found.first_mapped.get_or_insert(page);
            if value.kind() == Kind::Home {
                found.home.add(page..spot.pages().end.min(operation.pages.end));
            }
            if loses(value) {
                found.losers.union_with(&spot.slot.members());
            }
        });
        found
    }

    #[inline]
    pub(super) fn shoot(&self, member: &Member<'m>, pages: &Range<u64>, losers: &MemberSet, change: Change) {
        if losers.is_empty() {
            return;
        }
        let range = range_of(pages);
        self.mmu.shootdown(self.id, member.id(), range, losers, change);
        member.handle.step(Step::ShotDown);
    }

    #[inline]
    pub(super) fn commit(&self, member: &Member<'m>, by: Owner) {
        self.spaces.intent(by.member).commit(by.operation);
        member.handle.step(Step::Committed);
    }

    /// Changes the records of a committed operation, and unlocks them.
    #[inline]
    pub(super) fn settle(&self, member: &Member<'m>, operation: &Operation, doing: Doing, found: &Gathered) {
        let drops = matches!(doing, Doing::Set(_));
        let mut one_by_one = false;
        if drops {
            // Most often one run: told at once.
            match &found.home {
                Homes::None => {}
                Homes::Run(run) => self.frames.vacated(self.id, member.id(), range_of(run)),
                Homes::Several => one_by_one = true,
            }
        }
        let leaves = |spot: &Spot<'m>| {
            let value = spot.slot.value();
            if !drops || !value.is_mapped() {
                return;
            }
            // Nobody has these pages in view any more.
            spot.slot.clear_members();
            if one_by_one && value.kind() == Kind::Home {
                self.frames.vacated(self.id, member.id(), range_of(&spot.pages()));
            }
        };
        let (me, by, at) = (&member.handle, operation.by, operation.at);
        self.tree().settle(me, by, at, &operation.pages, doing, &leaves);
    }

    /// Does to the locked records what a committed operation does to them, and keeps them locked: also what recovery does for a
    /// dead member.
    pub(super) fn change_records(
        &self,
        member: &Member<'m>,
        by: Owner,
        at: At,
        pages: &Range<u64>,
        doing: Doing,
    ) {
        let tree = self.tree();
        tree.each_locked(by, at, pages, &mut |spot| {
            let own = spot.pages();
            if own.start < pages.start || own.end > pages.end {
                // Rounded out over pages that are not mapped, and stay so.
                return;
            }
            if let Doing::Set(_) = doing
                && spot.slot.value().is_mapped()
            {
                // Nobody has these pages in view any more: views are filled anew once the operation plants, and not before.
                spot.slot.clear_members();
                if spot.slot.value().kind() == Kind::Home {
                    self.frames.vacated(self.id, member.id(), range_of(&own));
                }
            }
            tree.set(&member.handle, &spot, doing.apply(spot.slot.value()));
        });
    }
}
