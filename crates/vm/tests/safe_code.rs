//! What safe code may try: in the wrong order, in the wrong process, out of range, on memory that has no such right. It gets an
//! error or the right answer; never another's memory, a missed write, or a process that hangs or dies.

#[macro_use]
mod common;

use common::{anonymous, indices, inline, memfd, page, unprotect};
use peregrine_base::sync::{AtomicBool, AtomicUsize, Ordering};
use peregrine_sys::fault::{self, Action, SIGBUS, SIGSEGV};
use peregrine_sys::process::{ChildEnd, ForkFlags, Forked, exit_now, fork_with, wait_for};
use peregrine_vm::capabilities::Simulate;
use peregrine_vm::sys_errno::Errno;
use peregrine_vm::{
    AltStack, Capabilities, Capability, Decision, DirtyMechanism, MapError, Mapping, Mechanism, PAGE_SIZE,
    PageCount, PageKind, PrivateMemory, Protection, Region, RegionError, TrackError, Tracker, Trap,
};
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::sync::{Arc, Mutex};
use testkit::{Outcome, run_helper, skip};

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

fn a_view_that_may_not_be_written_is_not_populated_for_writing() -> Outcome {
    let memory = memfd(4);
    for access in [Protection::Read, Protection::None] {
        let view = memory.alias(access).unwrap();
        let error = view.populate(view.range(), true).unwrap_err();
        assert!(matches!(error, MapError::Kernel { .. }), "{error}");
    }
    let view = memory.alias(Protection::Read).unwrap();
    view.populate(view.range(), false).unwrap();
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

fn a_tracker_gives_no_right_that_its_view_has_not() -> Outcome {
    let caps = Capabilities::probe();
    let memory = memfd(4);
    memory.bytes().store_u8(0, 5).unwrap();
    for mechanism in DirtyMechanism::ALL {
        let view = Arc::new(memory.alias(Protection::Read).unwrap());
        match Tracker::of(view.clone()).force(mechanism).start(&caps) {
            Ok(mut tracker) => {
                assert!(tracker.take_dirty().unwrap().is_empty(), "{mechanism}");
                assert_eq!(view.bytes().load_u8(0), Ok(5), "{mechanism}");
            }
            Err(TrackError::NoMechanism { tried, .. }) => println!("{mechanism}: {tried:?}"),
            Err(other) => panic!("{other}"),
        }
        let ended = run_helper(match mechanism {
            DirtyMechanism::AsyncWriteProtect => "helper_writes_through_a_read_only_view_scan",
            DirtyMechanism::SyncWriteProtect => "helper_writes_through_a_read_only_view_sigbus",
            DirtyMechanism::SyncWriteProtectPager => "helper_writes_through_a_read_only_view_pager",
            DirtyMechanism::Mprotect => "helper_writes_through_a_read_only_view_mprotect",
            DirtyMechanism::Compare => "helper_writes_through_a_read_only_view_compare",
        });
        assert!(ended.output.contains("about to write"), "{mechanism}: {ended:?}");
        let signal = ended.status.and_then(|s| s.signal());
        assert_eq!(signal, Some(SIGSEGV), "{mechanism}: {ended:?}");
    }
    // Nothing can be read through a view without access, so nothing can be compared.
    let closed = Arc::new(Mapping::reserve(PageCount::new(2)).unwrap());
    let error = Tracker::of(closed).force(DirtyMechanism::Compare).start(&caps).unwrap_err().to_string();
    assert!(error.contains("without access"), "{error}");
    Outcome::Passed
}

/// The default actions, so that a bad access ends the process.
fn default_actions() {
    for signal in [SIGSEGV, SIGBUS] {
        // SAFETY: the default action.
        unsafe { fault::action(signal, Some(&Action::default_action())).unwrap() };
    }
}

fn writes_through_a_read_only_view(mechanism: DirtyMechanism) -> Outcome {
    default_actions();
    let memory = memfd(2);
    let view = Arc::new(memory.alias(Protection::Read).unwrap());
    let tracker = Tracker::of(view.clone()).force(mechanism).start(&Capabilities::probe());
    peregrine_vm::io::complain(b"about to write\n");
    view.bytes().store_u8(0, 1).unwrap();
    drop(tracker);
    Outcome::Passed
}

fn helper_writes_through_a_read_only_view_scan() -> Outcome {
    writes_through_a_read_only_view(DirtyMechanism::AsyncWriteProtect)
}

fn helper_writes_through_a_read_only_view_sigbus() -> Outcome {
    writes_through_a_read_only_view(DirtyMechanism::SyncWriteProtect)
}

fn helper_writes_through_a_read_only_view_pager() -> Outcome {
    writes_through_a_read_only_view(DirtyMechanism::SyncWriteProtectPager)
}

fn helper_writes_through_a_read_only_view_mprotect() -> Outcome {
    writes_through_a_read_only_view(DirtyMechanism::Mprotect)
}

fn helper_writes_through_a_read_only_view_compare() -> Outcome {
    writes_through_a_read_only_view(DirtyMechanism::Compare)
}

fn helper_writes_beyond_the_end_of_a_file() -> Outcome {
    default_actions();
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 * PAGE_SIZE as u64).unwrap();
    let memory = Mapping::file(&file, PageCount::new(0), PageCount::new(4), Protection::ReadWrite).unwrap();
    let memory = Arc::new(memory);
    let caps = Capabilities::probe();
    let tracker = Tracker::of(memory.clone()).force(DirtyMechanism::Mprotect).start(&caps).unwrap();
    file.set_len(0).unwrap();
    peregrine_vm::io::complain(b"about to write\n");
    memory.bytes().store_u8(PAGE_SIZE, 1).unwrap();
    drop(tracker);
    Outcome::Passed
}

