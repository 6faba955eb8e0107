//! DIRTY as two descriptors and nothing else, for runtimes that ask where nothing of the program may be touched: between
//! two threads, in a signal handler, in a process that was just forked. **No allocator, lock, static or thread-local.**
//!
//! ```text
//!   open ─▶ watch(range), …        once, in the process whose writes are to be seen
//!   arm(part)                      its pages count as clean from now on; without it every page counts as written once
//!   take_into(part, &mut [run])    written since the last time, and clean again; stops when the buffer is full
//!   mark_written(part)             the other way: reported by the next take
//! ```
//!
//! [`Tracker`](super::Tracker) stands on this one for `AsyncWriteProtect`, and adds what this one leaves to its caller: who
//! owns the range, that nobody else tracks it, and that a forked child must not use it.

use super::TrackError;
use peregrine_base::{PageCount, PageRange};
use peregrine_sys::pagemap::{Categories, PageRegion, Pagemap, PagemapRef, ScanArgs};
use peregrine_sys::raw::Errno;
use peregrine_sys::uffd::{Features, RegisterMode, Uffd, UffdRef};
use std::os::fd::{BorrowedFd, OwnedFd};

/// Consecutive pages that were written. Three words that mean the same in every process, so that a report may be left in
/// shared memory.
pub type DirtyRun = PageRegion;

/// How far a [`RawTrackerRef::take_into`] came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken {
    /// Entries of the buffer that were written.
    pub runs: usize,
    /// What was not looked at, because the buffer was full; empty at the end.
    pub rest: PageRange,
}

/// The two descriptors. Dropping it ends the tracking of everything it watches.
///
/// ```
/// use peregrine_vm::dirty::{DirtyRun, RawTracker};
/// use peregrine_vm::{Mapping, PageCount};
/// let memory = Mapping::memfd(PageCount::new(8))?;
/// let Ok(tracker) = RawTracker::open() else { return Ok(()) }; // a kernel before 6.7, or no userfaultfd
/// // SAFETY: the mapping is ours, lives longer than the tracker, and nothing else tracks it.
/// unsafe { tracker.watch(memory.range())? };
/// tracker.by_ref().arm(memory.range())?;
/// memory.bytes().store_u8(3 * 4096, 1)?;
/// let mut found = [DirtyRun::default(); 4];
/// let taken = tracker.by_ref().take_into(memory.range(), &mut found)?;
/// assert_eq!((taken.runs, found[0].range()), (1, memory.pages(3, 1)?));
/// assert!(taken.rest.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct RawTracker {
    uffd: Uffd,
    pagemap: Pagemap,
}

impl RawTracker {
    /// What every kernel that has `PAGEMAP_SCAN` has too.
    const FEATURES: Features = Features::WP_ASYNC
        .union(Features::PAGEFAULT_FLAG_WP)
        .union(Features::WP_HUGETLBFS_SHMEM)
        .union(Features::WP_UNPOPULATED);

    /// Opens both, for the calling process's memory.
    ///
    /// # Errors
    /// [`TrackError::Open`]: no userfaultfd, or a kernel before 6.7. [`TrackError::Pagemap`].
    pub fn open() -> Result<Self, TrackError> {
        Self::over(Uffd::open(Self::FEATURES)?)
    }

    /// Over a descriptor that was made with `WP_ASYNC`.
    pub(super) fn over(uffd: Uffd) -> Result<Self, TrackError> {
        let pagemap = Pagemap::open().map_err(TrackError::Pagemap)?;
        Ok(Self { uffd, pagemap })
    }

    /// Begins to watch `range`: each of its pages counts as written until it was taken or armed once.
    ///
    /// # Errors
    /// [`TrackError::Kernel`]: EBUSY, another userfaultfd has it; EPERM, a shared mapping of a file that may not be written.
    ///
    /// # Safety
    /// The caller owns the mappings in `range`, which stay while this value lives, and nobody else write-protects them.
    /// No guard is laid over a shared page of it before [`RawTrackerRef::mark_written`]: the kernel would livelock.
    pub unsafe fn watch(&self, range: PageRange) -> Result<(), TrackError> {
        // SAFETY: the caller owns the range. Asynchronous write-protect never traps anybody.
        unsafe { self.uffd.by_ref().register(range, RegisterMode::WP) }.map(drop).map_err(|errno| {
            TrackError::Kernel {
                operation: "userfaultfd registration",
                range,
                errno,
                remedy: "EBUSY: another userfaultfd has it; EPERM: a shared mapping of a file that may not be written; else use DirtyMechanism::Mprotect",
            }
        })
    }

    /// Ends the watching of `range`; its protection is lifted.
    pub(super) fn unwatch(&self, range: PageRange) {
        // Fails only if the range is gone.
        let _ = self.uffd.by_ref().unregister(range);
    }

    /// A copyable view that makes the calls.
    pub fn by_ref(&self) -> RawTrackerRef<'_> {
        RawTrackerRef { uffd: self.uffd.by_ref(), pagemap: self.pagemap.by_ref(), pool: false }
    }

    /// The userfaultfd and the pagemap, for a runtime that keeps them by number; [`RawTrackerRef::new`] makes them useful
    /// again. Closing the first ends the tracking.
    pub fn into_fds(self) -> (OwnedFd, OwnedFd) {
        (self.uffd.into(), self.pagemap.into())
    }
}

