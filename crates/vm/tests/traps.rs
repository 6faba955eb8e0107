//! What a trap does to the thread that takes it and to the handlers around it.

#[macro_use]
mod common;

use common::{On, inline, open_page, page};
use peregrine_base::sync::{AtomicUsize, Ordering};
use peregrine_sys::fault::{self, Action, SIGBUS, SIGSEGV};
use peregrine_sys::mem;
use peregrine_vm::region::Builder;
use peregrine_vm::trap::{Fault, Registration};
use peregrine_vm::{
    Access, AltStack, Capabilities, Capability, Decision, Mapping, Mechanism, PAGE_SIZE, PageCount,
    PageRange, Protection, Region, Trap, VirtAddr,
};
use std::ffi::c_void;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use testkit::{Outcome, run_helper, skip};

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
    // The best there is, which may raise another signal than the outer one, and the one that raises the same.
    faults_in_another_region(&caps, |builder| builder);
    faults_in_another_region(&caps, |builder| builder.force(Mechanism::Mprotect));
    Outcome::Passed
}

fn faults_in_another_region(caps: &Capabilities, shape: impl FnOnce(Builder) -> Builder) {
    let inner_memory = Arc::new(Mapping::memfd(PageCount::new(8)).unwrap());
    let inner_builder = Region::builder(inner_memory.clone()).inline(inline(|t| t.unprotect()));
    let inner = Arc::new(shape(inner_builder).build(caps).unwrap());
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
        .build(caps)
        .unwrap();
    outer.protect(&[outer.range()], Protection::Read).unwrap();
    for n in 0..8 {
        outer_memory.bytes().store_u64(n * PAGE_SIZE, 1).unwrap();
        assert_eq!(inner_memory.bytes().load_u64(n * PAGE_SIZE).unwrap(), 7);
    }
}

fn a_pagers_handler_may_fault_in_other_regions() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, WriteProtectShared, UserfaultfdSigbus);
    // One is served by another pager, one on the pager's own thread.
    let logs = [(); 2].map(|()| Arc::new(Mapping::memfd(PageCount::new(8)).unwrap()));
    let shape = |log: &Arc<Mapping>| Region::builder(log.clone());
    let by_pager = shape(&logs[0]).pager(|t: &Trap<'_>| t.unprotect()).build(&caps).unwrap();
    let by_signal = shape(&logs[1]).inline(inline(|t| t.unprotect())).build(&caps).unwrap();
    for log in [&by_pager, &by_signal] {
        log.protect(&[log.range()], Protection::Read).unwrap();
    }
    let memory = Arc::new(Mapping::memfd(PageCount::new(8)).unwrap());
    let written = logs.clone();
    let handler = move |t: &Trap<'_>| {
        for log in &written {
            log.bytes().store_u64(t.page_index() * PAGE_SIZE, 7).unwrap();
        }
        t.unprotect()
    };
    let region = Region::builder(memory.clone()).pager(handler).build(&caps).unwrap();
    region.protect(&[region.range()], Protection::Read).unwrap();
    for n in 0..8 {
        memory.bytes().store_u64(n * PAGE_SIZE, 1).unwrap();
        for log in &logs {
            assert_eq!(log.bytes().load_u64(n * PAGE_SIZE), Ok(7));
        }
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
            peregrine_sys::io::complain(b"called\n");
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
    // A stack that recursion has used up ends in the same signal.
    assert_eq!(ended.output.matches("called").count(), 1, "{ended:?}");
    assert_eq!(ended.status.and_then(|s| s.signal()), Some(SIGSEGV), "{ended:?}");
    Outcome::Passed
}

fn helper_writes_below_its_alternate_stack() -> Outcome {
    let _stack = AltStack::install(64 << 10).unwrap();
    // SAFETY: asks only.
    let base = unsafe { fault::alt_stack(None) }.unwrap().base().unwrap();
    for signal in [SIGSEGV, SIGBUS] {
        // SAFETY: the default action.
        unsafe { fault::action(signal, Some(&Action::default_action())).unwrap() };
    }
    peregrine_sys::io::complain(b"about to write\n");
    // SAFETY: the lowest byte of the stack is nobody's; the one below it is what is asked for.
    unsafe {
        base.as_ptr::<u8>().write_volatile(1);
        peregrine_sys::io::complain(b"on it\n");
        VirtAddr::new(base.as_usize() - 1).as_ptr::<u8>().write_volatile(1);
    }
    Outcome::Passed
}

fn a_handler_that_outgrows_its_alternate_stack_dies_and_overwrites_nothing() -> Outcome {
    let ended = run_helper("helper_writes_below_its_alternate_stack");
    assert!(ended.output.contains("on it"), "{ended:?}");
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
        a_pagers_handler_may_fault_in_other_regions,
        helper_touches_its_own_page,
        a_handler_that_touches_the_page_it_guards_is_denied_and_does_not_recurse,
        helper_writes_below_its_alternate_stack,
        a_handler_that_outgrows_its_alternate_stack_dies_and_overwrites_nothing,
        a_fault_on_the_stack_itself_is_handled_on_the_alternate_stack,
        threads_made_later_trap_too_even_without_an_alternate_stack,
    ])
}
