//! Epochs: who is in, who has flushed, and how others go on without a member.
//!
//! A member's state word:
//!
//! ```text
//!   63            18 17      2  1  0
//!  │  epoch (46)    │  turn   │status│     status: Out 0, In 1, Expelling 2, Stray 3
//! ```
//!
//! An In member with epoch `e` has flushed everything since the global epoch became `e`. The global epoch moves from `E` to
//! `E + 1` when every In or Expelling member has epoch `E`; so it is at most one ahead of any In member.
//!
//! `turn` changes whenever others may have gone on without the member. *Stray* is Out for a member that was stopped with a
//! delta in its hands (`Block::moving`).
//!
//! **Deltas in somebody's hands** are in no memory that a flush would find. A member's own are covered by its place in the epoch as long
//! as it is In: it says that it has flushed after they have arrived. Two kinds are not: those of a stray, and those that an expeller has
//! taken from another member, for that one may come back, find nothing to flush, and let the epoch go on, or the expeller is expelled
//! itself and goes on sweeping when it wakes. So both are counted (`Epoch::hands`), and while there are any, a review looks
//! into everybody's hands: what is in them can't die.
//!
//! What can go wrong, and does not: an expeller stopped or killed half-way leaves `Expelling`, which still counts as In,
//! and which the member itself turns back, or recovery does. A member that comes back while it is being swept
//! wins the race for its state word, and the expeller has only flushed early, which is always allowed.

use super::{Block, Counted, Handle, Refcache, cache};
use crate::member::MemberId;
use crate::step::Step;
use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// The global epoch, in a line of its own.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct Epoch {
    now: AtomicU64,
    /// Members whose state is Stray, and members that sweep another one's deltas.
    hands: AtomicU32,
}

impl Epoch {
    /// The first epoch.
    #[expect(clippy::new_without_default, reason = "made in place, in shared memory")]
    pub fn new() -> Self {
        Self { now: AtomicU64::new(0), hands: AtomicU32::new(0) }
    }

    pub(crate) fn now(&self) -> u64 {
        self.now.load(Ordering::Acquire)
    }
}

/// A member's part in the epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Status {
    Out,
    In,
    Expelling,
    Stray,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct State(u64);

impl State {
    const fn new(epoch: u64, turn: u16, status: Status) -> Self {
        Self(epoch << 18 | (turn as u64) << 2 | status as u64)
    }
    #[inline]
    const fn status(self) -> Status {
        match self.0 & 3 {
            0 => Status::Out,
            1 => Status::In,
            2 => Status::Expelling,
            _ => Status::Stray,
        }
    }
    #[inline]
    const fn turn(self) -> u16 {
        (self.0 >> 2) as u16
    }
    #[inline]
    const fn epoch(self) -> u64 {
        self.0 >> 18
    }
    const fn is_counted(self) -> bool {
        matches!(self.status(), Status::In | Status::Expelling)
    }
}

/// Why a member was not taken out of the epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ExpelError {
    /// It is not in the epoch.
    #[error("member {0} is not in the epoch: nobody waits for it")]
    NotIn(MemberId),
    /// It moved, or another member expels it.
    #[error("member {0} moved by itself or is being expelled by another")]
    Moved(MemberId),
}

impl Block {
    #[inline]
    pub(super) fn state(&self) -> State {
        // Acquire pairs with the expeller's and the owner's changes, all of which are AcqRel.
        State(self.state.load(Ordering::Acquire))
    }

    fn exchange(&self, old: State, new: State) -> Result<(), State> {
        self.state
            .compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
            .map_err(State)
    }
}

