//! A slot: a record for all the pages it spans, or the way to a finer node.
//!
//! ```text
//!            63      32 31 30     22 21       10 9       1   0
//!  terminal │ op number│ 0│ in view │generation│ owner + 1 │ 0 │     owner 0: unlocked. The record is in `value`
//!  child    │ node     │ 0│        0           │  dying    │ 1 │     a weak link; `value` is stale
//!  moved    │ line     │ 1│        0                       │ 0 │     the slot is in that line, for as long as its node lives
//! ```
//!
//! `word` says what the slot is and who has locked it in one word, so a lock is won together with the certainty that the slot is
//! still terminal: the published "lock, then check again" is one compare-and-swap here.
//!
//! **A slot is 16 bytes, or a line.** In its node it is a [`Cell`], four of them in a cache line: what one member alone works with
//! is packed. Two members at work on neighbouring slots must share no line, so a slot that a second one comes near moves
//! to a [`Line`] of its own; its cell leads there and is written no more ([`Tree::keep_apart`](super::Tree::keep_apart)).
//!
//! **Who has the pages in view.** A line has room for a set. A cell has room for nobody, one member, or "those that had the
//! coarser slot in view from which this node was made" (`inherited`, written once, before the node is linked). A set that is
//! none of these needs a line.
//!
//! Record and set change under the lock only (S6). Both are read without it: a record is one word, never torn; a set is read
//! under the lock, or as what it was a moment ago.

use crate::member::{Generation, MAX_MEMBERS, MemberId, MemberSet, SharedSet};
use crate::record::Value;
use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering};

/// A slot's words, in its node or at the start of its line.
#[derive(Debug)]
#[repr(C, align(16))]
pub(crate) struct Cell {
    word: AtomicU64,
    value: AtomicU64,
}

/// A slot with a cache line of its own.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Line {
    cell: Cell,
    members: SharedSet,
    /// See [`Pooled`](crate::pool::Pooled).
    pub(crate) free_next: AtomicU32,
    pub(crate) live: AtomicU32,
}

/// Where a slot is now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot<'m> {
    cell: &'m Cell,
    /// The line's set, or what the node's cells may have inherited.
    set: &'m SharedSet,
    has_line: bool,
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

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SlotWord(u64);

const CHILD: u64 = 1;
const DYING: u64 = 2;
const MOVED: u64 = 1 << 31;
const VIEW_SHIFT: u32 = 22;
const VIEW_MASK: u64 = 0x1ff << VIEW_SHIFT;
const OWNER_MASK: u64 = 0x1ff << 1;
const LOCK_MASK: u64 = !(VIEW_MASK | MOVED | CHILD);

/// The view bits of a cell: nobody (0), a member (its number + 1), or this.
const INHERITED: u64 = MAX_MEMBERS as u64 + 1;

impl SlotWord {
    pub(crate) const FREE: Self = Self(0);

    #[inline]
    const fn lock_bits(by: Owner) -> u64 {
        (by.member.index() as u64 + 1) << 1 | (by.generation.get() as u64) << 10 | (by.operation as u64) << 32
    }

    /// The same terminal slot, locked.
    #[inline]
    pub(crate) const fn locked(self, by: Owner) -> Self {
        Self(self.0 & VIEW_MASK | Self::lock_bits(by))
    }

    /// The same terminal slot, unlocked.
    #[inline]
    pub(crate) const fn unlocked(self) -> Self {
        Self(self.0 & !LOCK_MASK)
    }

    #[inline]
    pub(crate) const fn child(node: u32, dying: bool) -> Self {
        Self((node as u64) << 32 | if dying { DYING } else { 0 } | CHILD)
    }

    /// Whether the slot is terminal and locked by the operation whose lock is `key` ([`locked`](Self::locked) from
    /// [`FREE`](Self::FREE)).
    #[inline]
    pub(crate) const fn is_locked_with(self, key: Self) -> bool {
        self.0 & !VIEW_MASK == key.0
    }

