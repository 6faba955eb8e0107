//! `fault` and `admit`: filling a view.
//!
//! ```text
//!  lock the page ─▶ record allows it? ─▶ has a frame, of its own if it is written? ─▶ set.insert(me) ─▶ fill ─▶ unlock
//! ```
//!
//! A fault changes one record, by one store, so it needs no commit. When a write finds a frame that others have too, the
//! members that have it in view lose it first: from then on they fault, and wait for the lock.
//!
//! Pages that are *home* need no frame and are filled together with those around them that are like them, in a block; their records stay
//! as coarse as they are. What is filled is what is locked.

use super::{AddressSpace, Operation, range_of};
use crate::desk::Member;
use crate::holder::Holder;
use crate::intent::Doing;
use crate::mmu::{Change, Contents, FrameId, Frames, Mmu};
use crate::radix::{PAGES, Spot};
use crate::record::{Access, Kind, Value};
use crate::step::Step;
use core::ops::Range;
use peregrine_base::{PAGE_SHIFT, PageRange, Protection, VirtAddr};

/// Why a fault can't be resolved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FaultError<E: core::fmt::Debug> {
    /// The MMU [gave up](crate::Mmu::gives_up) waiting for a member that holds a lock.
    #[error(
        "waited in vain: {0}; let it go on if it is stopped, or kill it: what a dead member holds is taken over"
    )]
    Held(Holder),
    /// Nothing is mapped there.
    #[error("nothing is mapped at {0}")]
    Unmapped(VirtAddr),
    /// The mapping does not allow it.
    #[error("{access:?} at {addr} is not allowed: its pages are {rights:?}")]
    Denied {
        /// Where.
        addr: VirtAddr,
        /// What was tried.
        access: Access,
        /// What is allowed.
        rights: Protection,
    },
    /// The embedder has no frame left, or not the object's page.
    #[error("no frame for {0}")]
    NoFrame(VirtAddr),
    /// Making the page's record its own needs a node, and the arena has none left.
    #[error("the arena's {0} nodes are in use: make it for more")]
    NoNodes(usize),
    /// The MMU could not fill the view.
    #[error("the view could not be filled: {0:?}")]
    Mmu(E),
}

/// What a fault did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Filled {
    /// The pages now in the member's view.
    pub range: PageRange,
    /// What it shows there.
    pub contents: Contents,
    /// With which rights.
    pub rights: Protection,
}

const fn needed_for(access: Access) -> Protection {
    match access {
        Access::Read => Protection::Read,
        Access::Write => Protection::ReadWrite,
    }
}

impl<'m, M: Mmu, F: Frames> AddressSpace<'m, M, F> {
    /// Resolves a fault of `member`: fills its view so that the access succeeds when it is tried again. A fault that has resolved
    /// itself meanwhile (rights were raised) is filled like any other.
    ///
    /// # Errors
    /// See [`FaultError`]; nothing has changed.
    pub fn fault(
        &self,
        member: &mut Member<'m>,
        addr: VirtAddr,
        access: Access,
    ) -> Result<Filled, FaultError<M::Error>> {
        let page = (addr.as_usize() >> PAGE_SHIFT) as u64;
        if page >= PAGES {
            return Err(FaultError::Unmapped(addr));
        }
        // Of home pages, all that are filled are locked: those around the page that are like it, and that nobody has locked now. What
        // they are may change before the locks are held: then some are locked for nothing, or fewer filled.
        let most = self.mmu.block_pages() as u64;
        let block = page & !(most - 1)..(page & !(most - 1)) + most;
        let is_home = |value: Value| value.kind() == Kind::Home;
        let run = if most > 1 { self.tree().alike(&member.handle, page, &block, is_home) } else { None };
        if let Some(run) = &run
            && let Some(filled) = self.fault_run(member, run, needed_for(access))
        {
            return filled;
        }
        let run = run.unwrap_or(page..page + 1);
        let operation = self.begin(member, Doing::Fault, run).map_err(FaultError::Held)?;
        let result = self.fault_locked(member, &operation, page, addr, access);
        self.finish(member, &operation);
        result
    }

