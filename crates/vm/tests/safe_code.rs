//! What safe code may try: in the wrong order, in the wrong process, out of range (what it has no right to: `rights.rs`). It gets an
//! error or the right answer; never another's memory, a missed write, or a process that hangs or dies.

#[macro_use]
mod common;

use common::{anonymous, indices, inline, memfd, page, unprotect};
use peregrine_base::sync::{AtomicBool, AtomicUsize, Ordering};
use peregrine_sys::fault;
use peregrine_sys::process::{ChildEnd, ForkFlags, Forked, exit_now, fork_with, wait_for};
use peregrine_vm::capabilities::Simulate;
use peregrine_vm::{
    AltStack, Capabilities, Capability, Decision, DirtyMechanism, MapError, Mapping, Mechanism, PAGE_SIZE,
    PageCount, PageKind, PrivateMemory, Protection, Region, RegionError, Tracker, Trap, UnionTracker,
};
use std::sync::{Arc, Mutex};
use testkit::{Outcome, skip};

/// The alternate stack in force, as the kernel tells it.
fn in_force() -> fault::AltStack {
    // SAFETY: asks only.
    unsafe { fault::alt_stack(None).unwrap() }
}

fn alternate_stacks_may_go_in_any_order() -> Outcome {
    let before = in_force();
    let first = AltStack::install(64 << 10).unwrap();
    let second = AltStack::install(64 << 10).unwrap();
    let third = AltStack::install(64 << 10).unwrap();
    let newest = in_force();
    drop(second);
    drop(first);
    assert_eq!(in_force(), newest, "the newest is in force until it goes");
    drop(third);
    // Whatever is in force now is memory: a handler runs on it, with the stack pointer inside.
    let memory = anonymous(1);
    let builder = Region::builder(memory.clone()).force(Mechanism::Mprotect).inline(inline(unprotect));
    let region = builder.build(&Capabilities::probe()).unwrap();
    region.protect(&[region.range()], Protection::Read).unwrap();
    memory.bytes().store_u8(0, 1).unwrap();
    // In order, everything is as it was.
    let outer = AltStack::install(64 << 10).unwrap();
    let inner = AltStack::install(64 << 10).unwrap();
    drop(inner);
    drop(outer);
    assert_ne!(before.base(), None, "Rust gives a thread one");
    std::thread::spawn(|| {
        let before = in_force();
        drop(AltStack::install(64 << 10).unwrap());
        assert_eq!(in_force(), before);
    })
    .join()
    .unwrap();
    Outcome::Passed
}

fn a_hole_punched_through_an_alias_hides_no_write_from_a_tracker() -> Outcome {
    let caps = Capabilities::probe();
    for mechanism in DirtyMechanism::ALL {
        let memory = memfd(8);
        let alias = memory.alias(Protection::ReadWrite).unwrap();
        memory.bytes().store_u8(5 * PAGE_SIZE, 1).unwrap();
        let Ok(mut tracker) = Tracker::of(memory.clone()).force(mechanism).start(&caps) else { continue };
        // The kernel takes the page out of every page table, and its protection with it.
        alias.discard(page(&alias, 5)).unwrap();
        memory.bytes().store_u8(5 * PAGE_SIZE, 2).unwrap();
        let set = tracker.take_dirty().unwrap();
        assert!(set.contains(page(&memory, 5).start()), "{mechanism}");
        memory.bytes().store_u8(5 * PAGE_SIZE, 3).unwrap();
        assert_eq!(indices(&memory, &tracker.take_dirty().unwrap()), [5], "{mechanism}: tracked on");
    }
    Outcome::Passed
}

fn a_fill_undoes_no_write_that_came_through_an_alias() -> Outcome {
    let caps = Capabilities::probe();
    for caps in [caps.clone(), caps.simulate(Simulate::ContainerWithoutUserfaultfd)] {
        for zero in [false, true] {
            let memory = memfd(4);
            let alias = memory.alias(Protection::ReadWrite).unwrap();
            let handler = inline(move |t| match zero {
                true => t.decide(t.region().fill_zero(t.page(), Protection::ReadWrite)),
                false => t.decide(t.region().fill_copy(t.page(), &[9; PAGE_SIZE], Protection::ReadWrite)),
            });
            let _stack = AltStack::install(64 << 10).unwrap();
            let builder = Region::builder(memory.clone()).traps_absent(true).traps_writes(false);
            let region = builder.inline(handler).build(&caps).unwrap();
            // After the region was made, so that it has to look.
            alias.bytes().store_u64(PAGE_SIZE, 77).unwrap();
            assert_eq!(memory.bytes().load_u64(PAGE_SIZE), Ok(77), "{} zero: {zero}", region.choice());
            let filled = if zero { 0 } else { 9 };
            assert_eq!(memory.bytes().load_u8(2 * PAGE_SIZE), Ok(filled), "{}", region.choice());
        }
    }
    Outcome::Passed
}

