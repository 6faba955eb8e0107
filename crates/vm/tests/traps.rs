//! What a trap does to the thread that takes it, the handlers around it and the process it happens in.

use peregrine_base::sync::{AtomicBool, AtomicUsize, Ordering};
use peregrine_sys::fault::{self, Action, SIGBUS, SIGSEGV};
use peregrine_sys::mem;
use peregrine_sys::process::{ChildEnd, ForkFlags, Forked, exit_now, fork_with, wait_for};
use peregrine_vm::trap::{Fault, Registration, SignalHandler};
use peregrine_vm::{
    Access, AltStack, Capabilities, Capability, Decision, Inline, Mapping, Mechanism, PAGE_SIZE, PageCount,
    PageRange, Protection, Region, Trap, VirtAddr,
};
use std::ffi::c_void;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use testkit::{Outcome, run_helper};

fn need(caps: &Capabilities, what: Capability) -> Result<(), Outcome> {
    caps.require(what).map_err(|lack| Outcome::Skipped(lack.to_string()))
}

macro_rules! need {
    ($caps:expr, $($what:ident),*) => { $(if let Err(skip) = need($caps, Capability::$what) { return skip; })* };
}

/// A handler of a closure.
struct On<F>(F);
// SAFETY: each closure below keeps the promise: atomics and system calls.
unsafe impl<F: Fn(&Fault) -> Decision + Send + Sync + 'static> SignalHandler for On<F> {
    fn on_fault(&self, fault: &Fault) -> Decision {
        (self.0)(fault)
    }
}

fn open_page(fault: &Fault) -> Decision {
    // SAFETY: a page of a mapping that the test owns.
    match unsafe { mem::protect(fault.page(), Protection::ReadWrite) } {
        Ok(()) => Decision::Filled,
        Err(_) => Decision::Deny,
    }
}

fn inline(
    f: impl Fn(&Trap<'_>) -> Decision + Send + Sync + 'static,
) -> Inline<impl Fn(&Trap<'_>) -> Decision> {
    // SAFETY: the closures below use atomics and the trap's operations only.
    unsafe { Inline::new(f) }
}

fn page(memory: &Mapping, n: usize) -> PageRange {
    memory.pages(n, 1).unwrap()
}

fn a_bare_registration_learns_address_access_and_instruction() -> Outcome {
    static ADDRESS: AtomicUsize = AtomicUsize::new(0);
    static WRITES: AtomicUsize = AtomicUsize::new(0);
    let memory = Mapping::reserve(PageCount::new(4)).unwrap();
    let handler = On(|fault: &Fault| {
        assert!(fault.instruction.as_usize() != 0);
        ADDRESS.store(fault.address.as_usize(), Ordering::SeqCst);
        WRITES.fetch_add(usize::from(fault.access == Access::Write), Ordering::SeqCst);
        open_page(fault)
    });
    let _registration = Registration::new(memory.range(), handler).unwrap();
    assert_eq!(memory.bytes().load_u8(123).unwrap(), 0);
    assert_eq!(ADDRESS.load(Ordering::SeqCst), memory.range().start().as_usize() + 123);
    assert_eq!(WRITES.load(Ordering::SeqCst), 0);
    memory.bytes().store_u8(PAGE_SIZE + 5, 1).unwrap();
    assert_eq!(ADDRESS.load(Ordering::SeqCst), memory.range().start().as_usize() + PAGE_SIZE + 5);
    assert_eq!(WRITES.load(Ordering::SeqCst), 1);
    Outcome::Passed
}

static CHAINED: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" fn earlier_handler(_: i32, info: *mut c_void, context: *mut c_void) {
    // SAFETY: a fault handler's own arguments.
    let frame = unsafe { fault::Frame::new(info, context) };
    CHAINED.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the page is the test's.
    let _ = unsafe {
        mem::protect(PageRange::covering(frame.address().page_floor(), PAGE_SIZE), Protection::ReadWrite)
    };
}

fn deny_goes_to_the_handler_that_was_there_before() -> Outcome {
    // SAFETY: `earlier_handler` makes system calls only.
    unsafe { fault::action(SIGSEGV, Some(&Action::run(earlier_handler, fault::SA_ONSTACK))).unwrap() };
    let memory = Arc::new(Mapping::anonymous(PageCount::new(2)).unwrap());
    let caps = Capabilities::probe();
    let region = Region::builder(memory.clone())
        .force(Mechanism::Mprotect)
        .inline(inline(|_| Decision::Deny))
        .build(&caps)
        .unwrap();
    region.protect(&[page(&memory, 0)], Protection::Read).unwrap();
    memory.bytes().store_u8(0, 1).unwrap();
    assert_eq!(CHAINED.load(Ordering::SeqCst), 1);
    // A fault that has nothing to do with us goes there at once.
    let other = Mapping::reserve(PageCount::new(1)).unwrap();
    other.bytes().store_u8(0, 1).unwrap();
    assert_eq!(CHAINED.load(Ordering::SeqCst), 2);
    Outcome::Passed
}

