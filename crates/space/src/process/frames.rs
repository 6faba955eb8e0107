//! The frames of a region. In one linear mapping an address names one frame, so frames are not handed out: they are used
//! again at their home address, by whoever maps that address next.
//!
//! ```text
//!            open                  vacated                     open by the next owner
//!   CLEAN ─────────▶ USED ───────────────────▶ STALE ──────────────────────────▶ USED
//!     ▲                 vacated, many pages:     zeroed through the alias first
//!     └──────────────── punched out ◀──────────────── trim
//! ```
//!
//! * **The alias** is a second mapping of the memfd, always open, which only this file touches.
//! * **A frame is zeroed between owners** (S2): lazily, when the next one opens it, for then it is warm when it is used.
//!   Runs of [`PUNCH_PAGES`] and more are punched out when they are vacated: the memory goes back to the kernel.
//! * **Unacknowledged.** A member that did not close its view in time (it is stopped) may still reach a frame. The frame is
//!   punched out, which takes it out of every page table, and the page's word names the member: nobody may open the page
//!   before that member has dropped its view, or died.
//!
//! A state is written before the view changes when it grows worse (USED before open), and after the bytes changed when it grows
//! better (CLEAN after punching): whoever is killed in between leaves a page that is zeroed once too often.

use super::liveness;
use super::table::{Table, members_in};
use core::ops::Range;
use peregrine_base::sync::Ordering;
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::mem::{self, MapOptions, Placement, Source};
use peregrine_sys::memfd;
use peregrine_sys::raw::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

/// No frame, or one of zeros.
const CLEAN: u8 = 0;
/// May hold its owner's bytes.
const USED: u8 = 1;
/// May hold the bytes of somebody who is gone.
const STALE: u8 = 2;
/// Beside the above: written since it was last asked for (tracked regions).
const WRITTEN: u8 = 0x80;
const STATE: u8 = 0x7f;

/// Runs of so many pages are given back when they are vacated. Punching costs about 2.4 µs and the next touch a new frame;
/// zeroing about 0.1 µs a page: but memory that nobody uses should not be kept.
pub const PUNCH_PAGES: usize = 64;

/// A page can't be opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    /// Somebody may still reach its frame.
    #[error(
        "{page} was unmapped while the members {members:#b} did not answer (they are stopped): it is free again when they \
         go on or die; map elsewhere"
    )]
    Unacknowledged {
        /// The page.
        page: VirtAddr,
        /// One bit for each member that has not dropped its view.
        members: u64,
    },
    /// The kernel refused to free or to make a frame.
    #[error("frames of {range:?}: {errno}; is the memory limit reached?")]
    Kernel {
        /// Which pages.
        range: PageRange,
        /// What it answered.
        errno: Errno,
    },
}

/// One process's access to the frames. Everything is trap code but the making (S3).
#[derive(Debug)]
pub(crate) struct Frames {
    table: Table,
    alias: PageRange,
    fd: RawFd,
}

impl Frames {
    /// Maps the alias of the memfd `fd`, which stays open as long as the value.
    pub(crate) fn new(table: Table, fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let source = Source::Shared(fd, PageCount::new(0));
        let options = MapOptions { no_reserve: true, ..MapOptions::default() };
        // SAFETY: a new mapping at a place of the kernel's choice.
        let alias = unsafe {
            mem::map(table.region().pages(), Protection::ReadWrite, source, Placement::Anywhere, options)?
        };
        // SAFETY: a child has no use for it.
        let _ = unsafe { mem::advise(alias, mem::Advice::DontFork) };
        Ok(Self { table, alias, fd: fd.as_raw_fd() })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as `self` (`new`).
        unsafe { BorrowedFd::borrow_raw(self.fd) }
    }

    #[inline]
    fn alias_of(&self, index: usize) -> *mut u8 {
        VirtAddr::new(self.alias.start().as_usize() + index * PAGE_SIZE).as_ptr()
    }

    fn page(&self, index: usize) -> VirtAddr {
        VirtAddr::new(self.table.region().start().as_usize() + index * PAGE_SIZE)
    }

    /// Makes the pages of `range` fit to be opened by a new owner's member: stale ones are zeroed. With `present`, absent ones
    /// get a frame, so that they can be mapped. Under the range's lock.
    #[inline]
    pub(crate) fn prepare(&self, range: PageRange, present: bool) -> Result<(), FrameError> {
        let indices = self.table.indices(range);
        let (states, unacked) = (self.table.states(), self.table.unacked());
        // The first page that is not zeroed yet, nor found to need it not.
        let mut first = indices.start;
        for index in indices.clone() {
            // Relaxed, here and below: written under the range's lock only, which orders them. (Bits of `unacked` are taken
            // away by anybody at any time, which only makes this check milder.)
            if unacked[index].load(Ordering::Relaxed) != 0 {
                self.check_acknowledged(index)?;
            }
            let state = &states[index];
            match state.load(Ordering::Relaxed) & STATE {
                USED => {}
                STALE => continue,
                _ if present => continue,
                _ => state.store(USED, Ordering::Relaxed),
            }
            self.zero(first..index);
            first = index + 1;
        }
        self.zero(first..indices.end);
        Ok(())
    }

    /// Zeroes frames, which are used from then on; a run at once, for each call takes as long as half a page.
    #[inline]
    fn zero(&self, indices: Range<usize>) {
        if indices.is_empty() {
            return;
        }
        // SAFETY: pages of the alias, which nobody else refers to (S1); in a space without memory this raises SIGBUS, as
        // any touch of a memfd does.
        unsafe { self.alias_of(indices.start).write_bytes(0, indices.len() * PAGE_SIZE) };
        for state in &self.table.states()[indices] {
            state.store(USED, Ordering::Relaxed);
        }
    }

