//! Has a file open and a child, kills everything, and goes on from disk: the file is gone, and its number stands for no other; nobody knows
//! how the child ended.

use peregrine::{checkpoint, sleep, tally};
use peregrine_sys::signal::{self, number};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

#[peregrine::main]
fn main() {
    let at = PathBuf::from(std::env::args().nth(1).expect("a directory"));
    let create = |name: &str| File::create(at.join(name)).expect("the directory can be written");
    let mut lost = create("lost");
    write!(lost, "in the first life").expect("the file is open");
    let mut child = Command::new("true").spawn().expect("it is there");
    checkpoint();
    if !tally().resumed {
        // The supervisor.
        signal::kill(std::os::unix::process::parent_id() as i32, number::KILL).expect("it runs");
        sleep(Duration::from_secs(60));
    }
    let next: Vec<File> = (0..20).map(|i| create(&i.to_string())).collect();
    assert!(next.iter().all(|f| f.as_raw_fd() != lost.as_raw_fd()), "a number was given twice");
    const EBADF: i32 = 9;
    let error = write!(lost, "in the second").expect_err("the file is gone");
    assert_eq!(error.raw_os_error(), Some(EBADF));
    let number = lost.as_raw_fd();
    drop(lost);
    assert_eq!(create("again").as_raw_fd(), number, "the lowest that is free");
    const ECHILD: i32 = 10;
    assert_eq!(child.wait().expect_err("it was another life's").raw_os_error(), Some(ECHILD));
    println!("gone on from disk");
}