fn a_pager_handler_may_drop_its_own_region() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, Userfaultfd, WriteProtectShared);
    let memory = memfd(2);
    let own: Arc<Mutex<Option<Region>>> = Arc::default();
    let (theirs, traps) = (own.clone(), Arc::new(AtomicUsize::new(0)));
    let counted = traps.clone();
    let handler = move |_: &Trap<'_>| {
        counted.fetch_add(1, Ordering::SeqCst);
        drop(theirs.lock().unwrap().take());
        Decision::Retry
    };
    let region = Region::builder(memory.clone()).pager(handler).build(&caps).unwrap();
    region.protect(&[region.range()], Protection::Read).unwrap();
    *own.lock().unwrap() = Some(region);
    memory.bytes().store_u8(0, 1).unwrap();
    memory.bytes().store_u8(PAGE_SIZE, 1).unwrap();
    assert_eq!(traps.load(Ordering::SeqCst), 1, "plain memory since");
    // The range is free again as soon as the region is gone.
    while own.lock().unwrap().is_some() {
        std::thread::yield_now();
    }
    let again = Region::builder(memory.clone()).pager(unprotect).build(&caps).unwrap();
    again.protect(&[again.range()], Protection::Read).unwrap();
    memory.bytes().store_u8(0, 2).unwrap();
    Outcome::Passed
}

fn a_panic_while_pages_are_reported_loses_none_of_the_others() -> Outcome {
    let caps = Capabilities::probe();
    for mechanism in DirtyMechanism::ALL {
        let memory = memfd(64);
        let Ok(mut tracker) = Tracker::of(memory.clone()).force(mechanism).start(&caps) else { continue };
        let wrote: Vec<usize> = (0..64).step_by(3).collect();
        for n in &wrote {
            memory.bytes().store_u8(n * PAGE_SIZE, 1).unwrap();
        }
        let mut told = Vec::new();
        let taken = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            tracker.take_dirty_each(memory.range(), |run| {
                told.push((run.start().as_usize() - memory.range().start().as_usize()) / PAGE_SIZE);
                assert!(told.len() < 5, "on purpose");
            })
        }));
        assert!(taken.is_err(), "{mechanism}");
        told.extend(indices(&memory, &tracker.take_dirty().unwrap()));
        assert_eq!(told, wrote, "{mechanism}");
    }
    Outcome::Passed
}

fn private_memory_gives_its_pages_back_by_number() -> Outcome {
    let mut memory = PrivateMemory::new(PageCount::new(4)).unwrap();
    memory.fill(3);
    memory.discard(memory.pages(1, 2).unwrap()).unwrap();
    let bytes_of = |n: usize| memory[n * PAGE_SIZE];
    assert_eq!([0, 1, 2, 3].map(bytes_of), [3, 0, 0, 3]);
    assert!(matches!(memory.pages(3, 2), Err(MapError::Outside { .. })));
    Outcome::Passed
}

fn what_a_child_inherits_changes_nothing_of_the_parents() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, UserfaultfdSigbus, WriteProtectAsync, PagemapScan, WriteProtectShared);
    let memory = memfd(4);
    let private = anonymous(2);
    private.bytes().store_u8(0, 7).unwrap();
    let mut tracker =
        Tracker::of(memory.clone()).force(DirtyMechanism::AsyncWriteProtect).start(&caps).unwrap();
    memory.bytes().store_u8(PAGE_SIZE, 1).unwrap();
    let taken = tracker.take_dirty().unwrap();
    let builder = Region::builder(private.clone()).force(Mechanism::Sigbus).inline(inline(unprotect));
    let region = builder.build(&caps).unwrap();
    // SAFETY: this process has one thread.
    match unsafe { fork_with(ForkFlags::default()).unwrap() } {
        Forked::Child => {
            tracker.give_back(&taken);
            let evicted = region.evict(region.range());
            let refused = matches!(evicted, Err(RegionError::Forked(_)));
            let kept = private.bytes().load_u8(0) == Ok(7);
            exit_now(i32::from(!(refused && kept)))
        }
        Forked::Parent(pid) => assert_eq!(wait_for(pid), Ok(ChildEnd::Exited(0))),
    }
    assert!(tracker.take_dirty().unwrap().is_empty(), "the child gave back to nobody");
    tracker.give_back(&taken);
    assert_eq!(indices(&memory, &tracker.take_dirty().unwrap()), [1]);
    Outcome::Passed
}

