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
use peregrine_base::sync::{AtomicU64, Ordering};

/// A page's word has so many bits, …
const BITS: usize = 16;
/// … so that this many lie in one atomic, and a take passes over as many clean pages at a glance.
const AT_ONCE: usize = u64::BITS as usize / BITS;
const DIRTY: u64 = 1 << (BITS - 1);
const ALL_DIRTY: u64 = u64::MAX / ((1 << BITS) - 1) * DIRTY;

/// One word a page, and one for the whole range.
pub struct Words {
    pages: usize,
    packed: Box<[AtomicU64]>,
    whole: AtomicU64,
}

/// A page's word.
#[derive(Clone, Copy)]
struct Word<'a> {
    packed: &'a AtomicU64,
    shift: usize,
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
        let packed = (0..pages.div_ceil(AT_ONCE)).map(|_| AtomicU64::new(0)).collect();
        Self { pages, packed, whole: AtomicU64::new(0) }
    }

    /// The handler: `page` was written. The calls say whether they succeeded.
    #[inline(always)]
    pub fn on_write(
        &self,
        page: usize,
        lift: impl FnOnce() -> bool,
        lift_all: impl FnOnce() -> bool,
    ) -> Lifted {
        let Some(word) = self.word(page) else { return Lifted::NoSuchPage };
        word.enter();
        let lifted = lift();
        word.leave();
        if lifted {
            return Lifted::Page;
        }
        let whole = self.whole();
        whole.enter();
        let all = lift_all();
        whole.leave();
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
        if self.whole().is_dirty() {
            // Everything is writable: so everything becomes dirty first, then `whole` may be cleared, unless a handler is
            // about to lift everything once more.
            for four in &self.packed {
                four.fetch_or(ALL_DIRTY, Ordering::SeqCst);
            }
            self.whole().clean();
        }
        let (mut at, mut stuck) = (self.next_dirty(pages.clone()), 0);
        while at < pages.end {
            let start = at;
            while at < pages.end
                && let Some(word) = self.word(at).filter(|w| w.is_dirty())
            {
                word.clean();
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

    #[inline(always)]
    fn word(&self, page: usize) -> Option<Word<'_>> {
        let packed = self.packed.get(page / AT_ONCE)?;
        (page < self.pages).then_some(Word { packed, shift: page % AT_ONCE * BITS })
    }

    fn whole(&self) -> Word<'_> {
        Word { packed: &self.whole, shift: 0 }
    }

    /// The first of `pages` that is dirty, or their end.
    #[inline]
    fn next_dirty(&self, pages: Range<usize>) -> usize {
        let load = |four: &AtomicU64| four.load(Ordering::SeqCst) & ALL_DIRTY;
        let mut at = pages.start;
        while at < pages.end {
            let Some((four, after)) = self.packed.get(at / AT_ONCE..).and_then(<[_]>::split_first) else {
                break;
            };
            let dirty = load(four) >> (at % AT_ONCE * BITS);
            if dirty != 0 {
                return pages.end.min(at + dirty.trailing_zeros() as usize / BITS);
            }
            // Most pages are clean: sixteen of them cost one jump.
            let clean = |fours: &&[AtomicU64]| fours.iter().fold(0, |all, four| all | load(four)) == 0;
            let skipped = after.chunks_exact(4).take_while(clean).count() * 4;
            at = (at / AT_ONCE + 1 + skipped) * AT_ONCE;
        }
        pages.end
    }

    /// The page counts as written.
    pub fn mark(&self, page: usize) {
        if let Some(word) = self.word(page) {
            word.mark();
        }
    }
}

// SeqCst on all of these: the taker's "clear, then protect" and the handler's "mark, then lift" order two kernel calls by these
// words; each call is a full barrier on x86-64, but nothing promises that for others.
impl Word<'_> {
    /// A handler begins, before it lifts anything.
    #[inline(always)]
    fn enter(self) {
        self.packed.fetch_add(1 << self.shift, Ordering::SeqCst);
        self.mark();
    }

    /// It has lifted what it could.
    #[inline(always)]
    fn leave(self) {
        self.packed.fetch_sub(1 << self.shift, Ordering::SeqCst);
    }

    #[inline(always)]
    fn mark(self) {
        self.packed.fetch_or(DIRTY << self.shift, Ordering::SeqCst);
    }

    #[inline]
    fn is_dirty(self) -> bool {
        self.packed.load(Ordering::SeqCst) & (DIRTY << self.shift) != 0
    }

    /// Makes it clean, unless a handler is at work on it: then it stays dirty.
    #[inline]
    fn clean(self) {
        let mask = ((1 << BITS) - 1) << self.shift;
        let mut seen = self.packed.load(Ordering::SeqCst);
        while seen & mask == DIRTY << self.shift {
            // What changed meanwhile may be a neighbour's.
            match self.packed.compare_exchange(seen, seen & !mask, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }
}
