//! A tracked range never misses a write: writers, system calls and evictions against a taker that keeps an image.
//!
//! Every (writer, page) has a word of its own that only grows (high byte first, so that half of a write is not less). A writer logs a value *after* its write is done. The taker
//! notes the log, takes the dirty set, and copies the dirty pages into its image, as a checkpoint would. Then every
//! value that was in the log before the take must be in the image: in a page of this set, or of an earlier one.

use peregrine_base::sync::{AtomicBool, AtomicU64, Ordering};
use peregrine_sys::io;
use peregrine_vm::Errno;
use peregrine_vm::{
    Backing, Capabilities, DirtyMechanism, Mapping, PAGE_SIZE, PageCount, Protection, Tracker, UnionTracker,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pages of the memory.
const PAGES: usize = 48;
/// Threads that write; each writes through view `number % views`.
const WRITERS: usize = 3;

/// What one run is made of.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Where the writes come from.
    pub seed: u64,
    /// How long.
    pub time: Duration,
    /// Which mechanism.
    pub mechanism: DirtyMechanism,
    /// How many aliases are written and tracked; more than one needs a memfd.
    pub views: usize,
}

/// What happened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Writes by plain stores.
    pub stores: u64,
    /// Writes by system calls.
    pub calls: u64,
    /// System calls that failed with EFAULT, and wrote nothing.
    pub refused: u64,
    /// Dirty sets taken.
    pub takes: u64,
    /// Pages in them.
    pub dirty_pages: u64,
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^ (z >> 29)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// Runs the plan on `memory`.
///
/// # Panics
/// If a write was missed.
pub fn never_misses(memory: &Arc<Mapping>, plan: Plan, caps: &Capabilities) -> Tally {
    let mut views = vec![memory.clone()];
    for _ in 1..plan.views {
        views.push(Arc::new(memory.alias(Protection::ReadWrite).expect("aliases need a memfd")));
    }
    let kernel_writes_may_fail =
        matches!(plan.mechanism, DirtyMechanism::SyncWriteProtect | DirtyMechanism::Mprotect)
            || plan.mechanism == DirtyMechanism::SyncWriteProtectPager
                && !caps.has(peregrine_vm::Capability::UserfaultfdKernelFaults);
    let log: Vec<AtomicU64> = (0..WRITERS * PAGES).map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicBool::new(false);
    let evictions = memory.backing() == Backing::Memfd;
    let start_tracker = |view: &Arc<Mapping>| {
        Tracker::of(view.clone()).force(plan.mechanism).start(caps).expect("the caller checked the mechanism")
    };
    let mut tally = Tally::default();
    // The union works on one view as well, but a private mapping has no object to unite over.
    let mut single = (plan.views == 1).then(|| start_tracker(&views[0]));
    let mut union = UnionTracker::new();
    if plan.views > 1 {
        for view in &views {
            union.add(start_tracker(view)).expect("aliases of one object");
        }
    }
    let mut image = vec![0u64; WRITERS * PAGES];
    std::thread::scope(|scope| {
        let mut writers = Vec::new();
        for writer in 0..WRITERS {
            let view = views[writer % views.len()].clone();
            let (log, stop) = (&log, &stop);
            writers.push(scope.spawn(move || {
                write(
                    writer,
                    &view,
                    log,
                    stop,
                    plan.seed ^ (writer as u64 * 7919),
                    kernel_writes_may_fail,
                    evictions,
                )
            }));
        }
        // A failure here must end the writers too, or nobody would hear of it.
        let _stop = StopOnDrop(&stop);
        let end = Instant::now() + plan.time;
        loop {
            let last = Instant::now() >= end;
            if last {
                stop.store(true, Ordering::Release);
                for w in writers.drain(..) {
                    let t: Tally = w.join().expect("a writer failed");
                    tally.stores += t.stores;
                    tally.calls += t.calls;
                    tally.refused += t.refused;
                }
            }
            let before: Vec<u64> = log.iter().map(|l| l.load(Ordering::Acquire)).collect();
            let dirty: Vec<usize> = match &mut single {
                Some(tracker) => {
                    let set = tracker.take_dirty().expect("take_dirty");
                    set.indices(memory.range()).collect()
                }
                None => union.take_dirty().expect("take_dirty").pages().map(PageCount::get).collect(),
            };
            tally.takes += 1;
            tally.dirty_pages += dirty.len() as u64;
            // A page of the pool is 512 of these, most of them beyond what is written.
            for page in dirty.into_iter().filter(|p| *p < PAGES) {
                for writer in 0..WRITERS {
                    image[writer * PAGES + page] = u64::from_be(
                        memory.bytes().load_u64(page * PAGE_SIZE + writer * 8).expect("in bounds"),
                    );
                }
            }
            for (i, (done, seen)) in before.iter().zip(&image).enumerate() {
                assert!(
                    seen >= done,
                    "{plan:?}: writer {} had written {done} to page {} before take {}, and the image has {seen}",
                    i / PAGES,
                    i % PAGES,
                    tally.takes,
                );
            }
            if last {
                break;
            }
            if plan.seed & 1 == 0 {
                std::thread::yield_now();
            }
        }
    });
    let end: Vec<u64> = log.iter().map(|l| l.load(Ordering::Acquire)).collect();
    assert_eq!(end, image, "{plan:?}: the image after the last take");
    tally
}

