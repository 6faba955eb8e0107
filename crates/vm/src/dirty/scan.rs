//! DIRTY by `PAGEMAP_SCAN` over asynchronous write-protect: get and reset are one step of the kernel, page by page under
//! its page-table lock, so no write falls between them.

use super::{TrackError, ViewDirty};
use crate::mapping::Mapping;
use crate::process::{self, Generation};
use peregrine_base::PageRange;
use peregrine_sys::capabilities::{Capabilities, Capability};
use peregrine_sys::pagemap::{PageRegion, Pagemap, ScanArgs};
use peregrine_sys::raw::Errno;
use peregrine_sys::uffd::{Features, RegisterMode, Uffd};

/// Regions that one system call can report.
const BATCH: usize = 256;

pub(super) struct Scan {
    uffd: Uffd,
    pagemap: Pagemap,
    range: PageRange,
    generation: Generation,
    found: Box<[PageRegion; BATCH]>,
}

impl Scan {
    pub(super) fn start(
        range: PageRange,
        mapping: &Mapping,
        caps: &Capabilities,
    ) -> Result<Self, TrackError> {
        let failed = |operation, remedy| move |errno| TrackError::Kernel { operation, range, errno, remedy };
        let mut features = Features::WP_ASYNC | Features::PAGEFAULT_FLAG_WP;
        if caps.has(Capability::WriteProtectUnpopulated) {
            features |= Features::WP_UNPOPULATED;
        }
        if mapping.backing().is_shared() && caps.has(Capability::WriteProtectShared) {
            features |= Features::WP_HUGETLBFS_SHMEM;
        }
        let uffd = caps.open_userfaultfd(features)?;
        let pagemap = Pagemap::open().map_err(failed(
            "open of /proc/self/pagemap",
            "mount /proc, or prctl(PR_SET_DUMPABLE, 1) after a change of user",
        ))?;
        // SAFETY: the tracker holds the mapping and the claim on the range: it owns it. Asynchronous write-protect never
        // traps a user.
        unsafe { uffd.by_ref().register(range, RegisterMode::WP) }.map_err(failed(
            "userfaultfd registration",
            "EBUSY: another userfaultfd has it; EPERM: a shared mapping of a file that may not be written; else use DirtyMechanism::Mprotect",
        ))?;
        // Arming costs about 40 ns a page once; a page not protected yet would be reported as written.
        uffd.by_ref()
            .write_protect(range, true)
            .map_err(failed("first write-protect", "use DirtyMechanism::Mprotect"))?;
        let found = Box::new([PageRegion::default(); BATCH]);
        Ok(Self { uffd, pagemap, range, generation: process::current(), found })
    }

    pub(super) fn take(
        &mut self,
        part: PageRange,
        found: &mut dyn FnMut(PageRange),
    ) -> Result<(), TrackError> {
        let mut rest = part;
        while !rest.is_empty() {
            let scanned = match self
                .pagemap
                .by_ref()
                .scan(ScanArgs::take_written(rest), self.found.as_mut_slice())
            {
                Ok(scanned) => scanned,
                Err(Errno::EINTR) => continue,
                Err(errno) => {
                    let remedy = "EPERM: the range was mapped anew behind the tracker's back (mremap, mmap over it): \
                                      take its dirty set before, and track the new mapping";
                    return Err(TrackError::Kernel { operation: "PAGEMAP_SCAN", range: rest, errno, remedy });
                }
            };
            for region in &self.found[..scanned.regions] {
                found(region.range());
            }
            let done = scanned.walk_end.as_usize() - rest.start().as_usize();
            let left = rest.len_bytes() - done;
            rest = PageRange::new(scanned.walk_end, peregrine_base::PageCount::for_bytes(left));
        }
        Ok(())
    }

    pub(super) fn give_back(&mut self, set: &ViewDirty) {
        for run in set.runs() {
            // Lifting the protection makes the page count as written. Failing would need the range to be gone.
            let _ = self.uffd.by_ref().write_protect(*run, false);
        }
    }
}

impl Drop for Scan {
    fn drop(&mut self) {
        // In a child the descriptor acts on the parent's memory.
        if self.generation.is_current() {
            let _ = self.uffd.by_ref().unregister(self.range);
        }
    }
}
