//! DIRTY by trapping each page's first write: a region whose handler keeps the books of [`words`](super::words).

use super::words::{Lifted, Words};
use super::{TrackError, ViewDirty};
use crate::region::{Builder, Inline, Mechanism, Region, Trap};
use crate::trap::{Access, Decision};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::capabilities::Capabilities;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// The handler. Trap code: allocates nothing, locks nothing, panics never (S3).
#[inline(always)]
fn on_write(words: &Words, trap: &Trap<'_>) -> Decision {
    if trap.access() != Access::Write {
        // Tracking stops writes only: a read that fails is somebody else's trouble (a short file, a hole).
        return Decision::Deny;
    }
    let region = trap.region();
    let lift = || region.unprotect_quietly(trap.address()).is_ok();
    let lift_all = || region.protect(&[region.range()], Protection::ReadWrite).is_ok();
    match words.on_write(trap.page_index(), lift, lift_all) {
        // The books are closed: only now does a pager's toucher go on (`Retry` wakes it), so that what it does next finds
        // them so.
        Lifted::Page | Lifted::All => Decision::Retry,
        Lifted::Nothing | Lifted::NoSuchPage => Decision::Deny,
    }
}

pub(super) struct Trapping {
    region: Region,
    words: Arc<Words>,
}

impl Trapping {
    pub(super) fn start(
        builder: Builder,
        mechanism: Mechanism,
        part: PageRange,
        caps: &Capabilities,
    ) -> Result<Self, TrackError> {
        let words = Arc::new(Words::clean(part.pages().get()));
        let seen = words.clone();
        let builder = builder.force(mechanism);
        let builder = if mechanism == Mechanism::Pager {
            builder.pager(move |trap: &Trap<'_>| on_write(&seen, trap))
        } else {
            // SAFETY: `on_write` touches atomics that live as long as the handler and makes system calls (S3).
            builder.inline(unsafe { Inline::new(move |trap: &Trap<'_>| on_write(&seen, trap)) })
        };
        let region = builder.build(caps)?;
        region.protect(&[part], Protection::Read)?;
        Ok(Self { region, words })
    }

    /// Returns how many of the pages could not be protected again.
    pub(super) fn take(&mut self, part: PageRange, found: &mut dyn FnMut(PageRange)) -> PageCount {
        let base = self.region.range().start().as_usize();
        let first = (part.start().as_usize() - base) / PAGE_SIZE;
        let run = |pages: core::ops::Range<usize>| {
            PageRange::new(VirtAddr::new(base + pages.start * PAGE_SIZE), PageCount::new(pages.len()))
        };
        PageCount::new(self.words.take(
            first..first + part.pages().get(),
            |pages| self.region.protect(&[run(pages)], Protection::Read).is_ok(),
            |pages| found(run(pages)),
        ))
    }

    pub(super) fn userfaultfd(&self) -> Option<BorrowedFd<'_>> {
        self.region.userfaultfd()
    }

    /// Every page counts as written.
    pub(super) fn mark_all(&mut self) {
        (0..self.region.range().pages().get()).for_each(|page| self.words.mark(page));
    }

    pub(super) fn give_back(&mut self, set: &ViewDirty) {
        let base = self.region.range().start().as_usize();
        for page in set.pages() {
            self.words.mark(page.as_usize().wrapping_sub(base) / PAGE_SIZE);
        }
    }
}
