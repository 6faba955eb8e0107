//! The checks of trackers: DIRTY.

use crate::common::indices;
use crate::or_skip;
use crate::settings::{Memory, PAGES, skip_for};
use crate::stress;
use peregrine_sys::io;
use peregrine_vm::sys_errno::Errno;
use peregrine_vm::{
    Capabilities, Capability, DirtyMechanism, Mapping, PAGE_SIZE, PageCount, TrackError, Tracker,
};
use std::sync::Arc;
use std::time::Duration;
use testkit::{Outcome, Rng};

fn track(memory: &Arc<Mapping>, m: DirtyMechanism, c: &Capabilities) -> Result<Tracker, Outcome> {
    match Tracker::of(memory.clone()).force(m).start(c) {
        Ok(t) => Ok(t),
        Err(TrackError::NoMechanism { tried: why, .. }) => Err(skip_for(why)),
        Err(other) => panic!("{other}"),
    }
}

/// How many pages become dirty together: one of the pool is one to the kernel, and not to a comparison.
fn grain(k: Memory, m: DirtyMechanism) -> usize {
    if k.is_pool() && m != DirtyMechanism::Compare { 512 } else { 1 }
}

pub fn exactly_the_written_pages_are_dirty_and_then_clean(
    m: DirtyMechanism,
    k: Memory,
    c: &Capabilities,
) -> Outcome {
    let memory = k.make(PAGES, c).unwrap_or_else(|e| panic!("{e}"));
    let mut tracker = or_skip!(track(&memory, m, c));
    assert!(tracker.take_dirty().unwrap().is_empty(), "nothing was written yet");
    let mut rng = Rng::new(3);
    for round in 0..10u64 {
        let mut wrote: Vec<usize> = (0..rng.below(12)).map(|_| rng.below(PAGES.get())).collect();
        for &page in &wrote {
            memory
                .bytes()
                .store_u64(page * PAGE_SIZE + 8 * rng.below(512), rng.next_u64() | 1 << 63 | round)
                .unwrap();
        }
        for page in 0..PAGES.get() {
            memory.bytes().load_u64(page * PAGE_SIZE).unwrap();
        }
        wrote.sort_unstable();
        wrote.dedup();
        let set = tracker.take_dirty().unwrap();
        let expected: Vec<usize> =
            if grain(k, m) > 1 && !wrote.is_empty() { (0..512).collect() } else { wrote };
        assert_eq!(indices(&memory, &set), expected, "round {round} over {}", tracker.choice());
        assert_eq!(set.always_dirty().get(), 0);
    }
    assert!(tracker.finish().unwrap().is_empty());
    memory.bytes().store_u64(0, 1).unwrap();
    Outcome::Passed
}

pub fn a_part_is_taken_alone_and_a_set_can_be_given_back(
    m: DirtyMechanism,
    k: Memory,
    c: &Capabilities,
) -> Outcome {
    let memory = k.make(PAGES, c).unwrap_or_else(|e| panic!("{e}"));
    let mut tracker = or_skip!(track(&memory, m, c));
    for page in [2, 3, 20] {
        memory.bytes().store_u64(page * PAGE_SIZE, 9).unwrap();
    }
    let low = tracker.take_dirty_in(memory.pages(0, 10).unwrap()).unwrap();
    assert_eq!(indices(&memory, &low), [2, 3]);
    tracker.give_back(&low);
    assert_eq!(indices(&memory, &tracker.take_dirty().unwrap()), [2, 3, 20]);
    assert!(tracker.take_dirty().unwrap().is_empty());
    memory.bytes().store_u64(3 * PAGE_SIZE, 10).unwrap();
    assert_eq!(indices(&memory, &tracker.take_dirty().unwrap()), [3], "given back, and tracked again");
    Outcome::Passed
}

pub fn a_system_call_that_writes_is_tracked_or_fails_with_efault_and_writes_nothing(
    m: DirtyMechanism,
    k: Memory,
    c: &Capabilities,
) -> Outcome {
    let memory = k.make(PAGES, c).unwrap_or_else(|e| panic!("{e}"));
    let mut tracker = or_skip!(track(&memory, m, c));
    let source = Mapping::memfd(PageCount::new(1)).unwrap();
    source.bytes().write(0, b"from a system call").unwrap();
    let to = memory.bytes().address(5 * PAGE_SIZE).unwrap();
    // SAFETY: bytes of the mapping, which is reached by copies only.
    let got = unsafe { io::read_at_ptr(source.object_fd().unwrap(), to.as_ptr(), 18, 0) };
    let served = match m {
        DirtyMechanism::AsyncWriteProtect | DirtyMechanism::Compare => true,
        DirtyMechanism::SyncWriteProtectPager => c.has(Capability::UserfaultfdKernelFaults),
        DirtyMechanism::SyncWriteProtect | DirtyMechanism::Mprotect => false,
    };
    let dirty = tracker.take_dirty().unwrap();
    if served {
        assert_eq!(got, Ok(18));
        assert!(dirty.contains(to));
    } else {
        assert_eq!(got, Err(Errno::EFAULT));
        assert!(dirty.is_empty());
        assert_eq!(memory.bytes().load_u64(5 * PAGE_SIZE).unwrap(), 0, "nothing was written");
    }
    Outcome::Passed
}

pub fn a_tracked_range_never_misses_a_write(m: DirtyMechanism, k: Memory, c: &Capabilities) -> Outcome {
    let memory = k.make(stress::MEMORY, c).unwrap_or_else(|e| panic!("{e}"));
    drop(or_skip!(track(&memory, m, c)));
    let seed = 0x5eed;
    let plan = stress::Plan { seed, time: Duration::from_millis(100), mechanism: m, views: 1 };
    println!("seed {seed:#x}: {:?}", stress::never_misses(&memory, plan, c));
    Outcome::Passed
}

pub fn a_union_over_aliases_never_misses_a_write(m: DirtyMechanism, k: Memory, c: &Capabilities) -> Outcome {
    let memory = k.make(stress::MEMORY, c).unwrap_or_else(|e| panic!("{e}"));
    drop(or_skip!(track(&memory, m, c)));
    let seed = 0xa11a5;
    let plan = stress::Plan { seed, time: Duration::from_millis(100), mechanism: m, views: 2 };
    println!("seed {seed:#x}: {:?}", stress::never_misses(&memory, plan, c));
    Outcome::Passed
}
