//! Ways to count references: one word, a word a core, SNZI, Refcache.

use super::base::sync::{AtomicI64, AtomicU64, Ordering};
use super::space::refcache::{Block, Counted, Epoch, Handle, Object, ObjectId, Reclaim, Refcache, Severed};
use super::space::{Generation, MemberId};

/// A reference taken and dropped by a core.
pub trait Counter: Sync {
    /// Both.
    fn take_and_drop(&self, core: usize);
}

/// One word that all cores change.
pub struct Shared(pub AtomicI64);

impl Counter for Shared {
    fn take_and_drop(&self, _core: usize) {
        self.0.fetch_add(1, Ordering::AcqRel);
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A line a core: cheap to change, dear to store (a line for each core and object), and nobody learns when the sum is zero.
pub struct Sharded(Vec<Line>);

#[repr(align(128))]
struct Line(AtomicI64);

impl Sharded {
    pub fn new(cores: usize) -> Self {
        Self((0..cores).map(|_| Line(AtomicI64::new(0))).collect())
    }
}

impl Counter for Sharded {
    fn take_and_drop(&self, core: usize) {
        self.0[core].0.fetch_add(1, Ordering::AcqRel);
        self.0[core].0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// SNZI (Ellen, Lev, Luchangco, Moir 2007): a tree whose nodes tell their parents only of changes between zero and not zero.
/// One leaf for each two cores.
pub struct Snzi {
    /// A heap: node `i` has parent `(i - 1) / 2`; the root counts plainly.
    nodes: Vec<Node>,
    leaves: usize,
}

/// Twice the count (so that one half is a value) in the low half, a version in the high one.
#[repr(align(128))]
struct Node(AtomicU64);

const HALF: u64 = 1;

impl Snzi {
    pub fn new(cores: usize) -> Self {
        let leaves = cores.div_ceil(2).next_power_of_two();
        Self { nodes: (0..2 * leaves - 1).map(|_| Node(AtomicU64::new(0))).collect(), leaves }
    }

    fn arrive(&self, node: usize) {
        let word = &self.nodes[node].0;
        if node == 0 {
            word.fetch_add(2, Ordering::AcqRel);
            return;
        }
        let parent = (node - 1) / 2;
        let (mut done, mut undo) = (false, 0);
        while !done {
            let old = word.load(Ordering::Acquire);
            let (count, version) = (old & 0xffff_ffff, old >> 32);
            let swap =
                |new: u64| word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok();
            if count >= 2 {
                done = swap(old + 2);
                continue;
            }
            let mut now = old;
            if count == 0 {
                let half = (version + 1) << 32 | HALF;
                if !swap(half) {
                    continue;
                }
                done = true;
                now = half;
            }
            if now & 0xffff_ffff == HALF {
                self.arrive(parent);
                let one = now & !0xffff_ffff | 2;
                if word.compare_exchange(now, one, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                    undo += 1;
                }
            }
        }
        (0..undo).for_each(|_| self.depart(parent));
    }

    fn depart(&self, node: usize) {
        let word = &self.nodes[node].0;
        let old = word.fetch_sub(2, Ordering::AcqRel);
        if node != 0 && old & 0xffff_ffff == 2 {
            self.depart((node - 1) / 2);
        }
    }
}

impl Counter for Snzi {
    fn take_and_drop(&self, core: usize) {
        let leaf = self.leaves - 1 + core % self.leaves;
        self.arrive(leaf);
        self.depart(leaf);
    }
}

/// Refcache, with one object.
pub struct Cached {
    epoch: Epoch,
    blocks: Vec<Block>,
    handles: Vec<Mine>,
    object: Object,
}

#[repr(align(128))]
struct Mine(Handle);

// SAFETY: handle `i` is used by the thread that plays core `i` only.
unsafe impl Sync for Cached {}

impl Cached {
    pub fn new(cores: usize) -> Self {
        Self {
            epoch: Epoch::new(),
            blocks: (0..cores).map(|_| Block::new()).collect(),
            handles: (0..cores).map(|c| Mine(Handle::new(MemberId::new(c), Generation::default()))).collect(),
            object: Object::new(1),
        }
    }

    /// The core's duty every few milliseconds.
    #[allow(dead_code, reason = "the recorded twin of this file does not tick")]
    pub fn tick(&self, core: usize) {
        Refcache::new(&self.epoch, &self.blocks).tick(&self.handles[core].0, self);
    }
}

impl Counted for Cached {
    fn object(&self, _id: ObjectId) -> &Object {
        &self.object
    }
}

impl Reclaim for Cached {
    fn sever(&self, _me: &Handle, _id: ObjectId) -> Severed {
        Severed::Dead
    }
    fn dead(&self, _me: &Handle, _id: ObjectId) {
        unreachable!("the object has a reference of its own");
    }
}

impl Counter for Cached {
    fn take_and_drop(&self, core: usize) {
        let refcache = Refcache::new(&self.epoch, &self.blocks);
        refcache.add(&self.handles[core].0, self, ObjectId(0), 1);
        refcache.add(&self.handles[core].0, self, ObjectId(0), -1);
    }
}
