//! The address space: operations on an arena's trees that keep views and records together.
//!
//! All operations on a range have one shape, and differ only in what they do to a record:
//!
//! ```text
//!  intend   the intent is written: pending
//!  lock     the slots that meet the range, left to right, serving shootdowns while waiting
//!  narrow   the slots at the edges, so that the locks cover what is to change and no more
//!  gather   the members whose views have pages that lose something
//!  shoot    take it from their views, and wait until it is gone               ◀── the lock is held
//!  commit   one store: from here on lookups see the new records, all at once
//!  settle   record by record, from left to right: change it, unlock it; each frame's reference is dropped as its record goes
//! ```
//!
//! Until the change, the records themselves hold the frames, so "frames kept until after the shootdown" needs no list of
//! them. A fault that comes while the range is locked waits for the lock and then finds the new record.

mod change;
mod fault;
mod fork;
mod hole;
mod look;
mod map;
mod recover;
mod run;

pub use change::{ProtectError, UnmapError};
pub use fault::{FaultError, Filled};
pub use fork::{CreateError, ForkError};
pub use look::Entries;
pub use map::{MapAdmitError, MapError};
pub use recover::{Recovered, Stopped};

use crate::desk::Member;
use crate::holder::Holder;
use crate::intent::{Doing, Phase};
use crate::member::MemberId;
use crate::mmu::{Frames, Mmu, SpaceId};
use crate::radix::lock::Attempt;
use crate::radix::slot::Owner;
use crate::radix::{At, FANOUT, PAGES, Tree};
use crate::spaces::Spaces;
use crate::step::Step;
use core::cell::Cell;
use core::fmt;
use core::ops::Range;
use peregrine_base::sync::{Ordering, spin_loop};
use peregrine_base::{PAGE_SHIFT, PageCount, PageRange, VirtAddr};

/// An address space, seen through an MMU and frames. Any number of handles may be open on the same one.
///
/// Operations of different members on disjoint ranges share no written cache line, except where one of them makes or frees a
/// node that another uses. Operations on overlapping ranges wait for each other; the range of a fault on a page that is
/// [`Home`](crate::Backing::Home) is what it fills. All take effect at one moment between call and
/// return. What each sees of a *killed* member's operation is what [`recover`](Self::recover) decided.
pub struct AddressSpace<'m, M, F> {
    pub(crate) spaces: Spaces<'m>,
    pub(crate) id: SpaceId,
    pub(crate) mmu: M,
    pub(crate) frames: F,
}

impl<M, F> fmt::Debug for AddressSpace<'_, M, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AddressSpace({})", self.id.0)
    }
}

/// Highest address that a space can hold, exclusive: 2^48.
pub const SPACE_END: usize = (PAGES as usize) << PAGE_SHIFT;

/// Most pages that one node can hold: more are never a [`run`].
pub(crate) const RUN_PAGES: usize = FANOUT;

/// An operation that has begun.
pub(crate) struct Operation {
    pub(crate) by: Owner,
    pub(crate) pages: Range<u64>,
    /// The lowest node that spans the pages: where its walks begin.
    pub(crate) at: At,
}

/// The pages of a range, if a space can hold them.
#[inline]
pub(crate) fn pages_of(range: PageRange) -> Option<Range<u64>> {
    let start = (range.start().as_usize() >> PAGE_SHIFT) as u64;
    let end = start + range.pages().get() as u64;
    (end <= PAGES).then_some(start..end)
}

#[inline]
pub(crate) fn range_of(pages: &Range<u64>) -> PageRange {
    let start = VirtAddr::new((pages.start as usize) << PAGE_SHIFT);
    PageRange::new(start, PageCount::new((pages.end - pages.start) as usize))
}

impl<'m, M: Mmu, F: Frames> AddressSpace<'m, M, F> {
    /// Which space of the arena.
    pub const fn id(&self) -> SpaceId {
        self.id
    }

    /// The MMU.
    pub const fn mmu(&self) -> &M {
        &self.mmu
    }

    /// The frames.
    pub const fn frames(&self) -> &F {
        &self.frames
    }

    #[inline]
    pub(crate) fn tree(&self) -> Tree<'_, 'm> {
        let root = self.spaces.roots[self.id.index()].node.load(Ordering::Relaxed);
        Tree { spaces: &self.spaces, root }
    }

