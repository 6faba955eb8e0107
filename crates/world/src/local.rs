//! What a node keeps for itself: its run queue and timers, behind the carrier, in memory private to the process.
//!
//! Both are derived: a replacement node fills them anew from the thread records. So nothing here needs repair when a
//! node dies.

use crate::control::{NONE, record, state};
use crate::windows::Owners;
use peregrine_base::sync::Ordering;
use peregrine_thread::layout::{CARRIER, SLOT_COUNT};
use peregrine_thread::stack_kind::MOST_THREADS;

/// Bytes of a node's private area, from [`CARRIER`].
pub const LOCAL_BYTES: usize = 136 << 20;
const QUEUE: usize = CARRIER + (64 << 10);
const STACK: usize = CARRIER + (128 << 20);
const STACK_BYTES: usize = 256 << 10;
const ALTSTACK: usize = STACK + STACK_BYTES + (64 << 10);
/// Size of the stack for resets, traces and faults.
pub const ALTSTACK_BYTES: usize = 128 << 10;

const SCRATCH: usize = CARRIER + (130 << 20);
/// Working memory of the scheduler, for packing; as much again lies behind it.
pub const SCRATCH_BYTES: usize = 1 << 20;

/// Start of the scheduler's working memory.
pub const fn scratch() -> usize {
    SCRATCH
}

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
    /// Put it at the front, and pack threads that wait: it finds no memory.
    Room,
    /// It parked itself.
    Parked,
    /// Send it to this node.
    Move(u32),
    /// It parked itself for a fresh call, and this is where its request lies.
    Call(usize),
    /// It has ended.
    Ended,
}

/// How often a node ticks: see `sched::tick`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Tick {
    /// Not at all.
    Off = 0,
    /// Each slice.
    Usual,
    /// Seldom, for one thread has it for itself.
    Alone,
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
    /// How often it runs out.
    pub ticking: Tick,
    /// The life of the World that queue and timers belong to; 0: none.
    pub life: u32,
    /// Connections and calls under way, in the process's heap; null before the first. See `fresh`.
    pub flights: *mut crate::fresh::Flights,
    /// How many calls are under way.
    pub in_flight: u32,
    /// What this node's kernel was told about signals.
    pub in_force: crate::dispositions::InForce,
    /// How long this node looks for work before it sleeps.
    pub spin: crate::sched::spin::Spin,
    /// The processors that this process may run on, read before it sleeps.
    pub affinity: Option<peregrine_sys::process::CpuSet>,
    /// A thread has just gone and taken this node's processor along.
    pub gave_processor: bool,
    queue: Ring<u32, { MOST_THREADS.next_power_of_two() }>,
    timers: usize,
    /// Who is in the windows of this node.
    pub windows: Owners,
    /// Guard geometry installed per slot: stack pages, 0 for none.
    guards: [u32; SLOT_COUNT],
    /// Generation of the thread for which this node has each slot in view with its guards up (`address_space`), 0 for none.
    admitted: [u32; SLOT_COUNT],
    /// Slots from here on have no entry there.
    admitted_used: usize,
    /// Slots whose pages this process's table may hold write-protected, one bit each: see `sched::raise_guards`.
    pub scanned: [u64; SLOT_COUNT / 64],
    heap: [Timer; MOST_THREADS + SLOT_COUNT],
}

const _: () = assert!(QUEUE + size_of::<Local>() <= STACK - (64 << 10));
const _: () =
    assert!(ALTSTACK + ALTSTACK_BYTES <= SCRATCH && SCRATCH + 2 * SCRATCH_BYTES <= CARRIER + LOCAL_BYTES);

/// A queue that uses only as much of its memory as it was ever long.
#[repr(C)]
pub struct Ring<T, const MOST: usize> {
    head: usize,
    len: usize,
    /// Places in use, less one; their number is a power of two.
    mask: usize,
    places: [T; MOST],
}

impl<T: Copy, const MOST: usize> Ring<T, MOST> {
    const FEWEST: usize = 4096;

    /// Empties it; also what makes zeroed memory one.
    pub fn clear(&mut self) {
        (self.head, self.len, self.mask) = (0, 0, Self::FEWEST - 1);
    }

