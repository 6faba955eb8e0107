//! Regions, registrations and trackers that come and go while others trap in them, and processes that fork meanwhile.

#[macro_use]
mod common;

use common::{On, inline, open_page, page};
use peregrine_base::sync::{AtomicBool, AtomicUsize, Ordering};
use peregrine_sys::fault::{self, Action, SIGSEGV};
use peregrine_sys::mem;
use peregrine_sys::process::{ChildEnd, ForkFlags, Forked, exit_now, fork_with, wait_for};
use peregrine_vm::trap::{Fault, Registration};
use peregrine_vm::{
    Capabilities, Capability, Decision, Mapping, Mechanism, PAGE_SIZE, PageCount, Protection, Region, Trap,
};
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use testkit::{Outcome, run_helper, skip};

fn registrations_come_and_go_while_others_trap() -> Outcome {
    let memory = Mapping::reserve(PageCount::new(64)).unwrap();
    let stop = AtomicBool::new(false);
    let traps = Arc::new(AtomicUsize::new(0));
    let counted = traps.clone();
    let handler = On(move |fault: &Fault| {
        counted.fetch_add(1, Ordering::SeqCst);
        open_page(fault)
    });
    let _registration = Registration::new(memory.range(), handler).unwrap();
    std::thread::scope(|scope| {
        for half in 0..2 {
            let (memory, stop) = (&memory, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    for p in half * 32..half * 32 + 32 {
                        memory.bytes().store_u8(p * PAGE_SIZE, 1).unwrap();
                        // SAFETY: the test's own memory.
                        unsafe { mem::protect(page(memory, p), Protection::None).unwrap() };
                    }
                }
            });
        }
        for round in 0..300 {
            let others: Vec<_> = (0..round % 5)
                .map(|_| {
                    Registration::new(memory.pages(round % 60, 3).unwrap(), On(|_: &Fault| Decision::Deny))
                        .unwrap()
                })
                .collect();
            std::thread::yield_now();
            drop(others);
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert!(traps.load(Ordering::SeqCst) > 0);
    Outcome::Passed
}

fn a_handler_that_forks_leaves_the_childs_books_right() -> Outcome {
    // The child leaves a handler that, by its own books, nobody entered: counted out all the same, the next thread inside
    // would count as nobody, and what it uses would be freed under it.
    static CHILD: AtomicBool = AtomicBool::new(false);
    static STATUS: AtomicUsize = AtomicUsize::new(usize::MAX);
    static INSIDE: AtomicBool = AtomicBool::new(false);
    static RELEASED: AtomicBool = AtomicBool::new(false);
    static DROPPED: AtomicBool = AtomicBool::new(false);
    static EARLY: AtomicBool = AtomicBool::new(false);
    let memory = Mapping::reserve(PageCount::new(2)).unwrap();
    let forks = On(|fault: &Fault| {
        // SAFETY: this process has one thread.
        match unsafe { fork_with(ForkFlags::default()) } {
            Ok(Forked::Child) => CHILD.store(true, Ordering::SeqCst),
            Ok(Forked::Parent(pid)) => {
                let ended = wait_for(pid) == Ok(ChildEnd::Exited(0));
                STATUS.store(usize::from(!ended), Ordering::SeqCst);
            }
            Err(_) => return Decision::Deny,
        }
        open_page(fault)
    });
    let _outer = Registration::new(page(&memory, 0), forks).unwrap();
    memory.bytes().store_u8(0, 1).unwrap();
    if !CHILD.load(Ordering::SeqCst) {
        assert_eq!(STATUS.load(Ordering::SeqCst), 0, "a registration went while a thread was in its handler");
        return Outcome::Passed;
    }
    let waits = On(|fault: &Fault| {
        INSIDE.store(true, Ordering::SeqCst);
        while !RELEASED.load(Ordering::SeqCst) {
            peregrine_sys::io::yield_now();
        }
        open_page(fault)
    });
    let registration = Registration::new(page(&memory, 1), waits).unwrap();
    let until_inside = || {
        while !INSIDE.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(move || {
            until_inside();
            drop(registration);
            DROPPED.store(true, Ordering::SeqCst);
        });
        scope.spawn(move || {
            until_inside();
            std::thread::sleep(std::time::Duration::from_millis(100));
            EARLY.store(DROPPED.load(Ordering::SeqCst), Ordering::SeqCst);
            RELEASED.store(true, Ordering::SeqCst);
        });
        memory.bytes().store_u8(PAGE_SIZE, 1).unwrap();
    });
    exit_now(i32::from(EARLY.load(Ordering::SeqCst)))
}

