//! Trap code takes no lock that trapped code may hold: the program's allocator keeps its blocks in memory that traps, and
//! traps while it holds its own lock.
//!
//! The allocator's free list runs through the blocks themselves, so it reads and writes trapping pages under its lock. Were
//! anything on the way of a trap to allocate, it would wait for that lock for ever, and the test be killed.

mod common;

use common::{noting, unprotect};
use peregrine_base::sync::{AtomicBool, AtomicUsize, Ordering, spin_loop};
use peregrine_vm::{
    AltStack, Capabilities, DirtyMechanism, Mapping, Mechanism, PAGE_SIZE, PageCount, Protection, Tracker,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::sync::Arc;
use testkit::{Outcome, Rng};

const BLOCK: usize = 256;
const PAGES: usize = 256;

/// Blocks of 256 bytes from one arena while it is switched on; everything else from the system.
struct Arena {
    on: AtomicBool,
    start: AtomicUsize,
    locked: AtomicBool,
    /// First free block, guarded by `locked`.
    free: UnsafeCell<usize>,
}

// SAFETY: `free` is touched under `locked` only.
unsafe impl Sync for Arena {}

impl Arena {
    fn with_lock<T>(&self, f: impl FnOnce(&mut usize) -> T) -> T {
        while self.locked.swap(true, Ordering::Acquire) {
            spin_loop();
        }
        // SAFETY: the lock is held.
        let result = f(unsafe { &mut *self.free.get() });
        self.locked.store(false, Ordering::Release);
        result
    }

    /// Makes every block of the arena free: writes to each, so it is done before the memory traps. Once only: the runtime's own
    /// blocks stay in it.
    fn give(&self, memory: &Mapping) {
        let start = memory.range().start().as_usize();
        self.start.store(start, Ordering::SeqCst);
        self.with_lock(|free| {
            *free = 0;
            for block in (0..PAGES * PAGE_SIZE / BLOCK).rev() {
                let at = start + block * BLOCK;
                // SAFETY: a block of the arena, free.
                unsafe { (at as *mut usize).write_volatile(*free) };
                *free = at;
            }
        });
    }

    fn owns(&self, at: usize) -> bool {
        let start = self.start.load(Ordering::SeqCst);
        start != 0 && at >= start && at < start + PAGES * PAGE_SIZE
    }
}

// SAFETY: blocks of the arena are handed out once at a time, are large and aligned enough; the rest is the system's.
unsafe impl GlobalAlloc for Arena {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if self.on.load(Ordering::SeqCst) && layout.size() <= BLOCK && layout.align() <= 16 {
            let at = self.with_lock(|free| {
                let at = *free;
                if at != 0 {
                    // The trap happens here, with the lock held.
                    // SAFETY: a free block, whose first word is the next one's address.
                    *free = unsafe { (at as *const usize).read_volatile() };
                }
                at
            });
            if at != 0 {
                return at as *mut u8;
            }
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        let at = ptr as usize;
        if self.owns(at) {
            self.with_lock(|free| {
                // And here.
                // SAFETY: the block was the caller's, and is free now.
                unsafe { (at as *mut usize).write_volatile(*free) };
                *free = at;
            });
        } else {
            // SAFETY: the caller's promise.
            unsafe { System.dealloc(ptr, layout) }
        }
    }
}

#[global_allocator]
static ARENA: Arena = Arena {
    on: AtomicBool::new(false),
    start: AtomicUsize::new(0),
    locked: AtomicBool::new(false),
    free: UnsafeCell::new(0),
};

/// Allocates, writes and frees in random order in two threads; checks that what was written stays.
fn churn(seed: u64, between: &(dyn Fn() + Sync)) {
    ARENA.on.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            scope.spawn(move || {
                let mut rng = Rng::new(seed + thread);
                let mut boxes: Vec<Box<[u64; 24]>> = Vec::new();
                for round in 0..3000 {
                    if rng.below(5) < 3 && boxes.len() < 800 {
                        boxes.push(Box::new([rng.next_u64(); 24]));
                    } else if !boxes.is_empty() {
                        let gone = boxes.swap_remove(rng.below(boxes.len()));
                        assert!(gone.iter().all(|w| *w == gone[0]));
                    }
                    if thread == 0 && round % 100 == 0 {
                        between();
                    }
                }
                assert!(boxes.iter().all(|b| b.iter().all(|w| *w == b[0])));
            });
        }
    });
    ARENA.on.store(false, Ordering::SeqCst);
}

fn an_allocator_may_trap_while_it_holds_its_lock() -> Outcome {
    let caps = Capabilities::probe();
    let _stack = AltStack::install(64 << 10).unwrap();
    let memory = Arc::new(Mapping::memfd(PageCount::new(PAGES)).unwrap());
    ARENA.give(&memory);
    for mechanism in [Mechanism::Sigbus, Mechanism::Pager, Mechanism::Mprotect] {
        let (region, seen) = match noting(&memory, mechanism, &caps, |b| b, unprotect) {
            Ok(made) => made,
            Err(why) => {
                println!("not tried: {why}");
                continue;
            }
        };
        let all = [region.range()];
        churn(7, &|| region.protect(&all, Protection::Read).unwrap());
        assert!(seen.traps() > 100, "{mechanism}: {}", seen.traps());
    }
    Outcome::Passed
}

fn an_allocator_may_be_tracked_while_it_holds_its_lock() -> Outcome {
    let caps = Capabilities::probe();
    let memory = Arc::new(Mapping::memfd(PageCount::new(PAGES)).unwrap());
    ARENA.give(&memory);
    for mechanism in DirtyMechanism::ALL {
        let tracker = match Tracker::of(memory.clone()).force(mechanism).start(&caps) {
            Ok(tracker) => std::sync::Mutex::new(tracker),
            Err(why) => {
                println!("not tried: {why}");
                continue;
            }
        };
        let dirty = AtomicUsize::new(0);
        churn(9, &|| {
            let mut tracker = tracker.lock().unwrap();
            let count = |run: peregrine_vm::PageRange| {
                dirty.fetch_add(run.pages().get(), Ordering::SeqCst);
            };
            tracker.take_dirty_each(memory.range(), count).unwrap();
        });
        assert!(dirty.load(Ordering::SeqCst) > 100, "{mechanism}: {dirty:?}");
    }
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        an_allocator_may_trap_while_it_holds_its_lock,
        an_allocator_may_be_tracked_while_it_holds_its_lock,
    ])
}