fn helper_denied_without_anybody_before() -> Outcome {
    for signal in [SIGSEGV, SIGBUS] {
        // SAFETY: the default action.
        unsafe { fault::action(signal, Some(&Action::default_action())).unwrap() };
    }
    let memory = Arc::new(Mapping::anonymous(PageCount::new(2)).unwrap());
    let region = Region::builder(memory.clone())
        .force(Mechanism::Mprotect)
        .inline(inline(|_| Decision::Deny))
        .build(&Capabilities::probe())
        .unwrap();
    region.protect(&[page(&memory, 0)], Protection::Read).unwrap();
    memory.bytes().store_u8(0, 1).unwrap();
    Outcome::Passed
}

fn deny_without_anybody_before_kills_by_the_signal_it_was() -> Outcome {
    let ended = run_helper("helper_denied_without_anybody_before");
    assert_eq!(ended.status.and_then(|s| s.signal()), Some(SIGSEGV), "{ended:?}");
    Outcome::Passed
}

fn helper_overflow() -> Outcome {
    fn deeper(n: u64) -> u64 {
        let big = [n; 512];
        if std::hint::black_box(n) == u64::MAX { 0 } else { deeper(n + 1) + std::hint::black_box(big)[3] }
    }
    let memory = Arc::new(Mapping::anonymous(PageCount::new(2)).unwrap());
    let caps = Capabilities::probe();
    let builder = Region::builder(memory.clone()).inline(inline(|t| t.unprotect()));
    let region = builder.force(Mechanism::Mprotect).build(&caps).unwrap();
    region.protect(&[page(&memory, 0)], Protection::Read).unwrap();
    memory.bytes().store_u8(0, 1).unwrap();
    println!("{}", deeper(0));
    Outcome::Passed
}

fn rusts_own_overflow_handler_still_speaks() -> Outcome {
    let ended = run_helper("helper_overflow");
    assert!(ended.output.contains("has overflowed its stack"), "{ended:?}");
    assert_eq!(ended.status.and_then(|s| s.signal()), Some(6), "{ended:?}");
    Outcome::Passed
}

fn a_signal_that_somebody_sent_goes_to_the_handler_before() -> Outcome {
    unsafe extern "C" fn note(_: i32, _: *mut c_void, _: *mut c_void) {
        CHAINED.fetch_add(1, Ordering::SeqCst);
    }
    // SAFETY: `note` touches an atomic.
    unsafe { fault::action(SIGSEGV, Some(&Action::run(note, 0))).unwrap() };
    let memory = Mapping::reserve(PageCount::new(1)).unwrap();
    let _registration = Registration::new(memory.range(), On(|_: &Fault| panic!("not a fault"))).unwrap();
    fault::queue_to_thread(fault::current_thread_id(), SIGSEGV, -1, memory.range().start()).unwrap();
    assert_eq!(CHAINED.load(Ordering::SeqCst), 1);
    Outcome::Passed
}

fn the_innermost_registration_is_asked_first_and_the_outer_next() -> Outcome {
    static ORDER: AtomicUsize = AtomicUsize::new(0);
    let memory = Mapping::reserve(PageCount::new(4)).unwrap();
    let note = |digit: usize, then: fn(&Fault) -> Decision| {
        On(move |fault: &Fault| {
            ORDER.store(ORDER.load(Ordering::SeqCst) * 10 + digit, Ordering::SeqCst);
            then(fault)
        })
    };
    let _outer = Registration::new(memory.range(), note(1, open_page)).unwrap();
    let inner = Registration::new(memory.pages(1, 2).unwrap(), note(2, |_| Decision::Deny)).unwrap();
    let innermost = Registration::new(page(&memory, 1), note(3, |_| Decision::Deny)).unwrap();
    memory.bytes().store_u8(PAGE_SIZE, 1).unwrap();
    assert_eq!(ORDER.swap(0, Ordering::SeqCst), 321);
    memory.bytes().store_u8(2 * PAGE_SIZE, 1).unwrap();
    assert_eq!(ORDER.swap(0, Ordering::SeqCst), 21);
    memory.bytes().store_u8(3 * PAGE_SIZE, 1).unwrap();
    assert_eq!(ORDER.swap(0, Ordering::SeqCst), 1);
    drop((inner, innermost));
    // SAFETY: the test's own memory.
    unsafe { mem::protect(memory.range(), Protection::None).unwrap() };
    memory.bytes().store_u8(PAGE_SIZE, 1).unwrap();
    assert_eq!(ORDER.swap(0, Ordering::SeqCst), 1);
    Outcome::Passed
}

