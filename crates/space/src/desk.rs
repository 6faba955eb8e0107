//! A member's place in an arena, and what it does between operations.
//!
//! A member joins by claiming a *desk*: its own lines, which others read but (short of recovery) never write.

use crate::intent::Intent;
use crate::keeper::Keeper;
use crate::member::{Generation, MemberId};
use crate::mmu::{FrameId, Frames};
use crate::pool::Stack;
use crate::refcache::{ExpelError, Handle};
use crate::spaces::Spaces;
use crate::step::Hook;
use core::fmt;
use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering};

/// All members' places are taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("all {members} members' places are taken: make the arena for more")]
pub struct NoPlace {
    /// How many the arena was made for.
    pub members: usize,
}

/// A member's own lines.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Desk {
    /// generation << 1 | claimed
    claim: AtomicU64,
    /// 1 while in an operation.
    busy: AtomicU32,
    pub(crate) free_nodes: Stack,
    pub(crate) free_lines: Stack,
    pub(crate) free_regions: Stack,
    pub(crate) intent: Intent,
}

impl Desk {
    #[cfg_attr(not(peregrine_loom), allow(dead_code, reason = "elsewhere it lies in zeroed memory"))]
    pub(crate) fn new() -> Self {
        Self {
            claim: AtomicU64::new(0),
            busy: AtomicU32::new(0),
            free_nodes: Stack::new(),
            free_lines: Stack::new(),
            free_regions: Stack::new(),
            intent: Intent::new(),
        }
    }
}

impl<'m> Spaces<'m> {
    /// Claims a member's place.
    ///
    /// # Errors
    /// [`NoPlace`] if there is none left.
    pub fn join(&self) -> Result<Member<'m>, NoPlace> {
        let claimed = (0..self.desks.len()).find_map(|index| self.claim(index));
        claimed.ok_or(NoPlace { members: self.desks.len() })
    }

    /// Claims one certain place: for embedders that have a list of members of their own, by the same numbers.
    ///
    /// # Errors
    /// [`NoPlace`] if somebody has it, or there is none.
    pub fn join_at(&self, member: MemberId) -> Result<Member<'m>, NoPlace> {
        self.claim(member.index()).ok_or(NoPlace { members: self.desks.len() })
    }

    fn claim(&self, index: usize) -> Option<Member<'m>> {
        let desk = self.desks.get(index)?;
        let claim = desk.claim.load(Ordering::Relaxed);
        if claim & 1 != 0 {
            return None;
        }
        let generation = Generation::new((claim >> 1) as u16).next();
        let claimed = u64::from(generation.get()) << 1 | 1;
        // Acquire pairs with the release of whoever left this place or recovered it.
        desk.claim.compare_exchange(claim, claimed, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        let handle = Handle::new(MemberId::new(index), generation);
        Some(Member { spaces: *self, operation: desk.intent.last(), handle, hint: None, stuck: (0, 0) })
    }

    /// The members whose places are claimed.
    pub fn members(&self) -> crate::MemberSet {
        let claimed = |d: &&(usize, &Desk)| d.1.claim.load(Ordering::Relaxed) & 1 != 0;
        self.desks.iter().enumerate().collect_members(claimed)
    }
}

trait CollectMembers<'a> {
    fn collect_members(self, keep: impl Fn(&&(usize, &'a Desk)) -> bool) -> crate::MemberSet;
}
impl<'a, I: Iterator<Item = (usize, &'a Desk)>> CollectMembers<'a> for I {
    fn collect_members(self, keep: impl Fn(&&(usize, &'a Desk)) -> bool) -> crate::MemberSet {
        self.filter(|d| keep(&d)).map(|(i, _)| MemberId::new(i)).collect()
    }
}

/// A member: one at a time uses it, and all operations go through one.
///
/// Dropping it does not give the place back, for a member may also end by being killed: [`leave`](Self::leave) does, and
/// [`AddressSpace::recover`](crate::AddressSpace::recover) does it for the dead.
pub struct Member<'m> {
    pub(crate) spaces: Spaces<'m>,
    pub(crate) handle: Handle,
    pub(crate) operation: u32,
    /// Where the next hole is looked for.
    pub(crate) hint: Option<u64>,
    /// The epoch at the last tick, and for how many ticks it has been that.
    stuck: (u64, u32),
}

/// Ticks for which the epoch may wait for a member before it goes on without it.
const PATIENCE: u32 = 16;

impl fmt::Debug for Member<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Member({}, {:?})", self.id(), self.generation())
    }
}

impl<'m> Member<'m> {
    /// The member's number.
    #[inline]
    pub const fn id(&self) -> MemberId {
        self.handle.id()
    }

    /// Which life of that number.
    #[inline]
    pub const fn generation(&self) -> Generation {
        self.handle.generation()
    }

