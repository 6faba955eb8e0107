//! The doors: atomics are named in `peregrine-base::sync` only, the kernel's crates in `peregrine-sys` only, and what
//! watches and guards pages is called through `peregrine-vm` only.
//!
//! Clippy's `disallowed-types` resolves re-exports and would refuse the door itself, so this reads the sources.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(dir: &Path, into: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            if path.file_name().is_some_and(|n| n != "target" && n != ".git") {
                sources(&path, into);
            }
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// Lines of code outside `home` that name `what`; comments don't count.
fn offenders(what: &str, home: &[&str]) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 20, "the sources are where they were");
    let mut found = Vec::new();
    for file in files {
        let name = file.strip_prefix(&root).unwrap().display().to_string();
        if home.iter().any(|h| name.starts_with(h)) || name.ends_with("tests/doors.rs") {
            continue;
        }
        for (number, line) in fs::read_to_string(&file).unwrap().lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if code.contains(what) {
                found.push(format!("{name}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    found
}

#[test]
fn atomics_are_named_behind_their_door_only() {
    // Programs that use Peregrine as anybody would are free to name them.
    let door = [
        "crates/base/src/sync",
        "crates/peregrine/tests/",
        "crates/peregrine/examples/",
        "crates/vm/examples/",
        "examples/",
    ];
    let found: Vec<_> =
        ["core::sync::atomic", "std::sync::atomic"].iter().flat_map(|what| offenders(what, &door)).collect();
    assert!(found.is_empty(), "use peregrine_base::sync:\n{}", found.join("\n"));
}

#[test]
fn the_tracking_crate_reaches_the_kernel_through_its_door_only() {
    for what in ["rustix::", "linux_raw_sys::", "libc::"] {
        let found: Vec<_> = offenders(what, &["crates/sys"])
            .into_iter()
            .filter(|f| {
                ["crates/vm/", "crates/base/", "crates/testkit/", "bench/", "soak/"]
                    .iter()
                    .any(|p| f.starts_with(p))
            })
            // What the benchmarks measure beside ours is bare calls.
            .filter(|f| !(f.starts_with("bench/") && f.contains("peregrine_sys::rustix::")))
            .collect();
        assert!(found.is_empty(), "use peregrine_sys:\n{}", found.join("\n"));
    }
}

#[test]
fn pages_are_watched_and_guarded_through_the_crate_for_that_only() {
    // The benchmarks' floor is bare calls.
    let home = ["crates/sys", "crates/vm", "bench/src/vm", "bench/src/space"];
    for what in ["sys::uffd", "sys::pagemap", "sys::guard", "UFFDIO_", "GuardInstall", "GuardRemove"] {
        let found = offenders(what, &home);
        assert!(found.is_empty(), "use peregrine_vm:\n{}", found.join("\n"));
    }
}