fn a_handler_may_fault_in_another_region() -> Outcome {
    let _stack = AltStack::install(128 << 10).unwrap();
    let caps = Capabilities::probe();
    let inner_memory = Arc::new(Mapping::memfd(PageCount::new(8)).unwrap());
    let inner_builder = Region::builder(inner_memory.clone()).inline(inline(|t| t.unprotect()));
    let inner = Arc::new(inner_builder.build(&caps).unwrap());
    inner.protect(&[inner.range()], Protection::Read).unwrap();
    let outer_memory = Arc::new(Mapping::anonymous(PageCount::new(8)).unwrap());
    let log = inner_memory.clone();
    let outer = Region::builder(outer_memory.clone())
        .force(Mechanism::Mprotect)
        .inline(inline(move |t| {
            // Writes to a page of the inner region, which traps in this handler.
            let _ = log.bytes().store_u64(t.page_index() * PAGE_SIZE, 7);
            t.unprotect()
        }))
        .build(&caps)
        .unwrap();
    outer.protect(&[outer.range()], Protection::Read).unwrap();
    for n in 0..8 {
        outer_memory.bytes().store_u64(n * PAGE_SIZE, 1).unwrap();
        assert_eq!(inner_memory.bytes().load_u64(n * PAGE_SIZE).unwrap(), 7);
    }
    Outcome::Passed
}

fn helper_touches_its_own_page() -> Outcome {
    let _stack = AltStack::install(64 << 10).unwrap();
    let memory = Arc::new(Mapping::anonymous(PageCount::new(2)).unwrap());
    let touched = memory.clone();
    let region = Region::builder(memory.clone())
        .force(Mechanism::Mprotect)
        .inline(inline(move |t| {
            let _ = touched.bytes().store_u8(t.page_index() * PAGE_SIZE + 1, 1);
            t.unprotect()
        }))
        .build(&Capabilities::probe())
        .unwrap();
    region.protect(&[region.range()], Protection::Read).unwrap();
    peregrine_sys::io::complain(b"about to trap\n");
    memory.bytes().store_u8(0, 1).unwrap();
    Outcome::Passed
}

fn a_handler_that_touches_the_page_it_guards_is_denied_and_does_not_recurse() -> Outcome {
    let ended = run_helper("helper_touches_its_own_page");
    assert!(ended.output.contains("about to trap"));
    assert_eq!(ended.status.and_then(|s| s.signal()), Some(SIGSEGV), "{ended:?}");
    Outcome::Passed
}

fn a_fault_on_the_stack_itself_is_handled_on_the_alternate_stack() -> Outcome {
    #[inline(never)]
    fn use_stack(pages: usize) -> usize {
        let mut filler = [0u8; PAGE_SIZE];
        std::hint::black_box(&mut filler)[7] = pages as u8;
        if pages == 0 { 0 } else { use_stack(pages - 1) + usize::from(filler[7] == pages as u8) }
    }
    static TRAPS: AtomicUsize = AtomicUsize::new(0);
    let thread = std::thread::Builder::new().stack_size(2 << 20).spawn(|| {
        let here = 0u8;
        let below = VirtAddr::new((&raw const here) as usize - (512 << 10)).page_floor();
        let part = PageRange::new(below, PageCount::new(64));
        let handler = On(|fault: &Fault| {
            TRAPS.fetch_add(1, Ordering::SeqCst);
            open_page(fault)
        });
        let _registration = Registration::new(part, handler).unwrap();
        // SAFETY: pages of this thread's stack far below anything live.
        unsafe { mem::protect(part, Protection::None).unwrap() };
        assert_eq!(use_stack(200), 200);
        // SAFETY: as above.
        unsafe { mem::protect(part, Protection::ReadWrite).unwrap() };
    });
    thread.unwrap().join().unwrap();
    assert!(TRAPS.load(Ordering::SeqCst) >= 32, "{TRAPS:?}");
    Outcome::Passed
}

