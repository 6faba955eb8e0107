//! One test for each item of `docs/semantics.md` about pages that are dropped, discarded, moved, split, collapsed, swapped or
//! written back.

#[macro_use]
mod common;

use common::{anonymous, indices, inline, memfd};
use peregrine_base::sync::{AtomicUsize, Ordering};
use peregrine_sys::mem::{self, Advice};
use peregrine_vm::{
    Capabilities, Capability, Decision, DirtyMechanism, Mapping, PAGE_SIZE, PageCount, PageKind, Protection,
    Region, Tracker,
};
use std::sync::Arc;
use testkit::{Outcome, skip};

fn a_range_moved_by_mremap_is_tracked_no_more_and_the_next_take_says_so() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, WriteProtectAsync, PagemapScan);
    let memory = anonymous(4);
    let mut tracker =
        Tracker::of(memory.clone()).force(DirtyMechanism::AsyncWriteProtect).start(&caps).unwrap();
    memory.bytes().store_u8(0, 1).unwrap();
    // What was written before is taken before: that is the rule.
    assert_eq!(indices(&memory, &tracker.take_dirty().unwrap()), [0]);
    // SAFETY: the test's own memory, behind its mapping's back; put back below.
    let moved = unsafe { mem::remap(memory.range(), memory.range().pages(), None) };
    let moved = match moved {
        Ok(range) if range != memory.range() => range,
        // Linux may answer with the same place: then ask for another.
        _ => {
            let room = Mapping::reserve(PageCount::new(4)).unwrap();
            let to = room.range().start();
            std::mem::forget(room);
            // SAFETY: as above, onto a reservation of ours.
            unsafe { mem::remap(memory.range(), memory.range().pages(), Some(to)).unwrap() }
        }
    };
    // SAFETY: mapped by the call above.
    unsafe { moved.start().as_ptr::<u8>().write_volatile(2) };
    // Something else is mapped where the range was: not tracked, and the take fails rather than finding nothing.
    // SAFETY: the old place is free since the move.
    unsafe {
        let at = mem::Placement::At(memory.range().start());
        mem::map(
            PageCount::new(4),
            Protection::ReadWrite,
            mem::Source::Anonymous,
            at,
            mem::MapOptions::default(),
        )
        .unwrap();
    }
    let error = tracker.take_dirty().unwrap_err().to_string();
    assert!(error.contains("mapped anew") && error.contains("EPERM"), "{error}");
    // SAFETY: this test's.
    unsafe { mem::unmap(moved).unwrap() };
    Outcome::Passed
}

fn a_page_dropped_by_dontneed_keeps_its_dirtiness() -> Outcome {
    let caps = Capabilities::probe();
    for mechanism in DirtyMechanism::ALL {
        let memory = memfd(8);
        let Ok(mut tracker) = Tracker::of(memory.clone()).force(mechanism).start(&caps) else { continue };
        memory.bytes().store_u8(PAGE_SIZE, 1).unwrap();
        memory.evict(memory.range()).unwrap();
        let first = tracker.take_dirty().unwrap();
        assert!(first.contains(memory.pages(1, 1).unwrap().start()), "{mechanism}");
        // Evicted while clean, written after: seen as well.
        tracker.take_dirty().unwrap();
        memory.evict(memory.range()).unwrap();
        memory.bytes().store_u8(2 * PAGE_SIZE, 1).unwrap();
        assert!(tracker.take_dirty().unwrap().contains(memory.pages(2, 1).unwrap().start()), "{mechanism}");
    }
    Outcome::Passed
}

/// Out of the page table; what has no other place is lost.
fn drop_all(memory: &Mapping) {
    match memory.backing().is_shared() {
        true => memory.evict(memory.range()).unwrap(),
        false => memory.discard(memory.range()).unwrap(),
    }
}

fn contents_given_back_are_reported_and_what_is_written_after_too() -> Outcome {
    let caps = Capabilities::probe();
    for mechanism in DirtyMechanism::ALL {
        for shared in [true, false] {
            let memory = if shared { memfd(16) } else { anonymous(16) };
            memory.bytes().store_u8(3 * PAGE_SIZE, 1).unwrap();
            memory.bytes().store_u8(9 * PAGE_SIZE, 1).unwrap();
            let Ok(mut tracker) = Tracker::of(memory.clone()).force(mechanism).start(&caps) else { continue };
            // Nobody writes; zeros take the place of what was there.
            memory.discard(memory.pages(3, 1).unwrap()).unwrap();
            let third = memory.pages(3, 1).unwrap().start();
            assert!(tracker.take_dirty().unwrap().contains(third), "{mechanism}, shared: {shared}");
            assert!(tracker.take_dirty().unwrap().is_empty(), "{mechanism}, shared: {shared}: once");
            memory.discard(memory.pages(9, 1).unwrap()).unwrap();
            memory.bytes().store_u8(9 * PAGE_SIZE, 2).unwrap();
            let ninth = memory.pages(9, 1).unwrap().start();
            assert!(tracker.take_dirty().unwrap().contains(ninth), "{mechanism}, shared: {shared}");
            memory.bytes().store_u8(9 * PAGE_SIZE, 3).unwrap();
            assert_eq!(indices(&memory, &tracker.take_dirty().unwrap()), [9], "{mechanism}: tracked on");
        }
    }
    Outcome::Passed
}

