//! Rights that a view has not, and pages that its object has not: no tracker and no operation grants them, and an access that
//! wants them ends as it would without this crate.

mod common;

use common::memfd;
use peregrine_sys::fault::{self, Action, SIGBUS, SIGSEGV};
use peregrine_vm::Errno;
use peregrine_vm::{
    Capabilities, DirtyMechanism, MapError, Mapping, PAGE_SIZE, PageCount, Protection, TrackError, Tracker,
};
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use testkit::{Outcome, run_helper};

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

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        a_view_that_may_not_be_written_is_not_populated_for_writing,
        a_tracker_gives_no_right_that_its_view_has_not,
        helper_writes_through_a_read_only_view_scan,
        helper_writes_through_a_read_only_view_sigbus,
        helper_writes_through_a_read_only_view_pager,
        helper_writes_through_a_read_only_view_mprotect,
        helper_writes_through_a_read_only_view_compare,
        helper_writes_beyond_the_end_of_a_file,
        a_write_beyond_the_end_of_a_file_is_not_taken_for_a_first_write,
        nobody_can_cut_a_memfd_short_under_its_mappings,
    ])
}
