//! Intents: what a member is about to do, for lookups that meet its locks and for survivors of its death.
//!
//! One entry a member, in a line of its own:
//!
//! ```text
//!  state = operation number << 8 | phase
//!
//!  idle(n-1) ─▶ writing(n) ─▶ pending(n) ─▶ committed(n) ─▶ planting(n) ─▶ idle(n)
//!                               │  locks, gathers, shoots down      after a death: unlock, nothing has changed
//!                                              │  changes records   after a death: change the rest, unlock
//!                                                              │    only `map_and_admit`, which fills its view before it unlocks:
//!                                                                   what was there is gone, and all that is mapped is new; where
//!                                                                   nothing was, this follows upon pending
//! ```
//!
//! What a committed operation does to a record depends on the record alone ([`Intent::outcome`]), and doing it twice is
//! doing it once: so a lookup can tell the result before it is written, and recovery can finish from anywhere. The fields
//! are written before `pending` is and never while an operation with that number can be looked at: a sequence lock.
//!
//! Shootdowns come *before* the commit: from the commit on nobody reaches the pages through a stale entry, and whoever faults meets the
//! lock. So a death after the commit leaves no view to be mended.

use crate::mmu::SpaceId;
use crate::radix::slot::Owner;
use crate::record::Value;
use core::ops::Range;
use peregrine_base::Protection;
use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering, fence};

/// What an operation does to each record in its range once it is committed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Doing {
    /// This record, whatever was there.
    Set(Value),
    /// Other rights, if it is mapped.
    Rights(Protection),
    /// One page's record, in one step of its own: never committed.
    Fault,
    /// Copies to the space under construction: never committed.
    Fork(SpaceId),
}

impl Doing {
    /// The record that `old` becomes.
    #[inline]
    pub(crate) const fn apply(self, old: Value) -> Value {
        match self {
            Self::Set(new) => new,
            Self::Rights(rights) => old.with_rights(rights),
            Self::Fault | Self::Fork(_) => old,
        }
    }

    #[inline]
    const fn encode(self) -> (u32, u64) {
        match self {
            Self::Set(value) => (0, value.0),
            Self::Rights(rights) => (1, rights as u64),
            Self::Fault => (2, 0),
            Self::Fork(space) => (3, space.0 as u64),
        }
    }

    const fn decode(kind: u32, value: u64) -> Self {
        match (kind, value) {
            (0, _) => Self::Set(Value(value)),
            (1, 0) => Self::Rights(Protection::None),
            (1, 1) => Self::Rights(Protection::Read),
            (1, _) => Self::Rights(Protection::ReadWrite),
            (3, _) => Self::Fork(SpaceId(value as u16)),
            _ => Self::Fault,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    Idle,
    Writing,
    Pending,
    Committed,
    Planting,
}

/// An intent as it was read in one piece.
#[derive(Clone, Debug)]
pub(crate) struct Read {
    pub(crate) phase: Phase,
    pub(crate) operation: u32,
    pub(crate) doing: Doing,
    pub(crate) space: SpaceId,
    pub(crate) pages: Range<u64>,
}

#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Intent {
    state: AtomicU64,
    kind: AtomicU32,
    space: AtomicU32,
    value: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
}

const fn state(operation: u32, phase: Phase) -> u64 {
    (operation as u64) << 8 | phase as u64
}

const fn phase(state: u64) -> Phase {
    match state & 0xff {
        0 => Phase::Idle,
        1 => Phase::Writing,
        2 => Phase::Pending,
        3 => Phase::Committed,
        _ => Phase::Planting,
    }
}

impl Intent {
    #[cfg_attr(not(peregrine_loom), allow(dead_code, reason = "elsewhere it lies in zeroed memory"))]
    pub(crate) fn new() -> Self {
        Self {
            state: AtomicU64::new(0),
            kind: AtomicU32::new(0),
            space: AtomicU32::new(0),
            value: AtomicU64::new(0),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
        }
    }

    /// The number of the last operation, also of an earlier life of this member.
    pub(crate) fn last(&self) -> u32 {
        (self.state.load(Ordering::Acquire) >> 8) as u32
    }