fn whole_page_tables_dropped_by_dontneed_keep_their_dirtiness() -> Outcome {
    // The kernel frees a page table that such a call leaves empty, and with it whatever it kept there by the page.
    let caps = Capabilities::probe();
    for mechanism in DirtyMechanism::ALL {
        for shared in [true, false] {
            let memory = if shared { memfd(2048) } else { anonymous(2048) };
            let Ok(mut tracker) = Tracker::of(memory.clone()).force(mechanism).start(&caps) else { continue };
            for page in [0, 700, 1500, 2047] {
                memory.bytes().store_u8(page * PAGE_SIZE, 1).unwrap();
            }
            drop_all(&memory);
            let set = tracker.take_dirty().unwrap();
            for page in [0, 700, 1500, 2047] {
                // Private pages that are dropped are zeros again, which to a comparison is as if nothing had happened.
                let seen = set.contains(memory.pages(page, 1).unwrap().start());
                let undone = mechanism == DirtyMechanism::Compare && !shared;
                assert_eq!(seen, !undone, "{mechanism}, shared: {shared}, page {page}");
            }
            // Dropped while clean, written after.
            tracker.take_dirty().unwrap();
            drop_all(&memory);
            memory.bytes().store_u8(1000 * PAGE_SIZE, 2).unwrap();
            let set = tracker.take_dirty().unwrap();
            assert!(set.contains(memory.pages(1000, 1).unwrap().start()), "{mechanism}, shared: {shared}");
        }
    }
    Outcome::Passed
}

fn a_page_of_the_pool_dropped_by_dontneed_keeps_its_dirtiness() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, HugePool);
    for mechanism in [DirtyMechanism::AsyncWriteProtect, DirtyMechanism::Compare] {
        let memory = Arc::new(Mapping::memfd_of(PageCount::new(1024), PageKind::Huge2M).unwrap());
        let Ok(mut tracker) = Tracker::of(memory.clone()).force(mechanism).start(&caps) else { continue };
        memory.bytes().store_u8(600 * PAGE_SIZE, 1).unwrap();
        memory.evict(memory.range()).unwrap();
        assert!(tracker.take_dirty().unwrap().contains(memory.pages(600, 1).unwrap().start()), "{mechanism}");
        // Present and clean, it is reported no more.
        memory.bytes().load_u8(600 * PAGE_SIZE).unwrap();
        tracker.take_dirty().unwrap();
        assert!(tracker.take_dirty().unwrap().is_empty(), "{mechanism}");
        memory.evict(memory.range()).unwrap();
        memory.bytes().store_u8(PAGE_SIZE, 2).unwrap();
        assert!(tracker.take_dirty().unwrap().contains(memory.pages(1, 1).unwrap().start()), "{mechanism}");
    }
    Outcome::Passed
}

fn a_protected_page_that_is_evicted_comes_back_with_the_protection_that_the_fill_says() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, Userfaultfd, UserfaultfdSigbus, MinorShared, WriteProtectShared);
    for (with, traps_again) in [(Protection::Read, true), (Protection::ReadWrite, false)] {
        let memory = memfd(1);
        memory.bytes().store_u8(0, 1).unwrap();
        let writes = Arc::new(AtomicUsize::new(0));
        let counted = writes.clone();
        let handler = inline(move |t| match t.region().fill_continue(t.page(), with) {
            Ok(n) if n.get() == 1 => Decision::Filled,
            _ => {
                counted.fetch_add(1, Ordering::SeqCst);
                t.unprotect()
            }
        });
        let region = Region::builder(memory.clone()).traps_absent(true).inline(handler).build(&caps).unwrap();
        region.protect(&[region.range()], Protection::Read).unwrap();
        region.evict(region.range()).unwrap();
        memory.bytes().load_u8(0).unwrap();
        memory.bytes().store_u8(0, 2).unwrap();
        assert_eq!(writes.load(Ordering::SeqCst), usize::from(traps_again));
    }
    Outcome::Passed
}

fn huge_pages_split_and_collapsed_lose_no_dirtiness() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, TransparentHuge, WriteProtectAsync, PagemapScan);
    let memory = Arc::new(Mapping::anonymous_of(PageCount::new(1024), PageKind::TransparentHuge).unwrap());
    memory.populate(memory.range(), true).unwrap();
    for mechanism in
        [DirtyMechanism::AsyncWriteProtect, DirtyMechanism::SyncWriteProtect, DirtyMechanism::Mprotect]
    {
        let mut tracker = Tracker::of(memory.clone()).force(mechanism).start(&caps).unwrap();
        memory.bytes().store_u8(5 * PAGE_SIZE, 1).unwrap();
        memory.bytes().store_u8(700 * PAGE_SIZE, 1).unwrap();
        // The kernel may refuse to make a huge page of pages in different states; it may not forget a state.
        let collapsed = memory.collapse(memory.range());
        println!("{mechanism}: collapse: {collapsed:?}");
        memory.bytes().store_u8(9 * PAGE_SIZE, 1).unwrap();
        let set = tracker.take_dirty().unwrap();
        for page in [5, 9, 700] {
            assert!(set.contains(memory.pages(page, 1).unwrap().start()), "{mechanism}: page {page}");
        }
        let _ = memory.collapse(memory.range());
        memory.bytes().store_u8(900 * PAGE_SIZE, 1).unwrap();
        assert!(tracker.take_dirty().unwrap().contains(memory.pages(900, 1).unwrap().start()), "{mechanism}");
    }
    Outcome::Passed
}

