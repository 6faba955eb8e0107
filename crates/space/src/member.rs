//! Members and sets of them.
//!
//! A *member* has a view: a core with its own page table, a node process, a virtual CPU. Sets of members are part of every
//! record, so they are bit sets of fixed width, and a set in shared memory ([`SharedSet`]) is written under the lock of the
//! slot that it lies in.

use core::fmt;
use peregrine_base::sync::{AtomicU64, Ordering};

/// Members that one arena can have.
pub const MAX_MEMBERS: usize = if cfg!(peregrine_loom) { 64 } else { 256 };
const WORDS: usize = MAX_MEMBERS / 64;

/// The number of a member, below [`MAX_MEMBERS`]. A number is used again after its member left or died: what must not be
/// mistaken for its successor's carries a [`Generation`] too.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct MemberId(u16);

impl MemberId {
    /// The member `number`.
    ///
    /// # Panics
    /// If `number` is not below [`MAX_MEMBERS`].
    #[inline]
    pub const fn new(number: usize) -> Self {
        assert!(number < MAX_MEMBERS, "member numbers are below MAX_MEMBERS");
        Self(number as u16)
    }

    /// The number.
    #[inline]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Debug for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "member {}", self.0)
    }
}

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One life of a member number. It has [`Generation::BITS`] bits and wraps.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(transparent)]
pub struct Generation(u16);

impl Generation {
    /// Bits in use: what a lock word has room for.
    pub const BITS: u32 = 12;

    /// The generation with these low bits.
    #[inline]
    pub const fn new(bits: u16) -> Self {
        Self(bits & ((1 << Self::BITS) - 1))
    }

    /// The bits.
    #[inline]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// The one after.
    #[must_use]
    pub const fn next(self) -> Self {
        Self::new(self.0.wrapping_add(1))
    }
}

/// A set of members.
///
/// ```
/// use peregrine_space::{MemberId, MemberSet};
/// let mut set = MemberSet::EMPTY;
/// set.insert(MemberId::new(3));
/// set.insert(MemberId::new(200));
/// assert!(set.contains(MemberId::new(200)));
/// assert_eq!(set.iter().map(MemberId::index).collect::<Vec<_>>(), [3, 200]);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MemberSet([u64; WORDS]);

impl MemberSet {
    /// No member.
    pub const EMPTY: Self = Self([0; WORDS]);

    /// `member` alone.
    #[inline]
    pub const fn only(member: MemberId) -> Self {
        let mut set = Self::EMPTY;
        set.insert(member);
        set
    }

    /// Adds `member`.
    #[inline]
    pub const fn insert(&mut self, member: MemberId) {
        self.0[member.index() / 64] |= 1 << (member.index() % 64);
    }

    /// Takes `member` away.
    pub const fn remove(&mut self, member: MemberId) {
        self.0[member.index() / 64] &= !(1 << (member.index() % 64));
    }

    /// Whether `member` is in the set.
    #[inline]
    pub const fn contains(&self, member: MemberId) -> bool {
        self.0[member.index() / 64] & (1 << (member.index() % 64)) != 0
    }

    /// Adds all members of `other`.
    #[inline]
    pub const fn union_with(&mut self, other: &Self) {
        let mut i = 0;
        while i < WORDS {
            self.0[i] |= other.0[i];
            i += 1;
        }
    }

    /// Takes all members of `other` away.
    pub const fn remove_all(&mut self, other: &Self) {
        let mut i = 0;
        while i < WORDS {
            self.0[i] &= !other.0[i];
            i += 1;
        }
    }

    /// The set as words, member 0 in the lowest bit of the first.
    #[inline]
    pub const fn words(&self) -> &[u64; WORDS] {
        &self.0
    }

    /// How many.
    pub const fn len(&self) -> usize {
        let (mut i, mut n) = (0, 0);
        while i < WORDS {
            n += self.0[i].count_ones();
            i += 1;
        }
        n as usize
    }

    /// Whether there is none.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        let (mut i, mut any) = (0, 0);
        while i < WORDS {
            any |= self.0[i];
            i += 1;
        }
        any == 0
    }

    /// The members in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = MemberId> + use<> {
        self.0.into_iter().enumerate().flat_map(|(i, mut word)| {
            core::iter::from_fn(move || {
                let bit = word.trailing_zeros() as usize;
                (word != 0).then(|| {
                    word &= word - 1;
                    MemberId::new(i * 64 + bit)
                })
            })
        })
    }
}

impl FromIterator<MemberId> for MemberSet {
    fn from_iter<I: IntoIterator<Item = MemberId>>(members: I) -> Self {
        let mut set = Self::EMPTY;
        for member in members {
            set.insert(member);
        }
        set
    }
}

impl fmt::Debug for MemberSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(MemberId::index)).finish()
    }
}

/// A [`MemberSet`] in shared memory.
///
/// Written under the lock of its slot only (S6), so relaxed accesses suffice: the lock's acquire and release order them.
#[derive(Debug)]
pub struct SharedSet([AtomicU64; WORDS]);

impl SharedSet {
    /// The empty set.
    #[expect(clippy::new_without_default, reason = "made in place, in shared memory")]
    #[inline]
    pub fn new() -> Self {
        Self(core::array::from_fn(|_| AtomicU64::new(0)))
    }

    /// The set now.
    #[inline]
    pub fn load(&self) -> MemberSet {
        MemberSet(core::array::from_fn(|i| self.0[i].load(Ordering::Relaxed)))
    }

    /// Adds `member`, under its slot's lock.
    #[inline]
    pub fn insert(&self, member: MemberId) {
        let (word, bit) = (&self.0[member.index() / 64], 1 << (member.index() % 64));
        let bits = word.load(Ordering::Relaxed);
        if bits & bit == 0 {
            word.store(bits | bit, Ordering::Relaxed);
        }
    }

    /// Replaces the set, under its slot's lock. Words that are right already are not written.
    #[inline]
    pub fn store(&self, set: &MemberSet) {
        for (word, bits) in self.0.iter().zip(set.0) {
            if word.load(Ordering::Relaxed) != bits {
                word.store(bits, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_what_was_inserted_and_not_removed() {
        let mut set: MemberSet = [0, 63, 64, 255].map(MemberId::new).into_iter().collect();
        set.remove(MemberId::new(63));
        assert_eq!(set.iter().map(MemberId::index).collect::<std::vec::Vec<_>>(), [0, 64, 255]);
        assert_eq!(set.len(), 3);
        let shared = SharedSet::new();
        shared.store(&set);
        assert_eq!(shared.load(), set);
        for member in [63, 64, 200].map(MemberId::new) {
            shared.insert(member);
            set.insert(member);
            assert_eq!(shared.load(), set);
        }
    }

    #[test]
    fn generations_wrap_inside_a_lock_word() {
        assert_eq!(Generation::new(0xfff).next(), Generation::new(0));
    }
}
