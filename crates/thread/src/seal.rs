//! Sealed pages: what nobody writes need not be compared at each switch.
//!
//! ```text
//!   window      │ unit 0: .data, hot │ unit 1: cold │ unit 2: cold │      whole pages, 64 units at most
//!   `open`                 1                 0              0            one bit a unit, shared with who answers faults
//!                          │                 │
//!               compared when its            write-protected here, and equal to the template:
//!               owner leaves                 nothing to compare, nothing to save
//!
//!   open   ── not written for `patience` reviews ─────────────────────────▶ sealed   [`Seals::review`], between two threads
//!   sealed ── a thread, or the kernel for it, writes: a fault ────────────▶ open     the supervisor marks the unit, then lifts
//!   sealed ── a thread is brought whose own granules lie there ───────────▶ open     [`Seals::open_for`], between two threads
//! ```
//!
//! **The promise**: a unit whose bit is 0 is write-protected in this process and holds the template's bytes. A bit is
//! cleared after the protection is in force, and set before it is lifted, so at any instruction, and after a reset, it holds.
//! Between setting and lifting whoever answers can be held up for long, and the writer need not wait for it: a tick or a reset takes
//! it away. Then the protection of a unit that was sealed anew meanwhile would be lifted: nothing is sealed while somebody answers.
//!
//! Protection is userfaultfd's, with a descriptor that serves the kernel's own writes too (FACTS: a page protected by
//! `mprotect`, or for user code only, makes `read` into a static fail with EFAULT). Such a descriptor takes
//! CAP_SYS_PTRACE, `vm.unprivileged_userfaultfd=1` or `/dev/userfaultfd`; without one every unit stays open and is
//! compared. The faults are answered by another process, for the node's only thread is the one that waits.
//!
//! A fault costs some 50 us, what 3,000 compares of a small program's window cost: a unit is reviewed every few thousand
//! switches, and each fault doubles its patience, so a wrong guess at most doubles what comparing would have cost.
//!
//! Between two threads: no static, no thread-local, no allocation, no panic.

use crate::template::TemplateHeader;
use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_base::{PageRange, Protection, VirtAddr};
use peregrine_sys::mem::{self, MapOptions, Placement, Source};
use peregrine_sys::raw::Errno;
use peregrine_vm::region::{Answered, RawRegion, RawRegionRef, RawTraps};
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd, RawFd};

/// Most units.
const MOST: usize = 64;
/// Most reviews that a unit must go unwritten for.
const MOST_PATIENCE: u16 = 512;
const PAGE: usize = 4096;

/// The units of a window: whole pages, as few to a unit as give at most 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Units {
    start: usize,
    end: usize,
    bytes: usize,
}

impl Units {
    /// Those of this template's window.
    pub const fn of(t: &TemplateHeader) -> Self {
        let start = t.statics_start & !(PAGE - 1);
        let end = (t.statics_start + t.statics_len).next_multiple_of(PAGE);
        Self { start, end, bytes: ((end - start) / PAGE).div_ceil(MOST) * PAGE }
    }

    const fn count(self) -> usize {
        (self.end - self.start).div_ceil(self.bytes)
    }

    /// The bits of all of them.
    pub const fn all(self) -> u64 {
        u64::MAX >> (MOST - self.count())
    }

    /// The unit that holds `addr`.
    pub fn holding(self, addr: usize) -> Option<usize> {
        (self.start..self.end).contains(&addr).then(|| (addr - self.start) / self.bytes)
    }

    /// The pages of unit `i`.
    pub const fn pages(self, i: usize) -> PageRange {
        let start = self.start + i * self.bytes;
        let end = if start + self.bytes < self.end { start + self.bytes } else { self.end };
        PageRange::covering(VirtAddr::new(start), end - start)
    }

    /// The part of the window in units `first..=last`, as offsets in it.
    #[inline(always)]
    pub fn part(self, t: &TemplateHeader, first: usize, last: usize) -> (usize, usize) {
        let before = t.statics_start - self.start;
        let end = ((last + 1) * self.bytes - before).min(t.statics_len);
        ((first * self.bytes).saturating_sub(before), end)
    }

    /// The granules that lie in unit `i`, wholly or in part.
    fn granules(self, t: &TemplateHeader, i: usize) -> u64 {
        let (from, to) = self.part(t, i, i);
        if from >= to {
            return 0;
        }
        (from / t.granule..=(to - 1) / t.granule).fold(0, |m, g| m | 1 << g)
    }
}

/// A node's seals.
#[repr(C)]
pub struct Seals {
    /// One bit a unit: 1, it may differ from the template.
    open: &'static AtomicU64,
    /// Whether somebody answers faults.
    pub answered: &'static AtomicU64,
    /// Whether somebody is answering one now.
    answering: &'static AtomicU64,
    /// What a full `open` is.
    all: u64,
    /// Granules of the units that this node believes sealed; a fault may have opened some since.
    pub sealed_granules: u64,
    /// Granules found written since the last review.
    seen: u64,
    /// Compares until the next review.
    countdown: u32,
    /// Compares between two reviews; 0: nothing is ever sealed.
    every: u32,
    sealed: u64,
    /// The units.
    pub units: Units,
    fd: RawFd,
    clean: [u16; MOST],
    patience: [u16; MOST],
    granules: [u64; MOST],
}

