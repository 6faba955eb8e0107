//! What a node keeps for itself: its run queue and timers, behind the carrier, in memory private to the process.
//!
//! Both are derived: a replacement node fills them anew from the thread records. So nothing here needs repair when a
//! node dies.

use crate::control::{NONE, record, state};
use peregrine_base::sync::Ordering;
use peregrine_thread::layout::{CARRIER, SLOT_COUNT};

/// Bytes of a node's private area, from [`CARRIER`].
pub const LOCAL_BYTES: usize = 4 << 20;
const QUEUE: usize = CARRIER + (64 << 10);
const STACK: usize = CARRIER + (2 << 20);
const STACK_BYTES: usize = 256 << 10;
const ALTSTACK: usize = STACK + STACK_BYTES + (64 << 10);
/// Size of the stack for resets, traces and faults.
pub const ALTSTACK_BYTES: usize = 128 << 10;

/// End of the scheduler's stack.
pub const fn stack_top() -> usize {
    STACK + STACK_BYTES
}

/// Base of the alternate stack.
pub const fn altstack_base() -> usize {
    ALTSTACK
}

/// What the scheduler is to do with the thread that just switched to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Nothing: none did.
    None,
    /// Put it at the end of the run queue.
    Requeue,
    /// Put it at the front: it only made way for a pause.
    RequeueFront,
    /// It parked itself.
    Parked,
    /// Send it to this node.
    Move(u32),
    /// It has ended.
    Ended,
}

/// A waiting timer.
#[derive(Clone, Copy)]
struct Timer {
    at: u64,
    slot: u32,
    wait: u32,
}

/// The private part of a node.
#[repr(C)]
pub struct Local {
    /// What to do with the thread that switched to the scheduler.
    pub action: Action,
    /// Its slot.
    pub previous: u32,
    /// The tick's timer.
    pub tick: Option<peregrine_sys::timer::Timer>,
    /// Whether it runs.
    pub ticking: bool,
    /// The life of the World that queue and timers belong to; 0: none.
    pub life: u32,
    head: usize,
    len: usize,
    timers: usize,
    /// Guard geometry installed per slot: stack pages, 0 for none.
    guards: [u32; SLOT_COUNT],
    /// Slots whose pages this process's table may hold write-protected, one bit each: see `sched::raise_guards`.
    pub scanned: [u64; SLOT_COUNT / 64],
    queue: [u32; SLOT_COUNT],
    heap: [Timer; SLOT_COUNT * 2],
}

const _: () = assert!(size_of::<Local>() <= (2 << 20) - (64 << 10));

/// This node's private part.
///
/// # Safety
/// The process is a node, and the caller holds no other reference to it.
#[inline(always)]
pub unsafe fn local() -> &'static mut Local {
    // SAFETY: mapped for the life of a node; used only by the scheduler and in runtime sections.
    unsafe { &mut *(QUEUE as *mut Local) }
}

impl Local {
    /// Empties queue and timers.
    pub fn clear(&mut self) {
        (self.head, self.len, self.timers) = (0, 0, 0);
        self.action = Action::None;
        self.previous = NONE;
        self.life = 0;
    }

    /// Number of runnable threads waiting.
    #[inline(always)]
    pub fn queued(&self) -> usize {
        self.len
    }

    /// Adds to the end.
    #[inline(always)]
    pub fn push(&mut self, slot: u32) {
        debug_assert!(self.len < SLOT_COUNT);
        self.queue[(self.head + self.len) % SLOT_COUNT] = slot;
        self.len += 1;
    }

    /// Adds to the front.
    pub fn push_front(&mut self, slot: u32) {
        self.head = (self.head + SLOT_COUNT - 1) % SLOT_COUNT;
        self.queue[self.head] = slot;
        self.len += 1;
    }

    /// The one at the front.
    #[inline(always)]
    pub fn first(&self) -> Option<u32> {
        (self.len != 0).then(|| self.queue[self.head])
    }

    /// The one `i` places behind the front.
    #[inline(always)]
    pub fn peek(&self, i: usize) -> u32 {
        self.queue[(self.head + i) % SLOT_COUNT]
    }

