//! After an unmap returned, no write of any member reaches the old frame: two writers hammer the pages of a few records, a
//! mapper takes records away and gives them back, and the writers are stopped and continued at random.
//!
//! ```text
//!   mapper    lock ─ take_away(set) ─ snapshot A ─ vacated ─ unlock ─ … ─ snapshot B     A = B, or somebody wrote
//!             lock ─ open: all zeros? ─ mapped ─ unlock
//!   writers   store, store, …; a trap: lock, if mapped: join the set, open
//!   parent    SIGSTOP, SIGCONT to a random writer
//! ```
//! The records here are the simplest possible (a lock word, a set), so that only the seats are on trial.

use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering, spin_loop};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_space::process::{Config, FillError, Filling, FrameError, Ground, Lowering, Seat};
use peregrine_sys::process::{ChildEnd, ForkFlags, Forked, exit_now, fork_with, wait_for};
use peregrine_sys::signal::{self, number};
use peregrine_sys::{io, timer};
use peregrine_vm::trap::{Fault, Registration, SignalHandler};
use peregrine_vm::{AltStack, Decision};
use std::time::Duration;
use testkit::Rng;

/// Records, and pages of each.
const RECORDS: usize = 6;
const RECORD_PAGES: usize = 4;
const WRITERS: usize = 2;
const MAPPER: usize = WRITERS;

#[repr(C)]
struct Record {
    /// 0, or the holder's index plus one.
    lock: AtomicU32,
    mapped: AtomicU32,
    set: AtomicU64,
}

#[repr(C)]
struct Shared {
    records: [Record; RECORDS],
    stop: AtomicU32,
    ready: AtomicU32,
    writes: AtomicU64,
    unmaps: AtomicU64,
    overdue: AtomicU64,
    skipped: AtomicU64,
    longest_ns: AtomicU64,
}

/// What a run did.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Stores that went through.
    pub writes: u64,
    /// Records taken away.
    pub unmaps: u64,
    /// Times that a stopped member was cut off.
    pub overdue: u64,
    /// Records left alone because a stopped member held their lock.
    pub skipped: u64,
    /// The longest that taking away took.
    pub longest: Duration,
}

/// What to try.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Of the random choices.
    pub seed: u64,
    /// How long.
    pub time: Duration,
    /// Which kind of region.
    pub filling: Filling,
}

#[derive(Clone, Copy)]
struct Scene(*const Shared, PageRange);

