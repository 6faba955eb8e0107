//! Delta caches: a member's uncounted references, one word a way.
//!
//! ```text
//!   63          32 31      16 15      0
//!  │  object + 1  │  delta   │version │     object 0: the way is empty
//! ```
//!
//! An object has two ways that it can be in (and may be in both); only when other objects have both, one of them is evicted, for an
//! eviction writes the object's line, which other members write too. The owner changes a way by compare-and-swap, in a line that
//! nobody else touches, so it costs no more than the instruction; in return any member can flush for another ([`Refcache::expel`]).
//! `version` counts all changes, so that one begun before such a flush fails after it, and a reader of all ways ([`Refcache::sum`])
//! knows whether they stood still.
//!
//! A delta on its way from the cache to the object is in nobody's memory but in `Block::moving`, as the name of the object.

use super::object::{Object, ObjectId, Word};
use super::{Block, Counted, Handle, Refcache};
use crate::member::MemberId;
use crate::step::Step;
use core::fmt;
use peregrine_base::sync::{AtomicU64, Ordering, spin_loop};

/// Ways of a delta cache. Fewer under a model checker, where two objects must meet in one way.
pub const WAYS: usize = if cfg!(peregrine_loom) { 1 } else { 1024 };

/// A delta beyond this is given to the object at once; it fits 16 bits with room to spare.
const LARGE: i32 = 1 << 14;

pub(super) struct Ways([AtomicU64; WAYS]);

impl Ways {
    #[inline]
    pub(super) fn new() -> Self {
        Self(core::array::from_fn(|_| AtomicU64::new(0)))
    }

    pub(super) fn clear(&self) {
        for way in &self.0 {
            way.store(0, Ordering::Release);
        }
    }

    #[cfg_attr(peregrine_loom, allow(clippy::modulo_one, reason = "one way is what the model has"))]
    #[inline]
    fn of(&self, id: ObjectId) -> [&AtomicU64; 2] {
        // Fibonacci hashing: neighbouring objects go to ways far apart.
        let hash = id.0.wrapping_mul(0x9e37_79b9) as usize;
        [&self.0[(hash >> 12) % WAYS], &self.0[(hash >> 22) % WAYS]]
    }
}