fn sizes_beyond_the_address_space_are_errors() -> Outcome {
    let all = [usize::MAX, usize::MAX / PAGE_SIZE, usize::MAX / PAGE_SIZE / 2, 1 << 40, 0];
    for pages in all.map(PageCount::new) {
        for made in [
            Mapping::anonymous(pages),
            Mapping::anonymous_of(pages, PageKind::TransparentHuge),
            Mapping::anonymous_of(pages, PageKind::Huge2M),
            Mapping::reserve(pages),
            Mapping::memfd(pages),
            Mapping::memfd_of(pages, PageKind::Huge2M),
            PrivateMemory::new(pages).map(|m| m.into_mapping().unwrap()),
        ] {
            let error = made.unwrap_err();
            assert!(matches!(error, MapError::Kernel { .. } | MapError::Pool { .. }), "{pages:?}: {error}");
        }
    }
    let file = tempfile::tempfile().unwrap();
    let (huge, one) = (PageCount::new(usize::MAX), PageCount::new(1));
    assert!(Mapping::file(&file, huge, one, Protection::Read).is_err());
    assert!(Mapping::private_file(&file, one, huge).is_err());
    let memory = memfd(2);
    let fd = memory.object_fd().unwrap().try_clone_to_owned().unwrap();
    assert!(Mapping::from_memfd(fd, huge, one).is_err());
    assert!(AltStack::install(usize::MAX).is_err());
    let mut byte = [0];
    assert!(memory.bytes().read(usize::MAX, &mut byte).is_err());
    assert!(memory.bytes().address(2 * PAGE_SIZE).is_err());
    assert!(memory.bytes().fill(PAGE_SIZE, usize::MAX, 1).is_err());
    assert!(memory.pages(usize::MAX, 2).is_err());
    Outcome::Passed
}

fn pages_of_the_pool_come_whole() -> Outcome {
    let caps = Capabilities::probe();
    for made in [Mapping::anonymous_of, Mapping::memfd_of] {
        let error = made(PageCount::new(513), PageKind::Huge2M).unwrap_err();
        assert!(matches!(error, MapError::Pool { .. }), "{error}");
    }
    need!(caps, HugePool);
    for made in [Mapping::anonymous_of, Mapping::memfd_of] {
        let memory = made(PageCount::new(512), PageKind::Huge2M).unwrap();
        memory.bytes().store_u8(511 * PAGE_SIZE, 1).unwrap();
    }
    Outcome::Passed
}

fn an_empty_part_is_an_error_or_nothing_at_all() -> Outcome {
    let caps = Capabilities::probe();
    let memory = memfd(4);
    let none = memory.pages(2, 0).unwrap();
    for mechanism in Mechanism::ALL {
        let guard = mechanism == Mechanism::Guard;
        let shape = Region::builder(memory.clone()).traps_writes(!guard).traps_reads(guard).force(mechanism);
        let built = match mechanism.is_inline() {
            true => shape.part(none).inline(inline(unprotect)).build(&caps),
            false => shape.part(none).pager(unprotect).build(&caps),
        };
        match built {
            Ok(region) => region.protect(&[none], Protection::ReadWrite).unwrap(),
            Err(why) => println!("{mechanism}: {why}"),
        }
    }
    for mechanism in DirtyMechanism::ALL {
        match Tracker::of(memory.clone()).part(none).force(mechanism).start(&caps) {
            Ok(mut tracker) => assert!(tracker.take_dirty().unwrap().is_empty(), "{mechanism}"),
            Err(why) => println!("{mechanism}: {why}"),
        }
        let Ok(mut whole) = Tracker::of(memory.clone()).force(mechanism).start(&caps) else { continue };
        memory.bytes().store_u64(2 * PAGE_SIZE, 1 + mechanism as u64).unwrap();
        assert!(whole.take_dirty_in(none).unwrap().is_empty(), "{mechanism}");
        assert_eq!(indices(&memory, &whole.take_dirty().unwrap()), [2], "{mechanism}");
    }
    memory.populate(none, true).unwrap();
    memory.evict(none).unwrap();
    Outcome::Passed
}

