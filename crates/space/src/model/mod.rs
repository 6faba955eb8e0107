//! A model of hardware: any number of cores whose TLBs keep stale entries until they are shot down.
//!
//! It is the oracle of this crate's tests. A core reaches memory as hardware does, through its TLB first and the page table
//! then, and nothing but a shootdown takes an entry from a TLB. Each entry remembers which life of its frame it was made for; an
//! access through an entry to a frame that has been given to somebody else is noted as a [violation](ModelMmu::violations).
//!
//! ```
//! use peregrine_space::model::{Delivery, HeapArena, ModelFrames, ModelMmu, Tables};
//! use peregrine_space::{AddressSpace, Backing, Mapping, PageCount, Place, Protection, Sizes, VirtAddr};
//!
//! let arena = HeapArena::new(&Sizes { members: 2, spaces: 1, nodes: 100, regions: 10, frames: 50 });
//! let frames = ModelFrames::new(2, 50);
//! let mmu = ModelMmu::new(&frames, 2, Tables::Views, Delivery::Interrupt);
//! let mut a = arena.spaces().join()?;
//! let mut b = arena.spaces().join()?;
//! let space = AddressSpace::create(&mut a, &mmu, &frames)?;
//!
//! let mapping = Mapping { backing: Backing::Anonymous, rights: Protection::ReadWrite };
//! let addr = VirtAddr::new(0x10_0000);
//! let range = space.map(&mut a, Place::Fixed(addr), PageCount::new(1), &mapping)?;
//! space.store(&mut a, addr, 7)?;
//! assert_eq!(space.load(&mut b, addr)?, 7);
//! space.unmap(&mut b, range)?;
//! assert!(space.load(&mut a, addr).is_err());
//! assert_eq!(mmu.counts().shootdowns, 1, "a's; b's own view needs no interrupt");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod arena;
mod frames;
mod table;

pub use arena::HeapArena;
pub use frames::ModelFrames;
pub use table::Tables;

use crate::desk::Member;
use crate::member::{MemberId, MemberSet};
use crate::mmu::{Change, Contents, Mmu, SpaceId};
use crate::record::Access;
use crate::space::FaultError;
use crate::{AddressSpace, PageRange, Protection, VirtAddr};
use frames::Lives;
use peregrine_base::PAGE_SHIFT;
use peregrine_base::sync::{AtomicBool, Ordering, spin_loop};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::vec::Vec;
use table::{Entry, Translations};

/// How a shootdown reaches another core.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delivery {
    /// At once, whatever the core is doing: an inter-processor interrupt.
    Interrupt,
    /// When the core polls: at its next access, or while it waits for a lock. Cores that are not [running](ModelMmu::run)
    /// are served by whoever shoots.
    Polled,
}

/// A fault planted in the hardware, for tests of tests: whoever checks histories on the model should see them fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Planted {
    /// Other cores are not told what is dropped.
    LostDrops,
    /// Other cores are not told of lowered rights.
    LostRestrictions,
}

/// What was counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Cores interrupted, all shootdowns together; the sender's own view does not count.
    pub shootdowns: u64,
    /// Views filled.
    pub fills: u64,
    /// Page-table pages in use now, upper levels left out.
    pub table_pages: usize,
    /// Most page-table pages at a time.
    pub most_table_pages: usize,
}

/// Simulated cores; member `i` is core `i`.
#[derive(Debug)]
pub struct ModelMmu {
    cores: Vec<Core>,
    tables: Translations,
    delivery: Delivery,
    planted: Option<Planted>,
    gives_up_after: Option<u32>,
    lives: Lives,
}

/// Books are kept behind locks of std, so that a recording of atomics shows the structures under test only.
#[derive(Debug, Default)]
struct Core {
    books: Mutex<Books>,
    tlb: Mutex<HashMap<(SpaceId, u64), Entry>>,
    mail: Mutex<Vec<Request>>,
    running: AtomicBool,
    dead: AtomicBool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Books {
    shootdowns: u64,
    fills: u64,
    violations: u64,
}

#[derive(Clone, Debug)]
struct Request {
    space: SpaceId,
    range: PageRange,
    change: Change,
    done: Arc<AtomicBool>,
}

/// An access did not get through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageFault;

impl ModelMmu {
    /// `cores` cores.
    pub fn new(frames: &ModelFrames, cores: usize, tables: Tables, delivery: Delivery) -> Self {
        Self {
            cores: (0..cores).map(|_| Core::default()).collect(),
            tables: Translations::new(cores, tables),
            delivery,
            planted: None,
            gives_up_after: None,
            lives: frames.lives(),
        }
    }

