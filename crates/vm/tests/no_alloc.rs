//! Trap code allocates nothing: the allocator aborts the process while traps of every mechanism are served.

mod common;

use common::{noting, unprotect};
use peregrine_base::sync::{AtomicBool, Ordering};
use peregrine_vm::region::Builder;
use peregrine_vm::{
    AltStack, Capabilities, Decision, DirtyMechanism, Inline, Mapping, Mechanism, PAGE_SIZE, PageCount,
    Protection, Region, Tracker, Trap,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use testkit::{Outcome, run_helper};

static FORBIDDEN: AtomicBool = AtomicBool::new(false);

/// The system's allocator, unless it is forbidden: then any call, in any thread, ends the process.
struct Aborting;

fn check() {
    if FORBIDDEN.load(Ordering::SeqCst) {
        peregrine_sys::io::complain(b"allocated while it was forbidden\n");
        peregrine_sys::process::exit_now(101);
    }
}

// SAFETY: passes every call on to the system's allocator.
unsafe impl GlobalAlloc for Aborting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        check();
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Aborting = Aborting;

fn without_allocating<T>(f: impl FnOnce() -> T) -> T {
    FORBIDDEN.store(true, Ordering::SeqCst);
    let result = f();
    FORBIDDEN.store(false, Ordering::SeqCst);
    result
}

fn helper_allocates() -> Outcome {
    without_allocating(|| std::hint::black_box(vec![1, 2, 3]));
    Outcome::Passed
}

fn the_allocator_of_this_test_does_abort() -> Outcome {
    let ended = run_helper("helper_allocates");
    assert!(ended.output.contains("allocated while it was forbidden"), "{ended:?}");
    assert!(!ended.status.is_some_and(|s| s.success()));
    Outcome::Passed
}

fn serving_a_trap_allocates_nothing() -> Outcome {
    const PAGES: usize = 32;
    let caps = Capabilities::probe();
    let _stack = AltStack::install(64 << 10).unwrap();
    for mechanism in Mechanism::ALL {
        let memory = Arc::new(Mapping::memfd(PageCount::new(PAGES)).unwrap());
        let guard = mechanism == Mechanism::Guard;
        let shape = |b: Builder| b.traps_writes(!guard).traps_reads(guard);
        let (region, seen) = match noting(&memory, mechanism, &caps, shape, unprotect) {
            Ok(made) => made,
            Err(why) => {
                println!("not tried: {why}");
                continue;
            }
        };
        let access = if guard { Protection::None } else { Protection::Read };
        let ranges = [region.range()];
        without_allocating(|| {
            region.protect(&ranges, access).unwrap();
            for page in 0..PAGES {
                memory.bytes().store_u64(page * PAGE_SIZE, 1).unwrap();
            }
        });
        assert_eq!(seen.traps(), PAGES, "{mechanism}");
    }
    Outcome::Passed
}

fn filling_pages_allocates_nothing() -> Outcome {
    const PAGES: usize = 32;
    let caps = Capabilities::probe();
    let _stack = AltStack::install(128 << 10).unwrap();
    for mechanism in [Mechanism::Sigbus, Mechanism::Pager, Mechanism::Mprotect] {
        let memory = Arc::new(Mapping::memfd(PageCount::new(PAGES)).unwrap());
        let handler = |trap: &Trap<'_>| match trap.page_index() % 3 {
            0 => trap.decide(trap.region().fill_copy(trap.page(), &[3; PAGE_SIZE], Protection::ReadWrite)),
            1 => trap.decide(trap.region().fill_zero(trap.page(), Protection::ReadWrite)),
            _ => {
                let _ = trap.region().fill_copy(trap.page(), &[4; PAGE_SIZE], Protection::Read);
                let _ = trap.region().evict(trap.page());
                trap.decide(trap.region().fill_continue(trap.page(), Protection::ReadWrite))
            }
        };
        let builder = Region::builder(memory.clone()).traps_absent(true).force(mechanism);
        let builder = match mechanism.is_inline() {
            // SAFETY: system calls only.
            true => builder.inline(unsafe { Inline::new(handler) }),
            false => builder.pager(handler),
        };
        let _region = match builder.build(&caps) {
            Ok(region) => region,
            Err(why) => {
                println!("not tried: {why}");
                continue;
            }
        };
        without_allocating(|| {
            for page in 0..PAGES {
                assert_eq!(memory.bytes().load_u8(page * PAGE_SIZE), Ok([3, 0, 4][page % 3]));
                memory.bytes().store_u8(page * PAGE_SIZE, 1).unwrap();
            }
        });
    }
    Outcome::Passed
}

