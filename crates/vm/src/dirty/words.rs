//! The books of DIRTY by trapping each page's first write. **`on_write` is trap code: allocates nothing, locks nothing,
//! panics never (S3).**
//!
//! One word a page, `DIRTY | number of handlers at work on it`, and one rule: **a page that can be written is `DIRTY`, or
//! the taker is between its two steps on it.**
//!
//! ```text
//!  handler (writing thread)              taker (one at a time)
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

use core::ops::Range;
use peregrine_base::sync::{AtomicU16, Ordering};

const DIRTY: u16 = 0x8000;

/// One word a page, and one for the whole range.
pub struct Words {
    words: Box<[AtomicU16]>,
    whole: AtomicU16,
}

/// What became of a page that was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lifted {
    /// It can be written.
    Page,
    /// Every page can be written.
    All,
    /// Nothing could be lifted.
    Nothing,
    /// There is no such page.
    NoSuchPage,
}

impl Words {
    /// All of `pages` pages are clean, and are about to be protected.
    pub fn clean(pages: usize) -> Self {
        Self { words: (0..pages).map(|_| AtomicU16::new(0)).collect(), whole: AtomicU16::new(0) }
    }

    /// The handler: `page` was written. The calls say whether they succeeded.
    #[inline(always)]
    pub fn on_write(
        &self,
        page: usize,
        lift: impl FnOnce() -> bool,
        lift_all: impl FnOnce() -> bool,
    ) -> Lifted {
        let Some(word) = self.words.get(page) else { return Lifted::NoSuchPage };
        enter(word);
        let lifted = lift();
        leave(word);
        if lifted {
            return Lifted::Page;
        }
        enter(&self.whole);
        let all = lift_all();
        leave(&self.whole);
        if all { Lifted::All } else { Lifted::Nothing }
    }

    /// The taker: calls `protect` and then `found` with each run of dirty `pages`, lowest first, which are clean then.
    /// `protect` says whether it succeeded; pages that it did not protect stay dirty, and their number is returned.
    ///
    /// One call at a time.
    pub fn take(
        &self,
        pages: Range<usize>,
        mut protect: impl FnMut(Range<usize>) -> bool,
        mut found: impl FnMut(Range<usize>),
    ) -> usize {
        if self.whole.load(Ordering::SeqCst) & DIRTY != 0 {
            // Everything is writable: so everything becomes dirty first, then `whole` may be cleared, unless a handler is
            // about to lift everything once more.
            for word in &self.words {
                word.fetch_or(DIRTY, Ordering::SeqCst);
            }
            let _ = self.whole.compare_exchange(DIRTY, 0, Ordering::SeqCst, Ordering::SeqCst);
        }
        let (mut at, mut stuck) = (self.next_dirty(pages.clone()), 0);
        while at < pages.end {
            let start = at;
            while at < pages.end && self.is_dirty(at) {
                // Fails if a handler is at work on it: then it stays dirty.
                let _ = self.words[at].compare_exchange(DIRTY, 0, Ordering::SeqCst, Ordering::SeqCst);
                at += 1;
            }
            if !protect(start..at) {
                // No room for another mapping: the run may be writable still, so it stays dirty.
                (start..at).for_each(|page| self.mark(page));
                stuck += at - start;
            }
            found(start..at);
            at = self.next_dirty(at..pages.end);
        }
        stuck
    }

    #[inline]
    fn is_dirty(&self, page: usize) -> bool {
        self.words.get(page).is_some_and(|w| w.load(Ordering::SeqCst) & DIRTY != 0)
    }

    /// The first of `pages` that is dirty, or their end.
    #[inline]
    fn next_dirty(&self, pages: Range<usize>) -> usize {
        // Most pages are clean: eight of them cost one jump.
        const AT_ONCE: usize = 8;
        let clean =
            |words: &&[AtomicU16]| words.iter().fold(0, |all, w| all | w.load(Ordering::SeqCst)) & DIRTY == 0;
        let rest = self.words.get(pages.clone()).unwrap_or(&[]);
        let skipped = rest.chunks(AT_ONCE).take_while(clean).count() * AT_ONCE;
        (pages.start + skipped..pages.end).find(|page| self.is_dirty(*page)).unwrap_or(pages.end)
    }

    /// The page counts as written.
    pub fn mark(&self, page: usize) {
        if let Some(word) = self.words.get(page) {
            word.fetch_or(DIRTY, Ordering::SeqCst);
        }
    }
}

#[inline]
fn enter(word: &AtomicU16) {
    // SeqCst on all of these: the taker's "clear, then protect" and this "mark, then lift" order two kernel calls by these
    // words; each call is a full barrier on x86-64, but nothing promises that for others.
    word.fetch_add(1, Ordering::SeqCst);
    word.fetch_or(DIRTY, Ordering::SeqCst);
}

#[inline]
fn leave(word: &AtomicU16) {
    word.fetch_sub(1, Ordering::SeqCst);
}
