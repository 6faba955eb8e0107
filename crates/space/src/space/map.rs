//! `map`: new records on a range, in place of whatever is there.

use super::{AddressSpace, Operation, RUN_PAGES, pages_of, range_of};
use crate::desk::Member;
use crate::holder::Holder;
use crate::intent::Doing;
use crate::mmu::{Change, Contents, Frames, Mmu};
use crate::record::{Backing, Kind, Mapping, Place, Value};
use crate::step::Step;
use peregrine_base::sync::Ordering;
use peregrine_base::{PAGE_SHIFT, PageCount, PageRange, VirtAddr};

/// Why nothing was mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapError {
    /// The MMU [gave up](crate::Mmu::gives_up) waiting for a member that holds a lock.
    #[error(
        "waited in vain: {0}; let it go on if it is stopped, or kill it: what a dead member holds is taken over"
    )]
    Held(Holder),
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

/// Why [`map_and_admit`](AddressSpace::map_and_admit) did not do all.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapAdmitError<E: core::fmt::Debug> {
    /// Nothing is mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// It is mapped, but the member's view could not be filled.
    #[error("mapped {range:?}, but the view could not be filled: {error:?}")]
    Mmu {
        /// What is mapped.
        range: PageRange,
        /// The MMU's reason.
        error: E,
    },
}

