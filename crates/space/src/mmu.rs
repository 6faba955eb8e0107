//! What the embedder brings: an MMU and frames.
//!
//! The address space decides, the [`Mmu`] carries out. Every member has a view of each space: a page table, or a process
//! with mappings. A view is a cache that may be dropped at any time, for the records alone are the truth; it must never
//! hold *more* than the records allow. The protocol keeps that with one rule: before a record loses a frame or a right, the
//! views of all members in the record's set lose it, under the record's lock.
//!
//! ```text
//!  fault:             lock ─▶ set.insert(me) ─▶ Mmu::fill(me) ─▶ unlock
//!  unmap, protect:    lock ─▶ gather sets ─▶ Mmu::shootdown(sets) ─▶ commit ─▶ change records, drop frames ─▶ unlock
//! ```
//!
//! A member enters the set before its view is filled, and leaves it after its view was emptied, so that a member that dies
//! in between is at worst shot down for nothing.

use crate::member::{MemberId, MemberSet};
use peregrine_base::{PageRange, Protection, VirtAddr};

/// An address space of an arena: one tree.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct SpaceId(pub(crate) u16);

impl SpaceId {
    /// Its number: below the number of spaces that the arena was made for.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A page frame, by the embedder's dense numbering: below the number of frames that the arena was made for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct FrameId(u32);

impl FrameId {
    /// The frame `number`.
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// What a view shows in a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Contents {
    /// This frame.
    Frame(FrameId),
    /// The frame that this address names in the embedder's one linear mapping (see [`Backing::Home`](crate::Backing::Home)).
    Home,
}

/// What a shootdown takes from views.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// All: the next access of a member faults.
    Drop,
    /// Rights beyond these. A view may as well drop the pages.
    Restrict(Protection),
}

/// The views of all members.
///
/// Methods are called by the member named `by` or `member`, in its own context. The implementation must not call back
/// into the address space.
pub trait Mmu {
    /// Why a view could not be filled.
    type Error: core::fmt::Debug;

    /// Pages that a fault on a [`Home`](crate::Backing::Home) record fills at once, at most: a power of two. They lie in the aligned
    /// block of so many around the page, and are of the page's mapping.
    const BLOCK_PAGES: usize = 1;

    /// The same for the fault at hand: a power of two, at most [`BLOCK_PAGES`](Self::BLOCK_PAGES).
    fn block_pages(&self) -> usize {
        Self::BLOCK_PAGES
    }

    /// Shows `contents` with at most `rights` in `member`'s own view; for [`Contents::Frame`] the range is one page, for
    /// [`Contents::Home`] all of it is home and of one mapping. The pages' lock is held. An entry that is there already is replaced.
    ///
    /// # Errors
    /// The implementation's own; the fault reports it and changes nothing else.
    fn fill(
        &self,
        space: SpaceId,
        member: MemberId,
        range: PageRange,
        contents: Contents,
        rights: Protection,
    ) -> Result<(), Self::Error>;

    /// Takes `change` from the views of `targets` (`by` may be one of them: its own view needs no interrupt) and returns when no
    /// target can reach through a stale entry any more: it acknowledged, is dead, or can't run an instruction before it has
    /// acknowledged. Called with the range locked; never called with an empty set. The members that wait for the lock
    /// meanwhile are in [`Mmu::wait`].
    fn shootdown(&self, space: SpaceId, by: MemberId, range: PageRange, targets: &MemberSet, change: Change);

    /// Called again and again while `member` waits for a lock that `owner` holds: serves the shootdowns sent to `member`, or
    /// two members that wait for each other would never go on, and lets time pass.
    fn wait(&self, member: MemberId, owner: MemberId);

    /// `member` died: whatever it had filled is gone with it, and shootdowns no longer wait for it.
    fn forget(&self, member: MemberId) {
        let _ = member;
    }

    /// Whether `member` is certain to have been killed. A recovery asks this of members that it would have to wait for, and mends
    /// what they left as well; so does, now and then, who waits for a lock, of its holder, and recovers if it is.
    fn is_dead(&self, member: MemberId) -> bool {
        let _ = member;
        false
    }

    /// Whether what a dead member had in view is gone with it, as a process's page table is.
    fn views_die_with_members(&self) -> bool {
        false
    }

    /// Asked after each [`wait`](Self::wait), the `turns`th for this lock: whether `member` should wait no longer for `owner`, which
    /// lives (it may be stopped in the middle of an operation, which can't be taken over). Then its own operation fails, with
    /// nothing changed, and the error names the holder.
    fn gives_up(&self, member: MemberId, owner: MemberId, turns: u32) -> bool {
        let _ = (member, owner, turns);
        false
    }

    /// The process that `member` is, if members are processes: for messages.
    fn process_of(&self, member: MemberId) -> Option<u32> {
        let _ = member;
        None
    }
}