fn two_regions_on_one_mapping_serve_their_own_parts_only() -> Outcome {
    let caps = Capabilities::probe();
    let memory = memfd(4);
    let hits = [Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0))];
    let make = |half: usize| {
        let count = hits[half].clone();
        let handler = inline(move |t| {
            count.fetch_add(1, Ordering::SeqCst);
            t.unprotect()
        });
        let part = memory.pages(half * 2, 2).unwrap();
        Region::builder(memory.clone()).part(part).inline(handler).build(&caps).unwrap()
    };
    let (low, high) = (make(0), make(1));
    // A range across both belongs to neither.
    for region in [&low, &high] {
        let across = memory.pages(1, 2).unwrap();
        let refused = region.protect(&[across], Protection::Read).unwrap_err();
        assert!(matches!(refused, RegionError::Outside { .. }), "{refused}");
        region.protect(&[region.range()], Protection::Read).unwrap();
    }
    for n in 0..4 {
        memory.bytes().store_u8(n * PAGE_SIZE, 1).unwrap();
    }
    assert_eq!(hits.each_ref().map(|h| h.load(Ordering::SeqCst)), [2, 2]);
    drop(low);
    high.protect(&[high.range()], Protection::Read).unwrap();
    // Bytes on both sides of the border in one copy.
    memory.bytes().write(2 * PAGE_SIZE - 50, &[3; 100]).unwrap();
    assert_eq!(hits.each_ref().map(|h| h.load(Ordering::SeqCst)), [2, 3]);
    Outcome::Passed
}

fn threads_that_race_on_the_same_bytes_see_some_of_what_was_written() -> Outcome {
    // Safe code may do this; each byte that comes out was put in by somebody.
    let memory = memfd(1);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for value in [1u8, 2] {
            let (memory, stop) = (&memory, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    memory.bytes().store_u8(7, value).unwrap();
                    memory.bytes().write(8, &[value; 20]).unwrap();
                    memory.bytes().write(100, &[value; 300]).unwrap();
                    memory.bytes().fill(500, 100, value).unwrap();
                }
            });
        }
        for _ in 0..2000 {
            let mut bytes = [0; 700];
            memory.bytes().read(0, &mut bytes).unwrap();
            assert!(bytes.iter().all(|b| *b <= 2), "{bytes:?}");
            assert!(memory.bytes().load_u8(7).unwrap() <= 2);
        }
        stop.store(true, Ordering::SeqCst);
    });
    Outcome::Passed
}

fn views_of_parts_are_united_by_where_they_lie_in_the_object() -> Outcome {
    let caps = Capabilities::probe();
    for mechanism in DirtyMechanism::ALL {
        let whole = memfd(16);
        let part = Arc::new(whole.alias_part(whole.pages(4, 8).unwrap(), Protection::ReadWrite).unwrap());
        let within = Arc::new(part.alias_part(part.pages(6, 2).unwrap(), Protection::ReadWrite).unwrap());
        assert_eq!((part.object_offset().get(), within.object_offset().get()), (4, 10));
        let mut union = UnionTracker::new();
        for view in [&whole, &part, &within] {
            // Of the part, only its upper half is tracked.
            let tracked = if Arc::ptr_eq(view, &part) {
                part.pages(4, 4)
            } else {
                view.pages(0, view.range().pages().get())
            };
            let builder = Tracker::of(view.clone()).part(tracked.unwrap()).force(mechanism);
            match builder.start(&caps) {
                Ok(tracker) => _ = union.add(tracker).unwrap(),
                Err(why) => skip!("{why}"),
            }
        }
        whole.bytes().store_u8(PAGE_SIZE, 1).unwrap();
        part.bytes().store_u8(5 * PAGE_SIZE, 1).unwrap();
        within.bytes().store_u8(PAGE_SIZE, 1).unwrap();
        let pages: Vec<usize> = union.take_dirty().unwrap().pages().map(PageCount::get).collect();
        assert_eq!(pages, [1, 9, 11], "{mechanism}");
    }
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        views_of_parts_are_united_by_where_they_lie_in_the_object,
        alternate_stacks_may_go_in_any_order,
        a_hole_punched_through_an_alias_hides_no_write_from_a_tracker,
        a_fill_undoes_no_write_that_came_through_an_alias,
        a_pager_handler_may_drop_its_own_region,
        a_panic_while_pages_are_reported_loses_none_of_the_others,
        private_memory_gives_its_pages_back_by_number,
        what_a_child_inherits_changes_nothing_of_the_parents,
        sizes_beyond_the_address_space_are_errors,
        pages_of_the_pool_come_whole,
        an_empty_part_is_an_error_or_nothing_at_all,
        two_regions_on_one_mapping_serve_their_own_parts_only,
        threads_that_race_on_the_same_bytes_see_some_of_what_was_written,
    ])
}
