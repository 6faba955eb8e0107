//! What numbers of files stand for after a rollback, which takes back no file, and after a resume, which has none.

mod examples;

use examples::example;
use peregrine::{checkpoint, sleep, tally};
use peregrine_sys::signal::{self, number};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const EBADF: i32 = 9;

/// Ends this node, for the first life only: a rollback follows.
fn is_killed_in_its_first_life() {
    if tally().rollbacks == 0 {
        signal::kill(std::process::id() as i32, number::KILL).unwrap();
        sleep(Duration::from_secs(60));
    }
    assert_eq!(tally().rollbacks, 1);
}

fn in_a_directory(test: &str) -> PathBuf {
    let supervisor = std::os::unix::process::parent_id();
    let at = std::env::temp_dir().join(format!("peregrine-{test}-{supervisor}"));
    std::fs::create_dir_all(&at).unwrap();
    at
}

fn create(at: &Path, name: &str) -> File {
    File::options().create(true).append(true).read(true).open(at.join(name)).unwrap()
}

fn is_open(fd: RawFd) -> bool {
    std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok()
}

/// Gives `file` the number of `other`, which is closed.
fn takes_the_place_of(file: File, other: &File) {
    // SAFETY: the number is the test's own; it goes back to its owner below.
    let mut place = unsafe { OwnedFd::from_raw_fd(other.as_raw_fd()) };
    peregrine_sys::rustix::io::dup2(&file, &mut place).unwrap();
    let _ = place.into_raw_fd();
}

#[peregrine::test(nodes = 2, image_interval_ms = 3_600_000)]
fn who_goes_back_writes_into_no_file_that_took_the_number_of_its_own() {
    let at = in_a_directory("number-taken");
    let (mut kept, mut lost) = (create(&at, "kept"), create(&at, "lost"));
    write!(kept, "before. ").unwrap();
    checkpoint();
    if tally().rollbacks == 0 {
        takes_the_place_of(create(&at, "another's"), &lost);
        write!(lost, "in the first life").unwrap();
    }
    is_killed_in_its_first_life();
    assert_eq!(write!(lost, "in the second").unwrap_err().raw_os_error(), Some(EBADF));
    assert_eq!(std::fs::read_to_string(at.join("another's")).unwrap(), "in the first life");
    // Its number is its own still, and given to nobody.
    let next: Vec<File> = (0..20).map(|i| create(&at, &i.to_string())).collect();
    assert!(next.iter().all(|f| f.as_raw_fd() != lost.as_raw_fd()));
    let was = lost.as_raw_fd();
    drop(lost);
    assert!(!is_open(was));
    // What nobody touched is there.
    write!(kept, "after").unwrap();
    assert_eq!(std::fs::read_to_string(at.join("kept")).unwrap(), "before. after");
    std::fs::remove_dir_all(at).unwrap();
}

#[peregrine::test(nodes = 2, image_interval_ms = 3_600_000)]
fn what_was_closed_since_the_image_is_closed_and_its_number_given_to_nobody() {
    let at = in_a_directory("closed-since");
    let mut file = create(&at, "file");
    let number = file.as_raw_fd();
    checkpoint();
    if tally().rollbacks == 0 {
        // SAFETY: in this life nobody uses it any more.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    }
    is_killed_in_its_first_life();
    let other = create(&at, "other");
    assert_ne!(other.as_raw_fd(), number);
    assert_eq!(file.read(&mut [0]).unwrap_err().raw_os_error(), Some(EBADF));
    drop(file);
    assert_eq!(create(&at, "the next").as_raw_fd(), number, "the lowest that is free");
    std::fs::remove_dir_all(at).unwrap();
}

/// One end in the image, the other lost: an end of a pipe that nobody has would keep its reader waiting for ever.
#[peregrine::test(nodes = 2, image_interval_ms = 3_600_000)]
fn what_was_opened_since_the_image_is_closed() {
    let (from, to) = peregrine_sys::rustix::pipe::pipe().unwrap();
    let place = File::open("/dev/null").unwrap();
    checkpoint();
    let mut copies = Vec::new();
    if tally().rollbacks == 0 {
        copies = (0..300).map(|_| to.try_clone().unwrap().into_raw_fd()).collect();
        // Numbers that only the first life knows, of a file that the image has too.
        copies.push(place.try_clone().unwrap().into_raw_fd());
    }
    is_killed_in_its_first_life();
    assert!(copies.is_empty());
    drop(to);
    assert_eq!(File::from(from).read(&mut [0]).unwrap(), 0, "the end of the pipe");
}

#[test]
fn who_goes_on_from_disk_has_no_file_open_and_no_other_gets_its_number_and_has_no_child() {
    let at = tempfile::tempdir().unwrap();
    let (files, store) = (at.path().join("files"), at.path().join("store"));
    std::fs::create_dir(&files).unwrap();
    let life = |variable: &str| {
        let mut program = Command::new(example("files"));
        program.arg(&files).env(variable, &store).env("PEREGRINE_NODES", "2");
        program.output().unwrap()
    };
    let first = life("PEREGRINE_STORE");
    assert_eq!(first.status.signal(), Some(number::KILL), "{first:?}");
    let second = life("PEREGRINE_RESUME");
    assert!(second.status.success(), "{second:?}");
    assert_eq!(String::from_utf8_lossy(&second.stdout), "gone on from disk\n");
    assert_eq!(std::fs::read_to_string(files.join("lost")).unwrap(), "in the first life");
}

#[test]
fn files_are_told_apart_where_few_may_be_open_unless_more_are_asked_for() {
    for test in [
        "what_was_closed_since_the_image_is_closed_and_its_number_given_to_nobody",
        "who_goes_back_writes_into_no_file_that_took_the_number_of_its_own",
    ] {
        let mut shell = Command::new("sh");
        shell.args(["-c", "ulimit -Sn 256 && ulimit -Hn 4096 && exec \"$0\" \"$@\""]);
        shell.arg(std::env::current_exe().unwrap()).args(["--exact", test]);
        let o = shell.output().unwrap();
        assert!(o.status.success(), "{test}: {o:?}");
        assert!(String::from_utf8_lossy(&o.stdout).contains("1 passed"), "{test}: {o:?}");
    }
}