    #[cold]
    fn check_acknowledged(&self, index: usize) -> Result<(), FrameError> {
        let word = &self.table.unacked()[index];
        let members = word.load(Ordering::Acquire);
        let mut left = 0;
        for member in members_in(members) {
            let record = self.table.member(member);
            if !record.has_flushed() && liveness::may_run_again(record) {
                left |= member.bit();
            }
        }
        word.fetch_and(!(members & !left), Ordering::AcqRel);
        if left == 0 {
            return Ok(());
        }
        Err(FrameError::Unacknowledged { page: self.page(index), members: left })
    }

    /// The owner of `range` is gone and no view that answered shows it. Under the range's lock.
    #[inline]
    pub(crate) fn vacated(&self, range: PageRange) {
        if range.pages().get() >= PUNCH_PAGES && self.punch(range).is_ok() {
            return;
        }
        for state in &self.table.states()[self.table.indices(range)] {
            if state.load(Ordering::Relaxed) & STATE == USED {
                state.store(STALE, Ordering::Relaxed);
            }
        }
    }

    fn punch(&self, range: PageRange) -> Result<(), Errno> {
        let first = self.table.indices(range).start;
        memfd::punch(self.fd(), PageCount::new(first), range.pages())?;
        for index in self.table.indices(range) {
            self.table.states()[index].store(CLEAN, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Takes the frames of `range` out of every page table, for `members` did not answer; they are named at each page. With
    /// `keep`, the contents are moved to new frames: nobody writes them meanwhile, for the others have closed their views and
    /// `members` can't run before they have closed theirs. Under the range's lock.
    #[cold]
    pub(crate) fn cut_off(&self, range: PageRange, members: u64, keep: bool) -> Result<(), Errno> {
        let indices = self.table.indices(range);
        for index in indices.clone() {
            self.table.unacked()[index].fetch_or(members, Ordering::AcqRel);
        }
        if !keep {
            return self.punch(range);
        }
        for index in indices {
            if self.table.states()[index].load(Ordering::Relaxed) & STATE == USED {
                let mut bytes = [0u8; PAGE_SIZE];
                // SAFETY: a page of the alias and a local; a page that is punched reads as zeros, and is written anew.
                unsafe {
                    core::ptr::copy_nonoverlapping(self.alias_of(index), bytes.as_mut_ptr(), PAGE_SIZE);
                    memfd::punch(self.fd(), PageCount::new(index), PageCount::new(1))?;
                    core::ptr::copy_nonoverlapping(bytes.as_ptr(), self.alias_of(index), PAGE_SIZE);
                }
            }
        }
        Ok(())
    }

    /// Gives the memory of stale pages in `range` back to the kernel; returns how many. Under the range's lock.
    pub(crate) fn trim(&self, range: PageRange) -> Result<PageCount, Errno> {
        let mut freed = 0;
        let mut run: Option<(usize, usize)> = None;
        let indices = self.table.indices(range);
        for index in indices.start..=indices.end {
            let stale =
                index < indices.end && self.table.states()[index].load(Ordering::Relaxed) & STATE == STALE;
            run = match (run, stale) {
                (Some((first, count)), true) => Some((first, count + 1)),
                (None, true) => Some((index, 1)),
                (Some((first, count)), false) => {
                    self.punch(PageRange::new(self.page(first), PageCount::new(count)))?;
                    freed += count;
                    None
                }
                (None, false) => None,
            };
        }
        Ok(PageCount::new(freed))
    }

    /// Pages of `range` that were written.
    pub(crate) fn note_written(&self, range: PageRange) {
        for index in self.table.indices(range) {
            self.table.states()[index].fetch_or(WRITTEN, Ordering::AcqRel);
        }
    }

    /// Takes the marks that [`Frames::note_written`] left.
    pub(crate) fn take_written(&self, range: PageRange, mut found: impl FnMut(VirtAddr)) {
        for index in self.table.indices(range) {
            let state = &self.table.states()[index];
            if state.load(Ordering::Relaxed) & WRITTEN != 0
                && state.fetch_and(!WRITTEN, Ordering::AcqRel) & WRITTEN != 0
            {
                found(self.page(index));
            }
        }
    }

    /// Whether nobody is named at the pages of `range`.
    pub(crate) fn check_range(&self, range: PageRange) -> Result<(), FrameError> {
        for index in self.table.indices(range) {
            if self.table.unacked()[index].load(Ordering::Relaxed) != 0 {
                self.check_acknowledged(index)?;
            }
        }
        Ok(())
    }

    /// Frames that the memfd holds.
    pub(crate) fn resident(&self) -> PageCount {
        let mut count = 0;
        memfd::for_each_data(self.fd(), PageCount::new(0), self.table.region().pages(), |_| count += 1);
        PageCount::new(count)
    }

    /// A copy of the page at `page`, whoever may see it: for checks.
    pub(crate) fn peek(&self, page: VirtAddr) -> [u8; PAGE_SIZE] {
        let index = self.table.indices(PageRange::new(page.page_floor(), PageCount::new(1))).start;
        let mut bytes = [0; PAGE_SIZE];
        // SAFETY: a page of the alias; others may write it meanwhile, so nothing is made of it but a copy (S1).
        unsafe { core::ptr::copy_nonoverlapping(self.alias_of(index), bytes.as_mut_ptr(), PAGE_SIZE) };
        bytes
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        // SAFETY: only this value refers to the alias.
        let _ = unsafe { mem::unmap(self.alias) };
    }
}