impl Scene {
    fn shared(&self) -> &Shared {
        // SAFETY: zeroed shared memory of the ground, which outlives the run; all fields are atomics.
        unsafe { &*self.0 }
    }
    fn range(&self, record: usize) -> PageRange {
        let start = self.1.start().as_usize() + record * RECORD_PAGES * PAGE_SIZE;
        PageRange::new(VirtAddr::new(start), PageCount::new(RECORD_PAGES))
    }
    fn stopping(&self) -> bool {
        self.shared().stop.load(Ordering::Acquire) != 0
    }
    fn try_lock(&self, record: usize, seat: &Seat) -> bool {
        let lock = &self.shared().records[record].lock;
        lock.compare_exchange(0, seat.index().get() as u32 + 1, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }
    fn unlock(&self, record: usize) {
        self.shared().records[record].lock.store(0, Ordering::Release);
    }
}

fn fail(what: &str) -> ! {
    eprintln!("{what}");
    exit_now(3)
}

struct Trapper {
    scene: Scene,
    seat: *const Seat,
}

// SAFETY: one thread makes and uses it.
unsafe impl Send for Trapper {}
// SAFETY: as above.
unsafe impl Sync for Trapper {}

// SAFETY: takes a record's lock that interrupted code of this process does not hold, allocates nothing unless the test has
// failed already.
unsafe impl SignalHandler for Trapper {
    fn on_fault(&self, fault: &Fault) -> Decision {
        // SAFETY: the seat outlives the registration.
        let (seat, scene) = (unsafe { &*self.seat }, &self.scene);
        if scene.stopping() {
            exit_now(0);
        }
        seat.poll();
        let page = (fault.address.as_usize() - scene.1.start().as_usize()) / PAGE_SIZE;
        let record = page / RECORD_PAGES;
        if !scene.try_lock(record, seat) {
            io::yield_now();
            return Decision::Retry;
        }
        let r = &scene.shared().records[record];
        let opened = if r.mapped.load(Ordering::Relaxed) == 0 {
            Ok(false)
        } else {
            r.set.fetch_or(seat.index().bit(), Ordering::Relaxed);
            seat.serve_trap_at(Some(fault.address));
            let opened = seat.open(scene.range(record), Protection::ReadWrite);
            seat.serve_trap_at(None);
            opened.map(|()| true)
        };
        scene.unlock(record);
        match opened {
            Ok(true) => Decision::Filled,
            Ok(false) => {
                io::yield_now();
                Decision::Retry
            }
            Err(e) => fail(&format!("a mapped page can't be opened: {e}")),
        }
    }
}

fn writer(scene: Scene, ground: &Ground, index: usize, seed: u64) {
    let mut rng = Rng::new(seed);
    let seat = ground.join(index).expect("a seat");
    let _stack = AltStack::install(64 << 10).expect("a stack");
    let trapper = Trapper { scene, seat: &raw const *seat };
    let registration = Registration::new(scene.1, trapper).expect("handlers");
    scene.shared().ready.fetch_add(1, Ordering::AcqRel);
    let mut count = 0u64;
    while !scene.stopping() {
        let page = rng.below(RECORDS * RECORD_PAGES);
        let at = scene.1.start().as_usize() + page * PAGE_SIZE + rng.below(512) * 8;
        for i in 0..64 {
            // SAFETY: mapped in this process, or it traps; nobody refers to the bytes (S1).
            unsafe { VirtAddr::new(at).as_ptr::<u64>().write_volatile(count << 8 | i | 1) };
        }
        count += 64;
        // Some polls are left out, so that signals are needed too.
        if rng.below(4) != 0 {
            seat.poll();
        }
        if count.is_multiple_of(6400) {
            scene.shared().writes.fetch_add(6400, Ordering::Relaxed);
        }
    }
    drop(registration);
    ground.leave(seat);
}

fn mapper(scene: Scene, ground: &Ground, seed: u64) {
    let mut rng = Rng::new(seed);
    let seat = ground.join(MAPPER).expect("a seat");
    let s = scene.shared();
    s.ready.fetch_add(1, Ordering::AcqRel);
    let snapshot = |record: usize| {
        let first = scene.range(record).start().as_usize();
        (0..RECORD_PAGES).map(|i| seat.peek(VirtAddr::new(first + i * PAGE_SIZE))).collect::<Vec<_>>()
    };
    while !scene.stopping() {
        let record = rng.below(RECORDS);
        let r = &s.records[record];
        let deadline = timer::monotonic_ns() + 2_000_000;
        while !scene.try_lock(record, &seat) {
            if timer::monotonic_ns() > deadline {
                break;
            }
            io::yield_now();
        }
        if r.lock.load(Ordering::Relaxed) != MAPPER as u32 + 1 {
            s.skipped.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let range = scene.range(record);
        if r.mapped.load(Ordering::Relaxed) == 0 {
            if seat.check_acknowledged(range).is_ok() {
                match seat.open(range, Protection::ReadWrite) {
                    Ok(()) => {}
                    Err(FillError::Frames(FrameError::Unacknowledged { .. })) => fail("checked, then not so"),
                    Err(e) => fail(&format!("opening: {e}")),
                }
                for i in 0..range.len_bytes() / 8 {
                    let at = VirtAddr::new(range.start().as_usize() + i * 8);
                    // SAFETY: opened above.
                    let word = unsafe { at.as_ptr::<u64>().read_volatile() };
                    if word != 0 {
                        fail(&format!("seed {seed}: a new owner of {at} finds {word:#x} of the last one"));
                    }
                }
                r.set.store(seat.index().bit(), Ordering::Relaxed);
                r.mapped.store(1, Ordering::Relaxed);
            }
            scene.unlock(record);
        } else {
            let set = r.set.swap(0, Ordering::Relaxed);
            let begun = timer::monotonic_ns();
            seat.take_away(range, set, Lowering::Close);
            s.longest_ns.fetch_max(timer::monotonic_ns() - begun, Ordering::Relaxed);
            let before = snapshot(record);
            r.mapped.store(0, Ordering::Relaxed);
            scene.unlock(record);
            // Time for a late write to land.
            let until = timer::monotonic_ns() + 1_000 * rng.below(200) as u64;
            while timer::monotonic_ns() < until {
                seat.poll();
                spin_loop();
            }
            if snapshot(record) != before {
                fail(&format!("seed {seed}: a frame of {range:?} changed after it was unmapped"));
            }
            // The records' owner is gone: this mapper alone maps, so nothing came in between.
            while !scene.try_lock(record, &seat) && !scene.stopping() {
                if r.mapped.load(Ordering::Relaxed) != 0 {
                    fail("somebody else mapped");
                }
                io::yield_now();
            }
            if !scene.stopping() {
                seat.vacated(range);
                scene.unlock(record);
            }
            s.unmaps.fetch_add(1, Ordering::Relaxed);
        }
    }
    s.overdue.store(seat.tally().overdue, Ordering::Relaxed);
    ground.leave(seat);
}

/// Runs `plan`; panics with the seed when the promise is broken.
pub fn never_reached_again(plan: Plan) -> Outcome {
    let config = Config { pages: PageCount::new(RECORDS * RECORD_PAGES), filling: plan.filling, at: None };
    let ground = Ground::new(config, PageCount::for_bytes(size_of::<Shared>())).expect("shared memory");
    let scene = Scene(ground.pool().start().as_ptr(), ground.region());
    let mut rng = Rng::new(plan.seed);
    let mut children = Vec::new();
    for index in 0..=WRITERS {
        let seed = rng.next_u64();
        // SAFETY: the tests' processes have one thread.
        match unsafe { fork_with(ForkFlags::default()) }.expect("fork") {
            Forked::Child => {
                peregrine_sys::process::die_with_parent();
                if index == MAPPER {
                    mapper(scene, &ground, seed);
                } else {
                    writer(scene, &ground, index, seed);
                }
                exit_now(0);
            }
            Forked::Parent(pid) => children.push(pid),
        }
    }
    while scene.shared().ready.load(Ordering::Acquire) < WRITERS as u32 + 1 {
        io::yield_now();
    }
    let end = timer::monotonic_ns() + plan.time.as_nanos() as u64;
    while timer::monotonic_ns() < end {
        let victim = children[rng.below(WRITERS)];
        signal::kill(victim, number::STOP).expect("a living writer");
        std::thread::sleep(Duration::from_micros(rng.below(6000) as u64));
        signal::kill(victim, number::CONT).expect("a living writer");
        std::thread::sleep(Duration::from_micros(rng.below(3000) as u64));
    }
    scene.shared().stop.store(1, Ordering::Release);
    for pid in children {
        let end = wait_for(pid).expect("our child");
        assert_eq!(end, ChildEnd::Exited(0), "seed {}: a member failed", plan.seed);
    }
    let s = scene.shared();
    let get = |a: &AtomicU64| a.load(Ordering::Relaxed);
    Outcome {
        writes: get(&s.writes),
        unmaps: get(&s.unmaps),
        overdue: get(&s.overdue),
        skipped: get(&s.skipped),
        longest: Duration::from_nanos(get(&s.longest_ns)),
    }
}