    /// At work on the structures: returns once no recovery is on.
    #[inline]
    pub(crate) fn enter(&self, member: &Member<'m>) {
        while !member.try_enter() {
            self.mmu.wait(member.id(), member.id());
            spin_loop();
        }
    }

    /// Intends, and locks the slots that meet `pages`. Ends with [`finish`](Self::finish). Fails with the holder of a lock for which the
    /// MMU does not want to wait any longer.
    #[inline]
    pub(crate) fn begin(
        &self,
        member: &mut Member<'m>,
        doing: Doing,
        pages: Range<u64>,
    ) -> Result<Operation, Holder> {
        let turns = Cell::new(0);
        loop {
            let stuck = Cell::new(None);
            self.enter(member);
            let by = self.intend(member, doing, &pages);
            let me = &member.handle;
            let attempt = Attempt {
                me,
                by,
                turn: self.spaces.refcache().enter(me),
                wait: &|owner| self.wait(me.id(), owner, &turns, &stuck),
            };
            let tree = self.tree();
            match tree.lock(&attempt, &pages) {
                Ok(at) => return Ok(Operation { by, pages, at }),
                Err(interrupted) => {
                    let locked = pages.start..interrupted.locked_up_to.min(pages.end);
                    tree.unlock(me, by, tree.top(), &locked, false);
                    self.over(member, by);
                    if let Some(owner) = stuck.get()
                        && !self.take_over(member, owner)
                    {
                        return Err(self.holder(owner));
                    }
                }
            }
        }
    }

    /// Mends what the holder of a lock left, if it is dead.
    fn take_over(&self, member: &mut Member<'m>, owner: Owner) -> bool {
        let dead = self.mmu.is_dead(owner.member);
        if dead {
            self.recover_dead(member, owner.member);
        }
        dead
    }

    fn holder(&self, owner: Owner) -> Holder {
        let intent = self.spaces.intent(owner.member).read();
        let intent = intent.filter(|read| read.operation == owner.operation);
        Holder::new(owner.member, self.mmu.process_of(owner.member), intent)
    }

    /// Members in the middle of an operation of this space. Whoever is named again and again with the same may be stopped.
    pub fn at_work(&self) -> impl Iterator<Item = Holder> + '_ {
        let members = self.spaces.members();
        members.iter().filter_map(|member| {
            let read = self.spaces.intent(member).read()?;
            let here = read.space == self.id && read.phase != Phase::Idle;
            here.then(|| Holder::new(member, self.mmu.process_of(member), Some(read)))
        })
    }

    #[inline]
    fn intend(&self, member: &mut Member<'m>, doing: Doing, pages: &Range<u64>) -> Owner {
        member.operation = member.operation.wrapping_add(1);
        let by = Owner { member: member.id(), generation: member.generation(), operation: member.operation };
        self.spaces.intent(by.member).begin(by.operation, doing, self.id, pages);
        member.handle.step(Step::Intended);
        by
    }

    /// Lets time pass for who waits for `owner`; `false` to give up, for a recovery or, if `stuck` names the owner, for good.
    #[cold]
    fn wait(&self, me: MemberId, owner: Owner, turns: &Cell<u32>, stuck: &Cell<Option<Owner>>) -> bool {
        self.mmu.wait(me, owner.member);
        spin_loop();
        if self.spaces.is_recovering() {
            return false;
        }
        let n = turns.get().saturating_add(1);
        turns.set(n);
        // Rarely: the kernel is asked.
        let ask = n >= 256 && (n.is_power_of_two() || n.is_multiple_of(4096));
        if ask && self.mmu.is_dead(owner.member) || self.mmu.gives_up(me, owner.member, n) {
            stuck.set(Some(owner));
        }
        stuck.get().is_none()
    }

    /// Unlocks, and the operation is over.
    #[inline]
    pub(crate) fn finish(&self, member: &Member<'m>, operation: &Operation) {
        self.tree().unlock(&member.handle, operation.by, operation.at, &operation.pages, false);
        self.over(member, operation.by);
    }

    /// The operation is over, and everything is unlocked.
    #[inline]
    pub(crate) fn over(&self, member: &Member<'m>, by: Owner) {
        self.spaces.intent(by.member).finish(by.operation);
        member.exit();
    }
}