fn write(
    writer: usize,
    view: &Mapping,
    log: &[AtomicU64],
    stop: &AtomicBool,
    seed: u64,
    kernel_writes_may_fail: bool,
    evictions: bool,
) -> Tally {
    let mut rng = Rng(seed);
    let mut tally = Tally::default();
    let source = Mapping::memfd(PageCount::new(1)).expect("a page");
    let fd = source.object_fd().expect("a memfd");
    let bytes = view.bytes();
    while !stop.load(Ordering::Acquire) {
        // Bursts on few pages and strays over all, so that pages are clean, dirty and contended by turns.
        let page = if rng.below(4) == 0 { rng.below(PAGES) } else { rng.below(4) };
        let offset = page * PAGE_SIZE + writer * 8;
        let mine = &log[writer * PAGES + page];
        let value = mine.load(Ordering::Relaxed) + 1;
        if evictions && rng.below(64) == 0 {
            // A page of the pool goes as a whole.
            let one = view.pages(rng.below(PAGES), 1).expect("in bounds");
            let part = if view.grain().get() > 1 { view.range() } else { one };
            view.evict(part).expect("evict");
        }
        if rng.below(3) == 0 {
            source.bytes().store_u64(0, value.to_be()).expect("in bounds");
            let to = bytes.address(offset).expect("in bounds");
            // SAFETY: eight bytes of the mapping, which is reached by copies only.
            match unsafe { io::read_at_ptr(fd, to.as_ptr(), 8, 0) } {
                Ok(8) => tally.calls += 1,
                Err(Errno::EFAULT) if kernel_writes_may_fail => {
                    assert_eq!(
                        u64::from_be(bytes.load_u64(offset).expect("in bounds")),
                        value - 1,
                        "EFAULT, yet written"
                    );
                    tally.refused += 1;
                    bytes.store_u64(offset, value.to_be()).expect("in bounds");
                }
                // The taker protected the page again in the middle: the kernel says how much it had written.
                Ok(1..8) if kernel_writes_may_fail => {
                    tally.refused += 1;
                    bytes.store_u64(offset, value.to_be()).expect("in bounds");
                }
                other => panic!("read(2) into tracked memory: {other:?}"),
            }
        } else {
            bytes.store_u64(offset, value.to_be()).expect("in bounds");
            tally.stores += 1;
        }
        mine.store(value, Ordering::Release);
        if rng.below(32) == 0 {
            std::thread::yield_now();
        }
    }
    tally
}

/// Memory of the size that [`never_misses`] wants.
pub const MEMORY: PageCount = PageCount::new(PAGES);