    /// Whether the slot is terminal, and nobody has locked it.
    #[inline]
    pub(crate) const fn is_free(self) -> bool {
        self.0 & (CHILD | OWNER_MASK) == 0
    }

    #[inline]
    const fn moved(line: u32) -> Self {
        Self((line as u64) << 32 | MOVED)
    }

    /// The line to which a cell's slot has moved.
    #[inline]
    const fn line(self) -> Option<u32> {
        if self.0 & MOVED != 0 { Some((self.0 >> 32) as u32) } else { None }
    }

    #[inline]
    const fn view(self) -> u64 {
        (self.0 & VIEW_MASK) >> VIEW_SHIFT
    }

    #[inline]
    const fn with_view(self, view: u64) -> Self {
        Self(self.0 & !VIEW_MASK | view << VIEW_SHIFT)
    }

    #[inline]
    pub(crate) const fn shape(self) -> Shape {
        if self.0 & CHILD != 0 {
            return Shape::Child { node: (self.0 >> 32) as u32, dying: self.0 & DYING != 0 };
        }
        match (self.0 & OWNER_MASK) >> 1 {
            0 => Shape::Terminal(None),
            n => Shape::Terminal(Some(Owner {
                member: MemberId::new(n as usize - 1),
                generation: Generation::new((self.0 >> 10) as u16),
                operation: (self.0 >> 32) as u32,
            })),
        }
    }
}

impl Cell {
    #[cfg_attr(not(peregrine_loom), allow(dead_code, reason = "elsewhere cells lie in zeroed memory"))]
    #[inline]
    pub(crate) fn new() -> Self {
        Self { word: AtomicU64::new(0), value: AtomicU64::new(0) }
    }

    /// Acquire pairs with the release of whoever linked the child, moved the slot or unlocked it.
    #[inline]
    fn word(&self) -> SlotWord {
        SlotWord(self.word.load(Ordering::Acquire))
    }

    /// The line to which the slot has moved, if it has.
    #[inline]
    pub(crate) fn line(&self) -> Option<u32> {
        self.word().line()
    }

    /// By the maker of the node, before it is linked.
    #[inline]
    pub(crate) fn make(&self, word: SlotWord, value: Value) {
        self.value.store(value.0, Ordering::Release);
        self.word.store(word.0, Ordering::Release);
    }
}

impl Line {
    #[cfg_attr(not(peregrine_loom), allow(dead_code, reason = "elsewhere lines lie in zeroed memory"))]
    #[inline]
    pub(crate) fn new() -> Self {
        Self {
            cell: Cell::new(),
            members: SharedSet::new(),
            free_next: AtomicU32::new(0),
            live: AtomicU32::new(0),
        }
    }
}

impl<'m> Slot<'m> {
    /// Follows a cell to where its slot is, and tells the slot's word.
    #[inline]
    pub(crate) fn find(cell: &'m Cell, inherited: &'m SharedSet, lines: &'m [Line]) -> (Self, SlotWord) {
        let word = cell.word();
        match word.line() {
            None => (Self { cell, set: inherited, has_line: false }, word),
            Some(line) => {
                let line = &lines[line as usize];
                (Self { cell: &line.cell, set: &line.members, has_line: true }, line.cell.word())
            }
        }
    }

    /// Moves the slot, which the member has locked, to the fresh line number `line`.
    #[inline]
    pub(crate) fn move_to(self, number: u32, lines: &'m [Line]) -> Self {
        debug_assert!(!self.has_line, "a slot moves once");
        let line = &lines[number as usize];
        let word = self.word();
        line.members.store(&self.members_in(word));
        line.cell.make(word.with_view(0), self.value());
        // Release: who finds the line finds what is in it. Nobody else writes a locked slot's word.
        self.cell.word.store(SlotWord::moved(number).0, Ordering::Release);
        Self { cell: &line.cell, set: &line.members, has_line: true }
    }

