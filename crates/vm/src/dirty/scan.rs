//! DIRTY by `PAGEMAP_SCAN` over asynchronous write-protect: get and reset are one step of the kernel, page by page under
//! its page-table lock, so no write falls between them. The calls are [`raw`](super::raw)'s; here is who may make them.

use super::raw::{DirtyRun, RawTracker, RawTrackerRef};
use super::{TrackError, ViewDirty};
use crate::mapping::Mapping;
use crate::process::{self, Generation};
use peregrine_base::PageRange;
use peregrine_sys::capabilities::{Capabilities, Capability};
use peregrine_sys::uffd::Features;

/// Runs that one system call can report.
const BATCH: usize = 256;

pub(super) struct Scan {
    raw: RawTracker,
    range: PageRange,
    generation: Generation,
    /// Of the huge page pool.
    pool: bool,
    found: Box<[DirtyRun; BATCH]>,
}

/// Runs that the kernel counts as clean and nobody was told of yet: should that panic, they are dirty again.
struct Unreported<'a> {
    raw: RawTrackerRef<'a>,
    runs: &'a [DirtyRun],
}

impl Drop for Unreported<'_> {
    fn drop(&mut self) {
        for run in self.runs {
            // Failing would need the range to be gone.
            let _ = self.raw.mark_written(run.range());
        }
    }
}

impl Scan {
    pub(super) fn start(
        range: PageRange,
        mapping: &Mapping,
        caps: &Capabilities,
    ) -> Result<Self, TrackError> {
        let mut features = Features::WP_ASYNC | Features::PAGEFAULT_FLAG_WP;
        if caps.has(Capability::WriteProtectUnpopulated) {
            features |= Features::WP_UNPOPULATED;
        }
        if mapping.backing().is_shared() && caps.has(Capability::WriteProtectShared) {
            features |= Features::WP_HUGETLBFS_SHMEM;
        }
        let raw = RawTracker::over(caps.open_userfaultfd(features)?)?;
        // SAFETY: the tracker holds the mapping and the claim on the range: it owns it, alone.
        unsafe { raw.watch(range)? };
        // A page not protected yet would be reported as written.
        raw.by_ref().arm(range).map_err(|errno| TrackError::Kernel {
            operation: "first write-protect",
            range,
            errno,
            remedy: "use DirtyMechanism::Mprotect",
        })?;
        let found = Box::new([DirtyRun::default(); BATCH]);
        let pool = mapping.grain().get() > 1;
        Ok(Self { raw, range, generation: process::current(), pool, found })
    }

    pub(super) fn take(
        &mut self,
        part: PageRange,
        found: &mut dyn FnMut(PageRange),
    ) -> Result<(), TrackError> {
        let mut rest = part;
        while !rest.is_empty() {
            let raw = self.raw.by_ref().of_pool(self.pool);
            let taken = raw.take_into(rest, self.found.as_mut_slice()).map_err(|errno| {
                let remedy = "EPERM: the range was mapped anew behind the tracker's back (mremap, mmap over it): \
                              take its dirty set before, and track the new mapping";
                TrackError::Kernel { operation: "PAGEMAP_SCAN", range: rest, errno, remedy }
            })?;
            let mut clean_now = Unreported { raw, runs: &self.found[..taken.runs] };
            while let [run, after @ ..] = clean_now.runs {
                clean_now.runs = after;
                found(run.range());
            }
            rest = taken.rest;
        }
        Ok(())
    }

    /// Every page counts as written.
    pub(super) fn mark_all(&mut self) -> Result<(), TrackError> {
        self.raw.by_ref().mark_written(self.range).map_err(|errno| TrackError::Kernel {
            operation: "marking discarded pages",
            range: self.range,
            errno,
            remedy: "the range was unmapped behind the tracker's back: track the new mapping",
        })
    }

    pub(super) fn give_back(&mut self, set: &ViewDirty) {
        for run in set.runs() {
            // Failing would need the range to be gone.
            let _ = self.raw.by_ref().mark_written(*run);
        }
    }
}

impl Drop for Scan {
    fn drop(&mut self) {
        // In a child the descriptor acts on the parent's memory.
        if self.generation.is_current() {
            self.raw.unwatch(self.range);
        }
    }
}
