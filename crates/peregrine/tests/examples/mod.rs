//! The examples that tests run as a user would, up to date.
//!
//! `cargo test` builds them beside the tests. `cargo test --test NAME` does not: then an example is missing or, worse, an older one
//! than the sources, and the test would tell of a program that is no longer there. So it is built here if any source of this
//! workspace's crates is newer than it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::SystemTime;

/// The newest change of a Rust source under `dir`, tests left out: no example has them.
fn newest_source(dir: &Path) -> SystemTime {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut newest = SystemTime::UNIX_EPOCH;
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let changed = if path.is_dir() {
            if name == "tests" || name == "target" {
                continue;
            }
            newest_source(&path)
        } else if path.extension().is_some_and(|e| e == "rs") || name == "Cargo.toml" {
            entry.metadata().and_then(|m| m.modified()).expect("a file's time")
        } else {
            continue;
        };
        newest = newest.max(changed);
    }
    newest
}

/// Where the example `name` lies, as it was built last, however that was.
pub fn as_built(name: &str) -> PathBuf {
    let tests = std::env::current_exe().expect("a test knows its own path");
    tests.ancestors().nth(2).expect("tests lie in target/PROFILE/deps").join("examples").join(name)
}

/// The example `name`.
pub fn example(name: &str) -> PathBuf {
    /// One look, and one build, at a time.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let path = as_built(name);
    let profile = path.ancestors().nth(2).expect("target/PROFILE");
    let built = std::fs::metadata(&path).and_then(|m| m.modified());
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    if built.is_ok_and(|built| newest_source(here.parent().expect("the crates' folder")) <= built) {
        return path;
    }
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--offline", "--example", name]).current_dir(here);
    cargo.arg("--target-dir").arg(profile.parent().expect("target/PROFILE"));
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    let status = cargo.status().expect("cargo starts");
    assert!(status.success(), "example {name} is older than the sources and can't be built: {status}");
    path
}
