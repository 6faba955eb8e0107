//! The memory of a space, made once and inherited by every process that will be a member.
//!
//! ```text
//!   creator ── Ground: │ table (shared, mapped) │ frames (memfd, not mapped) │ region (addresses reserved, no access) │
//!      └ fork ─▶ member: takes a place in the table, maps the frames over the reservation, all closed
//! ```
//!
//! Fork members from a process that has not joined: in a member the region is not inherited by children
//! (`MADV_DONTFORK`: a child would reach frames that nobody could take from it), so there its addresses may be taken by
//! then, and joining fails and says so.

use super::frames::Frames;
use super::joined;
use super::liveness::{self, Vigour};
use super::mine::Mine;
use super::seat::{OPEN_PAGES, Seat};
use super::table::{Life, MEMBERS, MemberIndex, Shape, Table, Who};
use super::view::{Filling, View, ViewError};
use peregrine_base::sync::{AtomicU32, Ordering};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::mem::{self, MapOptions, Placement, Source};
use peregrine_sys::raw::Errno;
use peregrine_sys::{memfd, other, process};
use std::boxed::Box;
use std::os::fd::{AsFd, OwnedFd};

/// What a space is to be.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Pages of the region: addresses, and at most so many frames.
    pub pages: PageCount,
    /// Who fills them.
    pub filling: Filling,
    /// Where the region lies; `None`: wherever the creator finds room.
    pub at: Option<VirtAddr>,
}

/// A space could not be made.
#[derive(Debug, thiserror::Error)]
pub enum GroundError {
    /// No memfd.
    #[error("no shared memory for {what} ({pages} pages): {errno}; is memfd_create allowed, and RLIMIT_AS large enough?", pages = pages.get())]
    Memory {
        /// For what.
        what: &'static str,
        /// How much.
        pages: PageCount,
        /// What the kernel answered.
        errno: Errno,
    },
    /// A region without pages.
    #[error("a region has at least one page")]
    Empty,
}

/// A process could not become a member.
#[derive(Debug, thiserror::Error)]
pub enum GroundJoinError {
    /// Its view.
    #[error(transparent)]
    View(#[from] ViewError),
    /// Its access to the frames.
    #[error("the frames can't be mapped: {0}; is RLIMIT_AS large enough, and the kernel 4.14 or later?")]
    Alias(Errno),
    /// No signal handler.
    #[error(
        "the signals of a member can't be caught: {0}; a seccomp filter forbids rt_sigaction or sigaltstack"
    )]
    Signal(Errno),
    /// A place beyond the table.
    #[error("member number {index}: a space of processes has at most {MEMBERS} members")]
    TooMany {
        /// The number.
        index: usize,
    },
    /// This process is a member of too many spaces.
    #[error("this process is a member of {0} spaces already")]
    TooManySpaces(usize),
}

/// The memory of a space, and who sits in it.
#[derive(Debug)]
pub struct Ground {
    frames: OwnedFd,
    _table: OwnedFd,
    pub(crate) table: Table,
    pub(crate) filling: Filling,
    /// The process that replaced the reservation by a view, 0 if none did: its children have a hole there.
    replaced_by: AtomicU32,
}

fn reserve_options() -> MapOptions {
    MapOptions { no_reserve: true, ..MapOptions::default() }
}

fn reserve_at(pages: PageCount, place: Placement) -> Result<PageRange, Errno> {
    // SAFETY: a new mapping, which replaces nothing.
    unsafe { mem::map(pages, Protection::None, Source::Anonymous, place, reserve_options()) }
}

/// Addresses that begin where a page of the page table does, so that the records of an aligned part of the region lie in one node, and its
/// page-table entries in one page.
fn reserve_aligned(pages: PageCount) -> Result<PageRange, Errno> {
    let more = reserve_at(PageCount::new(pages.get().saturating_add(OPEN_PAGES)), Placement::Anywhere)?;
    let align = OPEN_PAGES * PAGE_SIZE;
    let start = VirtAddr::new(more.start().as_usize().next_multiple_of(align));
    let region = PageRange::new(start, pages);
    for (from, to) in [(more.start(), region.start()), (region.end(), more.end())] {
        let rest = PageRange::covering(from, to.as_usize() - from.as_usize());
        if !rest.is_empty() {
            // SAFETY: a part of the reservation, of which nobody knows yet.
            unsafe { mem::unmap(rest) }?;
        }
    }
    Ok(region)
}

impl Ground {
    /// Makes the memory, with `pool` pages beside it for whoever keeps the records ([`Ground::pool`]).
    ///
    /// # Errors
    /// [`GroundError`].
    pub fn new(config: Config, pool: PageCount) -> Result<Self, GroundError> {
        if config.pages.get() == 0 {
            return Err(GroundError::Empty);
        }
        let table_pages = PageCount::for_bytes(Table::overhead_bytes(config.pages.get()) + pool.bytes());
        let memory = |what, pages| move |errno| GroundError::Memory { what, pages, errno };
        let frames = memfd::create(c"peregrine-space", config.pages, memfd::Pages::Base)
            .map_err(memory("the region", config.pages))?;
        memfd::seal_size(&frames).map_err(memory("the region", config.pages))?;
        let table_fd = memfd::create(c"peregrine-space-table", table_pages, memfd::Pages::Base)
            .map_err(memory("the table", table_pages))?;
        memfd::seal_size(&table_fd).map_err(memory("the table", table_pages))?;
        let source = Source::Shared(table_fd.as_fd(), PageCount::new(0));
        // SAFETY: new mappings, which replace nothing.
        let (table, region) = unsafe {
            let table =
                mem::map(table_pages, Protection::ReadWrite, source, Placement::Anywhere, reserve_options())
                    .map_err(memory("the table", table_pages))?;
            let region = match config.at {
                Some(at) => reserve_at(config.pages, Placement::At(at)),
                None => reserve_aligned(config.pages),
            };
            let region = region.map_err(|e| {
                let _ = mem::unmap(table);
                memory("the region's addresses", config.pages)(e)
            })?;
            (table, region)
        };
        // SAFETY: the table was mapped above, zeros, with room for what `overhead_bytes` counts; it is unmapped in `drop`.
        let table = unsafe { Table::new(Shape { region, table }) };
        Ok(Self { frames, _table: table_fd, table, filling: config.filling, replaced_by: AtomicU32::new(0) })
    }