    /// Takes from the front.
    #[inline(always)]
    pub fn pop(&mut self) -> Option<u32> {
        let slot = self.first()?;
        self.head = (self.head + 1) % SLOT_COUNT;
        self.len -= 1;
        Some(slot)
    }

    /// Takes from the end.
    pub fn pop_last(&mut self) -> Option<u32> {
        self.len = self.len.checked_sub(1)?;
        Some(self.queue[(self.head + self.len) % SLOT_COUNT])
    }

    /// Takes `slot` out of the queue, wherever it is.
    pub fn remove(&mut self, slot: u32) -> bool {
        for i in 0..self.len {
            if self.queue[(self.head + i) % SLOT_COUNT] == slot {
                for j in i..self.len - 1 {
                    self.queue[(self.head + j) % SLOT_COUNT] = self.queue[(self.head + j + 1) % SLOT_COUNT];
                }
                self.len -= 1;
                return true;
            }
        }
        false
    }

    /// Whether the guards of `slot` for a stack of `pages` are installed here.
    #[inline(always)]
    pub fn guards_of(&mut self, slot: u32) -> &mut u32 {
        &mut self.guards[slot as usize]
    }

    /// Whether `slot` was scanned since this was last asked.
    pub fn take_scanned(&mut self, slot: u32) -> bool {
        let (word, bit) = (&mut self.scanned[slot as usize / 64], 1 << (slot % 64));
        let was = *word & bit != 0;
        *word &= !bit;
        was
    }

    /// Notes that `slot`, in its wait number `wait`, wakes at `at`.
    pub fn add_timer(&mut self, at: u64, slot: u32, wait: u32) {
        if self.timers == self.heap.len() {
            self.drop_stale_timers();
        }
        let mut i = self.timers;
        self.heap[i] = Timer { at, slot, wait };
        self.timers += 1;
        while i > 0 && self.heap[(i - 1) / 2].at > self.heap[i].at {
            self.heap.swap(i, (i - 1) / 2);
            i = (i - 1) / 2;
        }
    }

    /// Deadline of the next timer.
    #[inline(always)]
    pub fn next_deadline(&self) -> Option<u64> {
        (self.timers != 0).then(|| self.heap[0].at)
    }

    /// Takes the next timer that is due at `now`; the slot, if its wait still lasts.
    pub fn due(&mut self, now: u64) -> Option<Option<u32>> {
        if self.timers == 0 || self.heap[0].at > now {
            return None;
        }
        let t = self.heap[0];
        self.timers -= 1;
        self.heap[0] = self.heap[self.timers];
        self.sift_down(0);
        Some(t.lasts().then_some(t.slot))
    }

    fn sift_down(&mut self, mut i: usize) {
        loop {
            let (l, r) = (2 * i + 1, 2 * i + 2);
            let mut least = i;
            if l < self.timers && self.heap[l].at < self.heap[least].at {
                least = l;
            }
            if r < self.timers && self.heap[r].at < self.heap[least].at {
                least = r;
            }
            if least == i {
                return;
            }
            self.heap.swap(i, least);
            i = least;
        }
    }

    /// Keeps one timer for each thread that sleeps: at most as many as there are slots.
    fn drop_stale_timers(&mut self) {
        let mut kept = 0;
        for i in 0..self.timers {
            if self.heap[i].lasts() {
                self.heap[kept] = self.heap[i];
                kept += 1;
            }
        }
        self.timers = kept;
        for i in (0..kept / 2).rev() {
            self.sift_down(i);
        }
    }
}

impl Timer {
    fn lasts(&self) -> bool {
        let r = record(self.slot);
        // One that moved away sleeps on elsewhere, with a timer there.
        // SAFETY: on a node.
        let here = unsafe { peregrine_thread::carrier::carrier() }.node;
        r.node.load(Ordering::Relaxed) == here
            && r.state.load(Ordering::Relaxed) == state::SLEEPING
            && r.waits.load(Ordering::Relaxed) == self.wait
    }
}