    /// The same, with a fault.
    #[must_use]
    pub const fn with_fault(mut self, planted: Planted) -> Self {
        self.planted = Some(planted);
        self
    }

    /// The same, whose operations [give up](Mmu::gives_up) waiting for a lock after so many turns.
    #[must_use]
    pub const fn with_patience(mut self, turns: u32) -> Self {
        self.gives_up_after = Some(turns);
        self
    }

    /// What was counted so far.
    pub fn counts(&self) -> Counts {
        let (table_pages, most_table_pages) = self.tables.pages();
        let mut counts = Counts { table_pages, most_table_pages, ..Counts::default() };
        for core in &self.cores {
            let books = lock(&core.books);
            counts.shootdowns += books.shootdowns;
            counts.fills += books.fills;
        }
        counts
    }

    /// Accesses that reached a frame which was no longer the page's.
    pub fn violations(&self) -> u64 {
        self.cores.iter().map(|c| lock(&c.books).violations).sum()
    }

    /// Says whether a thread runs on the core, and so polls. A core that does not run is served by whoever shoots.
    pub fn run(&self, core: MemberId, running: bool) {
        self.cores[core.index()].running.store(running, Ordering::SeqCst);
        if !running {
            self.serve(core);
        }
    }

    /// Says whether the member was killed (the core serves another one later).
    pub fn set_dead(&self, member: MemberId, dead: bool) {
        self.cores[member.index()].dead.store(dead, Ordering::SeqCst);
    }

    /// One access by one core: through its TLB, or its page table. Writes `value` if there is one; returns what was there.
    ///
    /// # Errors
    /// [`PageFault`] if the core's view does not allow it.
    pub fn access(
        &self,
        frames: &ModelFrames,
        space: SpaceId,
        core: MemberId,
        addr: VirtAddr,
        value: Option<u64>,
    ) -> Result<u64, PageFault> {
        self.serve(core);
        let page = (addr.as_usize() >> PAGE_SHIFT) as u64;
        let needed = if value.is_some() { Protection::ReadWrite } else { Protection::Read };
        // Held over the access: an interrupt is taken between two instructions.
        let mut tlb = self.tlb(core);
        let entry = match tlb.get(&(space, page)) {
            Some(entry) if entry.rights >= needed => *entry,
            _ => {
                let walked = self.tables.walk(space, core, page).filter(|e| e.rights >= needed);
                let entry = walked.ok_or(PageFault)?;
                tlb.insert((space, page), entry);
                entry
            }
        };
        if let Contents::Frame(frame) = entry.contents
            && self.lives.of(frame) != entry.life
        {
            lock(&self.cores[core.index()].books).violations += 1;
        }
        Ok(frames.access(entry.contents, page, value))
    }

    fn tlb(&self, core: MemberId) -> MutexGuard<'_, HashMap<(SpaceId, u64), Entry>> {
        lock(&self.cores[core.index()].tlb)
    }

    /// Takes a change from a core's own view.
    fn apply(&self, space: SpaceId, core: MemberId, range: PageRange, change: Change) {
        let pages = pages(range);
        // The table first: or the core could load the entry anew.
        self.tables.change(space, core, &pages, change);
        self.tlb(core).retain(|(s, page), entry| {
            if *s != space || !pages.contains(page) {
                return true;
            }
            match change {
                Change::Drop => false,
                Change::Restrict(rights) => {
                    entry.rights = entry.rights.min(rights);
                    entry.rights > Protection::None
                }
            }
        });
    }

    fn serve(&self, core: MemberId) {
        let mail = {
            let mut mail = lock(&self.cores[core.index()].mail);
            if mail.is_empty() {
                return;
            }
            core::mem::take(&mut *mail)
        };
        for request in mail {
            self.apply(request.space, core, request.range, request.change);
            request.done.store(true, Ordering::Release);
        }
    }
}

fn pages(range: PageRange) -> core::ops::Range<u64> {
    let start = (range.start().as_usize() >> PAGE_SHIFT) as u64;
    start..start + range.pages().get() as u64
}

impl Mmu for ModelMmu {
    type Error = core::convert::Infallible;
    const BLOCK_PAGES: usize = 16;

