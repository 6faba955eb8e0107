//! One test for each item of `docs/semantics.md`: the table there says what happens, and here it does. What becomes of pages whose
//! contents or frames go and come back is in `contents.rs`.

#[macro_use]
mod common;

use common::{REPLACED, anonymous, indices, inline, memfd, read_into, replace_pages_on, write_from};
use peregrine_base::sync::Ordering;
use peregrine_sys::fault::{SIGBUS, SIGSEGV};
use peregrine_sys::mem;
use peregrine_sys::process::{self, ChildEnd, ForkFlags, Forked, exit_now, fork_with, wait_for};
use peregrine_vm::Errno;
use peregrine_vm::capabilities::Simulate;
use peregrine_vm::{
    Capabilities, Capability, Decision, DirtyMechanism, Mapping, Mechanism, PAGE_SIZE, PageCount, PageRange,
    Protection, Region, RegionError, TrackError, Tracker, Trap, UnionTracker,
};
use std::sync::Arc;
use testkit::{Outcome, run_helper, skip};

fn fill_zero(trap: &Trap<'_>) -> Decision {
    trap.decide(trap.region().fill_zero(trap.page(), Protection::ReadWrite))
}

fn system_calls_on_absent_pages_are_served_by_a_pager_and_fail_with_efault_otherwise() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, Userfaultfd, UserfaultfdSigbus);
    for (caps, served) in [
        (caps.clone(), caps.has(Capability::UserfaultfdKernelFaults)),
        (caps.simulate(Simulate::OrdinaryUser), false),
    ] {
        let memory = anonymous(4);
        let region =
            Region::builder(memory.clone()).traps_absent(true).pager(fill_zero).build(&caps).unwrap();
        assert_eq!(region.serves_system_calls(), served);
        let expected = if served { Ok(8) } else { Err(Errno::EFAULT) };
        assert_eq!(read_into(&memory, 0), expected);
        assert_eq!(write_from(&memory, PAGE_SIZE), expected);
        // The program's own accesses are served in any case.
        assert_eq!(memory.bytes().load_u8(2 * PAGE_SIZE).unwrap(), 0);
    }
    let memory = anonymous(4);
    let inline_region =
        Region::builder(memory.clone()).traps_absent(true).inline(inline(fill_zero)).build(&caps).unwrap();
    assert!(!inline_region.serves_system_calls());
    assert_eq!(
        (read_into(&memory, 0), write_from(&memory, PAGE_SIZE)),
        (Err(Errno::EFAULT), Err(Errno::EFAULT))
    );
    // Populated first by a touch, it works.
    memory.bytes().load_u8(0).unwrap();
    assert_eq!(read_into(&memory, 0), Ok(8));
    Outcome::Passed
}

fn system_calls_on_pages_without_access_fail_with_efault() -> Outcome {
    let caps = Capabilities::probe();
    let memory = memfd(4);
    let mechanisms = [Mechanism::Mprotect, Mechanism::Guard];
    for mechanism in mechanisms {
        if mechanism == Mechanism::Guard && !caps.has(Capability::GuardShared) {
            continue;
        }
        let builder = Region::builder(memory.clone()).traps_writes(false).traps_reads(true);
        let region = builder.force(mechanism).inline(inline(|t| t.unprotect())).build(&caps).unwrap();
        region.protect(&[region.range()], Protection::None).unwrap();
        assert_eq!(read_into(&memory, 0), Err(Errno::EFAULT));
        assert_eq!(write_from(&memory, 0), Err(Errno::EFAULT));
    }
    Outcome::Passed
}

fn a_forked_child_is_not_tracked_and_says_so() -> Outcome {
    let caps = Capabilities::probe();
    for mechanism in [DirtyMechanism::AsyncWriteProtect, DirtyMechanism::SyncWriteProtect] {
        let memory = memfd(8);
        let mut tracker = match Tracker::of(memory.clone()).force(mechanism).start(&caps) {
            Ok(t) => t,
            Err(TrackError::NoMechanism { tried: why, .. }) => skip!("{why:?}"),
            Err(e) => panic!("{e}"),
        };
        memory.bytes().store_u8(PAGE_SIZE, 1).unwrap();
        // SAFETY: this process has one thread.
        match unsafe { fork_with(ForkFlags::default()).unwrap() } {
            Forked::Child => {
                let refused = matches!(tracker.take_dirty(), Err(TrackError::Forked(_)));
                drop(tracker);
                // The child's own tracker sees the child's own writes.
                let mut own = Tracker::of(memory.clone()).force(mechanism).start(&caps).unwrap();
                memory.bytes().store_u8(5 * PAGE_SIZE, 1).unwrap();
                let seen = own.take_dirty().unwrap();
                exit_now(i32::from(!(refused && indices(&memory, &seen) == [5])))
            }
            Forked::Parent(pid) => assert_eq!(wait_for(pid), Ok(ChildEnd::Exited(0)), "{mechanism}"),
        }
        memory.bytes().store_u8(2 * PAGE_SIZE, 1).unwrap();
        let seen = tracker.take_dirty().unwrap();
        assert_eq!(
            indices(&memory, &seen),
            [1, 2],
            "the child wrote page 5 through its own page table: {mechanism}"
        );
    }
    Outcome::Passed
}