fn tracking_and_taking_dirty_pages_allocates_nothing() -> Outcome {
    const PAGES: usize = 64;
    let caps = Capabilities::probe();
    for mechanism in DirtyMechanism::ALL {
        let memory = Arc::new(Mapping::memfd(PageCount::new(PAGES)).unwrap());
        let mut tracker = match Tracker::of(memory.clone()).force(mechanism).start(&caps) {
            Ok(tracker) => tracker,
            Err(why) => {
                println!("not tried: {why}");
                continue;
            }
        };
        let found = without_allocating(|| {
            for page in (0..PAGES).step_by(3) {
                memory.bytes().store_u64(page * PAGE_SIZE, 7).unwrap();
            }
            let mut found = 0;
            tracker.take_dirty_each(memory.range(), |run| found += run.pages().get()).unwrap();
            found
        });
        assert_eq!(found, PAGES.div_ceil(3), "{mechanism}");
    }
    Outcome::Passed
}

fn a_runtimes_own_tracker_and_guards_allocate_nothing() -> Outcome {
    use peregrine_vm::dirty::{DirtyRun, RawTracker};
    let memory = Mapping::memfd(PageCount::new(16)).unwrap();
    let guarded = memory.pages(12, 4).unwrap();
    let mut found = [DirtyRun::default(); 4];
    let runs = without_allocating(|| {
        let Ok(tracker) = RawTracker::open() else { return None };
        // SAFETY: the test's own memory, tracked by nobody else; the guards lie where the protection was lifted.
        unsafe {
            tracker.watch(memory.range()).unwrap();
            tracker.by_ref().arm(memory.range()).unwrap();
            memory.bytes().store_u64(5 * PAGE_SIZE, 7).unwrap();
            let taken = tracker.by_ref().take_into(memory.range(), &mut found).unwrap();
            tracker.by_ref().mark_written(guarded).unwrap();
            peregrine_vm::guard::install(guarded).unwrap();
            peregrine_vm::guard::remove(guarded).unwrap();
            Some(taken.runs)
        }
    });
    let Some(runs) = runs else {
        let caps = Capabilities::probe();
        let lack = caps.lack(peregrine_vm::Capability::WriteProtectAsync);
        testkit::skip!("{}", lack.expect("or the tracker would have opened"))
    };
    assert_eq!((runs, found[0].range()), (1, memory.pages(5, 1).unwrap()));
    Outcome::Passed
}

fn a_denied_trap_allocates_nothing_on_its_way_down_the_chain() -> Outcome {
    unsafe extern "C" fn open(_: i32, info: *mut std::ffi::c_void, context: *mut std::ffi::c_void) {
        // SAFETY: a fault handler's own arguments.
        let frame = unsafe { peregrine_sys::fault::Frame::new(info, context) };
        let page = peregrine_vm::PageRange::covering(frame.address(), 1);
        // SAFETY: the page is the test's.
        let _ = unsafe { peregrine_sys::mem::protect(page, Protection::ReadWrite) };
    }
    let action = peregrine_sys::fault::Action::run(open, peregrine_sys::fault::SA_ONSTACK);
    // SAFETY: `open` makes a system call.
    unsafe { peregrine_sys::fault::action(peregrine_sys::fault::SIGSEGV, Some(&action)).unwrap() };
    let memory = Arc::new(Mapping::anonymous(PageCount::new(1)).unwrap());
    let builder = Region::builder(memory.clone()).force(Mechanism::Mprotect);
    // SAFETY: does nothing.
    let builder = builder.inline(unsafe { Inline::new(|_: &Trap<'_>| Decision::Deny) });
    let region = builder.build(&Capabilities::probe()).unwrap();
    without_allocating(|| {
        region.protect(&[region.range()], Protection::Read).unwrap();
        memory.bytes().store_u8(0, 1).unwrap();
    });
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        helper_allocates,
        the_allocator_of_this_test_does_abort,
        serving_a_trap_allocates_nothing,
        filling_pages_allocates_nothing,
        tracking_and_taking_dirty_pages_allocates_nothing,
        a_runtimes_own_tracker_and_guards_allocate_nothing,
        a_denied_trap_allocates_nothing_on_its_way_down_the_chain,
    ])
}