    fn fault_locked(
        &self,
        member: &Member<'m>,
        operation: &Operation,
        page: u64,
        addr: VirtAddr,
        access: Access,
    ) -> Result<Filled, FaultError<M::Error>> {
        let one = page..page + 1;
        let value = self.spot(operation, &one).slot.value();
        if !value.is_mapped() {
            return Err(FaultError::Unmapped(addr));
        }
        let rights = value.rights();
        let needed = needed_for(access);
        if rights < needed {
            return Err(FaultError::Denied { addr, access, rights });
        }
        if value.kind() == Kind::Home {
            return self.fill_home(member, operation, &one, value);
        }
        self.tree()
            .narrow(&member.handle, operation.by, operation.at, &one, true)
            .map_err(|_| FaultError::NoNodes(self.spaces.nodes.len()))?;
        let spot = self.spot(operation, &one);
        let filled = self.with_frame(member, &spot, addr, value, access)?;
        let frame = filled.frame().ok_or(FaultError::NoFrame(addr))?;
        self.tree().admit(&member.handle, spot.slot);
        let (range, contents, rights) = (range_of(&one), Contents::Frame(frame), filled.view_rights());
        self.mmu.fill(self.id, member.id(), range, contents, rights).map_err(FaultError::Mmu)?;
        member.handle.step(Step::Filled);
        Ok(Filled { range, contents, rights })
    }

    /// Gives the page's record a frame that serves the access, if it has none yet.
    fn with_frame(
        &self,
        member: &Member<'m>,
        spot: &Spot<'m>,
        addr: VirtAddr,
        value: Value,
        access: Access,
    ) -> Result<Value, FaultError<M::Error>> {
        let (me, addr, write) = (member.id(), addr.page_floor(), access == Access::Write);
        // An object's frame, and a reference to it.
        let mut borrowed = None;
        let new = match (value.frame(), value.kind()) {
            (Some(shared), _) if value.is_cow() && write => {
                let copy = self.copy(member, addr, shared)?;
                // Whoever has the old frame in view would go on reading what is about to be out of date.
                let losers = spot.slot.members();
                if !losers.is_empty() {
                    let range = range_of(&spot.pages());
                    self.mmu.shootdown(self.id, me, range, &losers, Change::Drop);
                    member.handle.step(Step::ShotDown);
                    spot.slot.clear_members();
                }
                value.with_frame(copy).cow(false)
            }
            (Some(_), _) => return Ok(value),
            (None, Kind::Object) => {
                let (object, base) = self.spaces.region(value);
                let index = base.wrapping_add(spot.pages().start);
                let frame = self.borrow(member, object, index).ok_or(FaultError::NoFrame(addr))?;
                borrowed = Some(frame);
                match (value.is_shared(), write) {
                    (true, _) => value.with_frame(frame),
                    (false, false) => value.with_frame(frame).cow(true),
                    (false, true) => {
                        // The object's frame is only read. If nobody has it, it goes back after a review.
                        let copy = self.copy(member, addr, frame);
                        if copy.is_err() {
                            self.give_back(member, frame);
                        }
                        value.with_frame(copy?)
                    }
                }
            }
            (None, _) => {
                let frame = self.frames.zeroed(self.id, me, addr).ok_or(FaultError::NoFrame(addr))?;
                value.with_frame(frame)
            }
        };
        member.handle.step(Step::FrameTaken);
        self.tree().set(&member.handle, spot, new);
        if let Some(frame) = borrowed {
            self.give_back(member, frame);
        }
        Ok(new)
    }

    /// The frame of an object's page, with a reference. The embedder's cache may have none, so the frame may be under review:
    /// whoever is asked to [`forget`](Frames::forget) it says no once after it was handed out, and by the time of the next review the reference is
    /// known, unless the member was stopped in between, and others went on without it.
    fn borrow(&self, member: &Member<'m>, object: u64, index: u64) -> Option<FrameId> {
        let (me, refcache) = (&member.handle, self.spaces.refcache());
        loop {
            let turn = refcache.enter(me);
            let frame = self.frames.of_object(me.id(), object, index)?;
            refcache.add(me, &self.spaces, self.spaces.frame_id(frame), 1);
            if refcache.is_still_in(me, turn) {
                return Some(frame);
            }
            self.give_back(member, frame);
        }
    }

