//! One suite, run for every mechanism, on every kind of memory it serves, under every set of capabilities.

#[macro_use]
#[path = "../common/mod.rs"]
mod common;
mod regions;
mod settings;
#[path = "../stress/mod.rs"]
mod stress;
mod tracking;

use common::unprotect;
use peregrine_sys::io;
use peregrine_vm::{DirtyMechanism, Inline, Mapping, Mechanism, PageCount, Protection, Region, Tracker};
use regions::*;
use settings::{Case, Memory, PAGES, Setting};
use std::fmt::Display;
use testkit::{Outcome, Test, skip};
use tracking::*;

fn the_best_that_there_is_is_chosen_and_the_rest_explained(setting: Setting) -> Outcome {
    let caps = match setting.enter() {
        Ok(caps) => caps,
        Err(why) => skip!("{why}"),
    };
    for kind in [Memory::Anonymous, Memory::Memfd, Memory::File] {
        let memory = kind.make(PAGES);
        // SAFETY: one system call.
        let region =
            Region::builder(memory.clone()).inline(unsafe { Inline::new(unprotect) }).build(&caps).unwrap();
        println!("{kind:?}: {}", region.choice());
        for (_, why) in &region.choice().passed_over {
            assert!(!why.is_empty());
        }
        region.protect(&[region.range()], Protection::Read).unwrap();
        memory.bytes().store_u8(0, 1).unwrap();
        drop(region);
        let mut tracker = Tracker::of(memory.clone()).start(&caps).unwrap();
        println!("{kind:?}: {}", tracker.choice());
        memory.bytes().store_u8(0, 2).unwrap();
        assert_eq!(tracker.take_dirty().unwrap().page_count().get(), 1);
        drop(tracker);
        // One that system calls may write into must never fail them, whatever the kernel offers.
        let mut tracker = Tracker::of(memory.clone()).kernel_writes(true).start(&caps).unwrap();
        let source = Mapping::memfd(PageCount::new(1)).unwrap();
        source.bytes().write(0, b"x").unwrap();
        let to = memory.bytes().address(7).unwrap();
        // SAFETY: a byte of the mapping, which is reached by copies only.
        assert_eq!(unsafe { io::read_at_ptr(source.object_fd().unwrap(), to.as_ptr(), 1, 0) }, Ok(1));
        assert_eq!(tracker.take_dirty().unwrap().page_count().get(), 1);
    }
    Outcome::Passed
}

type Check<M> = fn(&Case<M>) -> Outcome;

/// Each check with its name.
macro_rules! checks {
    ($($check:ident),* $(,)?) => {
        &[$((stringify!($check), $check)),*]
    };
}

/// Whether the check is about something that the mechanism does at all, on any kernel. (What it does not do is in the
/// table of `Mechanism`, and refused with what to use instead: `tests/errors.rs`.)
fn region_applies(name: &str, m: Mechanism, k: Memory) -> bool {
    let userfaultfd = matches!(m, Mechanism::Sigbus | Mechanism::Pager);
    let huge = k == Memory::Huge || k.is_pool();
    if userfaultfd && k == Memory::File {
        return false;
    }
    let as_one = name == "a_huge_page_is_protected_and_opened_as_one";
    if as_one || k.is_pool() {
        return as_one && k.is_pool() && m != Mechanism::Guard;
    }
    match name {
        "every_access_to_a_page_without_access_traps_and_contents_stay" => !userfaultfd,
        "a_batch_protects_exactly_its_ranges" => true,
        "absent_pages_trap_and_are_filled_in_blocks" | "a_page_can_arrive_protected" => {
            m != Mechanism::Guard && !huge && k != Memory::File && (userfaultfd || k.is_shared())
        }
        _ => m != Mechanism::Guard,
    }
}

fn main() -> std::process::ExitCode {
    let mut tests = Vec::new();
    let region_checks: &[(&'static str, Check<Mechanism>)] = checks![
        a_write_to_a_protected_page_traps_once_and_a_read_never,
        an_access_that_is_to_be_tried_again_traps_again,
        every_access_to_a_page_without_access_traps_and_contents_stay,
        a_batch_protects_exactly_its_ranges,
        absent_pages_trap_and_are_filled_in_blocks,
        a_page_can_arrive_protected,
        threads_that_touch_the_same_pages_at_once_all_go_on,
        a_system_call_on_a_protected_page_is_served_or_fails_with_efault,
        a_huge_page_is_protected_and_opened_as_one,
        dropping_the_region_makes_the_memory_plain,
    ];
    let tracker_checks: &[(&'static str, Check<DirtyMechanism>)] = checks![
        exactly_the_written_pages_are_dirty_and_then_clean,
        a_part_is_taken_alone_and_a_set_can_be_given_back,
        a_system_call_that_writes_is_tracked_or_fails_with_efault_and_writes_nothing,
        a_tracked_range_never_misses_a_write,
        a_union_over_aliases_never_misses_a_write,
    ];
    for setting in Setting::ALL {
        for kind in Memory::ALL {
            for m in Mechanism::ALL {
                for &(name, check) in region_checks.iter().filter(|(n, _)| region_applies(n, m, kind)) {
                    tests.push(test(name, check, m, kind, setting));
                }
            }
            for m in DirtyMechanism::ALL {
                let userfaultfd =
                    matches!(m, DirtyMechanism::SyncWriteProtect | DirtyMechanism::SyncWriteProtectPager);
                if userfaultfd && kind == Memory::File {
                    continue;
                }
                for &(name, check) in tracker_checks {
                    let union = name.contains("union");
                    let part = name.contains("part");
                    if union && kind != Memory::Memfd || part && kind.is_pool() {
                        continue;
                    }
                    let by_the_huge_page =
                        matches!(m, DirtyMechanism::AsyncWriteProtect | DirtyMechanism::Compare);
                    if kind.is_pool() && !by_the_huge_page {
                        continue;
                    }
                    tests.push(test(name, check, m, kind, setting));
                }
            }
        }
        tests.push(Test {
            name: format!("the_best_that_there_is_is_chosen_and_the_rest_explained[{}]", setting.name()),
            body: Box::new(move || the_best_that_there_is_is_chosen_and_the_rest_explained(setting)),
        });
    }
    testkit::main(tests)
}

fn test<M>(name: &str, check: Check<M>, mechanism: M, kind: Memory, setting: Setting) -> Test
where
    M: Copy + Display + Send + Sync + 'static,
{
    Test {
        name: format!("{name}[{mechanism}, {kind:?}, {}]", setting.name()),
        body: Box::new(move || {
            let caps = match setting.enter() {
                Ok(caps) => caps,
                Err(why) => skip!("{why}"),
            };
            if let Some(lack) = kind.needs().and_then(|which| caps.lack(which)) {
                skip!("{lack}");
            }
            check(&Case { mechanism, kind, caps })
        }),
    }
}