/// A borrowed [`RawTracker`]. To be used in the process that opened it: in another one the calls would act on the opener's
/// memory.
#[derive(Clone, Copy, Debug)]
pub struct RawTrackerRef<'a> {
    uffd: UffdRef<'a>,
    pagemap: PagemapRef<'a>,
    pool: bool,
}

impl<'a> RawTrackerRef<'a> {
    /// Of the descriptors that [`RawTracker::into_fds`] gave. With any others the calls fail.
    pub const fn new(uffd: BorrowedFd<'a>, pagemap: BorrowedFd<'a>) -> Self {
        Self { uffd: UffdRef::new(uffd), pagemap: PagemapRef::new(pagemap), pool: false }
    }

    /// For memory from the huge page pool: pages that are not in the page table count as written, for when one is evicted
    /// (`MADV_DONTNEED`) Linux 6.18 forgets that it was.
    #[must_use]
    pub const fn of_pool(self, pool: bool) -> Self {
        Self { pool, ..self }
    }

    /// Every page of `part` counts as clean from now on (about 40 ns a page the first time).
    ///
    /// # Errors
    /// ENOENT: `part` is not watched. EAGAIN: the address space is changing; call again.
    pub fn arm(self, part: PageRange) -> Result<(), Errno> {
        self.uffd.write_protect(part, true)
    }

    /// Every page of `part` counts as written, and is not write-protected: a guard may be laid over it.
    ///
    /// # Errors
    /// As [`RawTrackerRef::arm`].
    pub fn mark_written(self, part: PageRange) -> Result<(), Errno> {
        self.uffd.write_protect(part, false)
    }

    /// DIRTY of `part`: writes the runs of pages written since they were last taken or armed into `into`, lowest first, and
    /// makes them clean, each in one step of the kernel. When `into` is full, what it did not reach is
    /// [`Taken::rest`], and stays as it is.
    ///
    /// # Errors
    /// EPERM: a mapping in `part` is not watched. ENOTTY: not a pagemap, or a kernel before 6.7.
    #[inline]
    pub fn take_into(self, part: PageRange, into: &mut [DirtyRun]) -> Result<Taken, Errno> {
        let args = match self.pool {
            false => ScanArgs::take_written(part),
            true => ScanArgs::take_written_or_absent(part),
        };
        let mut taken = self.scan(part, args, into)?;
        if self.pool {
            taken.runs = keep_written(into, taken.runs);
        }
        Ok(taken)
    }

    /// As [`RawTrackerRef::take_into`], without the pages behind a guard, which else count as written: they are not
    /// write-protected. Before Linux 6.15, which tells guards from pages, only pages that are in memory are found.
    ///
    /// # Errors
    /// As [`RawTrackerRef::take_into`].
    pub fn take_unguarded_into(self, part: PageRange, into: &mut [DirtyRun]) -> Result<Taken, Errno> {
        self.scan_unguarded(part, ScanArgs::take_written(part), into)
    }

    /// As [`RawTrackerRef::take_unguarded_into`], leaving everything as it is: what is found now is found again by the next
    /// call. For a range that is about to be unmapped or guarded.
    ///
    /// # Errors
    /// As [`RawTrackerRef::take_into`].
    pub fn peek_unguarded_into(self, part: PageRange, into: &mut [DirtyRun]) -> Result<Taken, Errno> {
        let args = ScanArgs { write_protect: false, ..ScanArgs::take_written(part) };
        self.scan_unguarded(part, args, into)
    }

    fn scan_unguarded(self, part: PageRange, args: ScanArgs, into: &mut [DirtyRun]) -> Result<Taken, Errno> {
        let all_of = Categories::WRITTEN.union(Categories::GUARD);
        match self.scan(part, ScanArgs { all_of, inverted: Categories::GUARD, ..args }, into) {
            Err(Errno::EINVAL) => {
                let all_of = Categories::WRITTEN.union(Categories::PRESENT);
                self.scan(part, ScanArgs { all_of, ..args }, into)
            }
            done => done,
        }
    }

    #[inline]
    fn scan(self, part: PageRange, args: ScanArgs, into: &mut [DirtyRun]) -> Result<Taken, Errno> {
        // To the kernel an empty vector means "report nothing, and reset all the same".
        if part.is_empty() || into.is_empty() {
            return Ok(Taken { runs: 0, rest: part });
        }
        loop {
            match self.pagemap.scan(args, into) {
                Ok(scanned) => {
                    let left = part.end().as_usize() - scanned.walk_end.as_usize();
                    let rest = PageRange::new(scanned.walk_end, PageCount::for_bytes(left));
                    return Ok(Taken { runs: scanned.regions, rest });
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

/// Moves those of the first `count` runs that were written, or are nowhere, to the front; returns how many.
fn keep_written(runs: &mut [DirtyRun], count: usize) -> usize {
    let mut kept = 0;
    for i in 0..count.min(runs.len()) {
        let states = runs[i].categories();
        let known = Categories::PRESENT.union(Categories::SWAPPED);
        if states.contains(Categories::WRITTEN) || states.intersection(known).is_empty() {
            runs[kept] = runs[i];
            kept += 1;
        }
    }
    kept
}