fn a_view_sees_its_own_writes_only_and_a_union_all() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, WriteProtectAsync, PagemapScan);
    let one = memfd(8);
    let two = Arc::new(one.alias(Protection::ReadWrite).unwrap());
    let mut alone = Tracker::of(one.clone()).force(DirtyMechanism::AsyncWriteProtect).start(&caps).unwrap();
    two.bytes().store_u8(3 * PAGE_SIZE, 1).unwrap();
    assert!(alone.take_dirty().unwrap().is_empty(), "DIRTY sees one page table");
    let mut compare = Tracker::of(one.clone()).force(DirtyMechanism::Compare).start(&caps).unwrap();
    two.bytes().store_u8(3 * PAGE_SIZE, 2).unwrap();
    assert_eq!(indices(&one, &compare.take_dirty().unwrap()), [3], "comparing sees every view");
    let mut union = UnionTracker::new();
    union.add(alone).unwrap();
    union.add(Tracker::of(two.clone()).start(&caps).unwrap()).unwrap();
    one.bytes().store_u8(0, 1).unwrap();
    two.bytes().store_u8(6 * PAGE_SIZE, 1).unwrap();
    // A view that goes leaves what it saw behind; another process sends its set.
    let (reader, mut writer) = std::io::pipe().unwrap();
    // SAFETY: this process has one thread.
    match unsafe { fork_with(ForkFlags::default()).unwrap() } {
        Forked::Child => {
            let mut own =
                Tracker::of(Arc::new(one.alias(Protection::ReadWrite).unwrap())).start(&caps).unwrap();
            own_write(&mut own, &mut writer);
            exit_now(0)
        }
        Forked::Parent(pid) => assert_eq!(wait_for(pid), Ok(ChildEnd::Exited(0))),
    }
    drop(writer);
    let mut sent = [0u8; 8];
    std::io::Read::read_exact(&mut { reader }, &mut sent).unwrap();
    let page = PageCount::new(u64::from_le_bytes(sent) as usize);
    let run = peregrine_vm::dirty::ObjectRun { first: page, pages: PageCount::new(1) };
    union.absorb(&peregrine_vm::ObjectDirty::from_runs([run]));
    union.remove(1).unwrap();
    drop(two);
    let pages: Vec<usize> = union.take_dirty().unwrap().pages().map(PageCount::get).collect();
    assert_eq!(pages, [0, 4, 6]);
    let stranger = Tracker::of(anonymous(1)).start(&caps).unwrap();
    let refused = union.add(stranger).unwrap_err().to_string();
    assert!(refused.contains("only aliases can be united"), "{refused}");
    Outcome::Passed
}

/// In the child: writes page 4 through a view of its own and sends what its tracker saw.
fn own_write(tracker: &mut Tracker, to: &mut std::io::PipeWriter) {
    let at = tracker.range().start().as_usize() + 4 * PAGE_SIZE;
    // SAFETY: the tracked view is this child's, and is behind no reference.
    unsafe { peregrine_vm::VirtAddr::new(at).as_ptr::<u8>().write_volatile(1) };
    let set = tracker.take_object_dirty().unwrap();
    for page in set.pages() {
        std::io::Write::write_all(to, &(page.get() as u64).to_le_bytes()).unwrap();
    }
}

fn two_trackers_on_one_range_are_refused_unless_one_compares() -> Outcome {
    let caps = Capabilities::probe();
    let memory = memfd(8);
    let mut first = Tracker::of(memory.clone()).start(&caps).unwrap();
    for mechanism in DirtyMechanism::ALL {
        match Tracker::of(memory.clone()).force(mechanism).start(&caps) {
            Ok(mut second) => {
                assert_eq!(mechanism, DirtyMechanism::Compare);
                memory.bytes().store_u8(PAGE_SIZE, 1).unwrap();
                assert_eq!(indices(&memory, &second.take_dirty().unwrap()), [1]);
            }
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("a tracker changes already") && text.contains("Compare"), "{text}");
            }
        }
    }
    // A region on it is refused too, and so is a guard over what is write-protected: that would livelock in the kernel.
    let refused = Region::builder(memory.clone())
        .part(memory.pages(2, 1).unwrap())
        .build(&caps)
        .unwrap_err()
        .to_string();
    assert!(refused.contains("tracker"), "{refused}");
    assert_eq!(indices(&memory, &first.take_dirty().unwrap()), [1]);
    drop(first);
    drop(Region::builder(memory).build(&caps).unwrap());
    Outcome::Passed
}