impl Seals {
    /// All units open. `open`, `answered` and `answering` are shared with whoever answers faults; a review comes `every` so many
    /// compares.
    pub fn new(
        t: &TemplateHeader,
        open: &'static AtomicU64,
        answered: &'static AtomicU64,
        answering: &'static AtomicU64,
        every: u32,
    ) -> Self {
        let units = Units::of(t);
        let mut granules = [0; MOST];
        for (i, g) in granules.iter_mut().enumerate().take(units.count()) {
            *g = units.granules(t, i);
        }
        open.store(units.all(), Ordering::Relaxed);
        Self {
            open,
            answered,
            answering,
            all: units.all(),
            sealed_granules: 0,
            seen: 0,
            countdown: every.max(1),
            every,
            sealed: 0,
            units,
            fd: -1,
            clean: [0; MOST],
            patience: [1; MOST],
            granules,
        }
    }

    /// The open units, and whether those are all.
    #[inline(always)]
    pub fn open(&self) -> (u64, bool) {
        // Acquire: pairs with the release in whoever opened a unit for our own write, which it let go on only after.
        let open = self.open.load(Ordering::Acquire);
        (open, open == self.all)
    }

    /// The granules that may differ from the template.
    pub fn open_granules(&self) -> u64 {
        match self.open() {
            (_, true) => u64::MAX,
            (mut open, false) => {
                let mut granules = 0;
                while open != 0 {
                    granules |= self.granules[open.trailing_zeros() as usize % MOST];
                    open &= open - 1;
                }
                granules
            }
        }
    }

    /// Counts a compare that found `written`; `true` when a review is due.
    #[inline(always)]
    pub fn count(&mut self, written: u64) -> bool {
        self.seen |= written;
        self.countdown -= 1;
        self.countdown == 0
    }

    /// Seals units that have gone unwritten for long.
    ///
    /// # Safety
    /// Between two threads, right after a compare of all open units whose result went to [`Seals::count`].
    #[cold]
    #[inline(never)]
    pub unsafe fn review(&mut self) {
        self.countdown = self.every.max(1);
        let seen = core::mem::take(&mut self.seen);
        if self.every == 0 || self.fd < 0 || self.answered.load(Ordering::Acquire) == 0 {
            return;
        }
        // Only a write of this process, which is here, can be answered: so who is not at it now will not begin before the next one.
        // Acquire: pairs with the release after the last answer.
        if self.answering.load(Ordering::Acquire) != 0 {
            return;
        }
        for i in 0..self.units.count() {
            let bit = 1 << i;
            if self.open.load(Ordering::Acquire) & bit == 0 {
                continue;
            }
            if self.sealed & bit != 0 {
                self.note_opened(i);
            }
            if seen & self.granules[i] != 0 {
                self.clean[i] = 0;
                continue;
            }
            self.clean[i] += 1;
            if self.clean[i] < self.patience[i] {
                continue;
            }
            self.clean[i] = 0;
            // Nothing was found written, in the compare just made either: the unit equals the template, and no thread
            // runs that could change it before it is protected.
            if self.region().protect(self.units.pages(i)).is_ok() {
                self.sealed |= bit;
                self.open.fetch_and(!bit, Ordering::Release);
            }
        }
        self.sum_up();
    }

    /// Unit `i` is open again: it was sealed too soon.
    fn note_opened(&mut self, i: usize) {
        self.sealed &= !(1 << i);
        self.patience[i] = (self.patience[i] * 2).min(MOST_PATIENCE);
        self.clean[i] = 0;
    }

    fn sum_up(&mut self) {
        self.sealed_granules = (0..self.units.count())
            .filter(|i| self.sealed >> i & 1 != 0)
            .fold(0, |m, i| m | self.granules[i]);
    }

    /// Opens what the runtime is about to write.
    ///
    /// # Safety
    /// Between two threads.
    #[cold]
    #[inline(never)]
    pub unsafe fn open_for(&mut self, granules: u64) {
        for i in 0..self.units.count() {
            if self.sealed >> i & 1 != 0 && self.granules[i] & granules != 0 {
                if self.open.fetch_or(1 << i, Ordering::Release) & 1 << i == 0 {
                    // What fails here faults at the write, and is answered there.
                    let _ = self.region().unprotect(self.units.pages(i));
                }
                self.note_opened(i);
            }
        }
        self.sum_up();
    }