    /// By the member itself.
    #[inline]
    pub(crate) fn begin(&self, operation: u32, doing: Doing, space: SpaceId, pages: &Range<u64>) {
        let (kind, value) = doing.encode();
        // Release: a lookup that finds the last operation over finds its locks gone.
        self.state.store(state(operation, Phase::Writing), Ordering::Release);
        // Pairs with the fence in `read`: who sees a new field sees `Writing` or later, and looks again.
        fence(Ordering::Release);
        self.kind.store(kind, Ordering::Relaxed);
        self.space.store(u32::from(space.0), Ordering::Relaxed);
        self.value.store(value, Ordering::Relaxed);
        self.start.store(pages.start, Ordering::Relaxed);
        self.end.store(pages.end, Ordering::Relaxed);
        self.state.store(state(operation, Phase::Pending), Ordering::Release);
    }

    /// The moment at which the operation takes effect.
    #[inline]
    pub(crate) fn commit(&self, operation: u32) {
        self.state.store(state(operation, Phase::Committed), Ordering::Release);
    }

    /// Of a committed operation, or where nothing was: every record that was there is gone, and told so; from here on new ones are written.
    #[inline]
    pub(crate) fn plant(&self, operation: u32) {
        self.state.store(state(operation, Phase::Planting), Ordering::Release);
    }

    /// After the last lock was released.
    #[inline]
    pub(crate) fn finish(&self, operation: u32) {
        self.state.store(state(operation, Phase::Idle), Ordering::Release);
    }

    /// What the member is about to do, or `None` if it is just changing its mind.
    pub(crate) fn read(&self) -> Option<Read> {
        let before = self.state.load(Ordering::Acquire);
        let read = Read {
            phase: phase(before),
            operation: (before >> 8) as u32,
            doing: Doing::decode(self.kind.load(Ordering::Relaxed), self.value.load(Ordering::Relaxed)),
            space: SpaceId(self.space.load(Ordering::Relaxed) as u16),
            pages: self.start.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed),
        };
        fence(Ordering::Acquire);
        // The phase may have moved on from pending to committed; the fields are the same then.
        let after = self.state.load(Ordering::Relaxed);
        (after == before && read.phase != Phase::Writing).then_some(read)
    }

    /// What the record of `page` is, if its slot shows `owner`'s lock and holds `held`; `None` if the operation went on
    /// meanwhile: look again. Never waits: a member stopped at any point leaves an answer.
    pub(crate) fn outcome(&self, owner: Owner, page: u64, held: Value) -> Option<Value> {
        let before = self.state.load(Ordering::Acquire);
        if (before >> 8) as u32 != owner.operation {
            return None;
        }
        match phase(before) {
            Phase::Idle => None,
            // Not committed, so no record has changed; what the fields say does not matter yet.
            Phase::Writing | Phase::Pending => Some(held),
            Phase::Committed | Phase::Planting => {
                let read = self.read()?;
                if read.operation != owner.operation
                    || !matches!(read.phase, Phase::Committed | Phase::Planting)
                {
                    return None;
                }
                // Rounded out, the lock may cover more than the operation.
                Some(if read.pages.contains(&page) { read.doing.apply(held) } else { held })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::member::{Generation, MemberId};
    use crate::record::Kind;

    #[test]
    fn a_lookup_sees_the_outcome_from_the_commit_on_and_nothing_after_the_end() {
        let intent = Intent::new();
        let owner = Owner { member: MemberId::new(0), generation: Generation::default(), operation: 7 };
        let held = Value::new(Kind::Anonymous, false, Protection::ReadWrite, None);
        intent.begin(7, Doing::Set(Value::UNMAPPED), SpaceId(0), &(4..8));
        assert_eq!(intent.outcome(owner, 5, held).map(|v| v.0), Some(held.0));
        intent.commit(7);
        assert_eq!(intent.outcome(owner, 5, held).map(|v| v.0), Some(0));
        assert_eq!(intent.outcome(owner, 9, held).map(|v| v.0), Some(held.0));
        intent.finish(7);
        assert!(intent.outcome(owner, 5, held).is_none());
        intent.begin(8, Doing::Fault, SpaceId(0), &(4..8));
        assert!(intent.outcome(owner, 5, held).is_none());
    }
}
