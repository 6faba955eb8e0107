//! Contents that were given back, for trackers: pages that are zeros again have changed, though nobody wrote to them, and
//! on private memory the kernel forgets with a page that it was write-protected.
//!
//! ```text
//!  discard                        taker
//!    begun += 1                     done := finished
//!    the kernel's call              begun = what it saw finished last time?  nothing was discarded since
//!    finished += 1                  otherwise every page counts as written;  saw := done
//! ```
//!
//! A call that is still under way was begun and is not finished: the take that meets it reports, and so does the next.

use peregrine_base::sync::{AtomicU64, Ordering};

#[derive(Debug)]
pub(crate) struct Discards {
    begun: AtomicU64,
    finished: AtomicU64,
}

impl Discards {
    pub(super) const fn none() -> Self {
        Self { begun: AtomicU64::new(0), finished: AtomicU64::new(0) }
    }

    /// Runs the call that gives contents back.
    pub(super) fn during<T>(&self, call: impl FnOnce() -> T) -> T {
        // SeqCst here and in `since`: the count comes before the kernel's change of the page table, the taker's look at the
        // counts before its own.
        self.begun.fetch_add(1, Ordering::SeqCst);
        let result = call();
        self.finished.fetch_add(1, Ordering::SeqCst);
        result
    }

    /// How many are finished: what a taker that begins now has nothing to do with.
    pub(crate) fn finished(&self) -> u64 {
        self.finished.load(Ordering::SeqCst)
    }

    /// Whether one was under way since a taker `saw` that so many were finished; notes how many are now.
    pub(crate) fn since(&self, saw: &mut u64) -> bool {
        let done = self.finished();
        let any = self.begun.load(Ordering::SeqCst) != *saw;
        *saw = done;
        any
    }
}