    #[inline]
    pub(crate) const fn has_line(self) -> bool {
        self.has_line
    }

    /// Not of a cell whose slot may have moved since it was [found](Self::find).
    #[inline]
    pub(crate) fn word(self) -> SlotWord {
        self.cell.word()
    }

    #[inline]
    pub(crate) fn exchange(self, old: SlotWord, new: SlotWord) -> bool {
        self.cell.word.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// By the holder of the lock, or of the whole node.
    #[inline]
    pub(crate) fn set_word(self, word: SlotWord) {
        self.cell.word.store(word.0, Ordering::Release);
    }

    /// By the holder of the lock.
    #[inline]
    pub(crate) fn unlock(self) {
        let word = SlotWord(self.cell.word.load(Ordering::Relaxed));
        self.set_word(word.unlocked());
    }

    #[inline]
    pub(crate) fn value(self) -> Value {
        Value(self.cell.value.load(Ordering::Acquire))
    }

    /// By the holder of the lock. Release: a reader that finds a region's or frame's number here finds what it names.
    #[inline]
    pub(crate) fn set_value(self, value: Value) {
        self.cell.value.store(value.0, Ordering::Release);
    }

    /// Who may have the pages in view. By the holder of the lock.
    #[inline]
    pub(crate) fn members(self) -> MemberSet {
        self.members_in(self.word())
    }

    /// The same, by anybody, with the word that the slot was found with.
    #[inline(always)]
    pub(crate) fn members_in(self, word: SlotWord) -> MemberSet {
        if self.has_line {
            return self.set.load();
        }
        match word.view() {
            0 => MemberSet::EMPTY,
            INHERITED => self.set.load(),
            n => MemberSet::only(MemberId::new(n as usize - 1)),
        }
    }

    /// What a cell's word says of that, for comparison with its neighbours' in the same node; `None` of a line.
    #[inline]
    pub(crate) fn view_in(self, word: SlotWord) -> Option<u64> {
        (!self.has_line).then(|| word.view())
    }

    #[inline]
    fn set_view(self, view: u64) {
        let word = self.word();
        if word.view() != view {
            self.set_word(word.with_view(view));
        }
    }

    /// Adds `member` to those that may have the pages in view; `false` if that takes a line. By the holder of the lock, here
    /// and below.
    #[must_use]
    #[inline]
    pub(crate) fn admit(self, member: MemberId) -> bool {
        if self.has_line {
            self.set.insert(member);
            return true;
        }
        let mine = member.index() as u64 + 1;
        match self.word().view() {
            0 => self.set_view(mine),
            INHERITED => return self.set.load().contains(member),
            n => return n == mine,
        }
        true
    }

    /// Nobody has the pages in view.
    #[inline]
    pub(crate) fn clear_members(self) {
        if self.has_line {
            self.set.store(&MemberSet::EMPTY);
        } else {
            self.set_view(0);
        }
    }

    /// `member` alone has them.
    #[inline]
    pub(crate) fn only(self, member: MemberId) {
        if self.has_line {
            self.set.store(&MemberSet::only(member));
        } else {
            self.set_view(member.index() as u64 + 1);
        }
    }

    /// Nobody has the pages in view, and they are not mapped. The slot is locked with `key` ([`SlotWord::locked`] from
    /// [`SlotWord::FREE`]).
    #[inline]
    pub(crate) fn empty(self, key: SlotWord) {
        if self.has_line {
            self.set.store(&MemberSet::EMPTY);
        } else {
            self.set_word(key);
        }
        self.set_value(Value::UNMAPPED);
    }

    /// None of `gone`; what cells inherited is the node's, which a recovery mends by itself.
    #[inline]
    pub(crate) fn remove_all(self, gone: &MemberSet) {
        let mut members = self.members();
        members.remove_all(gone);
        if self.has_line {
            self.set.store(&members);
        } else if members.is_empty() {
            self.set_view(0);
        }
    }

    /// What is left in a slot whose child is about to be cut off: nothing.
    #[inline]
    pub(crate) fn empty_behind_child(self) {
        self.set_value(Value::UNMAPPED);
        if self.has_line {
            self.set.store(&MemberSet::EMPTY);
        }
    }
}

/// What a cell of a new node says of who has its pages in view, if those are `members`; what can't be said so is inherited.
pub(crate) fn view_of(members: &MemberSet) -> SlotWord {
    let mut all = members.iter();
    let view = match (all.next(), all.next()) {
        (None, _) => 0,
        (Some(one), None) => one.index() as u64 + 1,
        _ => INHERITED,
    };
    SlotWord::FREE.with_view(view)
}

#[cfg(not(peregrine_loom))]
const _: () = assert!(size_of::<Cell>() == 16 && size_of::<Line>() == 64);

#[cfg(test)]
mod tests {
    use super::*;