    /// Number of entries.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.len
    }

    #[inline(always)]
    fn place(&mut self, i: usize) -> &mut T {
        debug_assert!(self.mask < MOST);
        // SAFETY: `mask` is below `MOST`: `clear` and `make_room` alone set it.
        unsafe { self.places.get_unchecked_mut((self.head + i) & self.mask) }
    }

    /// The entry `i` places behind the front; any valid value if there are fewer.
    #[inline(always)]
    pub fn peek(&self, i: usize) -> T {
        debug_assert!(self.mask < MOST);
        // SAFETY: as in `place`.
        unsafe { *self.places.get_unchecked((self.head + i) & self.mask) }
    }

    /// The one at the front.
    #[inline(always)]
    pub fn first(&self) -> Option<T> {
        (self.len != 0).then(|| self.peek(0))
    }

    /// Adds to the end; drops the one at the front if there is no room.
    #[inline(always)]
    pub fn push(&mut self, entry: T) {
        if self.len > self.mask {
            self.make_room();
        }
        *self.place(self.len) = entry;
        self.len += 1;
    }

    /// Adds to the front.
    pub fn push_front(&mut self, entry: T) {
        if self.len > self.mask {
            self.make_room();
        }
        self.head = self.head.wrapping_sub(1) & self.mask;
        *self.place(0) = entry;
        self.len += 1;
    }

    /// Takes from the front.
    #[inline(always)]
    pub fn pop(&mut self) -> Option<T> {
        let entry = self.first()?;
        self.head = (self.head + 1) & self.mask;
        self.len -= 1;
        Some(entry)
    }

    /// Takes the one at the front away and puts `entry` at the end; there is one.
    #[inline(always)]
    pub fn rotate(&mut self, entry: T) {
        debug_assert!(self.len != 0);
        // The first place is free for it if the queue is as long as it may be.
        debug_assert!(self.mask < MOST);
        let (head, mask) = (self.head, self.mask);
        // SAFETY: as in `place`.
        unsafe { *self.places.get_unchecked_mut((head + self.len) & mask) = entry };
        self.head = (head + 1) & mask;
    }

    /// Takes from the end.
    pub fn pop_last(&mut self) -> Option<T> {
        self.len = self.len.checked_sub(1)?;
        Some(self.peek(self.len))
    }

    /// Takes out the entry at `i`.
    pub fn take(&mut self, i: usize) {
        for j in i..self.len - 1 {
            *self.place(j) = self.peek(j + 1);
        }
        self.len -= 1;
    }

    #[cold]
    fn make_room(&mut self) {
        let many = self.mask + 1;
        if many * 2 > MOST {
            self.pop();
            return;
        }
        // What had wrapped around goes behind the rest.
        self.places.copy_within(0..self.head, many);
        self.mask = many * 2 - 1;
    }
}

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
        self.timers = 0;
        self.queue.clear();
        self.windows.clear();
        // A thread made after the image may be made again with the same generation.
        self.admitted[..self.admitted_used].fill(0);
        self.admitted_used = 0;
        self.action = Action::None;
        self.previous = NONE;
        self.life = 0;
    }

    /// Has the tick come in `first_ns`, then every `every_ns`; 0: not at all.
    pub fn arm(&self, first_ns: u64, every_ns: u64) {
        if let Some(tick) = self.tick {
            tick.arm(first_ns, every_ns);
        }
    }

    /// Number of runnable threads waiting.
    #[inline(always)]
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Adds to the end.
    #[inline(always)]
    pub fn push(&mut self, slot: u32) {
        debug_assert!(self.queue.len() < MOST_THREADS);
        self.queue.push(slot);
    }

    /// Adds to the front.
    pub fn push_front(&mut self, slot: u32) {
        self.queue.push_front(slot);
    }

    /// The one at the front.
    #[inline(always)]
    pub fn first(&self) -> Option<u32> {
        self.queue.first()
    }

    /// The one `i` places behind the front.
    #[inline(always)]
    pub fn peek(&self, i: usize) -> u32 {
        self.queue.peek(i)
    }

    /// Takes from the front.
    #[inline(always)]
    pub fn pop(&mut self) -> Option<u32> {
        self.queue.pop()
    }

    /// Takes the one at the front away and puts `slot` at the end; there is one.
    #[inline(always)]
    pub fn rotate(&mut self, slot: u32) {
        self.queue.rotate(slot);
    }

    /// Takes from the end.
    pub fn pop_last(&mut self) -> Option<u32> {
        self.queue.pop_last()
    }

    /// Takes `slot` out of the queue, wherever it is.
    pub fn remove(&mut self, slot: u32) -> bool {
        let found = (0..self.queue.len()).find(|i| self.queue.peek(*i) == slot);
        if let Some(i) = found {
            self.queue.take(i);
        }
        found.is_some()
    }

    /// Whether the guards of `slot` for a stack of `pages` are installed here.
    #[inline(always)]
    pub fn guards_of(&mut self, slot: u32) -> &mut u32 {
        &mut self.guards[slot as usize]
    }

    /// Whether this node has `slot` in view, and its guards up, for the thread of this generation.
    #[inline(always)]
    pub fn is_admitted(&self, slot: u32, generation: u32) -> bool {
        self.admitted[slot as usize] == generation
    }

    /// Notes that it has.
    pub fn set_admitted(&mut self, slot: u32, generation: u32) {
        self.admitted[slot as usize] = generation;
        self.admitted_used = self.admitted_used.max(slot as usize + 1);
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
