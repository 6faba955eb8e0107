//! What a handler answers: denied, poisoned, filled by moving frames or from the object.

#[macro_use]
mod common;

use common::{REPLACED, inline, page, replace_pages_on};
use peregrine_base::sync::{AtomicUsize, Ordering};
use peregrine_sys::fault::{self, Action, SIGBUS};
use peregrine_vm::{
    Capabilities, Capability, Decision, Mapping, PAGE_SIZE, PageCount, Protection, Region, Trap,
};
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use testkit::{Outcome, run_helper, skip};

fn a_denied_pager_trap_is_a_bus_error_in_the_toucher() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, Userfaultfd, Poison);
    replace_pages_on(&[SIGBUS]);
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
    assert_eq!(REPLACED.load(Ordering::SeqCst), 1);
    assert_eq!(memory.bytes().load_u8(0).unwrap(), 0);
    assert_eq!(REPLACED.load(Ordering::SeqCst), 2);
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
    need!(caps, Userfaultfd, WriteProtectShared, ThreadId);
    let ended = run_helper("helper_denied_by_a_pager_without_poison");
    assert_eq!(ended.status.and_then(|s| s.signal()), Some(SIGBUS), "{ended:?}");
    Outcome::Passed
}

fn frames_move_without_a_copy_and_pages_come_from_their_object() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, Userfaultfd, UserfaultfdSigbus, Move, MinorShared, MissingShared);
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
    // One that is there already, amid a block: the move goes on behind it with the frames of the pages there.
    region.fill_zero(page(&memory, 9), Protection::ReadWrite).unwrap();
    for p in 0..16 {
        let expected = if p == 9 { 0 } else { p as u64 + 1 };
        assert_eq!(memory.bytes().load_u64(p * PAGE_SIZE).unwrap(), expected);
    }
    assert_eq!(store.bytes().load_u64(9 * PAGE_SIZE).unwrap(), 10, "its frame stays where it was");
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
    need!(caps, Userfaultfd, UserfaultfdSigbus, Poison);
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

fn a_pager_that_panics_denies_one_access_and_serves_those_that_came_with_it() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, UserfaultfdKernelFaults, MissingShared, Poison);
    const BAD: usize = 3;
    let memory = Arc::new(Mapping::memfd(PageCount::new(8)).unwrap());
    let panics = Arc::new(AtomicUsize::new(0));
    let seen = panics.clone();
    let handler = move |trap: &Trap<'_>| {
        // Meanwhile the others come, so that the next read brings several.
        std::thread::sleep(std::time::Duration::from_millis(20));
        if trap.page_index() == BAD {
            seen.fetch_add(1, Ordering::SeqCst);
            panic!("on purpose");
        }
        trap.decide(trap.region().fill_zero(trap.page(), Protection::ReadWrite))
    };
    let builder = Region::builder(memory.clone()).traps_absent(true).traps_writes(false);
    let region = builder.pager(handler).build(&caps).unwrap();
    for round in 1..=3 {
        std::thread::scope(|scope| {
            for n in 0..8 {
                let memory = &memory;
                scope.spawn(move || match n {
                    // A system call is told by its result, and no signal comes.
                    BAD => assert!(common::read_into(memory, BAD * PAGE_SIZE).is_err()),
                    _ => assert_eq!(memory.bytes().load_u8(n * PAGE_SIZE).unwrap(), 0),
                });
            }
        });
        assert_eq!(panics.load(Ordering::SeqCst), round);
        region.evict(memory.range()).unwrap();
    }
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        a_denied_pager_trap_is_a_bus_error_in_the_toucher,
        helper_denied_by_a_pager_without_poison,
        a_pager_that_panics_denies_one_access_and_serves_those_that_came_with_it,
        a_denied_write_to_a_protected_page_is_a_bus_error_too,
        frames_move_without_a_copy_and_pages_come_from_their_object,
        a_poisoned_page_is_a_bus_error_that_the_inline_handler_sees,
    ])
}