    /// The arena.
    pub const fn spaces(&self) -> Spaces<'m> {
        self.spaces
    }

    /// Has `hook` called at every step that holds a lock or has changed something.
    pub fn on_step(&mut self, hook: Option<Hook>) {
        self.handle.on_step(hook);
    }

    /// To be called between operations every few milliseconds: flushes deltas, moves the epoch on, gives memory that nobody uses
    /// back to its pools, and frames to `frames`. Tells how many objects died. Skipped while a recovery is on.
    ///
    /// A member for which the epoch has waited a number of these ticks is [expelled](Self::expel): it may be stopped.
    pub fn tick(&mut self, frames: &impl Frames) -> usize {
        if !self.try_enter() {
            return 0;
        }
        let keeper = Keeper { spaces: &self.spaces, frames };
        let dead = self.spaces.refcache().tick(&self.handle, &keeper);
        let epoch = self.epoch();
        self.stuck = if self.stuck.0 == epoch { (epoch, self.stuck.1 + 1) } else { (epoch, 0) };
        if self.stuck.1 >= PATIENCE {
            self.stuck.1 = 0;
            for laggard in self.laggards().iter().filter(|m| *m != self.id()) {
                // It may have moved just now, which is as good.
                let _ = self.spaces.refcache().expel(&self.handle, laggard, &self.spaces);
            }
        }
        self.exit();
        dead
    }

    /// Leaves the epoch until the next operation: before blocking. Nobody waits for this member then, and what it has under
    /// review is taken over by others.
    pub fn idle(&mut self) {
        if self.try_enter() {
            self.spaces.refcache().leave(&self.handle, &self.spaces);
            self.exit();
        }
    }

    /// Takes a member that no longer ticks out of the epoch: it may be stopped. It comes back by itself.
    ///
    /// # Errors
    /// See [`ExpelError`]. A member that moves in between is not expelled; try again later.
    pub fn expel(&mut self, who: MemberId) -> Result<(), ExpelError> {
        if !self.try_enter() {
            return Err(ExpelError::Moved(who));
        }
        let result = self.spaces.refcache().expel(&self.handle, who, &self.spaces);
        self.exit();
        result
    }

    /// The members that the epoch waits for. One that is named again and again is stopped: see [`expel`](Self::expel).
    pub fn laggards(&self) -> crate::MemberSet {
        self.spaces.refcache().laggards().collect()
    }

    /// The epoch.
    pub fn epoch(&self) -> u64 {
        self.spaces.refcache().now()
    }

    /// Takes a reference to a frame for the embedder itself (a page cache), which reports it in [`Frames::pins`].
    pub fn hold(&mut self, frame: FrameId) {
        self.add_to_frame(frame, 1);
    }

    /// Drops a reference that [`hold`](Self::hold) took.
    pub fn let_go(&mut self, frame: FrameId) {
        self.add_to_frame(frame, -1);
    }

    fn add_to_frame(&self, frame: FrameId, delta: i32) {
        while !self.try_enter() {
            peregrine_base::sync::spin_loop();
        }
        self.spaces.refcache().add(&self.handle, &self.spaces, self.spaces.frame_id(frame), delta);
        self.exit();
    }

    /// Gives the place back.
    pub fn leave(self) {
        while !self.try_enter() {
            peregrine_base::sync::spin_loop();
        }
        self.spaces.refcache().leave(&self.handle, &self.spaces);
        self.exit();
        let desk = self.desk();
        let claim = desk.claim.load(Ordering::Relaxed);
        desk.claim.store(claim & !1, Ordering::Release);
    }

    #[inline]
    pub(crate) fn desk(&self) -> &'m Desk {
        &self.spaces.desks[self.id().index()]
    }

    /// Says that the member is at work on the structures, unless a recovery holds everybody.
    #[inline]
    pub(crate) fn try_enter(&self) -> bool {
        // SeqCst here and in `hold_everybody`: either this member sees the recovery, or the recovery sees it busy.
        self.desk().busy.swap(1, Ordering::SeqCst);
        if self.spaces.head.recovery.0.load(Ordering::SeqCst) == 0 {
            return true;
        }
        self.exit();
        false
    }

    #[inline]
    pub(crate) fn exit(&self) {
        self.desk().busy.store(0, Ordering::Release);
    }

    /// Tries to become the one who recovers; who recovers at present is asked for `is_dead`, and taken over from if so.
    pub(crate) fn claim_recovery(&self, is_dead: impl Fn(MemberId) -> bool) -> bool {
        let (word, mine) = (&self.spaces.head.recovery.0, self.id().index() as u32 + 1);
        let now = word.load(Ordering::SeqCst);
        let free = now == 0 || is_dead(MemberId::new(now as usize - 1));
        free && word.compare_exchange(now, mine, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }

    /// A member that has not stepped back yet.
    pub(crate) fn somebody_at_work(&self) -> Option<MemberId> {
        let at_work = |(i, d): (usize, &Desk)| {
            (i != self.id().index() && d.busy.load(Ordering::SeqCst) != 0).then(|| MemberId::new(i))
        };
        self.spaces.desks.iter().enumerate().find_map(at_work)
    }

    pub(crate) fn release_everybody(&self) {
        self.spaces.head.recovery.0.store(0, Ordering::Release);
    }
}

impl Spaces<'_> {
    /// A dead member's place: no longer at work, and free for another.
    pub(crate) fn bury(&self, dead: MemberId) {
        let desk = &self.desks[dead.index()];
        desk.busy.store(0, Ordering::Release);
        desk.intent.finish(desk.intent.last());
        let claim = desk.claim.load(Ordering::Relaxed);
        desk.claim.store(claim & !1, Ordering::Release);
    }

    pub(crate) fn stop_working(&self, dead: MemberId) {
        self.desks[dead.index()].busy.store(0, Ordering::SeqCst);
    }

    /// Empties all stacks of free ones: recovery fills them anew.
    pub(crate) fn forget_free(&self) {
        for desk in self.desks {
            desk.free_nodes.clear();
            desk.free_lines.clear();
            desk.free_regions.clear();
        }
    }
}
