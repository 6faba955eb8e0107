//! The forms for runtimes: a tracker that is two descriptors, and guards in memory that somebody else lays out.

#[macro_use]
mod common;

use peregrine_base::sync::{AtomicUsize, Ordering};
use peregrine_sys::fault::{self, Action, SIGSEGV};
use peregrine_vm::dirty::{DirtyRun, RawTracker, RawTrackerRef};
use peregrine_vm::{Capabilities, Capability, Mapping, PAGE_SIZE, PageCount, PageRange, TrackError, guard};
use std::ffi::c_void;
use std::os::fd::AsFd;
use testkit::{Outcome, Rng, skip};

fn written(memory: &Mapping, runs: &[DirtyRun]) -> Vec<usize> {
    let start = memory.range().start().as_usize();
    let pages = |r: &DirtyRun| {
        let first = (r.range().start().as_usize() - start) / PAGE_SIZE;
        first..first + r.range().pages().get()
    };
    runs.iter().flat_map(pages).collect()
}

/// # Safety
/// As for `watch`.
unsafe fn watch(memory: &Mapping) -> RawTracker {
    let tracker = RawTracker::open().unwrap();
    // SAFETY: the caller's promise.
    unsafe { tracker.watch(memory.range()).unwrap() };
    tracker
}

fn a_page_counts_as_written_until_it_was_taken_or_armed_once() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, WriteProtectAsync, PagemapScan, WriteProtectShared);
    let memory = Mapping::memfd(PageCount::new(8)).unwrap();
    // SAFETY: the mapping outlives the tracker, and is watched by it alone.
    let tracker = unsafe { watch(&memory) };
    let mut found = [DirtyRun::default(); 8];
    tracker.by_ref().arm(memory.pages(4, 4).unwrap()).unwrap();
    let taken = tracker.by_ref().take_into(memory.range(), &mut found).unwrap();
    assert_eq!(written(&memory, &found[..taken.runs]), [0, 1, 2, 3]);
    let taken = tracker.by_ref().take_into(memory.range(), &mut found).unwrap();
    assert_eq!((taken.runs, taken.rest.is_empty()), (0, true));
    tracker.by_ref().mark_written(memory.pages(6, 1).unwrap()).unwrap();
    let taken = tracker.by_ref().take_into(memory.range(), &mut found).unwrap();
    assert_eq!(written(&memory, &found[..taken.runs]), [6]);
    Outcome::Passed
}

fn a_full_buffer_stops_the_take_and_what_it_did_not_reach_stays_dirty() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, WriteProtectAsync, PagemapScan, WriteProtectShared);
    let pages = 64;
    let memory = Mapping::memfd(PageCount::new(pages)).unwrap();
    // SAFETY: as above.
    let tracker = unsafe { watch(&memory) };
    let mut all = [DirtyRun::default(); 64];
    tracker.by_ref().arm(memory.range()).unwrap();
    for seed in 0..200 {
        let mut rng = Rng::new(seed);
        let mut wrote: Vec<usize> = (0..rng.below(pages)).map(|_| rng.below(pages)).collect();
        for page in &wrote {
            memory.bytes().store_u8(page * PAGE_SIZE, 1).unwrap();
        }
        wrote.sort_unstable();
        wrote.dedup();
        let room = 1 + rng.below(5);
        let (mut seen, mut rest) = (Vec::new(), memory.range());
        while !rest.is_empty() {
            // No room at all takes nothing, and so loses nothing.
            assert_eq!(tracker.by_ref().take_into(rest, &mut []).unwrap().rest, rest);
            let taken = tracker.by_ref().take_into(rest, &mut all[..room]).unwrap();
            assert!(taken.rest.is_empty() || taken.runs == room, "seed {seed}: stopped before it was full");
            seen.extend(written(&memory, &all[..taken.runs]));
            rest = taken.rest;
        }
        assert_eq!(seen, wrote, "seed {seed}, room for {room}");
    }
    Outcome::Passed
}

fn the_descriptors_alone_make_a_tracker_and_others_an_error() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, WriteProtectAsync, PagemapScan, WriteProtectShared);
    let memory = Mapping::memfd(PageCount::new(4)).unwrap();
    // SAFETY: as above.
    let (uffd, pagemap) = unsafe { watch(&memory) }.into_fds();
    let tracker = RawTrackerRef::new(uffd.as_fd(), pagemap.as_fd());
    tracker.arm(memory.range()).unwrap();
    memory.bytes().store_u8(PAGE_SIZE, 1).unwrap();
    let mut found = [DirtyRun::default(); 4];
    let taken = tracker.take_into(memory.range(), &mut found).unwrap();
    assert_eq!(written(&memory, &found[..taken.runs]), [1]);
    let swapped = RawTrackerRef::new(pagemap.as_fd(), uffd.as_fd());
    assert!(swapped.take_into(memory.range(), &mut found).is_err());
    assert!(swapped.arm(memory.range()).is_err());
    // A second tracker on the same range is told why not.
    let second = RawTracker::open().unwrap();
    // SAFETY: refused.
    let refused = unsafe { second.watch(memory.range()) }.unwrap_err();
    assert!(
        matches!(refused, TrackError::Kernel { .. }) && refused.to_string().contains("EBUSY"),
        "{refused}"
    );
    // Memory that is not watched is an error too, not an empty set.
    let other = Mapping::memfd(PageCount::new(1)).unwrap();
    assert!(tracker.take_into(other.range(), &mut found).is_err());
    Outcome::Passed
}

