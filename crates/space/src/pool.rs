//! Pools: memory for nodes, lines and regions that never changes its type.
//!
//! ```text
//!  │ handed out once or more                    │ fresh, never touched │
//!  0                                          fresh                  capacity
//!  each member: a stack of free ones; when it is empty, a batch of fresh ones; then what others have to spare
//! ```
//!
//! A member allocates and frees in its own line. Stacks are Treiber stacks with a tag against ABA, so that a member that
//! finds nothing fresh can take from the others' stacks. What a killed member had in its hands is found by `recover`, which
//! makes all stacks anew.

use crate::member::MemberId;
use crate::radix::slot::Line;
use crate::refcache::{Handle, Object};
use crate::step::Step;
use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering};

/// Fresh ones that a member takes at once.
pub(crate) const BATCH: u32 = if cfg!(peregrine_loom) { 1 } else { 4 };

/// Descriptor of a pooled thing or a frame, in a line of its own.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Descriptor {
    pub(crate) object: Object,
    /// The next free one, plus one.
    free_next: AtomicU32,
    /// 1 while handed out.
    pub(crate) live: AtomicU32,
    /// A node's parent slot (node << 32 | slot); a region's object.
    pub(crate) first: AtomicU64,
    /// A region's base: the object's page at address zero.
    pub(crate) second: AtomicU64,
}

impl Descriptor {
    #[cfg_attr(not(peregrine_loom), allow(dead_code, reason = "elsewhere descriptors lie in zeroed memory"))]
    pub(crate) fn new() -> Self {
        Self {
            object: Object::new(0),
            free_next: AtomicU32::new(0),
            live: AtomicU32::new(0),
            first: AtomicU64::new(0),
            second: AtomicU64::new(0),
        }
    }
}

/// What a pool needs in each thing that it holds.
pub(crate) trait Pooled {
    /// The next free one, plus one.
    fn free_next(&self) -> &AtomicU32;
    /// 1 while handed out.
    fn live(&self) -> &AtomicU32;
}

impl Pooled for Descriptor {
    fn free_next(&self) -> &AtomicU32 {
        &self.free_next
    }
    fn live(&self) -> &AtomicU32 {
        &self.live
    }
}

impl Pooled for Line {
    fn free_next(&self) -> &AtomicU32 {
        &self.free_next
    }
    fn live(&self) -> &AtomicU32 {
        &self.live
    }
}

/// A stack of free ones: tag << 32 | index + 1.
#[derive(Debug)]
pub(crate) struct Stack(AtomicU64);

impl Stack {
    #[cfg_attr(not(peregrine_loom), allow(dead_code, reason = "elsewhere it lies in zeroed memory"))]
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    fn push(&self, all: &[impl Pooled], index: u32) {
        loop {
            let head = self.0.load(Ordering::Relaxed);
            all[index as usize].free_next().store(head as u32, Ordering::Relaxed);
            let new = (head >> 32).wrapping_add(1) << 32 | u64::from(index + 1);
            // Release publishes the link; the tag makes a slow pop fail.
            if self.0.compare_exchange(head, new, Ordering::Release, Ordering::Relaxed).is_ok() {
                return;
            }
        }
    }

    fn pop(&self, all: &[impl Pooled]) -> Option<u32> {
        loop {
            let head = self.0.load(Ordering::Acquire);
            let index = (head as u32).checked_sub(1)?;
            let next = all[index as usize].free_next().load(Ordering::Relaxed);
            let new = (head >> 32).wrapping_add(1) << 32 | u64::from(next);
            if self.0.compare_exchange(head, new, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return Some(index);
            }
        }
    }

    pub(crate) fn clear(&self) {
        self.0.store(0, Ordering::Release);
    }
}

/// One kind of pooled thing.
#[derive(Clone, Copy)]
pub(crate) struct Pool<'m, 'a, T> {
    pub(crate) all: &'m [T],
    pub(crate) fresh: &'m AtomicU32,
    /// Each member's stack.
    pub(crate) stacks: &'a dyn Fn(MemberId) -> &'m Stack,
    pub(crate) members: usize,
}

impl<T: Pooled> Pool<'_, '_, T> {
    /// One that nobody uses, or `None` if there is none.
    pub(crate) fn take(&self, me: &Handle) -> Option<u32> {
        let index = self.find(me)?;
        self.all[index as usize].live().store(1, Ordering::Relaxed);
        me.step(Step::Allocated);
        Some(index)
    }

    fn find(&self, me: &Handle) -> Option<u32> {
        let mine = (self.stacks)(me.id());
        if let Some(index) = mine.pop(self.all) {
            return Some(index);
        }
        let capacity = self.all.len() as u32;
        if self.fresh.load(Ordering::Relaxed) < capacity {
            let from = self.fresh.fetch_add(BATCH, Ordering::Relaxed);
            if from < capacity {
                for index in (from + 1..(from + BATCH).min(capacity)).rev() {
                    mine.push(self.all, index);
                }
                return Some(from);
            }
        }
        (0..self.members).find_map(|m| (self.stacks)(MemberId::new(m)).pop(self.all))
    }

    /// Gives one back. Nobody can be reading it.
    pub(crate) fn give(&self, me: &Handle, index: u32) {
        self.all[index as usize].live().store(0, Ordering::Relaxed);
        (self.stacks)(me.id()).push(self.all, index);
        me.step(Step::Freed);
    }

    /// How many have ever been handed out.
    pub(crate) fn touched(&self) -> usize {
        (self.fresh.load(Ordering::Relaxed) as usize).min(self.all.len())
    }

    /// How many are handed out.
    pub(crate) fn live(&self) -> usize {
        self.all[..self.touched()].iter().filter(|d| d.live().load(Ordering::Relaxed) != 0).count()
    }
}
