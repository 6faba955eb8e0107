//! A slot: one line of a node, which holds a record for all the pages it spans, or leads to a finer node.
//!
//! ```text
//!            63      32 31      22 21       10 9       1   0
//!  terminal │ op number │    0    │generation│ owner + 1 │ 0 │     zero: unlocked. The record is in `value`
//!  child    │ node                │     0      │  dying    │ 1 │     a weak link; `value` is stale
//! ```
//!
//! A slot fills a cache line of its own, so two members at work on neighbouring slots share nothing. `word` says what the slot
//! is and who has locked it in one word, so a lock is won together with the certainty that the slot is still terminal:
//! the published "lock, then check again" is one compare-and-swap here.
//!
//! `value` and `members` change under the lock only (S6). Both are read without it: `value` is one word, never torn;
//! `members` is read under the lock, or as what it was a moment ago.

use crate::member::{Generation, MemberId, SharedSet};
use crate::record::Value;
use peregrine_base::sync::{AtomicU64, Ordering};

#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Slot {
    word: AtomicU64,
    value: AtomicU64,
    pub(crate) members: SharedSet,
}

/// What a slot's word says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Shape {
    /// A record; the lock, if it is held.
    Terminal(Option<Owner>),
    /// A finer node.
    Child { node: u32, dying: bool },
}

/// Who holds a lock, and for which of its operations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Owner {
    pub(crate) member: MemberId,
    pub(crate) generation: Generation,
    pub(crate) operation: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlotWord(u64);

const CHILD: u64 = 1;
const DYING: u64 = 2;

impl SlotWord {
    pub(crate) const FREE: Self = Self(0);

    pub(crate) const fn locked(by: Owner) -> Self {
        Self(
            (by.member.index() as u64 + 1) << 1
                | (by.generation.get() as u64) << 10
                | (by.operation as u64) << 32,
        )
    }

    pub(crate) const fn child(node: u32, dying: bool) -> Self {
        Self((node as u64) << 32 | if dying { DYING } else { 0 } | CHILD)
    }

    #[inline]
    pub(crate) const fn shape(self) -> Shape {
        if self.0 & CHILD != 0 {
            return Shape::Child { node: (self.0 >> 32) as u32, dying: self.0 & DYING != 0 };
        }
        match self.0 >> 1 & 0x1ff {
            0 => Shape::Terminal(None),
            n => Shape::Terminal(Some(Owner {
                member: MemberId::new(n as usize - 1),
                generation: Generation::new((self.0 >> 10) as u16),
                operation: (self.0 >> 32) as u32,
            })),
        }
    }
}

impl Slot {
    #[cfg_attr(not(peregrine_loom), allow(dead_code, reason = "elsewhere slots lie in zeroed memory"))]
    pub(crate) fn new() -> Self {
        Self { word: AtomicU64::new(0), value: AtomicU64::new(0), members: SharedSet::new() }
    }

    /// Acquire pairs with the release of whoever linked the child or unlocked the slot.
    pub(crate) fn word(&self) -> SlotWord {
        SlotWord(self.word.load(Ordering::Acquire))
    }

    pub(crate) fn exchange(&self, old: SlotWord, new: SlotWord) -> bool {
        self.word.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// By the holder of the lock, or of the whole node.
    pub(crate) fn set_word(&self, word: SlotWord) {
        self.word.store(word.0, Ordering::Release);
    }

    pub(crate) fn value(&self) -> Value {
        Value(self.value.load(Ordering::Acquire))
    }

    /// By the holder of the lock. Release: a reader that finds a region's or frame's number here finds what it names.
    pub(crate) fn set_value(&self, value: Value) {
        self.value.store(value.0, Ordering::Release);
    }
}

#[cfg(not(peregrine_loom))]
const _: () = assert!(size_of::<Slot>() == 64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_word_holds_owner_generation_and_operation() {
        let by =
            Owner { member: MemberId::new(255), generation: Generation::new(0xfff), operation: u32::MAX };
        assert_eq!(SlotWord::locked(by).shape(), Shape::Terminal(Some(by)));
        assert_eq!(SlotWord::FREE.shape(), Shape::Terminal(None));
        assert_eq!(SlotWord::child(u32::MAX, true).shape(), Shape::Child { node: u32::MAX, dying: true });
    }
}