    fn region(&self) -> RawRegionRef<'_> {
        // SAFETY: `prepare`'s descriptor, kept open for the life of the process. A program that closes foreign
        // descriptors gets an error from the ioctl, for nothing but a userfaultfd knows it.
        RawRegionRef::new(unsafe { BorrowedFd::borrow_raw(self.fd) })
    }

    /// Makes sealing possible in this process: gives the window pages that userfaultfd can protect, and returns the
    /// descriptor, which stays open. `None`: this kernel or this user's rights do not allow it.
    ///
    /// # Safety
    /// Nothing else runs in this process.
    pub unsafe fn prepare(&mut self) -> Option<RawFd> {
        if self.every == 0 {
            return None;
        }
        let traps = RawTraps { answered: Answered::Pager, absent: false, writes: true, shared: false };
        let region = RawRegion::open(traps).ok()?;
        if !region.serves_system_calls() {
            return None;
        }
        let range = PageRange::covering(VirtAddr::new(self.units.start), self.units.end - self.units.start);
        // SAFETY: the pages are this process's own, and nobody writes them meanwhile; whoever is given the descriptor answers.
        unsafe {
            make_anonymous(range).ok()?;
            region.watch(range).ok()?;
        }
        // Kept open for the life of the process: the zygote closes it when the node is gone.
        self.fd = peregrine_sys::descriptors::out_of_the_way(OwnedFd::from(region)).into_raw_fd();
        Some(self.fd)
    }
}

/// Replaces the pages of `range` by anonymous ones of this process with the same bytes, readable and writable, as if every
/// page of a private file mapping had been written. Nobody sees other bytes meanwhile.
///
/// # Safety
/// The range is readable, and written by nobody meanwhile.
unsafe fn make_anonymous(range: PageRange) -> Result<(), Errno> {
    let (pages, write) = (range.pages(), Protection::ReadWrite);
    // SAFETY: a fresh mapping, filled from the caller's range, then moved over it.
    unsafe {
        let fresh = mem::map(pages, write, Source::Anonymous, Placement::Anywhere, MapOptions::default())?;
        let (from, to) = (range.start().as_usize() as *const u8, fresh.start().as_usize() as *mut u8);
        core::ptr::copy_nonoverlapping(from, to, range.len_bytes());
        mem::remap(fresh, pages, Some(range.start())).map(drop).inspect_err(|_| {
            let _ = mem::unmap(fresh);
        })
    }
}

/// Answers a write to a sealed page at `addr` of the process behind `region`, whose `open` word this is. `false`: the
/// process is gone.
pub fn answer(units: Units, open: &AtomicU64, region: RawRegionRef<'_>, addr: usize) -> bool {
    let Some(i) = units.holding(addr) else { return true };
    // Release: pairs with the acquire in `Seals::open`. The writer goes on only after the protection is lifted.
    open.fetch_or(1 << i, Ordering::Release);
    region.unprotect(units.pages(i)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_sealed_while_a_write_is_being_answered() {
        static OPEN: AtomicU64 = AtomicU64::new(0);
        static ANSWERED: AtomicU64 = AtomicU64::new(1);
        static ANSWERING: AtomicU64 = AtomicU64::new(1);
        let (write, pages) = (Protection::ReadWrite, peregrine_base::PageCount::new(4));
        // SAFETY: a new place disturbs nobody.
        let window = unsafe {
            mem::map(pages, write, Source::Anonymous, Placement::Anywhere, MapOptions::default()).unwrap()
        };
        let t = TemplateHeader {
            statics_start: window.start().as_usize(),
            statics_len: window.len_bytes(),
            granule: crate::statics::granule_bytes(window.len_bytes()),
            ..TemplateHeader::default()
        };
        let mut seals = Seals::new(&t, &OPEN, &ANSWERED, &ANSWERING, 1);
        // SAFETY: nobody else knows the window, and nobody writes there.
        unsafe {
            if seals.prepare().is_none() {
                println!("skipped: no userfaultfd that serves the kernel's writes");
                return;
            }
            let mut review = || {
                seals.count(0);
                seals.review();
                seals.open()
            };
            assert!((0..8).all(|_| review().1), "a unit was sealed that an answer is about to open");
            ANSWERING.store(0, Ordering::Release);
            assert_eq!(review(), (0, false));
        }
    }

    #[test]
    fn units_cover_the_window_and_nothing_else() {
        for (start, len) in
            [(0x1c9e80, 2944), (0x1c9e80, 64), (0x1000, 4096), (0x5040, 70 * 4096), (0x5040, 500 * 4096)]
        {
            let t = TemplateHeader {
                statics_start: start,
                statics_len: len,
                granule: crate::statics::granule_bytes(len),
                ..TemplateHeader::default()
            };
            let u = Units::of(&t);
            assert!(u.count() <= 64 && u.all().count_ones() as usize == u.count());
            let (mut at, mut granules) = (0, 0);
            for i in 0..u.count() {
                let (from, to) = u.part(&t, i, i);
                assert_eq!(from, at, "no gap before unit {i} of {len} bytes at {start:#x}");
                assert!(to > from);
                assert_eq!(u.holding(start + from), Some(i));
                assert_eq!(u.holding(start + to - 1), Some(i));
                granules |= u.granules(&t, i);
                at = to;
            }
            assert_eq!(at, len);
            assert_eq!(granules.count_ones() as usize, len.div_ceil(t.granule));
            assert_eq!(u.holding(u.start - 1), None);
            assert_eq!(u.holding(u.end), None);
        }
    }
}
