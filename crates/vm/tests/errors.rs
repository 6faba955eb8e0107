//! What is refused says why, and what to use instead.

#[macro_use]
mod common;

use common::{anonymous, memfd, page, unprotect};
use peregrine_vm::capabilities::Simulate;
use peregrine_vm::{
    BuildError, Capabilities, Capability, DirtyMechanism, MapError, Mapping, Mechanism, PAGE_SIZE, PageCount,
    PageRange, Protection, Region, RegionError, TrackError, Tracker, UnionTracker,
};
use std::sync::Arc;
use testkit::{Outcome, skip};

/// A region without a handler: what is asked of it here traps nobody.
fn region(memory: &Arc<Mapping>, mechanism: Mechanism, caps: &Capabilities) -> Region {
    let guard = mechanism == Mechanism::Guard;
    let builder = Region::builder(memory.clone()).traps_writes(!guard).traps_reads(guard);
    builder.force(mechanism).build(caps).unwrap()
}

fn not_offered<T: std::fmt::Debug>(result: Result<T, RegionError>, instead: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, RegionError::NotOffered { .. }), "{error}");
    assert!(error.to_string().contains(instead), "{instead:?} in {error}");
}

fn what_mprotect_does_not_do_names_userfaultfd() -> Outcome {
    let memory = memfd(4);
    let region = region(&memory, Mechanism::Mprotect, &Capabilities::probe());
    let (one, bytes) = (page(&memory, 0), [0; PAGE_SIZE]);
    let userfaultfd = "use Mechanism::Sigbus or Pager";
    not_offered(region.fill_copy(one, &bytes, Protection::ReadWrite), userfaultfd);
    not_offered(region.fill_zero(one, Protection::ReadWrite), userfaultfd);
    not_offered(region.fill_continue(one, Protection::ReadWrite), userfaultfd);
    not_offered(region.poison(one), userfaultfd);
    not_offered(region.wake(one), userfaultfd);
    Outcome::Passed
}

fn what_userfaultfd_does_not_do_names_mprotect_and_guards() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, UserfaultfdSigbus, WriteProtectShared);
    let memory = memfd(4);
    let region = region(&memory, Mechanism::Sigbus, &caps);
    let one = page(&memory, 0);
    not_offered(region.protect(&[one], Protection::None), "use Mechanism::Mprotect, or Guard");
    not_offered(region.fill_copy(one, &[0; PAGE_SIZE], Protection::None), "one not filled");
    let source = anonymous(1);
    not_offered(region.fill_move(one, &source, source.range()), "use fill_continue");
    Outcome::Passed
}

fn what_guards_do_not_do_names_mechanisms_that_stop_writes() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, GuardShared);
    let memory = memfd(4);
    let region = region(&memory, Mechanism::Guard, &caps);
    not_offered(region.protect(&[page(&memory, 0)], Protection::Read), "use Mechanism::Sigbus or Mprotect");
    Outcome::Passed
}

fn pages_beyond_and_bytes_too_few_are_refused_with_their_numbers() -> Outcome {
    let caps = Capabilities::probe();
    let memory = memfd(4);
    let beyond = PageRange::new(memory.range().start(), PageCount::new(5));
    let whole = region(&memory, Mechanism::Mprotect, &caps);
    let error = whole.evict(beyond).unwrap_err();
    assert_eq!(error, RegionError::Outside { asked: beyond, region: memory.range() });
    let error = whole.fill_copy(memory.range(), &[0; PAGE_SIZE], Protection::ReadWrite).unwrap_err();
    assert_eq!(error, RegionError::Short { range: memory.range(), given_bytes: PAGE_SIZE });
    assert!(error.to_string().contains("4096 bytes can't fill"), "{error}");
    drop(whole);
    let error = Region::builder(memory.clone()).part(beyond).build(&caps).unwrap_err();
    assert!(matches!(error, BuildError::Map(MapError::Outside { asked, .. }) if asked == beyond), "{error}");
    let error = Tracker::of(memory.clone()).part(beyond).start(&caps).unwrap_err();
    assert!(matches!(error, TrackError::Map(MapError::Outside { asked, .. }) if asked == beyond), "{error}");
    let mut tracker = Tracker::of(memory.clone()).start(&caps).unwrap();
    let error = tracker.take_dirty_in(beyond).unwrap_err();
    assert!(matches!(error, TrackError::Outside { asked, .. } if asked == beyond), "{error}");
    let error = memory.pages(3, 2).unwrap_err();
    assert!(matches!(error, MapError::Outside { .. }), "{error}");
    let error = memory.bytes().store_u64(4 * PAGE_SIZE - 4, 1).unwrap_err().to_string();
    assert!(error.contains("8 bytes at offset 16380") && error.contains("the 16384 bytes"), "{error}");
    Outcome::Passed
}

