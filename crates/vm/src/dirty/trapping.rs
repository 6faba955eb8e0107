//! DIRTY by trapping each page's first write.
//!
//! One word a page, `DIRTY | number of handlers at work on it`, and one rule: **a page that can be written is `DIRTY`, or
//! the taker is between its two steps on it.**
//!
//! ```text
//!  handler (writing thread)              taker (one at a time: &mut)
//!    word += 1                             word has DIRTY?   no: clean
//!    word |= DIRTY                         word == DIRTY:    word := 0 (compare and swap)
//!    lift the protection                   word == DIRTY|n:  leave it, a handler may lift at any moment
//!    word -= 1                             protect the run; report the run
//! ```
//!
//! Without the count, this would lose writes: the handler sets DIRTY, the taker clears it and protects, the handler lifts:
//! writable and clean. With DIRTY set only after the lift, a second thread's write in between would be missed by a take
//! that it happened before. A handler that never comes to its last line (its thread was killed) leaves a page that is
//! reported every time, which is right: it may be writable.
//!
//! If lifting one page fails because it would split a mapping (`vm.max_map_count`), the handler lifts the whole range,
//! which splits nothing, after marking `whole` by the same rule.

use super::{TrackError, ViewDirty};
use crate::region::{Builder, Inline, Mechanism, Region, Trap};
use crate::trap::{Access, Decision};
use peregrine_base::sync::{AtomicU16, Ordering};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::capabilities::Capabilities;
use std::sync::Arc;

const DIRTY: u16 = 0x8000;

struct Pages {
    words: Box<[AtomicU16]>,
    whole: AtomicU16,
}

impl Pages {
    /// The handler. Trap code: allocates nothing, locks nothing, panics never.
    fn on_write(&self, trap: &Trap<'_>) -> Decision {
        let Some(word) = self.words.get(trap.page_index()) else { return Decision::Deny };
        if trap.access() != Access::Write {
            // Tracking stops writes only: a read that fails is somebody else's trouble (a short file, a hole).
            return Decision::Deny;
        }
        enter(word);
        let lifted = trap.region().unprotect_quietly(trap.address());
        leave(word);
        if lifted.is_ok() {
            // The books are closed: only now does a pager's toucher go on (`Retry` wakes it), so that what it does next
            // finds them so.
            return Decision::Retry;
        }
        enter(&self.whole);
        let all = trap.region().protect(&[trap.region().range()], Protection::ReadWrite);
        leave(&self.whole);
        trap.decide(all)
    }
}

fn enter(word: &AtomicU16) {
    // SeqCst on all of these: the taker's "clear, then protect" and this "mark, then lift" order two kernel calls by these
    // words; each call is a full barrier on x86-64, but nothing promises that for others.
    word.fetch_add(1, Ordering::SeqCst);
    word.fetch_or(DIRTY, Ordering::SeqCst);
}

fn leave(word: &AtomicU16) {
    word.fetch_sub(1, Ordering::SeqCst);
}

pub(super) struct Trapping {
    region: Region,
    pages: Arc<Pages>,
}

impl Trapping {
    pub(super) fn start(
        builder: Builder,
        mechanism: Mechanism,
        part: PageRange,
        caps: &Capabilities,
    ) -> Result<Self, TrackError> {
        let pages = Arc::new(Pages {
            words: (0..part.pages().get()).map(|_| AtomicU16::new(0)).collect(),
            whole: AtomicU16::new(0),
        });
        let seen = pages.clone();
        let builder = builder.force(mechanism);
        let builder = if mechanism == Mechanism::Pager {
            builder.pager(move |trap: &Trap<'_>| seen.on_write(trap))
        } else {
            // SAFETY: `on_write` touches atomics that live as long as the handler and makes system calls (S3).
            builder.inline(unsafe { Inline::new(move |trap: &Trap<'_>| seen.on_write(trap)) })
        };
        let region = builder.build(caps)?;
        region.protect(&[part], Protection::Read)?;
        Ok(Self { region, pages })
    }

    /// Returns how many of the pages could not be protected again.
    pub(super) fn take(&mut self, part: PageRange, found: &mut dyn FnMut(PageRange)) -> PageCount {
        if self.pages.whole.load(Ordering::SeqCst) & DIRTY != 0 {
            // Everything is writable: so everything becomes dirty first, then `whole` may be cleared, unless a handler is
            // about to lift everything once more.
            for word in &self.pages.words {
                word.fetch_or(DIRTY, Ordering::SeqCst);
            }
            let _ = self.pages.whole.compare_exchange(DIRTY, 0, Ordering::SeqCst, Ordering::SeqCst);
        }
        let base = self.region.range().start().as_usize();
        let first = (part.start().as_usize() - base) / PAGE_SIZE;
        let words = &self.pages.words[first..first + part.pages().get()];
        let mut stuck = 0;
        let mut at = 0;
        while at < words.len() {
            if words[at].load(Ordering::SeqCst) & DIRTY == 0 {
                at += 1;
                continue;
            }
            let start = at;
            while at < words.len() && words[at].load(Ordering::SeqCst) & DIRTY != 0 {
                // Fails if a handler is at work on it: then it stays dirty.
                let _ = words[at].compare_exchange(DIRTY, 0, Ordering::SeqCst, Ordering::SeqCst);
                at += 1;
            }
            let run = PageRange::new(
                VirtAddr::new(part.start().as_usize() + start * PAGE_SIZE),
                PageCount::new(at - start),
            );
            if self.region.protect(&[run], Protection::Read).is_err() {
                // No room for another mapping: the run may be writable still, so it stays dirty.
                for word in &words[start..at] {
                    word.fetch_or(DIRTY, Ordering::SeqCst);
                }
                stuck += at - start;
            }
            found(run);
        }
        PageCount::new(stuck)
    }

    pub(super) fn give_back(&mut self, set: &ViewDirty) {
        let base = self.region.range().start().as_usize();
        for page in set.pages() {
            if let Some(word) = self.pages.words.get(page.as_usize().wrapping_sub(base) / PAGE_SIZE) {
                word.fetch_or(DIRTY, Ordering::SeqCst);
            }
        }
    }
}