    fn give_back(&self, member: &Member<'m>, frame: FrameId) {
        self.spaces.refcache().add(&member.handle, &self.spaces, self.spaces.frame_id(frame), -1);
    }

    fn copy(
        &self,
        member: &Member<'m>,
        page: VirtAddr,
        from: FrameId,
    ) -> Result<FrameId, FaultError<M::Error>> {
        self.frames.copied(self.id, member.id(), page, from).ok_or(FaultError::NoFrame(page))
    }

    /// Fills the part of the block around the page that is home, with the same rights and of the same mapping.
    fn fill_home(
        &self,
        member: &Member<'m>,
        operation: &Operation,
        one: &Range<u64>,
        value: Value,
    ) -> Result<Filled, FaultError<M::Error>> {
        let mut run: Option<Range<u64>> = None;
        let mut done = false;
        self.tree().each_locked(operation.by, operation.at, &operation.pages, &mut |spot| {
            let own = spot.pages();
            let own = own.start.max(operation.pages.start)..own.end.min(operation.pages.end);
            if done {
                return;
            }
            if spot.slot.value() != value {
                // A run that ends before the page is not the page's; one beyond it ends the page's.
                done = run.as_ref().is_some_and(|r| r.contains(&one.start));
                if !done {
                    run = None;
                }
                return;
            }
            run = Some(run.as_ref().map_or(own.start, |r| r.start)..own.end);
        });
        let run = run.unwrap_or_else(|| one.clone());
        self.tree().each_locked(operation.by, operation.at, &run, &mut |spot| {
            self.tree().admit(&member.handle, spot.slot);
        });
        let (range, rights) = (range_of(&run), value.rights());
        self.mmu.fill(self.id, member.id(), range, Contents::Home, rights).map_err(FaultError::Mmu)?;
        member.handle.step(Step::Filled);
        Ok(Filled { range, contents: Contents::Home, rights })
    }

    /// Enters `member` in the sets of all [`Home`](crate::Backing::Home) records in `range` and fills its view of them, as faults
    /// would one by one: for memory that the kernel itself fills on demand, whose faults nobody sees.
    ///
    /// # Errors
    /// [`FaultError::Mmu`] if the MMU could not fill; what it filled before stays filled.
    pub fn admit(&self, member: &mut Member<'m>, range: PageRange) -> Result<(), FaultError<M::Error>> {
        let bad = FaultError::Unmapped(range.start());
        let pages = super::pages_of(range).ok_or(bad)?;
        if pages.is_empty() {
            return Ok(());
        }
        let operation = self.begin(member, Doing::Fault, pages).map_err(FaultError::Held)?;
        let mut result = Ok(());
        let me = &*member;
        // Neighbours are filled at once: for most MMUs a call for each record costs more than the record.
        let mut run: Option<(Range<u64>, Protection)> = None;
        let mut fill = |run: Option<(Range<u64>, Protection)>| {
            let Some((pages, rights)) = run else { return };
            if result.is_ok() {
                let filled = self.mmu.fill(self.id, me.id(), range_of(&pages), Contents::Home, rights);
                result = filled.map_err(FaultError::Mmu);
                me.handle.step(Step::Filled);
            }
        };
        self.tree().each_locked(operation.by, operation.at, &operation.pages, &mut |spot| {
            let value = spot.slot.value();
            if !value.is_mapped() || value.kind() != Kind::Home {
                return;
            }
            let own = spot.pages();
            let own = own.start.max(operation.pages.start)..own.end.min(operation.pages.end);
            // In the set before the view is filled. Should the filling of others fail, it is in the set for nothing.
            self.tree().admit(&me.handle, spot.slot);
            match &mut run {
                Some((pages, rights)) if pages.end == own.start && *rights == value.rights() => {
                    pages.end = own.end;
                }
                other => fill(other.replace((own, value.rights()))),
            }
        });
        fill(run);
        self.finish(member, &operation);
        result
    }

    /// The slot that holds a page which the operation has locked.
    fn spot(&self, operation: &Operation, one: &Range<u64>) -> Spot<'m> {
        let mut found = None;
        self.tree().each_locked(operation.by, operation.at, one, &mut |spot| found = Some(spot));
        found.expect("the operation has locked the page")
    }
}