    /// The region: its addresses mean the same in every member.
    pub fn region(&self) -> PageRange {
        self.table.region()
    }

    /// Shared memory for records, zeros at first, mapped in every process that inherits the ground.
    pub fn pool(&self) -> PageRange {
        self.table.pool()
    }

    /// Who fills the region's pages.
    pub const fn filling(&self) -> Filling {
        self.filling
    }

    /// Takes a place for this process, before it claims the same place in the structures: free ones, and those of dead processes
    /// that the structures know to be free (`is_free`). So whoever has a place in the structures is always named here, at whatever
    /// instruction it dies.
    pub(crate) fn reserve(&self, is_free: impl Fn(usize) -> bool) -> Option<usize> {
        let pid = process::pid() as u32;
        (0..MEMBERS).find(|&index| {
            let record = self.table.member(MemberIndex(index as u8));
            let who = record.who();
            let gone = who.pid() == 0 || liveness::of(record) == Vigour::Gone;
            if !gone || !is_free(index) {
                return false;
            }
            let joining = Who::new(pid, who.generation().wrapping_add(1), Life::Joining);
            record.born.store(0, Ordering::Relaxed);
            record.polls.store(0, Ordering::Relaxed);
            // AcqRel: what the last member of this place did is seen. One that is dead can't claim the place any more, so
            // it is still free.
            record.who.compare_exchange(who.0, joining.0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })
    }

    /// Gives a reserved place back.
    pub(crate) fn release(&self, index: usize) {
        let record = self.table.member(MemberIndex(index as u8));
        let generation = record.who().generation();
        record.who.store(Who::new(0, generation, Life::Free).0, Ordering::Release);
    }

    /// Makes the calling process the member at `index`, which nobody else has: the caller sees to that by a protocol of its
    /// own. Its view is all closed. The process is single-threaded as far as the region is concerned.
    ///
    /// # Errors
    /// [`GroundJoinError`].
    pub fn join(&self, index: usize) -> Result<Box<Seat>, GroundJoinError> {
        if index >= MEMBERS {
            return Err(GroundJoinError::TooMany { index });
        }
        let index = MemberIndex(index as u8);
        let record = self.table.member(index);
        let pid = process::pid() as u32;
        let before = record.who();
        let joining = Who::new(pid, before.generation().wrapping_add(1), Life::Joining);
        record.born.store(0, Ordering::Relaxed);
        // AcqRel: what the last member of this place did is seen.
        record.who.swap(joining.0, Ordering::AcqRel);
        record.born.store(other::stat(pid).map_or(0, |s| s.born), Ordering::Relaxed);
        let made = self.make_seat(index);
        match made {
            Ok(seat) => {
                // The view is new, all closed.
                record.flushed.store(record.overdue.load(Ordering::Acquire), Ordering::Release);
                let live = Who::new(pid, joining.generation(), Life::Live);
                record.who.store(live.0, Ordering::Release);
                if let Err(e) = joined::add(&seat) {
                    self.leave(seat);
                    return Err(e);
                }
                // Whoever took the last member of this place for alive waits for an answer.
                seat.poll();
                Ok(seat)
            }
            Err(e) => {
                record.who.store(Who::new(0, joining.generation(), Life::Free).0, Ordering::Release);
                Err(e)
            }
        }
    }

    fn make_seat(&self, index: MemberIndex) -> Result<Box<Seat>, GroundJoinError> {
        // The view first: in a child of a member the kernel may give its addresses to any other mapping.
        let reserved = self.holds_addresses();
        let view = View::new(self.frames.as_fd(), self.region(), reserved, self.filling)?;
        self.replaced_by.store(process::pid() as u32, Ordering::Relaxed);
        let frames = Frames::new(self.table, self.frames.as_fd()).map_err(GroundJoinError::Alias)?;
        let mine = Mine::new().map_err(GroundJoinError::Alias)?;
        Ok(Seat::new(self.table, index, view, frames, mine))
    }

    /// Ends a membership: nothing of the region is reachable here any more.
    pub fn leave(&self, seat: Box<Seat>) {
        if !seat.is_mine() {
            // A child of the member: the view and the place are the parent's.
            core::mem::forget(seat);
            return;
        }
        joined::remove(&seat);
        seat.close_pidfds();
        let record = self.table.member(seat.index);
        let generation = record.who().generation();
        drop(seat);
        // Only now, with the view gone, may others stop asking.
        record.who.store(Who::new(0, generation, Life::Free).0, Ordering::Release);
    }

    /// Whether the region's addresses are this process's: by the reservation, or by a view that took its place here.
    fn holds_addresses(&self) -> bool {
        let by = self.replaced_by.load(Ordering::Relaxed);
        by == 0 || by == process::pid() as u32
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // SAFETY: nobody in this process uses the table or the reservation any more: members borrow the ground.
        unsafe {
            let _ = mem::unmap(self.table.whole());
            if self.holds_addresses() {
                let _ = mem::unmap(self.table.region());
            }
        }
    }
}