/// The frames behind the pages. Counting is not the embedder's: the arena keeps one Refcache object a frame.
///
/// An embedder whose records are all [`Home`](crate::Backing::Home) hands out nothing and gets nothing back, which is what the methods do
/// if they are left as they are: then a fault on any other record fails with [`NoFrame`](crate::FaultError::NoFrame).
pub trait Frames {
    /// A frame of zeroes for the anonymous page at `page`, or `None` if there is none left.
    fn zeroed(&self, space: SpaceId, by: MemberId, page: VirtAddr) -> Option<FrameId> {
        let _ = (space, by, page);
        None
    }

    /// A private copy of `from` for `page`, or `None` if there is no frame left.
    fn copied(&self, space: SpaceId, by: MemberId, page: VirtAddr, from: FrameId) -> Option<FrameId> {
        let _ = (space, by, page, from);
        None
    }

    /// The frame of page `index` of `object`, or `None` if it can't be had. What the embedder keeps in a cache either has a reference of
    /// the cache's own ([`Member::hold`](crate::Member::hold), [`Frames::pins`]), or is given up when it is [asked](Frames::forget).
    fn of_object(&self, by: MemberId, object: u64, index: u64) -> Option<FrameId> {
        let _ = (by, object, index);
        None
    }

    /// Nobody but a cache of the embedder's that holds no reference may have `frame` any more. With `true` it is in the cache no
    /// longer (it was written back, if need be), and is [released](Frames::release) soon. `false`: since this was last asked, or if it never
    /// was, [`of_object`](Frames::of_object) has handed the frame out, and who got it may not have counted it yet: this is asked again.
    ///
    /// The cache's lock must make one of the two come first: an answer that a frame is forgotten, while somebody is just handed it,
    /// frees it under its new owner.
    fn forget(&self, by: MemberId, frame: FrameId) -> bool {
        let _ = (by, frame);
        true
    }

    /// No record, no view and no lock-free reader has `frame` any more. It may be used again, zeroed first (S2).
    fn release(&self, by: MemberId, frame: FrameId) {
        let _ = (by, frame);
    }

    /// The [`Home`](crate::Backing::Home) records of `range` leave: no view shows its pages any more, and its lock is held. Told again when the
    /// operation's member died and another one finishes it.
    fn vacated(&self, space: SpaceId, by: MemberId, range: PageRange) {
        let _ = (space, by, range);
    }

    /// References to `frame` that the embedder itself took with [`Member::hold`](crate::Member::hold). Asked when counts are made
    /// anew after a death.
    fn pins(&self, frame: FrameId) -> u32 {
        let _ = frame;
        0
    }

    /// A member died, and the records were mended: `live` tells the frames that are in use (in records, or still under
    /// review). Every other frame is free: rebuild the free lists from that. All other members are held meanwhile.
    fn rebuild(&self, by: MemberId, live: &dyn Fn(FrameId) -> bool) {
        let _ = (by, live);
    }
}

impl<T: Mmu> Mmu for &T {
    type Error = T::Error;
    const BLOCK_PAGES: usize = T::BLOCK_PAGES;

    fn block_pages(&self) -> usize {
        T::block_pages(self)
    }

    fn fill(
        &self,
        space: SpaceId,
        member: MemberId,
        range: PageRange,
        contents: Contents,
        rights: Protection,
    ) -> Result<(), Self::Error> {
        T::fill(self, space, member, range, contents, rights)
    }
    fn shootdown(&self, space: SpaceId, by: MemberId, range: PageRange, targets: &MemberSet, change: Change) {
        T::shootdown(self, space, by, range, targets, change);
    }
    fn wait(&self, member: MemberId, owner: MemberId) {
        T::wait(self, member, owner);
    }
    fn forget(&self, member: MemberId) {
        T::forget(self, member);
    }
    fn is_dead(&self, member: MemberId) -> bool {
        T::is_dead(self, member)
    }
    fn views_die_with_members(&self) -> bool {
        T::views_die_with_members(self)
    }
    fn gives_up(&self, member: MemberId, owner: MemberId, turns: u32) -> bool {
        T::gives_up(self, member, owner, turns)
    }
    fn process_of(&self, member: MemberId) -> Option<u32> {
        T::process_of(self, member)
    }
}

impl<T: Frames> Frames for &T {
    fn zeroed(&self, space: SpaceId, by: MemberId, page: VirtAddr) -> Option<FrameId> {
        T::zeroed(self, space, by, page)
    }
    fn copied(&self, space: SpaceId, by: MemberId, page: VirtAddr, from: FrameId) -> Option<FrameId> {
        T::copied(self, space, by, page, from)
    }
    fn of_object(&self, by: MemberId, object: u64, index: u64) -> Option<FrameId> {
        T::of_object(self, by, object, index)
    }
    fn forget(&self, by: MemberId, frame: FrameId) -> bool {
        T::forget(self, by, frame)
    }
    fn release(&self, by: MemberId, frame: FrameId) {
        T::release(self, by, frame);
    }
    fn vacated(&self, space: SpaceId, by: MemberId, range: PageRange) {
        T::vacated(self, space, by, range);
    }
    fn pins(&self, frame: FrameId) -> u32 {
        T::pins(self, frame)
    }
    fn rebuild(&self, by: MemberId, live: &dyn Fn(FrameId) -> bool) {
        T::rebuild(self, by, live);
    }
}
