//! The workspace is what ARCHITECTURE.md says: every crate stands in its table, uses only those above it or in its own row, has the
//! workspace's licence and lints.

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// What cargo knows of the crates below `crates/`, and of the benchmarks and long runs.
fn packages() -> Vec<Value> {
    let o = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .expect("cargo starts");
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    let all: Value = serde_json::from_slice(&o.stdout).expect("JSON");
    let ours = |p: &&Value| {
        let path = p["manifest_path"].as_str().expect("a path");
        ["/crates/", "/bench/", "/soak/"].iter().any(|d| path.contains(d)) && !path.contains("/examples/")
    };
    all["packages"].as_array().expect("packages").iter().filter(ours).cloned().collect()
}

fn name(package: &Value) -> &str {
    package["name"].as_str().expect("a name")
}

/// The row of each crate in ARCHITECTURE.md's table.
fn rows() -> BTreeMap<String, usize> {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let (_, section) = text.split_once("\n## Crates\n").expect("the section");
    let lines =
        section.lines().skip_while(|l| !l.starts_with('|')).take_while(|l| l.starts_with('|')).skip(2);
    let mut rows = BTreeMap::new();
    for (row, line) in lines.enumerate() {
        let first = line.trim_matches('|').split('|').next().expect("a cell");
        rows.extend(first.split('`').skip(1).step_by(2).map(|c| (c.to_owned(), row)));
    }
    rows
}

#[test]
fn a_crate_uses_only_those_above_it() {
    let rows = rows();
    let packages = packages();
    assert_eq!(rows.len(), packages.len(), "{rows:?}");
    let mut uses = 0;
    for package in &packages {
        let row = rows.get(name(package)).unwrap_or_else(|| panic!("{} has no row", name(package)));
        for used in package["dependencies"].as_array().expect("dependencies") {
            // Tests may use what they like.
            let Some(of_used) = rows.get(name(used)).filter(|_| used["kind"] != "dev") else { continue };
            assert!(of_used <= row, "{} uses {}, which is below it", name(package), name(used));
            uses += 1;
        }
    }
    assert!(uses > 20, "{uses}");
}

#[test]
fn the_kernels_crates_are_dependencies_of_one_crate_only() {
    for package in packages() {
        for used in package["dependencies"].as_array().expect("dependencies") {
            let kernels = ["rustix", "linux-raw-sys", "libc", "nix"].contains(&name(used));
            assert!(!kernels || name(&package) == "peregrine-sys", "{} uses {}", name(&package), name(used));
        }
    }
}

#[test]
fn every_crate_has_the_workspaces_licence_and_lints() {
    for licence in ["LICENSE-MIT", "LICENSE-APACHE"] {
        let text = std::fs::read_to_string(root().join(licence)).expect(licence);
        assert!(text.len() > 500, "{licence}");
    }
    for package in packages() {
        let manifest = Path::new(package["manifest_path"].as_str().expect("a path"));
        assert_eq!(package["license"], "MIT OR Apache-2.0", "{manifest:?}");
        assert!(package["description"].as_str().is_some_and(|d| !d.is_empty()), "{manifest:?}");
        let text = std::fs::read_to_string(manifest).expect("a manifest");
        assert!(text.contains("[lints]\nworkspace = true"), "{manifest:?}");
    }
}