fn a_guard_is_laid_over_a_tracked_range_by_finishing_the_tracker_first() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, GuardShared, WriteProtectShared, UserfaultfdSigbus);
    for mechanism in DirtyMechanism::ALL {
        let memory = memfd(8);
        let tracker = match Tracker::of(memory.clone()).force(mechanism).start(&caps) {
            Ok(t) => t,
            Err(e) => skip!("{e}"),
        };
        memory.bytes().store_u8(4 * PAGE_SIZE, 6).unwrap();
        assert_eq!(indices(&memory, &tracker.finish().unwrap()), [4]);
        let builder = Region::builder(memory.clone()).traps_writes(false).traps_reads(true);
        let region = builder.force(Mechanism::Guard).inline(inline(|t| t.unprotect())).build(&caps).unwrap();
        region.protect(&[region.range()], Protection::None).unwrap();
        assert_eq!(memory.bytes().load_u8(4 * PAGE_SIZE).unwrap(), 6);
    }
    Outcome::Passed
}

fn a_dirty_range_is_finished_before_it_is_unmapped_and_a_hole_is_not_silent_where_writes_trap() -> Outcome {
    let caps = Capabilities::probe();
    for mechanism in DirtyMechanism::ALL {
        let memory = memfd(8);
        let Ok(mut tracker) = Tracker::of(memory.clone()).force(mechanism).start(&caps) else { continue };
        memory.bytes().store_u8(PAGE_SIZE, 1).unwrap();
        if mechanism == DirtyMechanism::Compare {
            // It reads the memory, so it needs it.
            assert_eq!(indices(&memory, &tracker.finish().unwrap()), [1]);
            continue;
        }
        memory.bytes().store_u8(6 * PAGE_SIZE, 1).unwrap();
        // The mapping can't go while the tracker holds it; a bare munmap of part of it can.
        // SAFETY: the test's own pages; nothing touches them again.
        unsafe { mem::unmap(memory.pages(0, 4).unwrap()).unwrap() };
        let set = tracker.take_dirty().unwrap();
        assert!(set.contains(memory.pages(6, 1).unwrap().start()), "{mechanism}: the rest is still tracked");
        let lost = !set.contains(memory.pages(1, 1).unwrap().start());
        // The kernel's own books went with the mapping; ours did not.
        assert_eq!(lost, mechanism == DirtyMechanism::AsyncWriteProtect, "{mechanism}");
    }
    Outcome::Passed
}

fn when_mappings_run_out_protect_says_which_sysctl_and_a_tracker_still_misses_nothing() -> Outcome {
    let caps = Capabilities::probe();
    let limit = caps.max_map_count();
    if limit > 200_000 {
        skip!("missing capability: a vm.max_map_count small enough to reach (it is {limit})");
    }
    let memory = memfd(2 * limit);
    let region = Region::builder(memory.clone()).force(Mechanism::Mprotect).build(&caps).unwrap();
    let every_second: Vec<PageRange> = (0..limit).map(|i| memory.pages(2 * i, 1).unwrap()).collect();
    let error = region.protect(&every_second, Protection::Read).unwrap_err();
    assert!(matches!(error, RegionError::Kernel { errno: Errno::ENOMEM, .. }), "{error}");
    assert!(error.to_string().contains("vm.max_map_count"), "{error}");
    drop(region);
    // userfaultfd splits nothing.
    if let Ok(region) = Region::builder(memory.clone()).force(Mechanism::Sigbus).build(&caps) {
        region.protect(&every_second, Protection::Read).unwrap();
    }
    let mut tracker = Tracker::of(memory.clone()).force(DirtyMechanism::Mprotect).start(&caps).unwrap();
    for page in &every_second {
        let offset = page.start().as_usize() - memory.range().start().as_usize();
        memory.bytes().store_u8(offset, 1).unwrap();
    }
    let set = tracker.take_dirty().unwrap();
    assert!(every_second.iter().all(|p| set.contains(p.start())), "every page written is in the set");
    memory.bytes().store_u8(PAGE_SIZE, 1).unwrap();
    assert!(tracker.take_dirty().unwrap().contains(memory.pages(1, 1).unwrap().start()));
    Outcome::Passed
}