fn threads_made_later_trap_too_even_without_an_alternate_stack() -> Outcome {
    let caps = Capabilities::probe();
    let memory = Arc::new(Mapping::memfd(PageCount::new(64)).unwrap());
    let region = Region::builder(memory.clone()).inline(inline(|t| t.unprotect())).build(&caps).unwrap();
    region.protect(&[region.range()], Protection::Read).unwrap();
    std::thread::scope(|scope| {
        for t in 0..4 {
            let memory = &memory;
            scope.spawn(move || {
                // SAFETY: none is in force for the rest of this closure; std's own is put back by the next line but one.
                let before = (t % 2 == 0)
                    .then(|| unsafe { fault::alt_stack(Some(&fault::AltStack::disabled())).unwrap() });
                for p in 0..16 {
                    memory.bytes().store_u64((t * 16 + p) * PAGE_SIZE, 5).unwrap();
                }
                // SAFETY: std's own stack, which it still owns.
                before.map(|b| unsafe { fault::alt_stack(Some(&b)).unwrap() });
            });
        }
    });
    for p in 0..64 {
        assert_eq!(memory.bytes().load_u64(p * PAGE_SIZE).unwrap(), 5);
    }
    Outcome::Passed
}

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
    need!(&caps, Userfaultfd, WriteProtectShared);
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

fn a_denied_pager_trap_is_a_bus_error_in_the_toucher() -> Outcome {
    unsafe extern "C" fn replace(_: i32, info: *mut c_void, context: *mut c_void) {
        // SAFETY: a fault handler's own arguments.
        let frame = unsafe { fault::Frame::new(info, context) };
        CHAINED.fetch_add(1, Ordering::SeqCst);
        // A fresh page in place of the poisoned one, so that the access can end.
        let at = mem::Placement::Replace(frame.address().page_floor());
        // SAFETY: the page is the test's.
        let _ = unsafe {
            mem::map(
                PageCount::new(1),
                Protection::ReadWrite,
                mem::Source::Anonymous,
                at,
                mem::MapOptions::default(),
            )
        };
    }
    let caps = Capabilities::probe();
    need!(&caps, Userfaultfd, Poison);
    // SAFETY: `replace` makes system calls only.
    unsafe { fault::action(SIGBUS, Some(&Action::run(replace, fault::SA_ONSTACK))).unwrap() };
    let memory = Arc::new(Mapping::anonymous(PageCount::new(4)).unwrap());
    let _region = Region::builder(memory.clone())
        .traps_absent(true)
        .pager(|trap: &Trap<'_>| {
            if trap.page_index() == 0 {
                panic!("a handler that panics denies the access");
            }
            Decision::Deny
        })
        .build(&caps)
        .unwrap();
    assert_eq!(memory.bytes().load_u8(PAGE_SIZE).unwrap(), 0);
    assert_eq!(CHAINED.load(Ordering::SeqCst), 1);
    assert_eq!(memory.bytes().load_u8(0).unwrap(), 0);
    assert_eq!(CHAINED.load(Ordering::SeqCst), 2);
    Outcome::Passed
}