    const BY: Owner = Owner {
        member: MemberId::new(MAX_MEMBERS - 1),
        generation: Generation::new(0xfff),
        operation: u32::MAX,
    };

    fn set(members: &[usize]) -> MemberSet {
        members.iter().map(|m| MemberId::new(*m)).collect()
    }

    #[test]
    fn a_lock_word_holds_owner_generation_and_operation_beside_who_has_the_page_in_view() {
        for members in [set(&[]), set(&[0]), set(&[255]), set(&[3, 200])] {
            let free = view_of(&members);
            let locked = free.locked(BY);
            assert_eq!(locked.shape(), Shape::Terminal(Some(BY)));
            assert_eq!((free.shape(), locked.line(), locked.unlocked()), (Shape::Terminal(None), None, free));
        }
        assert_eq!(SlotWord::child(u32::MAX, true).shape(), Shape::Child { node: u32::MAX, dying: true });
        assert_eq!(SlotWord::moved(u32::MAX).line(), Some(u32::MAX));
        assert_eq!(SlotWord::child(u32::MAX, false).line(), None);
    }

    #[test]
    fn a_slot_that_moves_keeps_its_lock_its_record_and_its_set() {
        for members in [set(&[]), set(&[7]), set(&[3, 200])] {
            let (cell, inherited, lines) = (Cell::new(), SharedSet::new(), [Line::new(), Line::new()]);
            inherited.store(&members);
            let value = Value::home(peregrine_base::Protection::Read, 5);
            cell.make(view_of(&members).locked(BY), value);
            let (slot, _) = Slot::find(&cell, &inherited, &lines);
            assert_eq!((slot.members(), slot.has_line()), (members, false));
            let moved = slot.move_to(1, &lines);
            let (found, word) = Slot::find(&cell, &inherited, &lines);
            assert!(moved.has_line() && found.has_line());
            assert_eq!(word.shape(), Shape::Terminal(Some(BY)));
            assert_eq!((found.value(), found.members()), (value, members));
            assert!(found.admit(MemberId::new(9)), "a line takes any set");
            assert!(found.members().contains(MemberId::new(9)));
        }
    }

    #[test]
    fn a_cell_takes_nobody_or_one_member_or_those_inherited() {
        let (cell, inherited) = (Cell::new(), SharedSet::new());
        inherited.store(&set(&[1, 2]));
        let (slot, _) = Slot::find(&cell, &inherited, &[]);
        assert!(slot.admit(MemberId::new(4)) && slot.admit(MemberId::new(4)));
        assert!(!slot.admit(MemberId::new(5)), "two take a line");
        assert_eq!(slot.members(), set(&[4]));
        slot.clear_members();
        assert!(slot.members().is_empty());
        cell.make(view_of(&set(&[1, 2])), Value::UNMAPPED);
        assert!(slot.admit(MemberId::new(2)) && !slot.admit(MemberId::new(3)));
        assert_eq!(slot.members(), set(&[1, 2]));
        slot.only(MemberId::new(2));
        assert_eq!(slot.members(), set(&[2]));
    }
}