fn private_memory_is_neither_aliased_nor_evicted_nor_united() -> Outcome {
    let caps = Capabilities::probe();
    let private = anonymous(2);
    let error = private.alias(Protection::Read).unwrap_err();
    assert!(
        matches!(error, MapError::Private { .. }) && error.to_string().contains("needs a memfd"),
        "{error}"
    );
    let error = private.evict(private.range()).unwrap_err();
    assert!(
        matches!(error, MapError::WouldLose { .. }) && error.to_string().contains("`discard`"),
        "{error}"
    );
    let mut union = UnionTracker::new();
    let error = union.add(Tracker::of(private).start(&caps).unwrap()).unwrap_err().to_string();
    assert!(error.contains("only aliases can be united"), "{error}");
    let (one, other) = (memfd(2), memfd(2));
    union.add(Tracker::of(one).start(&caps).unwrap()).unwrap();
    let error = union.add(Tracker::of(other).start(&caps).unwrap()).unwrap_err().to_string();
    assert!(error.contains("only aliases can be united"), "{error}");
    Outcome::Passed
}

fn a_forced_mechanism_that_will_not_do_says_why_and_what_would() -> Outcome {
    let caps = Capabilities::probe();
    let memory = memfd(2);
    let handler = || common::inline(unprotect);
    let guard = Region::builder(memory.clone()).inline(handler()).force(Mechanism::Guard);
    let error = guard.build(&caps).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("guard+SIGSEGV: a guard stops reads too"), "{text}");
    let BuildError::NoMechanism { tried, fallback } = error else { panic!("{error}") };
    let fallback = fallback.expect("mprotect always does");
    assert_eq!(tried.len(), 1, "no other was tried");
    assert!(text.ends_with(&format!("; unforced, {fallback} would be used")), "{text}");
    // What it promises, it does.
    let region = Region::builder(memory.clone()).inline(handler()).build(&caps).unwrap();
    assert_eq!(region.choice().chosen, fallback);
    drop(region);

    let pager = Region::builder(memory.clone()).inline(handler()).force(Mechanism::Pager);
    let text = pager.build(&caps).unwrap_err().to_string();
    assert!(text.contains("it needs a pager handler, and the one given is inline"), "{text}");

    let old = Capabilities::probe().simulate(Simulate::Linux5_15);
    let scan = Tracker::of(memory.clone()).force(DirtyMechanism::AsyncWriteProtect);
    let error = scan.start(&old).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("write-protect-async is missing"), "{text}");
    let TrackError::NoMechanism { fallback, .. } = error else { panic!("{error}") };
    let fallback = fallback.expect("a comparison always does");
    assert!(text.ends_with(&format!("; unforced, {fallback} would be used")), "{text}");
    assert_eq!(Tracker::of(memory).start(&old).unwrap().choice().chosen, fallback);
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        what_mprotect_does_not_do_names_userfaultfd,
        what_userfaultfd_does_not_do_names_mprotect_and_guards,
        what_guards_do_not_do_names_mechanisms_that_stop_writes,
        pages_beyond_and_bytes_too_few_are_refused_with_their_numbers,
        private_memory_is_neither_aliased_nor_evicted_nor_united,
        a_forced_mechanism_that_will_not_do_says_why_and_what_would,
    ])
}
