//! `map`, `unmap`, `protect`: operations on a range.

use super::{AddressSpace, Operation, pages_of, range_of};
use crate::desk::Member;
use crate::intent::Doing;
use crate::member::MemberSet;
use crate::mmu::{Change, Frames, Mmu};
use crate::record::{Backing, Kind, Mapping, Place, Value};
use crate::refcache::ObjectId;
use crate::step::Step;
use core::ops::Range;
use peregrine_base::sync::Ordering;
use peregrine_base::{PAGE_SHIFT, PageCount, PageRange, Protection, VirtAddr};

/// Why nothing was mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapError {
    /// The range is empty, or ends beyond [`SPACE_END`](super::SPACE_END).
    #[error("{pages} pages from {start} are no range of an address space of 2^48 bytes")]
    BadRange {
        /// The start asked for.
        start: VirtAddr,
        /// The pages asked for.
        pages: usize,
    },
    /// Something is mapped there.
    #[error("{wanted:?} is taken from {taken} on: use Place::Fixed to replace what is there")]
    Occupied {
        /// The range asked for.
        wanted: PageRange,
        /// The first page that is mapped.
        taken: VirtAddr,
    },
    /// There is no hole of that size.
    #[error("no hole of {pages} pages in {within:?}")]
    NoHole {
        /// The pages asked for.
        pages: usize,
        /// Where it was looked for.
        within: PageRange,
    },
    /// The arena has no node left.
    #[error("the arena's {0} nodes are in use: make it for more, or tick to collapse empty ones")]
    NoNodes(usize),
    /// The arena has no region left.
    #[error("the arena's {0} regions are in use: make it for more")]
    NoRegions(usize),
}

/// Why nothing was unmapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UnmapError {
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
struct Gathered {
    first_mapped: Option<u64>,
    first_hole: Option<u64>,
    /// Members whose views have something that the change takes away.
    losers: MemberSet,
}

impl<'m, M: Mmu, F: Frames> AddressSpace<'m, M, F> {
    /// Maps `pages` pages, and tells where. No frame is allocated, and no view filled: that is what faults are for. What was mapped there
    /// is replaced in one step, and gone from every view when this returns.
    ///
    /// # Errors
    /// See [`MapError`]; nothing has changed.
    pub fn map(
        &self,
        member: &mut Member<'m>,
        place: Place,
        pages: PageCount,
        mapping: &Mapping,
    ) -> Result<PageRange, MapError> {
        match place {
            Place::Fixed(start) => self.map_at(member, start, pages, mapping, true),
            Place::FixedNoReplace(start) => self.map_at(member, start, pages, mapping, false),
            Place::Hole { within, hint } => {
                let mut at = self.first_guess(member, within, hint);
                loop {
                    let hole = self
                        .find_hole(member, within, at, pages)
                        .ok_or(MapError::NoHole { pages: pages.get(), within })?;
                    let start = VirtAddr::new((hole as usize) << PAGE_SHIFT);
                    match self.map_at(member, start, pages, mapping, false) {
                        // Somebody was faster: look on from there.
                        Err(MapError::Occupied { .. }) => at = hole,
                        Ok(range) => {
                            member.hint = Some(hole + pages.get() as u64);
                            return Ok(range);
                        }
                        error => return error,
                    }
                }
            }
        }
    }

    fn map_at(
        &self,
        member: &mut Member<'m>,
        start: VirtAddr,
        count: PageCount,
        mapping: &Mapping,
        replace: bool,
    ) -> Result<PageRange, MapError> {
        let bad = MapError::BadRange { start, pages: count.get() };
        let fits = start.is_page_aligned()
            && count.get() > 0
            && start.as_usize() < super::SPACE_END
            && count.get() <= (super::SPACE_END - start.as_usize()) >> PAGE_SHIFT;
        if !fits {
            return Err(bad);
        }
        let range = PageRange::new(start, count);
        let pages = pages_of(range).ok_or(bad)?;
        // What the records become is not known before the region is, and that is taken under the lock.
        let operation = self.begin(member, Doing::Fault, pages);
        let result = self.map_locked(member, &operation, mapping, replace, range);
        self.finish(member, &operation);
        result.map(|()| range)
    }

    fn map_locked(
        &self,
        member: &Member<'m>,
        operation: &Operation,
        mapping: &Mapping,
        replace: bool,
        range: PageRange,
    ) -> Result<(), MapError> {
        let found = self.gather(operation, |_| true);
        if let (false, Some(page)) = (replace, found.first_mapped) {
            let taken = VirtAddr::new((page as usize) << PAGE_SHIFT);
            return Err(MapError::Occupied { wanted: range, taken });
        }
        self.tree()
            .narrow(&member.handle, operation.by, &operation.pages, true)
            .map_err(|_| MapError::NoNodes(self.spaces.nodes.len()))?;
        let (value, region) = self.value_for(member, mapping, operation.pages.start)?;
        let (by, doing) = (operation.by, Doing::Set(value));
        self.spaces.intent(by.member).begin(by.operation, doing, self.id, &operation.pages);
        self.shoot(member, operation, &found.losers, Change::Drop);
        self.change(member, operation, doing);
        if let Some(region) = region {
            // The map's own reference: the records have theirs now.
            self.spaces.refcache().add(&member.handle, &self.spaces, region, -1);
        }
        Ok(())
    }