impl Refcache<'_> {
    /// Makes sure that the member is in the epoch, and tells its turn. Cheap if it is: one load of the member's own line.
    #[inline]
    pub(crate) fn enter(&self, me: &Handle) -> u16 {
        let state = self.block(me.id()).state();
        if state.status() == Status::In && state.turn() == me.turn.get() {
            state.turn()
        } else {
            self.come_back(me)
        }
    }

    /// Whether the member has been in the epoch all the time since [`enter`](Self::enter) told `turn`. What was read
    /// before, without a lock, is then trustworthy.
    #[inline(always)]
    pub(crate) fn is_still_in(&self, me: &Handle, turn: u16) -> bool {
        // The fence keeps the reads before it from moving behind the load: an expulsion whose effects they saw is seen here.
        fence(Ordering::Acquire);
        let state = self.block(me.id()).state();
        state.status() == Status::In && state.turn() == turn
    }

    #[cold]
    fn come_back(&self, me: &Handle) -> u16 {
        let block = self.block(me.id());
        loop {
            let old = block.state();
            let turn = old.turn().wrapping_add(1);
            let was_out = matches!(old.status(), Status::Out | Status::Stray);
            // Who is still counted has flushed in the epoch that it says.
            let epoch = if was_out { self.now() } else { old.epoch() };
            let mut state = State::new(epoch, turn, Status::In);
            if block.exchange(old, state).is_err() {
                continue;
            }
            if old.status() == Status::Stray {
                self.epoch.hands.fetch_sub(1, Ordering::AcqRel);
            }
            // Pairs with the fence in `advance`: either the scan there sees this member In, or this member's reads from here on
            // see all that was unlinked before the scan, and an epoch that the scan moved on from.
            fence(Ordering::SeqCst);
            // The epoch may have run ahead before anybody saw this member In. Once it is found where this member says it is,
            // it can be at most one ahead for ever after, which is what dues are computed from.
            while was_out && state.status() == Status::In && state.epoch() != self.now() {
                let newer = State::new(self.now(), turn, Status::In);
                state = match block.exchange(state, newer) {
                    Ok(()) => newer,
                    Err(other) => other,
                };
                fence(Ordering::SeqCst);
            }
            if state.status() == Status::In {
                me.turn.set(turn);
                return turn;
            }
        }
    }

    /// Leaves the epoch: nobody waits for this member until its next operation. What it has under review is taken over by
    /// the others.
    pub fn leave(&self, me: &Handle, objects: &impl Counted) {
        loop {
            let turn = self.enter(me);
            self.flush_all(me, objects, cache::Exact::No);
            let block = self.block(me.id());
            let state = block.state();
            let out = State::new(state.epoch(), turn.wrapping_add(1), Status::Out);
            if state.status() == Status::In && state.turn() == turn && block.exchange(state, out).is_ok() {
                return;
            }
        }
    }

    /// Flushes, and moves the epoch on if this member was the last. Tells whether the member flushed in a new epoch.
    pub(crate) fn flush(&self, me: &Handle, objects: &impl Counted) -> bool {
        let turn = self.enter(me);
        let block = self.block(me.id());
        let state = block.state();
        let now = self.now();
        let fresh = state.epoch() != now;
        if fresh {
            // `now` can't move beyond what was read while this member's own epoch is behind it, so dues are exact.
            self.flush_all(me, objects, cache::Exact::Yes(now));
            let done = State::new(now, turn, Status::In);
            if state.turn() != turn || block.exchange(state, done).is_err() {
                self.come_back(me);
                return false;
            }
        }
        self.advance(me);
        fresh
    }

    /// Moves the epoch on if every member that is In has flushed in it.
    fn advance(&self, me: &Handle) {
        let now = self.now();
        fence(Ordering::SeqCst);
        let all = self.blocks.iter().all(|b| {
            let state = b.state();
            !state.is_counted() || state.epoch() == now
        });
        if all && self.epoch.now.compare_exchange(now, now + 1, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            me.step(Step::Advanced);
        }
    }

    /// Takes `who` out of the epoch, flushing for it, when it has not ticked for long: it may be stopped. It comes back by
    /// itself with its next step.
    ///
    /// # Errors
    /// See [`ExpelError`]; nothing was changed that matters.
    pub fn expel(&self, me: &Handle, who: MemberId, objects: &impl Counted) -> Result<(), ExpelError> {
        self.enter(me);
        let block = self.block(who);
        let state = block.state();
        if state.status() != Status::In || who == me.id() {
            return Err(ExpelError::NotIn(who));
        }
        let expelling = State::new(state.epoch(), state.turn().wrapping_add(1), Status::Expelling);
        block.exchange(state, expelling).map_err(|_| ExpelError::Moved(who))?;
        me.step(Step::Expelling);
        // Before the first delta is taken: whoever finds its way empty sees this (its exchange), and then who has it.
        self.epoch.hands.fetch_add(1, Ordering::AcqRel);
        // Each way changes, so that a change that `who` was about to make when it was stopped fails.
        self.sweep(me, who, objects);
        // After the last one has arrived: whoever does not find this counted sees it in the object.
        self.epoch.hands.fetch_sub(1, Ordering::AcqRel);
        let stray = block.moving.load(Ordering::Acquire) != 0;
        if stray {
            self.epoch.hands.fetch_add(1, Ordering::AcqRel);
        }
        let status = if stray { Status::Stray } else { Status::Out };
        let gone = State::new(state.epoch(), expelling.turn(), status);
        block.exchange(expelling, gone).map_err(|_| {
            if stray {
                self.epoch.hands.fetch_sub(1, Ordering::AcqRel);
            }
            ExpelError::Moved(who)
        })
    }

    /// The members that the epoch waits for: In, and not yet flushed in it.
    pub fn laggards(&self) -> impl Iterator<Item = MemberId> {
        let now = self.now();
        self.blocks.iter().enumerate().filter_map(move |(i, b)| {
            let state = b.state();
            (state.is_counted() && state.epoch() != now).then(|| MemberId::new(i))
        })
    }

    /// Whether a delta of this object may be in somebody's hands and covered by nobody's place in the epoch.
    pub(super) fn is_in_hands(&self, id: super::ObjectId) -> bool {
        self.epoch.hands.load(Ordering::Acquire) != 0
            && self.blocks.iter().any(|b| b.moving.load(Ordering::Acquire) == id.0 + 1)
    }

    #[inline]
    pub(crate) fn status(&self, member: MemberId) -> Status {
        self.block(member).state().status()
    }

    /// The epoch that the member has flushed in; exact dues are two after the global one, others three after this.
    pub(super) fn own_epoch(&self, member: MemberId) -> u64 {
        self.block(member).state().epoch()
    }

    /// Forgets all deltas, queues and strays, and puts the dead Out: only while every other member is held (recovery).
    pub(crate) fn reset(&self, dead: &crate::MemberSet) {
        for (i, block) in self.blocks.iter().enumerate() {
            block.ways.clear();
            block.moving.store(0, Ordering::Release);
            block.queue.store(0, Ordering::Release);
            // Lookups go on meanwhile, and come back to the epoch by themselves: the turn changes after theirs.
            loop {
                let old = block.state();
                let out =
                    dead.contains(MemberId::new(i)) || matches!(old.status(), Status::Out | Status::Stray);
                let status = if out { Status::Out } else { Status::In };
                if block.exchange(old, State::new(old.epoch(), old.turn().wrapping_add(1), status)).is_ok() {
                    break;
                }
            }
        }
        self.epoch.hands.store(0, Ordering::Release);
    }
}
