//! The checks of trackers: DIRTY.

use crate::common::indices;
use crate::or_skip;
use crate::settings::{Case, PAGES, skip_for};
use crate::stress;
use peregrine_sys::io;
use peregrine_vm::Errno;
use peregrine_vm::{Capability, DirtyMechanism, Mapping, PAGE_SIZE, PageCount, TrackError, Tracker};
use std::sync::Arc;
use std::time::Duration;
use testkit::{Outcome, Rng};

impl Case<DirtyMechanism> {
    /// A tracker, or a skip that names the missing capability.
    fn track(&self, memory: &Arc<Mapping>) -> Result<Tracker, Outcome> {
        match Tracker::of(memory.clone()).force(self.mechanism).start(&self.caps) {
            Ok(tracker) => Ok(tracker),
            Err(TrackError::NoMechanism { tried: why, .. }) => Err(skip_for(why)),
            Err(other) => panic!("{other}"),
        }
    }

    /// How many pages become dirty together: one of the pool is one to the kernel, and not to a comparison.
    fn grain(&self) -> usize {
        if self.kind.is_pool() && self.mechanism != DirtyMechanism::Compare { 512 } else { 1 }
    }

    /// Writers and a taker at once, against the log of what was written.
    fn never_misses(&self, seed: u64, views: usize) -> Outcome {
        let memory = self.kind.make(stress::MEMORY);
        drop(or_skip!(self.track(&memory)));
        let plan = stress::Plan { seed, time: Duration::from_millis(100), mechanism: self.mechanism, views };
        println!("seed {seed:#x}: {:?}", stress::never_misses(&memory, plan, &self.caps));
        Outcome::Passed
    }
}

pub fn exactly_the_written_pages_are_dirty_and_then_clean(case: &Case<DirtyMechanism>) -> Outcome {
    let memory = case.kind.make(PAGES);
    let mut tracker = or_skip!(case.track(&memory));
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
            if case.grain() > 1 && !wrote.is_empty() { (0..512).collect() } else { wrote };
        assert_eq!(indices(&memory, &set), expected, "round {round} over {}", tracker.choice());
        assert_eq!(set.always_dirty().get(), 0);
    }
    assert!(tracker.finish().unwrap().is_empty());
    memory.bytes().store_u64(0, 1).unwrap();
    Outcome::Passed
}

pub fn a_part_is_taken_alone_and_a_set_can_be_given_back(case: &Case<DirtyMechanism>) -> Outcome {
    let memory = case.kind.make(PAGES);
    let mut tracker = or_skip!(case.track(&memory));
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
    case: &Case<DirtyMechanism>,
) -> Outcome {
    let memory = case.kind.make(PAGES);
    let mut tracker = or_skip!(case.track(&memory));
    let source = Mapping::memfd(PageCount::new(1)).unwrap();
    source.bytes().write(0, b"from a system call").unwrap();
    let to = memory.bytes().address(5 * PAGE_SIZE).unwrap();
    // SAFETY: bytes of the mapping, which is reached by copies only.
    let got = unsafe { io::read_at_ptr(source.object_fd().unwrap(), to.as_ptr(), 18, 0) };
    let served = match case.mechanism {
        DirtyMechanism::AsyncWriteProtect | DirtyMechanism::Compare => true,
        DirtyMechanism::SyncWriteProtectPager => case.caps.has(Capability::UserfaultfdKernelFaults),
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

pub fn a_tracked_range_never_misses_a_write(case: &Case<DirtyMechanism>) -> Outcome {
    case.never_misses(0x5eed, 1)
}

pub fn a_union_over_aliases_never_misses_a_write(case: &Case<DirtyMechanism>) -> Outcome {
    case.never_misses(0xa11a5, 2)
}
