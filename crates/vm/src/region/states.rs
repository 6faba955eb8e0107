//! Page states where the kernel does not keep them for us: absent pages without a userfaultfd (`Mechanism::Mprotect`).
//!
//! ```text
//!                 fill: contents into the object, then open the page
//!        ┌────────── CHANGING ──────────┐
//!        │    (one thread's; others     ▼
//!     ABSENT       try again)        PRESENT ──evict──▶ IN_OBJECT   no access here, contents in the memfd
//!                                       ▲───── a fill only maps ───────┘
//! ```
//!
//! A page has no access but when PRESENT, so whoever touches it traps. **Trap code: allocates nothing, locks nothing, panics
//! never (S3).**

use super::operations::{Operations, RegionError};
use crate::mapping::Object;
use peregrine_base::sync::Ordering;
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::raw::Errno;
use peregrine_sys::{mem, memfd};

const ABSENT: u8 = 0;
/// One thread is filling or evicting it; others come back later.
const CHANGING: u8 = 1;
const PRESENT: u8 = 2;
/// Absent in this view, and the object has its contents: a fill only maps it.
const IN_OBJECT: u8 = 3;
/// As `CHANGING`, of a page that the object turned out to have: it was written through an alias since we last looked.
const KEPT: u8 = 4;

/// Which pages a fill counts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Counted {
    /// Those that it gave contents.
    Filled,
    /// Those whose contents the object had.
    Mapped,
}

impl Operations {
    /// As `protect_one`, leaving absent pages without access.
    pub(super) fn protect_present(&self, range: PageRange, access: Protection) -> Result<(), RegionError> {
        let mut pages = self.state_indices(range);
        while let Some(first) = pages.next() {
            if !self.state_is(first, PRESENT) {
                continue;
            }
            let mut count = 1;
            while pages.start < pages.end && self.state_is(pages.start, PRESENT) {
                pages.next();
                count += 1;
            }
            let run = self.pages_at(first, count);
            // SAFETY: pages of the region, which `self.mapping` keeps.
            unsafe { mem::protect(run, access) }.map_err(self.failed("protect", run))?;
        }
        Ok(())
    }

    /// Fills without a userfaultfd: the page stays without access while its contents are put into the object behind it. What
    /// the object has by then stays as it is. (To look and to write are two calls of the kernel: a write through an alias that
    /// comes between them is undone. A userfaultfd does both in one.)
    pub(super) fn fill_emulated(
        &self,
        operation: &'static str,
        range: PageRange,
        access: Protection,
        counted: Counted,
        contents: impl Fn(&Object, PageCount, usize, PageRange) -> Result<(), Errno>,
    ) -> Result<PageCount, RegionError> {
        self.check(range)?;
        let Some(object) = self.mapping.object() else {
            return Err(self.not_offered(operation, "use a memfd, or a userfaultfd"));
        };
        let mut filled = 0;
        let mut pages = self.state_indices(range);
        while let Some(first) = pages.next() {
            if self.claim(first, IN_OBJECT) {
                let page = self.pages_at(first, 1);
                // SAFETY: a page of the region, claimed by this thread.
                let done = unsafe { mem::protect(page, access) };
                self.set_state(first, if done.is_ok() { PRESENT } else { IN_OBJECT });
                done.map_err(self.failed(operation, page))?;
                filled += usize::from(counted == Counted::Mapped);
                continue;
            }
            if !self.claim(first, ABSENT) {
                continue;
            }
            let mut count = 1;
            while pages.start < pages.end && self.claim(pages.start, ABSENT) {
                pages.next();
                count += 1;
            }
            let run = self.pages_at(first, count);
            let in_mapping = (run.start().as_usize() - self.mapping.range().start().as_usize()) / PAGE_SIZE;
            let at = PageCount::new(self.mapping.object_offset().get() + in_mapping);
            memfd::for_each_data(&object.fd, at, run.pages(), |page| {
                self.set_state(first + page.get() - at.get(), KEPT);
            });
            let (mut next, end) = (first, first + count);
            while next < end {
                let kept = self.state_is(next, KEPT);
                let same = |index: &usize| self.state_is(*index, KEPT) == kept;
                let part = self.pages_at(next, (next..end).take_while(same).count());
                let offset_bytes = part.start().as_usize() - range.start().as_usize();
                let put = match kept {
                    true => Ok(()),
                    false => contents(object, PageCount::new(at.get() + next - first), offset_bytes, part),
                };
                // SAFETY: pages of the region, claimed by this thread.
                let done = put.and_then(|()| unsafe { mem::protect(part, access) });
                if let Err(errno) = done {
                    (next..end).for_each(|index| self.release(index));
                    return Err(self.failed(operation, part)(errno));
                }
                let reached = next + part.pages().get();
                (next..reached).for_each(|index| self.set_state(index, PRESENT));
                if kept == (counted == Counted::Mapped) {
                    filled += part.pages().get();
                }
                next = reached;
            }
        }
        Ok(PageCount::new(filled))
    }

    /// A page claimed for a fill that failed.
    fn release(&self, index: usize) {
        self.set_state(index, if self.state_is(index, KEPT) { IN_OBJECT } else { ABSENT });
    }

    /// Closes the pages of `range`; their contents stay in the object.
    pub(super) fn evict_emulated(&self, range: PageRange) -> Result<(), RegionError> {
        for index in self.state_indices(range) {
            if self.claim(index, PRESENT) {
                let page = self.pages_at(index, 1);
                // SAFETY: a page of the region, claimed by this thread.
                let done = unsafe { mem::protect(page, Protection::None) };
                self.set_state(index, if done.is_ok() { IN_OBJECT } else { PRESENT });
                done.map_err(self.failed("evict", page))?;
            }
        }
        Ok(())
    }

    /// At the start: which pages the object has already.
    pub(super) fn note_object_pages(&self) {
        let Some(object) = self.mapping.object() else { return };
        let start = self.mapping.object_offset().get()
            + (self.range.start().as_usize() - self.mapping.range().start().as_usize()) / PAGE_SIZE;
        memfd::for_each_data(&object.fd, PageCount::new(start), self.range.pages(), |page| {
            self.set_state(page.get() - start, IN_OBJECT);
        });
    }

    fn state_indices(&self, range: PageRange) -> core::ops::Range<usize> {
        let first = (range.start().as_usize() - self.range.start().as_usize()) / PAGE_SIZE;
        first..first + range.pages().get()
    }

    fn pages_at(&self, index: usize, count: usize) -> PageRange {
        PageRange::new(
            VirtAddr::new(self.range.start().as_usize() + index * PAGE_SIZE),
            PageCount::new(count),
        )
    }

    fn state_is(&self, index: usize, state: u8) -> bool {
        // Acquire pairs with `set_state`: what was done to the page lies before.
        self.states.get(index).is_some_and(|s| s.load(Ordering::Acquire) == state)
    }

    fn claim(&self, index: usize, from: u8) -> bool {
        // AcqRel: after the last owner's `set_state`, before this owner's work.
        self.states
            .get(index)
            .is_some_and(|s| s.compare_exchange(from, CHANGING, Ordering::AcqRel, Ordering::Acquire).is_ok())
    }

    fn set_state(&self, index: usize, state: u8) {
        if let Some(s) = self.states.get(index) {
            // Release pairs with the Acquire of `claim` and `state_is`.
            s.store(state, Ordering::Release);
        }
    }
}