fn helper_denied_by_a_pager_without_poison() -> Outcome {
    let caps = Capabilities::probe().without(Capability::Poison);
    // SAFETY: the default action.
    unsafe { fault::action(SIGBUS, Some(&Action::default_action())).unwrap() };
    let memory = Arc::new(Mapping::memfd(PageCount::new(4)).unwrap());
    let region = Region::builder(memory.clone()).pager(|_: &Trap<'_>| Decision::Deny).build(&caps).unwrap();
    region.protect(&[region.range()], Protection::Read).unwrap();
    memory.bytes().store_u8(0, 1).unwrap();
    Outcome::Passed
}

fn a_denied_write_to_a_protected_page_is_a_bus_error_too() -> Outcome {
    let caps = Capabilities::probe();
    need!(&caps, Userfaultfd, WriteProtectShared, ThreadId);
    let ended = run_helper("helper_denied_by_a_pager_without_poison");
    assert_eq!(ended.status.and_then(|s| s.signal()), Some(SIGBUS), "{ended:?}");
    Outcome::Passed
}

fn frames_move_without_a_copy_and_pages_come_from_their_object() -> Outcome {
    let caps = Capabilities::probe();
    need!(&caps, Userfaultfd, UserfaultfdSigbus, Move, MinorShared, MissingShared);
    let store = Arc::new(Mapping::anonymous(PageCount::new(16)).unwrap());
    for p in 0..16 {
        store.bytes().store_u64(p * PAGE_SIZE, p as u64 + 1).unwrap();
    }
    let from = store.clone();
    let memory = Arc::new(Mapping::anonymous(PageCount::new(16)).unwrap());
    let handler = inline(move |t| {
        let block = t.block(PageCount::new(4));
        let first = t.page_index() / 4 * 4;
        match from.pages(first, 4) {
            Ok(part) => t.decide(t.region().fill_move(block, &from, part)),
            Err(_) => Decision::Deny,
        }
    });
    let region = Region::builder(memory.clone()).traps_absent(true).inline(handler).build(&caps).unwrap();
    for p in 0..16 {
        assert_eq!(memory.bytes().load_u64(p * PAGE_SIZE).unwrap(), p as u64 + 1);
    }
    assert_eq!(store.bytes().load_u64(0).unwrap(), 0, "the source is left empty");
    let shared = Region::builder(Arc::new(Mapping::memfd(PageCount::new(1)).unwrap())).build(&caps).unwrap();
    let refused = shared.fill_move(shared.range(), &store, page(&store, 0)).unwrap_err().to_string();
    assert!(refused.contains("fill_continue"), "{refused}");
    drop(region);

    // CONTINUE: what is put in through an alias is mapped here on the first touch, in blocks.
    let memory = Arc::new(Mapping::memfd(PageCount::new(16)).unwrap());
    let alias = memory.alias(Protection::ReadWrite).unwrap();
    let traps = Arc::new(AtomicUsize::new(0));
    let counted = traps.clone();
    let handler = inline(move |t| {
        counted.fetch_add(1, Ordering::SeqCst);
        t.decide(t.region().fill_continue(t.block(PageCount::new(8)), Protection::ReadWrite))
    });
    let _region = Region::builder(memory.clone()).traps_absent(true).inline(handler).build(&caps).unwrap();
    for p in 0..16 {
        alias.bytes().store_u64(p * PAGE_SIZE, p as u64 + 100).unwrap();
    }
    for p in 0..16 {
        assert_eq!(memory.bytes().load_u64(p * PAGE_SIZE).unwrap(), p as u64 + 100);
    }
    assert_eq!(traps.load(Ordering::SeqCst), 2);
    Outcome::Passed
}

fn a_poisoned_page_is_a_bus_error_that_the_inline_handler_sees() -> Outcome {
    let caps = Capabilities::probe();
    need!(&caps, Userfaultfd, UserfaultfdSigbus, Poison);
    let memory = Arc::new(Mapping::anonymous(PageCount::new(2)).unwrap());
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = seen.clone();
    let handler = inline(move |t| {
        counted.fetch_add(1, Ordering::SeqCst);
        // Evicting takes the poison away; then the page is absent, and can be filled.
        match t.region().evict(t.page()) {
            Ok(()) => t.decide(t.region().fill_zero(t.page(), Protection::ReadWrite)),
            Err(_) => Decision::Deny,
        }
    });
    let region = Region::builder(memory.clone()).traps_absent(true).inline(handler).build(&caps).unwrap();
    region.poison(page(&memory, 1)).unwrap();
    assert_eq!(memory.bytes().load_u8(PAGE_SIZE).unwrap(), 0);
    assert_eq!(seen.load(Ordering::SeqCst), 1);
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        a_bare_registration_learns_address_access_and_instruction,
        deny_goes_to_the_handler_that_was_there_before,
        helper_denied_without_anybody_before,
        deny_without_anybody_before_kills_by_the_signal_it_was,
        helper_overflow,
        rusts_own_overflow_handler_still_speaks,
        a_signal_that_somebody_sent_goes_to_the_handler_before,
        the_innermost_registration_is_asked_first_and_the_outer_next,
        a_handler_may_fault_in_another_region,
        helper_touches_its_own_page,
        a_handler_that_touches_the_page_it_guards_is_denied_and_does_not_recurse,
        a_fault_on_the_stack_itself_is_handled_on_the_alternate_stack,
        threads_made_later_trap_too_even_without_an_alternate_stack,
        registrations_come_and_go_while_others_trap,
        a_handler_that_forks_leaves_the_childs_books_right,
        regions_and_trackers_may_go_while_others_trap_in_them,
        helper_touches_what_a_dropped_region_left_without_access,
        a_bad_access_after_the_region_went_still_kills,
        a_child_keeps_mprotect_traps_and_its_handlers,
        a_child_of_a_userfaultfd_region_has_plain_memory_and_cannot_touch_its_parents,
        a_denied_pager_trap_is_a_bus_error_in_the_toucher,
        helper_denied_by_a_pager_without_poison,
        a_denied_write_to_a_protected_page_is_a_bus_error_too,
        frames_move_without_a_copy_and_pages_come_from_their_object,
        a_poisoned_page_is_a_bus_error_that_the_inline_handler_sees,
    ])
}