fn helper_a_user_asks_for_what_only_root_has() -> Outcome {
    process::become_user(65534).unwrap();
    let caps = Capabilities::probe();
    if caps.has(Capability::UserfaultfdKernelFaults) {
        skip!("vm.unprivileged_userfaultfd=1: an ordinary user lacks nothing here");
    }
    let builder = Tracker::of(anonymous(1)).force(DirtyMechanism::SyncWriteProtectPager).kernel_writes(true);
    println!("error: {}", builder.start(&caps).unwrap_err());
    let fallback = Tracker::of(anonymous(1)).kernel_writes(true).start(&caps).unwrap();
    println!("fallback: {}", fallback.choice());
    let masked = caps.without(Capability::WriteProtectAsync);
    let fallback = Tracker::of(anonymous(1)).kernel_writes(true).start(&masked).unwrap();
    println!("fallback: {}", fallback.choice());
    Outcome::Passed
}

fn a_refusal_names_the_sysctl_the_device_and_the_fallback() -> Outcome {
    if !process::is_root() {
        skip!("missing capability: root, to become uid 65534");
    }
    let ended = run_helper("helper_a_user_asks_for_what_only_root_has");
    if let Some(why) = ended.output.lines().find_map(|l| l.strip_prefix(testkit::SKIP)) {
        skip!("{why}");
    }
    assert!(ended.status.is_some_and(|s| s.success()), "{ended:?}");
    for word in [
        "vm.unprivileged_userfaultfd",
        "/dev/userfaultfd",
        "UFFD_USER_MODE_ONLY",
        "EPERM",
        "fallback: PAGEMAP_SCAN",
        "fallback: compare (not PAGEMAP_SCAN",
    ] {
        assert!(ended.output.contains(word), "{word} in {}", ended.output);
    }
    Outcome::Passed
}

fn a_file_that_was_cut_short_is_a_bus_error_that_the_chain_gets() -> Outcome {
    replace_pages_on(&[SIGSEGV, SIGBUS]);
    let caps = Capabilities::probe();
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 * PAGE_SIZE as u64).unwrap();
    let memory = Mapping::file(&file, PageCount::new(0), PageCount::new(4), Protection::ReadWrite).unwrap();
    let memory = Arc::new(memory);
    let tracker = Tracker::of(memory.clone()).force(DirtyMechanism::Mprotect).start(&caps).unwrap();
    file.set_len(0).unwrap();
    assert_eq!(memory.bytes().load_u8(PAGE_SIZE).unwrap(), 0);
    assert_eq!(
        REPLACED.load(Ordering::SeqCst),
        1,
        "a tracker does not take what is not a write to a clean page"
    );
    drop(tracker);
    // A memfd from elsewhere, which is not sealed: under userfaultfd a clean page raises the same signal as one beyond the end.
    let pages = PageCount::new(4);
    let fd = peregrine_sys::memfd::create(c"elsewhere", pages, peregrine_sys::memfd::Pages::Base).unwrap();
    let elsewhere = std::fs::File::from(fd.try_clone().unwrap());
    let memory = Arc::new(Mapping::from_memfd(fd, PageCount::new(0), pages).unwrap());
    match Tracker::of(memory.clone()).force(DirtyMechanism::SyncWriteProtect).start(&caps) {
        Ok(tracker) => {
            elsewhere.set_len(0).unwrap();
            assert_eq!(memory.bytes().load_u8(PAGE_SIZE).unwrap(), 0);
            assert_eq!(REPLACED.load(Ordering::SeqCst), 2, "nor a read under userfaultfd");
            drop(tracker);
        }
        Err(why) => println!("not tried: {why}"),
    }
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        system_calls_on_absent_pages_are_served_by_a_pager_and_fail_with_efault_otherwise,
        system_calls_on_pages_without_access_fail_with_efault,
        a_forked_child_is_not_tracked_and_says_so,
        a_view_sees_its_own_writes_only_and_a_union_all,
        two_trackers_on_one_range_are_refused_unless_one_compares,
        a_guard_is_laid_over_a_tracked_range_by_finishing_the_tracker_first,
        a_dirty_range_is_finished_before_it_is_unmapped_and_a_hole_is_not_silent_where_writes_trap,
        when_mappings_run_out_protect_says_which_sysctl_and_a_tracker_still_misses_nothing,
        helper_a_user_asks_for_what_only_root_has,
        a_refusal_names_the_sysctl_the_device_and_the_fallback,
        a_file_that_was_cut_short_is_a_bus_error_that_the_chain_gets,
    ])
}