fn regions_and_trackers_may_go_while_others_trap_in_them() -> Outcome {
    let caps = Capabilities::probe();
    let memory = Arc::new(Mapping::memfd(PageCount::new(16)).unwrap());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (memory, stop) = (&memory, &stop);
            scope.spawn(move || {
                let mut n = thread;
                while !stop.load(Ordering::SeqCst) {
                    n = (n * 7 + 3) % 16;
                    memory.bytes().fetch_add_u64(n * PAGE_SIZE, 1).unwrap();
                }
            });
        }
        for round in 0..60 {
            let mechanism = [Mechanism::Sigbus, Mechanism::Pager, Mechanism::Mprotect][round % 3];
            let builder = Region::builder(memory.clone()).force(mechanism);
            let builder = match mechanism.is_inline() {
                true => builder.inline(inline(|t| t.unprotect())),
                false => builder.pager(|t: &Trap<'_>| t.unprotect()),
            };
            if let Ok(region) = builder.build(&caps) {
                for _ in 0..5 {
                    region.protect(&[region.range()], Protection::Read).unwrap();
                    std::thread::yield_now();
                }
                region.protect(&[region.range()], Protection::Read).unwrap();
            }
            let mechanism = peregrine_vm::DirtyMechanism::ALL[round % 4];
            if let Ok(mut tracker) = peregrine_vm::Tracker::of(memory.clone()).force(mechanism).start(&caps) {
                std::thread::yield_now();
                tracker.take_dirty().unwrap();
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
    Outcome::Passed
}

fn helper_touches_what_a_dropped_region_left_without_access() -> Outcome {
    // SAFETY: the default action.
    unsafe { fault::action(SIGSEGV, Some(&Action::default_action())).unwrap() };
    let memory = Arc::new(Mapping::reserve(PageCount::new(1)).unwrap());
    let builder =
        Region::builder(memory.clone()).force(Mechanism::Mprotect).inline(inline(|t| t.unprotect()));
    drop(builder.build(&Capabilities::probe()).unwrap());
    memory.bytes().store_u8(0, 1).unwrap();
    Outcome::Passed
}

fn a_bad_access_after_the_region_went_still_kills() -> Outcome {
    let ended = run_helper("helper_touches_what_a_dropped_region_left_without_access");
    assert_eq!(ended.status.and_then(|s| s.signal()), Some(SIGSEGV), "{ended:?}");
    Outcome::Passed
}

fn a_child_keeps_mprotect_traps_and_its_handlers() -> Outcome {
    let memory = Arc::new(Mapping::anonymous(PageCount::new(2)).unwrap());
    let builder =
        Region::builder(memory.clone()).force(Mechanism::Mprotect).inline(inline(|t| t.unprotect()));
    let region = builder.build(&Capabilities::probe()).unwrap();
    region.protect(&[region.range()], Protection::Read).unwrap();
    // SAFETY: this process has one thread.
    match unsafe { fork_with(ForkFlags::default()).unwrap() } {
        Forked::Child => {
            let done = memory.bytes().store_u8(0, 9).is_ok() && memory.bytes().load_u8(0) == Ok(9);
            drop(region);
            exit_now(i32::from(!done))
        }
        Forked::Parent(pid) => assert_eq!(wait_for(pid), Ok(ChildEnd::Exited(0))),
    }
    assert_eq!(memory.bytes().load_u8(0).unwrap(), 0, "private to the child");
    memory.bytes().store_u8(0, 1).unwrap();
    Outcome::Passed
}

fn a_child_of_a_userfaultfd_region_has_plain_memory_and_cannot_touch_its_parents() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, Userfaultfd, WriteProtectShared);
    let traps = Arc::new(AtomicUsize::new(0));
    let counted = traps.clone();
    let memory = Arc::new(Mapping::memfd(PageCount::new(2)).unwrap());
    let builder = Region::builder(memory.clone()).force(Mechanism::Sigbus).inline(inline(move |t| {
        counted.fetch_add(1, Ordering::SeqCst);
        t.unprotect()
    }));
    let region = builder.build(&caps).unwrap();
    region.protect(&[region.range()], Protection::Read).unwrap();
    // SAFETY: this process has one thread.
    match unsafe { fork_with(ForkFlags::default()).unwrap() } {
        Forked::Child => {
            let plain = memory.bytes().store_u8(PAGE_SIZE, 9).is_ok() && traps.load(Ordering::SeqCst) == 0;
            let refused = region.protect(&[region.range()], Protection::ReadWrite);
            let refused = matches!(refused, Err(peregrine_vm::RegionError::Forked(_)));
            drop(region);
            // A region of the child's own works.
            let builder =
                Region::builder(memory.clone()).force(Mechanism::Sigbus).inline(inline(|t| t.unprotect()));
            let own = builder.build(&caps).unwrap();
            let own = own.protect(&[own.range()], Protection::Read).is_ok()
                && memory.bytes().store_u8(0, 1).is_ok();
            exit_now(i32::from(!(plain && refused && own)))
        }
        Forked::Parent(pid) => assert_eq!(wait_for(pid), Ok(ChildEnd::Exited(0))),
    }
    memory.bytes().store_u8(0, 3).unwrap();
    assert_eq!(traps.load(Ordering::SeqCst), 1, "the parent's protection stood");
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        registrations_come_and_go_while_others_trap,
        a_handler_that_forks_leaves_the_childs_books_right,
        regions_and_trackers_may_go_while_others_trap_in_them,
        helper_touches_what_a_dropped_region_left_without_access,
        a_bad_access_after_the_region_went_still_kills,
        a_child_keeps_mprotect_traps_and_its_handlers,
        a_child_of_a_userfaultfd_region_has_plain_memory_and_cannot_touch_its_parents,
    ])
}