fn a_write_beyond_the_end_of_a_file_is_not_taken_for_a_first_write() -> Outcome {
    let ended = run_helper("helper_writes_beyond_the_end_of_a_file");
    assert!(ended.output.contains("about to write"), "{ended:?}");
    assert_eq!(ended.status.and_then(|s| s.signal()), Some(SIGBUS), "{ended:?}");
    Outcome::Passed
}

fn nobody_can_cut_a_memfd_short_under_its_mappings() -> Outcome {
    let memory = memfd(4);
    let file = File::from(memory.object_fd().unwrap().try_clone_to_owned().unwrap());
    let error = file.set_len(PAGE_SIZE as u64).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::EPERM.0), "{error}");
    memory.bytes().store_u8(3 * PAGE_SIZE, 1).unwrap();
    memory.discard(memory.range()).unwrap();
    assert_eq!(memory.bytes().load_u8(3 * PAGE_SIZE), Ok(0));
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

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        alternate_stacks_may_go_in_any_order,
        a_view_that_may_not_be_written_is_not_populated_for_writing,
        a_hole_punched_through_an_alias_hides_no_write_from_a_tracker,
        a_fill_undoes_no_write_that_came_through_an_alias,
        a_pager_handler_may_drop_its_own_region,
        what_a_child_inherits_changes_nothing_of_the_parents,
        a_tracker_gives_no_right_that_its_view_has_not,
        helper_writes_through_a_read_only_view_scan,
        helper_writes_through_a_read_only_view_sigbus,
        helper_writes_through_a_read_only_view_pager,
        helper_writes_through_a_read_only_view_mprotect,
        helper_writes_through_a_read_only_view_compare,
        helper_writes_beyond_the_end_of_a_file,
        a_write_beyond_the_end_of_a_file_is_not_taken_for_a_first_write,
        nobody_can_cut_a_memfd_short_under_its_mappings,
        sizes_beyond_the_address_space_are_errors,
        pages_of_the_pool_come_whole,
        an_empty_part_is_an_error_or_nothing_at_all,
        two_regions_on_one_mapping_serve_their_own_parts_only,
        threads_that_race_on_the_same_bytes_see_some_of_what_was_written,
    ])
}