static TRAPS: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" fn count_and_remove(_: i32, info: *mut c_void, context: *mut c_void) {
    TRAPS.fetch_add(1, Ordering::SeqCst);
    // SAFETY: a fault handler's own arguments.
    let page = unsafe { fault::Frame::new(info, context) }.address().page_floor();
    // SAFETY: a page of the test's.
    let _ = unsafe { guard::remove(PageRange::new(page, PageCount::new(1))) };
}

fn a_guard_traps_until_it_is_removed_of_markers_or_without() -> Outcome {
    // SAFETY: the handler makes system calls only.
    unsafe { fault::action(SIGSEGV, Some(&Action::run(count_and_remove, fault::SA_ONSTACK))).unwrap() };
    let caps = Capabilities::probe();
    let memory = Mapping::memfd(PageCount::new(8)).unwrap();
    memory.bytes().store_u8(3 * PAGE_SIZE, 7).unwrap();
    // SAFETY: the test's own pages, tracked by nobody.
    let kind = unsafe { guard::install(memory.pages(2, 2).unwrap()).unwrap() };
    assert_eq!(kind == guard::Kind::Markers, caps.has(Capability::GuardShared));
    assert_eq!(memory.bytes().load_u8(3 * PAGE_SIZE).unwrap(), 7, "shared contents are kept");
    assert_eq!(TRAPS.swap(0, Ordering::SeqCst), 1);
    memory.bytes().store_u8(PAGE_SIZE, 1).unwrap();
    memory.bytes().store_u8(4 * PAGE_SIZE, 1).unwrap();
    assert_eq!(TRAPS.load(Ordering::SeqCst), 0, "its neighbours are open");
    // SAFETY: as above.
    unsafe { guard::remove(memory.range()).unwrap() };
    memory.bytes().store_u8(2 * PAGE_SIZE, 1).unwrap();
    assert_eq!(TRAPS.load(Ordering::SeqCst), 0);
    Outcome::Passed
}

fn helper_guards_without_markers() -> Outcome {
    // What a kernel before 6.13 answers.
    peregrine_sys::process::forbid_call(peregrine_sys::process::CALL_MADVISE).unwrap();
    // SAFETY: the handler makes system calls only.
    unsafe { fault::action(SIGSEGV, Some(&Action::run(count_and_remove, fault::SA_ONSTACK))).unwrap() };
    let memory = Mapping::memfd(PageCount::new(4)).unwrap();
    // SAFETY: the test's own page.
    let kind = unsafe { guard::install(memory.pages(1, 1).unwrap()).unwrap() };
    assert_eq!(kind, guard::Kind::NoAccess);
    memory.bytes().store_u8(PAGE_SIZE, 1).unwrap();
    assert_eq!(TRAPS.load(Ordering::SeqCst), 1);
    Outcome::Passed
}

fn without_markers_a_guard_is_a_page_without_access() -> Outcome {
    let ended = testkit::run_helper("helper_guards_without_markers");
    assert!(ended.status.is_some_and(|s| s.success()), "{ended:?}");
    Outcome::Passed
}

fn a_tracked_page_is_marked_written_before_a_guard_is_laid_over_it() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, WriteProtectAsync, PagemapScan, WriteProtectShared, GuardShared);
    let memory = Mapping::memfd(PageCount::new(4)).unwrap();
    // SAFETY: as above.
    let tracker = unsafe { watch(&memory) };
    tracker.by_ref().arm(memory.range()).unwrap();
    memory.bytes().store_u8(PAGE_SIZE, 9).unwrap();
    let guarded = memory.pages(1, 1).unwrap();
    tracker.by_ref().mark_written(guarded).unwrap();
    // SAFETY: the test's own page, no longer protected.
    unsafe { guard::install(guarded).unwrap() };
    // SAFETY: as above.
    unsafe { guard::remove(guarded).unwrap() };
    assert_eq!(memory.bytes().load_u8(PAGE_SIZE).unwrap(), 9);
    let mut found = [DirtyRun::default(); 4];
    let taken = tracker.by_ref().take_into(memory.range(), &mut found).unwrap();
    assert_eq!(written(&memory, &found[..taken.runs]), [1]);
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        a_page_counts_as_written_until_it_was_taken_or_armed_once,
        a_full_buffer_stops_the_take_and_what_it_did_not_reach_stays_dirty,
        the_descriptors_alone_make_a_tracker_and_others_an_error,
        a_guard_traps_until_it_is_removed_of_markers_or_without,
        helper_guards_without_markers,
        without_markers_a_guard_is_a_page_without_access,
        a_tracked_page_is_marked_written_before_a_guard_is_laid_over_it,
    ])
}