impl fmt::Debug for Ways {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ways")
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Way(u64);

impl Way {
    #[inline]
    const fn new(id: ObjectId, delta: i32, version: u16) -> Self {
        Self((id.0 as u64 + 1) << 32 | (delta as i16 as u16 as u64) << 16 | version as u64)
    }
    #[inline]
    const fn empty(version: u16) -> Self {
        Self(version as u64)
    }
    #[inline]
    const fn id(self) -> Option<ObjectId> {
        match (self.0 >> 32) as u32 {
            0 => None,
            n => Some(ObjectId(n - 1)),
        }
    }
    #[inline]
    const fn delta(self) -> i32 {
        (self.0 >> 16) as u16 as i16 as i32
    }
    /// What the way's next value carries.
    #[inline]
    const fn next_version(self) -> u16 {
        (self.0 as u16).wrapping_add(1)
    }
}

/// Whether the epoch is known while deltas are given away.
#[derive(Clone, Copy)]
pub(super) enum Exact {
    /// It is this one and can't move: the member is behind it.
    Yes(u64),
    /// It may be one ahead of the member's own.
    No,
}

impl Refcache<'_> {
    /// Changes the count of `id` by `delta`, in the member's own cache. The caller holds a reference (to take another, or to drop
    /// it), or `id`'s count can't be trusted yet and both halves of the change cancel out.
    #[inline(always)]
    pub fn add(&self, me: &Handle, objects: &impl Counted, id: ObjectId, delta: i32) {
        // Most often the object is in its first way, and the member in the epoch.
        let [way, _] = self.block(me.id()).ways.of(id);
        let old = Way(way.load(Ordering::Acquire));
        let new = old.delta() + delta;
        if old.id() == Some(id) && new.abs() < LARGE {
            self.enter(me);
            let new = Way::new(id, new, old.next_version());
            if way.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return;
            }
        }
        self.add_anywhere(me, objects, id, delta);
    }

    #[inline(never)]
    fn add_anywhere(&self, me: &Handle, objects: &impl Counted, id: ObjectId, delta: i32) {
        let ways = self.block(me.id()).ways.of(id);
        loop {
            // Acquire pairs with a sweep's exchange: a way that was swept shows a state that is no longer In.
            let both = ways.map(|way| Way(way.load(Ordering::Acquire)));
            let is = |wanted: Option<ObjectId>| both.iter().position(|w| w.id() == wanted);
            let chosen = is(Some(id)).or_else(|| is(None)).unwrap_or(0);
            let (way, old) = (ways[chosen], both[chosen]);
            self.enter(me);
            let new = match old.id() {
                Some(resident) if resident == id => old.delta() + delta,
                None => delta,
                Some(_) => {
                    self.evict(me, objects, way, old, Exact::No);
                    continue;
                }
            };
            if new.abs() >= LARGE {
                if old.id().is_none() {
                    // More at once than a way can hold.
                    self.give(me, objects, id, delta, Exact::No);
                    return;
                }
                self.evict(me, objects, way, old, Exact::No);
                continue;
            }
            let new = Way::new(id, new, old.next_version());
            if way.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return;
            }
        }
    }

    /// Empties a way into its object.
    fn evict(&self, me: &Handle, objects: &impl Counted, way: &AtomicU64, old: Way, exact: Exact) {
        let Some(id) = old.id() else { return };
        let moving = &self.block(me.id()).moving;
        // Before the exchange below, whose release shows it to a sweeper that finds the way empty.
        moving.store(id.0 + 1, Ordering::Release);
        let empty = Way::empty(old.next_version());
        if way.compare_exchange(old.0, empty.0, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            me.step(Step::DeltaTaken);
            self.give(me, objects, id, old.delta(), exact);
        }
        // After the object's change: a reviewer that finds nothing moving finds the change.
        moving.store(0, Ordering::Release);
    }

    /// Adds to the global count, and has the object reviewed if that makes it zero.
    fn give(&self, me: &Handle, objects: &impl Counted, id: ObjectId, delta: i32, exact: Exact) {
        let object = objects.object(id);
        let turn = me.turn.get();
        let due = match exact {
            Exact::Yes(now) => now + 2,
            Exact::No => self.own_epoch(me.id()) + 3,
        };
        loop {
            let old = object.load();
            if delta == 0 && old.count() != 0 {
                // A zero delta matters only to an object that looks dead.
                return;
            }
            let mut new = old.plus(delta);
            if new.count() == 0 {
                new = if old.queued() { new.soiled() } else { new.queue_at(due) };
            }
            if new == old || object.exchange(old, new) {
                me.step(Step::DeltaGiven);
                if new.count() == 0 && !old.queued() {
                    me.step(Step::Zero);
                    self.submit(me, objects, object, id, turn);
                }
                return;
            }
        }
    }

    /// Marks a queued object dying, makes sure that its due holds, and puts it in the member's queue.
    ///
    /// `turn` is the one in which the due was computed. If it is over, the epoch may have run ahead any distance.
    pub(super) fn submit(
        &self,
        me: &Handle,
        objects: &impl Counted,
        object: &Object,
        id: ObjectId,
        mut turn: u16,
    ) {
        if !object.load().limbo() {
            objects.mark_dying(id);
        }
        me.step(Step::Marked);
        while !self.is_still_in(me, turn) {
            turn = self.enter(me);
            let due = self.own_epoch(me.id()) + 3;
            change(object, |old| if old.dirty() { old.queue_at(due).soiled() } else { old.queue_at(due) });
        }
        self.push(me.id(), objects, id);
    }

    pub(super) fn flush_all(&self, me: &Handle, objects: &impl Counted, exact: Exact) {
        let block: &Block = self.block(me.id());
        for way in &block.ways.0 {
            let old = Way(way.load(Ordering::Acquire));
            if old.id().is_some() {
                self.evict(me, objects, way, old, exact);
            }
        }
    }

    /// Flushes the ways of `who`, which is being expelled, and changes every one of them.
    pub(super) fn sweep(&self, me: &Handle, who: MemberId, objects: &impl Counted) {
        let moving = &self.block(me.id()).moving;
        for way in &self.block(who).ways.0 {
            loop {
                let old = Way(way.load(Ordering::Acquire));
                if let Some(id) = old.id() {
                    moving.store(id.0 + 1, Ordering::Release);
                }
                let empty = Way::empty(old.next_version());
                if way.compare_exchange(old.0, empty.0, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                    if let Some(id) = old.id() {
                        me.step(Step::DeltaTaken);
                        self.give(me, objects, id, old.delta(), Exact::No);
                    }
                    break;
                }
            }
            moving.store(0, Ordering::Release);
        }
    }

    /// The true count of `id`, as it was at one moment: for tests and statistics, at the price of reading every member's lines.
    ///
    /// All parts are read twice, and again until nothing has changed in between. (The released code sees that something has, and
    /// uses the sum all the same: its `continue` goes on with the inner loop.)
    pub fn sum(&self, objects: &impl Counted, id: ObjectId) -> i64 {
        let mut last = None;
        loop {
            // A delta on its way is in nobody's way and in no object: wait for it, and see the object after that.
            let mut still = true;
            let mut sum = 0i64;
            let mut seen = 0u64;
            for block in self.blocks {
                still &= block.moving.load(Ordering::Acquire) != id.0 + 1;
                let [first, second] = block.ways.of(id);
                for (n, way) in [first, second].into_iter().enumerate() {
                    if n == 1 && core::ptr::eq(first, second) {
                        break;
                    }
                    let way = Way(way.load(Ordering::Acquire));
                    seen = seen.wrapping_add(u64::from(way.next_version()).wrapping_sub(1) & 0xffff);
                    if way.id() == Some(id) {
                        sum += i64::from(way.delta());
                    }
                }
            }
            let global = objects.object(id).global();
            let now = (global, sum, seen);
            if still && last == Some(now) {
                return i64::from(global) + sum;
            }
            last = still.then_some(now);
            spin_loop();
        }
    }

    /// The delta of `id` that `member` holds back: for tests and books that are made while nobody moves.
    pub fn held_back(&self, member: MemberId, id: ObjectId) -> i32 {
        let in_way = |way: &AtomicU64| {
            let way = Way(way.load(Ordering::Acquire));
            if way.id() == Some(id) { way.delta() } else { 0 }
        };
        let [first, second] = self.block(member).ways.of(id);
        in_way(first) + if core::ptr::eq(first, second) { 0 } else { in_way(second) }
    }
}

/// Changes an object's word, however often others come in between.
pub(super) fn change(object: &Object, f: impl Fn(Word) -> Word) {
    loop {
        let old = object.load();
        if object.exchange(old, f(old)) {
            return;
        }
    }
}