/// What a record says of a mapping, and object and first page if that takes a region.
fn parts_of(mapping: &Mapping) -> (Value, Option<(u64, u64)>) {
    let (kind, shared, object) = match mapping.backing {
        Backing::Anonymous => (Kind::Anonymous, false, None),
        Backing::AnonymousShared => (Kind::Anonymous, true, None),
        Backing::Object { object, first } => (Kind::Object, true, Some((object, first))),
        Backing::ObjectPrivate { object, first } => (Kind::Object, false, Some((object, first))),
        Backing::Home { object } => match u32::try_from(object) {
            Ok(name) => return (Value::home(mapping.rights, name), None),
            Err(_) => (Kind::Home, true, Some((object, 0))),
        },
    };
    (Value::new(kind, shared, mapping.rights, None), object)
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
        self.map_placed(member, place, pages, mapping, false).map(|(range, _)| range)
    }

    /// [`map`](Self::map) and, if the mapping is [`Home`](Backing::Home), [`admit`](Self::admit) in one operation: the records are
    /// locked once, and nobody sees the one without the other.
    ///
    /// # Errors
    /// See [`MapAdmitError`].
    #[inline]
    pub fn map_and_admit(
        &self,
        member: &mut Member<'m>,
        place: Place,
        pages: PageCount,
        mapping: &Mapping,
    ) -> Result<PageRange, MapAdmitError<M::Error>> {
        if let (Place::Fixed(start) | Place::FixedNoReplace(start), 1..=RUN_PAGES) = (place, pages.get())
            && let Some(filled) = self.map_run(member, start, pages, mapping)
        {
            let range = PageRange::new(start, pages);
            return filled.map(|()| range).map_err(|error| MapAdmitError::Mmu { range, error });
        }
        self.map_range_and_admit(member, place, pages, mapping)
    }

    #[inline(never)]
    fn map_range_and_admit(
        &self,
        member: &mut Member<'m>,
        place: Place,
        pages: PageCount,
        mapping: &Mapping,
    ) -> Result<PageRange, MapAdmitError<M::Error>> {
        match self.map_placed(member, place, pages, mapping, true)? {
            (range, Ok(())) => Ok(range),
            (range, Err(error)) => Err(MapAdmitError::Mmu { range, error }),
        }
    }

    fn map_placed(
        &self,
        member: &mut Member<'m>,
        place: Place,
        pages: PageCount,
        mapping: &Mapping,
        admit: bool,
    ) -> Result<(PageRange, Result<(), M::Error>), MapError> {
        let admit = admit && matches!(mapping.backing, Backing::Home { .. });
        match place {
            Place::Fixed(start) => self.map_at(member, start, pages, mapping, true, admit),
            Place::FixedNoReplace(start) => self.map_at(member, start, pages, mapping, false, admit),
            Place::Hole { within, hint } => {
                let mut at = self.first_guess(member, within, hint);
                loop {
                    let hole = self
                        .find_hole(member, within, at, pages)
                        .ok_or(MapError::NoHole { pages: pages.get(), within })?;
                    let start = VirtAddr::new((hole as usize) << PAGE_SHIFT);
                    match self.map_at(member, start, pages, mapping, false, admit) {
                        // Somebody was faster: look on from there.
                        Err(MapError::Occupied { .. }) => at = hole,
                        Ok(mapped) => {
                            member.hint = Some(hole + pages.get() as u64);
                            return Ok(mapped);
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
        admit: bool,
    ) -> Result<(PageRange, Result<(), M::Error>), MapError> {
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
        // What the records become is not known before the region is, if there is one, and that is taken under the lock.
        let (plain, object) = parts_of(mapping);
        let doing = if object.is_none() { Doing::Set(plain) } else { Doing::Fault };
        let operation = self.begin(member, doing, pages).map_err(MapError::Held)?;
        let filled = self.map_locked(member, &operation, plain, object, replace, admit);
        if filled.is_err() {
            self.finish(member, &operation);
        } else {
            self.over(member, operation.by);
        }
        filled.map(|filled| (range, filled))
    }

    /// Unlocks, unless it fails.
    fn map_locked(
        &self,
        member: &Member<'m>,
        operation: &Operation,
        plain: Value,
        object: Option<(u64, u64)>,
        replace: bool,
        admit: bool,
    ) -> Result<Result<(), M::Error>, MapError> {
        let found = self.gather(operation, |_| true);
        if let (false, Some(page)) = (replace, found.first_mapped) {
            let taken = VirtAddr::new((page as usize) << PAGE_SHIFT);
            return Err(MapError::Occupied { wanted: range_of(&operation.pages), taken });
        }
        let (me, by, tree) = (&member.handle, operation.by, self.tree());
        tree.narrow(me, by, operation.at, &operation.pages, true)
            .map_err(|_| MapError::NoNodes(self.spaces.nodes.len()))?;
        let (mut value, mut region) = (plain, None);
        if let Some((object, first)) = object {
            let made = self.make_region(member, object, first.wrapping_sub(operation.pages.start))?;
            (value, region) = (plain.with_region(made), Some(self.spaces.region_id(made)));
            let doing = Doing::Set(value);
            self.spaces.intent(by.member).begin(by.operation, doing, self.id, &operation.pages);
        }
        self.shoot(member, &operation.pages, &found.losers, Change::Drop);
        self.commit(member, operation.by);
        let mut filled = Ok(());
        if admit {
            // In the set before the view is filled. What was there is gone for good before it is filled anew.
            if found.first_mapped.is_some() {
                let nothing = Doing::Set(Value::UNMAPPED);
                self.change_records(member, by, operation.at, &operation.pages, nothing);
            }
            self.spaces.intent(by.member).plant(by.operation);
            me.step(Step::Planting);
            tree.plant_all(me, by, operation.at, &operation.pages, value);
            let (range, rights) = (range_of(&operation.pages), value.view_rights());
            filled = self.mmu.fill(self.id, me.id(), range, Contents::Home, rights);
            me.step(Step::Filled);
            tree.unlock(me, by, operation.at, &operation.pages, true);
        } else {
            self.settle(member, operation, Doing::Set(value), &found);
        }
        if let Some(region) = region {
            // The map's own reference: the records have theirs now.
            self.spaces.refcache().add(me, &self.spaces, region, -1);
        }
        Ok(filled)
    }

    /// A new region, with one reference for the caller.
    fn make_region(&self, member: &Member<'m>, object: u64, base: u64) -> Result<u32, MapError> {
        let taken = self.spaces.region_pool(|pool| pool.take(&member.handle));
        let region = taken.ok_or(MapError::NoRegions(self.spaces.region_descriptors.len()))?;
        let descriptor = &self.spaces.region_descriptors[region as usize];
        // Nobody can find the region before a record names it, and that is written with release.
        descriptor.first.store(object, Ordering::Relaxed);
        descriptor.second.store(base, Ordering::Relaxed);
        self.spaces.refcache().add(&member.handle, &self.spaces, self.spaces.region_id(region), 1);
        Ok(region)
    }
}
