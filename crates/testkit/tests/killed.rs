//! A harness that is killed takes its tests along.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use testkit::Outcome;

/// Where the test that stays writes its number; unset: it does not stay.
const STAY: &str = "TESTKIT_TEST_STAYS";
const PATIENCE: Duration = Duration::from_secs(60);

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn stays() -> Outcome {
    if let Some(file) = std::env::var_os(STAY) {
        let written = Path::new(&file).with_extension("new");
        std::fs::write(&written, std::process::id().to_string()).expect("written");
        std::fs::rename(written, file).expect("renamed");
        std::thread::sleep(2 * PATIENCE);
    }
    Outcome::Passed
}

fn a_test_dies_with_its_harness() -> Outcome {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("pid");
    let me = std::env::current_exe().expect("a running program has a path");
    let mut harness = Command::new(me);
    harness.args(["--exact", "stays"]).env(STAY, &file).env_remove(testkit::CHILD).stdout(Stdio::null());
    let mut harness = harness.spawn().expect("this program can be run again");
    wait_until("the test runs", || file.exists());
    let pid = std::fs::read_to_string(&file).expect("its number");
    harness.kill().expect("our own child");
    harness.wait().expect("our own child");
    // One that has ended and that nobody has waited for yet is gone too.
    let stat = format!("/proc/{pid}/stat");
    wait_until("the test is gone", || std::fs::read_to_string(&stat).map_or(true, |s| s.contains(") Z ")));
    Outcome::Passed
}

fn main() -> ExitCode {
    testkit::main(testkit::tests![stays, a_test_dies_with_its_harness])
}
