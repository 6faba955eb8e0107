//! What a region calls on a trap, and what it is told.

use super::{Operations, RegionError};
use crate::trap::{Access, Cause, Decision, Fault, SignalHandler};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, VirtAddr};
use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

/// A trap, as a handler sees it.
pub struct Trap<'a> {
    fault: Fault,
    region: &'a Operations,
    /// Whether the toucher was woken by what the handler did.
    woken: Cell<bool>,
}

impl<'a> Trap<'a> {
    #[inline]
    pub(crate) fn new(fault: Fault, region: &'a Operations) -> Self {
        Self { fault, region, woken: Cell::new(false) }
    }

    #[inline]
    pub(crate) fn was_woken(&self) -> bool {
        self.woken.get()
    }

    /// The address that was touched (its page's start, from a pager on a kernel without `EXACT_ADDRESS`).
    #[inline]
    pub const fn address(&self) -> VirtAddr {
        self.fault.address
    }

    /// The page that was touched; of the pool, the huge page.
    #[inline]
    pub fn page(&self) -> PageRange {
        self.region.mapping.grain_of(self.fault.address)
    }

    /// Which page of the region that is.
    #[inline]
    pub const fn page_index(&self) -> usize {
        (self.fault.page().start().as_usize() - self.region.range.start().as_usize()) / PAGE_SIZE
    }

    /// What was attempted.
    #[inline]
    pub const fn access(&self) -> Access {
        self.fault.access
    }

    /// How the trap came.
    #[inline]
    pub const fn cause(&self) -> Cause {
        self.fault.cause
    }

    /// The region's operations.
    #[inline]
    pub const fn region(&self) -> &'a Operations {
        self.region
    }

    /// The aligned block of `pages` pages that holds the page, cut at the region's ends: fill in blocks, for a trap costs
    /// far more than a page.
    #[inline]
    pub fn block(&self, pages: PageCount) -> PageRange {
        let size = pages.get().max(self.region.mapping.grain().get());
        let first = self.page_index() / size * size;
        let count = size.min(self.region.range.pages().get() - first);
        let start = self.region.range.start().as_usize() + first * PAGE_SIZE;
        PageRange::new(VirtAddr::new(start), PageCount::new(count))
    }

    /// UNPROT of the page: `Filled`, or `Deny` if the kernel refuses.
    #[inline]
    pub fn unprotect(&self) -> Decision {
        self.decide(self.region.unprotect(self.fault.address))
    }

    /// `Filled` if the operation succeeded, else `Deny`: the last line of most handlers.
    #[inline]
    pub fn decide<T>(&self, result: Result<T, RegionError>) -> Decision {
        match result {
            Ok(_) => {
                // Every operation that makes a page accessible wakes those who wait for it.
                self.woken.set(true);
                Decision::Filled
            }
            Err(_) => Decision::Deny,
        }
    }
}

impl fmt::Debug for Trap<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fault.fmt(f)
    }
}

/// A handler that runs inside a signal handler on the thread that touched the page.
///
/// # Safety
/// `on_trap` runs at an arbitrary instruction of arbitrary code, on several threads at once. The implementor promises that
/// it allocates nothing, takes no lock that interrupted code may hold, does not panic, does not unwind or jump out,
/// preserves `errno` if it calls libc, and neither makes nor drops regions, trackers or registrations (S3). The
/// operations of [`Trap::region`] keep all that.
pub unsafe trait InlineHandler: Send + Sync + 'static {
    /// Serves one trap.
    fn on_trap(&self, trap: &Trap<'_>) -> Decision;
}

/// A closure that its maker promises to be an [`InlineHandler`].
pub struct Inline<F>(F);

impl<F: Fn(&Trap<'_>) -> Decision + Send + Sync + 'static> Inline<F> {
    /// Makes a handler of a closure.
    ///
    /// # Safety
    /// The closure keeps the promise of [`InlineHandler`].
    pub const unsafe fn new(f: F) -> Self {
        Self(f)
    }
}

// SAFETY: promised in `Inline::new`.
unsafe impl<F: Fn(&Trap<'_>) -> Decision + Send + Sync + 'static> InlineHandler for Inline<F> {
    #[inline]
    fn on_trap(&self, trap: &Trap<'_>) -> Decision {
        (self.0)(trap)
    }
}

/// A handler that runs on a thread of its own while the toucher sleeps. Ordinary code, with two duties: it must not touch
/// absent or protected pages of its own region (nobody would answer), and not wait for a thread that may be asleep on one;
/// if an allocator's own memory lies in the region, that includes allocating.
pub trait PagerHandler: Send + 'static {
    /// Serves one trap.
    fn on_trap(&mut self, trap: &Trap<'_>) -> Decision;
}

impl<F: FnMut(&Trap<'_>) -> Decision + Send + 'static> PagerHandler for F {
    #[inline]
    fn on_trap(&mut self, trap: &Trap<'_>) -> Decision {
        self(trap)
    }
}

/// Joins a region's handler to the registry. Trap code, compiled for the handler at hand: after a trap a processor predicts no
/// jump, so each that is not there counts.
pub(super) struct Adapter<H> {
    pub(super) operations: Arc<Operations>,
    pub(super) handler: H,
}

// SAFETY: it adds nothing to what the handler promised in `InlineHandler`.
unsafe impl<H: InlineHandler> SignalHandler for Adapter<H> {
    #[inline]
    fn on_fault(&self, fault: &Fault) -> Decision {
        if fault.cause != self.operations.mechanism.raises() && self.operations.is_live() {
            // A write through a view that may only be read, a touch beyond the end of a file: nothing that the region can do
            // helps, and a handler that opens the page would be called for ever.
            return Decision::Deny;
        }
        match self.handler.on_trap(&Trap::new(*fault, &self.operations)) {
            // The region was not there yet when this thread faulted, or goes while it is on its way here, so the handler could
            // do nothing: the access repeats on plain memory.
            Decision::Deny if !self.operations.is_live() => Decision::Retry,
            decision => decision,
        }
    }
}