    fn fill(
        &self,
        space: SpaceId,
        member: MemberId,
        range: PageRange,
        contents: Contents,
        rights: Protection,
    ) -> Result<(), Self::Error> {
        lock(&self.cores[member.index()].books).fills += 1;
        let life = match contents {
            Contents::Frame(frame) => self.lives.of(frame),
            Contents::Home => 0,
        };
        let dropped = self.tables.fill(space, member, &pages(range), Entry { contents, rights, life });
        let mut tlb = self.tlb(member);
        // A replaced entry is invalidated, as every processor wants it.
        tlb.retain(|(s, page), _| {
            *s != space || !(pages(range).contains(page) || dropped.iter().any(|d| d.contains(page)))
        });
        Ok(())
    }

    fn shootdown(&self, space: SpaceId, by: MemberId, range: PageRange, targets: &MemberSet, change: Change) {
        let targets = self.tables.targets(space, &pages(range), targets);
        if targets.contains(by) {
            self.apply(space, by, range, change);
        }
        match (self.planted, change) {
            (Some(Planted::LostDrops), Change::Drop)
            | (Some(Planted::LostRestrictions), Change::Restrict(_)) => return,
            _ => {}
        }
        let others: Vec<MemberId> = targets.iter().filter(|t| *t != by).collect();
        lock(&self.cores[by.index()].books).shootdowns += others.len() as u64;
        if self.delivery == Delivery::Interrupt {
            for target in others {
                // The interrupt's handler runs on the target: what it touches is the target's doing.
                #[cfg(peregrine_record)]
                peregrine_base::sync::record::on_behalf_of(target.index() as u32, || {
                    self.apply(space, target, range, change);
                });
                #[cfg(not(peregrine_record))]
                self.apply(space, target, range, change);
            }
            return;
        }
        let requests: Vec<(MemberId, Request)> = others
            .into_iter()
            .map(|t| (t, Request { space, range, change, done: Arc::new(AtomicBool::new(false)) }))
            .collect();
        for (target, request) in &requests {
            lock(&self.cores[target.index()].mail).push(request.clone());
        }
        while !requests.iter().all(|(_, r)| r.done.load(Ordering::Acquire)) {
            // Two that shoot at each other serve each other.
            self.serve(by);
            for (target, _) in &requests {
                if !self.cores[target.index()].running.load(Ordering::SeqCst) {
                    self.serve(*target);
                }
            }
            std::thread::yield_now();
        }
    }

    fn wait(&self, member: MemberId, _owner: MemberId) {
        self.serve(member);
        std::thread::yield_now();
        spin_loop();
    }

    fn gives_up(&self, _member: MemberId, _owner: MemberId, turns: u32) -> bool {
        self.gives_up_after.is_some_and(|most| turns >= most)
    }

    fn is_dead(&self, member: MemberId) -> bool {
        self.cores[member.index()].dead.load(Ordering::SeqCst)
    }

    fn forget(&self, member: MemberId) {
        self.cores[member.index()].running.store(false, Ordering::SeqCst);
        self.serve(member);
        self.tlb(member).clear();
        self.tables.forget(member);
    }
}

impl<'m> AddressSpace<'m, &ModelMmu, &ModelFrames> {
    /// Reads the word at `addr` as `member`'s core does, faulting as often as it takes.
    ///
    /// # Errors
    /// As [`AddressSpace::fault`].
    pub fn load(
        &self,
        member: &mut Member<'m>,
        addr: VirtAddr,
    ) -> Result<u64, FaultError<core::convert::Infallible>> {
        self.access(member, addr, None)
    }

    /// Writes `value` at `addr` as `member`'s core does; returns what was there.
    ///
    /// # Errors
    /// As [`AddressSpace::fault`].
    pub fn store(
        &self,
        member: &mut Member<'m>,
        addr: VirtAddr,
        value: u64,
    ) -> Result<u64, FaultError<core::convert::Infallible>> {
        self.access(member, addr, Some(value))
    }

    fn access(
        &self,
        member: &mut Member<'m>,
        addr: VirtAddr,
        value: Option<u64>,
    ) -> Result<u64, FaultError<core::convert::Infallible>> {
        loop {
            if let Ok(found) = self.mmu.access(self.frames, self.id, member.id(), addr, value) {
                return Ok(found);
            }
            let access = if value.is_some() { Access::Write } else { Access::Read };
            self.fault(member, addr, access)?;
        }
    }
}

/// A test that dies in the middle of something leaves locks poisoned; the data are consistent all the same.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
