//! An object's counting words.
//!
//! ```text
//!   63           32 31              4   3       2       1       0
//!  │  global count │  due epoch (28)  │  -  │ limbo │ dirty │ queued │   one word: every change is one compare-and-swap
//! ```
//!
//! The count is signed: deltas of different members arrive in any order. It is never set, only added to: a late pair of
//! +1 and -1 of a member that was thrown out of the epoch may hit an object that was used anew meanwhile, and must cancel out there.

use core::fmt;
use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering};

/// Which object, among all that one Refcache counts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct ObjectId(pub u32);

/// The words that Refcache keeps in an object.
pub struct Object {
    word: AtomicU64,
    /// The next one in a queue or free list, plus one.
    pub(crate) next: AtomicU32,
}

impl Object {
    /// An object with global count `count`, in no queue.
    pub fn new(count: i32) -> Self {
        Self { word: AtomicU64::new(Word::of(count).0), next: AtomicU32::new(0) }
    }

    /// The global count: not the true one unless all deltas are flushed.
    pub fn global(&self) -> i32 {
        self.load().count()
    }

    pub(crate) fn load(&self) -> Word {
        Word(self.word.load(Ordering::Acquire))
    }

    /// Success releases what the member did to the object before, and acquires what others did.
    pub(crate) fn exchange(&self, old: Word, new: Word) -> bool {
        self.word.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Sets the count and forgets all else: only while every other member is held (recovery).
    pub(crate) fn reset(&self, count: i32) {
        self.word.store(Word::of(count).0, Ordering::Release);
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.load().fmt(f)
    }
}

/// A value of an object's word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word(u64);

const QUEUED: u64 = 1;
const DIRTY: u64 = 2;
const LIMBO: u64 = 4;
const DUE_SHIFT: u32 = 4;
const DUE_MASK: u64 = (1 << 28) - 1;

impl Word {
    pub(crate) const fn of(count: i32) -> Self {
        Self((count as u32 as u64) << 32)
    }

    pub(crate) const fn count(self) -> i32 {
        (self.0 >> 32) as u32 as i32
    }

    pub(crate) const fn queued(self) -> bool {
        self.0 & QUEUED != 0
    }

    pub(crate) const fn dirty(self) -> bool {
        self.0 & DIRTY != 0
    }

    /// Unlinked already: the object only waits for its readers to leave.
    pub(crate) const fn limbo(self) -> bool {
        self.0 & LIMBO != 0
    }

    /// Whether the review is due in `epoch`. Epochs wrap; a review is never 2^27 epochs late.
    pub(crate) const fn is_due(self, epoch: u64) -> bool {
        (epoch.wrapping_sub(self.0 >> DUE_SHIFT)) & DUE_MASK <= DUE_MASK / 2
    }

    #[must_use]
    pub(crate) const fn plus(self, delta: i32) -> Self {
        Self((self.count().wrapping_add(delta) as u32 as u64) << 32 | self.0 & 0xffff_ffff)
    }

    /// Queued, clean, due at `epoch`.
    #[must_use]
    pub(crate) const fn queue_at(self, epoch: u64) -> Self {
        let kept = self.0 & !(DUE_MASK << DUE_SHIFT) & !DIRTY;
        Self(kept | QUEUED | (epoch & DUE_MASK) << DUE_SHIFT)
    }

    #[must_use]
    pub(crate) const fn soiled(self) -> Self {
        Self(self.0 | DIRTY)
    }

    #[must_use]
    pub(crate) const fn into_limbo(self) -> Self {
        Self(self.0 | LIMBO)
    }

    /// In no queue.
    #[must_use]
    pub(crate) const fn released(self) -> Self {
        Self(self.0 & !0xffff_ffff)
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object")
            .field("count", &self.count())
            .field("queued", &self.queued())
            .field("dirty", &self.dirty())
            .field("limbo", &self.limbo())
            .field("due", &(self.0 >> DUE_SHIFT & DUE_MASK))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_review_is_due_from_its_epoch_on_also_across_the_wrap() {
        let w = Word::of(-3).queue_at(DUE_MASK);
        assert_eq!(w.count(), -3);
        assert!(!w.is_due(DUE_MASK - 1));
        assert!(w.is_due(DUE_MASK) && w.is_due(DUE_MASK + 5));
        assert_eq!(w.plus(3).released(), Word::of(0));
    }
}