fn a_swapped_page_keeps_its_dirtiness() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, Swap, Userfaultfd, UserfaultfdSigbus, WriteProtectAsync, WriteProtectShared, PagemapScan);
    for mechanism in DirtyMechanism::ALL {
        for (kind, memory) in [("anonymous", anonymous(64)), ("memfd", memfd(64))] {
            let mut tracker = Tracker::of(memory.clone()).force(mechanism).start(&caps).unwrap();
            for page in 0..32 {
                memory.bytes().store_u8(page * PAGE_SIZE, 1).unwrap();
            }
            memory.page_out(memory.range()).unwrap();
            let first = indices(&memory, &tracker.take_dirty().unwrap());
            assert_eq!(first, (0..32).collect::<Vec<_>>(), "{mechanism} {kind}");
            memory.page_out(memory.range()).unwrap();
            memory.bytes().store_u8(7 * PAGE_SIZE, 2).unwrap();
            assert_eq!(indices(&memory, &tracker.take_dirty().unwrap()), [7], "{mechanism} {kind}");
        }
    }
    Outcome::Passed
}

fn a_page_written_back_to_its_file_keeps_its_dirtiness() -> Outcome {
    // What `a_swapped_page_keeps_its_dirtiness` asks, where there is a file to go to instead of swap.
    let caps = Capabilities::probe();
    need!(caps, WriteProtectAsync, PagemapScan);
    let file = tempfile::tempfile().unwrap();
    file.set_len(16 * PAGE_SIZE as u64).unwrap();
    let memory = Mapping::file(&file, PageCount::new(0), PageCount::new(16), Protection::ReadWrite).unwrap();
    let memory = Arc::new(memory);
    let mut tracker =
        Tracker::of(memory.clone()).force(DirtyMechanism::AsyncWriteProtect).start(&caps).unwrap();
    memory.bytes().store_u8(3 * PAGE_SIZE, 1).unwrap();
    file.sync_all().unwrap();
    memory.page_out(memory.range()).unwrap();
    assert!(tracker.take_dirty().unwrap().contains(memory.pages(3, 1).unwrap().start()));
    tracker.take_dirty().unwrap();
    file.sync_all().unwrap();
    memory.page_out(memory.range()).unwrap();
    memory.bytes().store_u8(4 * PAGE_SIZE, 1).unwrap();
    assert!(tracker.take_dirty().unwrap().contains(memory.pages(4, 1).unwrap().start()));
    Outcome::Passed
}

fn collapse_and_dontneed_by_bare_calls_are_seen_by_regions_as_the_kernel_leaves_them() -> Outcome {
    // MADV_DONTNEED behind a region's back: an absent page traps again, a kernel-filled one stays protected.
    let caps = Capabilities::probe();
    need!(caps, Userfaultfd, UserfaultfdSigbus, WriteProtectShared);
    let traps = Arc::new(AtomicUsize::new(0));
    let counted = traps.clone();
    let memory = memfd(2);
    memory.populate(memory.range(), true).unwrap();
    let handler = inline(move |t| {
        counted.fetch_add(1, Ordering::SeqCst);
        t.unprotect()
    });
    let region = Region::builder(memory.clone()).inline(handler).build(&caps).unwrap();
    region.protect(&[region.range()], Protection::Read).unwrap();
    // SAFETY: the test's own memory, whose contents stay in the memfd.
    unsafe { mem::advise(memory.range(), Advice::DontNeed).unwrap() };
    memory.bytes().store_u8(0, 1).unwrap();
    assert_eq!(traps.load(Ordering::SeqCst), 1, "the protection outlives the page table entry");
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        a_range_moved_by_mremap_is_tracked_no_more_and_the_next_take_says_so,
        a_page_dropped_by_dontneed_keeps_its_dirtiness,
        contents_given_back_are_reported_and_what_is_written_after_too,
        whole_page_tables_dropped_by_dontneed_keep_their_dirtiness,
        a_page_of_the_pool_dropped_by_dontneed_keeps_its_dirtiness,
        a_protected_page_that_is_evicted_comes_back_with_the_protection_that_the_fill_says,
        huge_pages_split_and_collapsed_lose_no_dirtiness,
        a_swapped_page_keeps_its_dirtiness,
        a_page_written_back_to_its_file_keeps_its_dirtiness,
        collapse_and_dontneed_by_bare_calls_are_seen_by_regions_as_the_kernel_leaves_them,
    ])
}