    /// The record of a mapping, and a new region with one reference for the caller if it needs one.
    fn value_for(
        &self,
        member: &Member<'m>,
        mapping: &Mapping,
        start: u64,
    ) -> Result<(Value, Option<ObjectId>), MapError> {
        let (kind, shared, object, first) = match mapping.backing {
            Backing::Anonymous => (Kind::Anonymous, false, 0, None),
            Backing::AnonymousShared => (Kind::Anonymous, true, 0, None),
            Backing::Object { object, first } => (Kind::Object, true, object, Some(first)),
            Backing::ObjectPrivate { object, first } => (Kind::Object, false, object, Some(first)),
            Backing::Home { object: 0 } => (Kind::Home, true, 0, None),
            Backing::Home { object } => (Kind::Home, true, object, Some(0)),
        };
        let Some(first) = first else {
            return Ok((Value::new(kind, shared, mapping.rights, None), None));
        };
        let taken = self.spaces.region_pool(|pool| pool.take(&member.handle));
        let region = taken.ok_or(MapError::NoRegions(self.spaces.region_descriptors.len()))?;
        let descriptor = &self.spaces.region_descriptors[region as usize];
        // Nobody can find the region before a record names it, and that is written with release.
        descriptor.first.store(object, Ordering::Relaxed);
        descriptor.second.store(first.wrapping_sub(start), Ordering::Relaxed);
        let id = self.spaces.region_id(region);
        self.spaces.refcache().add(&member.handle, &self.spaces, id, 1);
        Ok((Value::new(kind, shared, mapping.rights, Some(region)), Some(id)))
    }

    /// Unmaps the range: when this returns, no member's access reaches any of it. Unmapped pages in it are left alone.
    ///
    /// # Errors
    /// See [`UnmapError`]; nothing has changed.
    pub fn unmap(&self, member: &mut Member<'m>, range: PageRange) -> Result<(), UnmapError> {
        let pages = pages_of(range).ok_or(UnmapError::BadRange(range))?;
        if pages.is_empty() {
            return Ok(());
        }
        let doing = Doing::Set(Value::UNMAPPED);
        let operation = self.begin(member, doing, pages);
        let narrowed = self.tree().narrow(&member.handle, operation.by, &operation.pages, false);
        let result = narrowed.map_err(|_| UnmapError::NoNodes(self.spaces.nodes.len()));
        if result.is_ok() {
            let found = self.gather(&operation, |_| true);
            if found.first_mapped.is_some() {
                self.shoot(member, &operation, &found.losers, Change::Drop);
                self.change(member, &operation, doing);
            }
        }
        self.finish(member, &operation);
        result
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
        let operation = self.begin(member, Doing::Rights(rights), pages);
        let result = self.protect_locked(member, &operation, rights, range);
        self.finish(member, &operation);
        result
    }

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
            .narrow(&member.handle, operation.by, &operation.pages, false)
            .map_err(|_| ProtectError::NoNodes(self.spaces.nodes.len()))?;
        self.shoot(member, operation, &found.losers, Change::Restrict(rights));
        self.change(member, operation, Doing::Rights(rights));
        Ok(())
    }

    fn gather(&self, operation: &Operation, loses: impl Fn(Value) -> bool) -> Gathered {
        let mut found = Gathered { first_mapped: None, first_hole: None, losers: MemberSet::EMPTY };
        self.tree().each_locked(operation.by, &operation.pages, &mut |spot| {
            let value = spot.slot.value();
            let page = spot.pages().start.max(operation.pages.start);
            if !value.is_mapped() {
                found.first_hole.get_or_insert(page);
                return;
            }
            found.first_mapped.get_or_insert(page);
            if loses(value) {
                found.losers.union_with(&spot.slot.members.load());
            }
        });
        found
    }

    fn shoot(&self, member: &Member<'m>, operation: &Operation, losers: &MemberSet, change: Change) {
        if losers.is_empty() {
            return;
        }
        let range = range_of(&operation.pages);
        self.mmu.shootdown(self.id, member.id(), range, losers, change);
        member.handle.step(Step::ShotDown);
    }

    /// Commits, and changes the records.
    fn change(&self, member: &Member<'m>, operation: &Operation, doing: Doing) {
        self.spaces.intent(operation.by.member).commit(operation.by.operation);
        member.handle.step(Step::Committed);
        self.change_records(member, operation.by, &operation.pages, doing);
    }

    /// Does to the locked records what a committed operation does to them: also what recovery does for a dead member.
    pub(super) fn change_records(
        &self,
        member: &Member<'m>,
        by: crate::radix::slot::Owner,
        pages: &Range<u64>,
        doing: Doing,
    ) {
        let tree = self.tree();
        tree.each_locked(by, pages, &mut |spot| {
            let own = spot.pages();
            if own.start < pages.start || own.end > pages.end {
                // Rounded out over pages that are not mapped, and stay so.
                return;
            }
            if let Doing::Set(_) = doing
                && spot.slot.value().is_mapped()
            {
                // Nobody has these pages in view any more.
                spot.slot.members.store(&MemberSet::EMPTY);
                if spot.slot.value().kind() == Kind::Home {
                    self.frames.vacated(self.id, member.id(), range_of(&own));
                }
            }
            tree.set(&member.handle, &spot, doing.apply(spot.slot.value()));
        });
    }
}
