//! The documents are true where that can be compared: the table of shared structures in ARCHITECTURE.md is whole (every field in
//! shared memory has a row that says how it survives a node's death, and every group of kill points is named there), the files
//! that the documents name exist, and the README's test command is the one that must pass.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The rows of the table, cell by cell.
fn rows() -> Vec<Vec<String>> {
    let text = read("ARCHITECTURE.md");
    let (_, section) = text.split_once("### Every shared structure").expect("the section");
    let lines = section.lines().skip_while(|l| !l.starts_with('|')).take_while(|l| l.starts_with('|'));
    let cells = |line: &str| line.trim_matches('|').split('|').map(|c| c.trim().to_owned()).collect();
    lines.skip(2).map(cells).collect()
}

/// Words in backticks.
fn quoted(cell: &str) -> impl Iterator<Item = String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned)
}

/// The fields of `pub struct NAME` in a source.
fn fields(path: &str, name: &str) -> Vec<String> {
    let text = read(path);
    let (_, body) =
        text.split_once(&format!("pub struct {name} {{\n")).unwrap_or_else(|| panic!("{path} has no {name}"));
    let (body, _) = body.split_once("\n}").expect("it ends");
    let of_line = |line: &str| {
        line.trim().strip_prefix("pub ").and_then(|l| l.split_once(':')).map(|(f, _)| f.to_owned())
    };
    body.lines().filter_map(of_line).collect()
}

#[test]
fn every_field_in_shared_memory_is_told_of() {
    let told: BTreeSet<String> = rows().iter().flat_map(|r| quoted(&r[1])).collect();
    let mut lie: BTreeSet<String> = BTreeSet::new();
    for (path, name) in [
        ("crates/world/src/control.rs", "World"),
        ("crates/world/src/control.rs", "NodeShared"),
        ("crates/world/src/tables.rs", "Imaged"),
    ] {
        let found = fields(path, name);
        assert!(found.len() > 10, "{name}: {found:?}");
        lie.extend(found);
    }
    // What tests count is no part of a World.
    assert!(lie.remove("kill_points"));
    let untold: Vec<_> = lie.difference(&told).collect();
    assert!(untold.is_empty(), "ARCHITECTURE.md does not say how these survive a node's death: {untold:?}");
    let entries = ["ThreadRecord", "JoinCell", "ChannelState", "End", "Lock", "name"].map(str::to_owned);
    let gone: Vec<_> = told.iter().filter(|t| !lie.contains(*t) && !entries.contains(t)).collect();
    assert!(gone.is_empty(), "ARCHITECTURE.md tells of fields that are no more: {gone:?}");
    for entry in ["ThreadRecord", "JoinCell", "ChannelState", "End"] {
        assert!(told.contains(entry) && !fields("crates/world/src/records.rs", entry).is_empty(), "{entry}");
    }
}

#[test]
fn every_row_says_how_its_structure_survives() {
    for row in rows() {
        assert_eq!(row.len(), 6, "{row:?}");
        assert!(!row[3].is_empty() && !row[4].is_empty(), "who writes, or what is after a death: {row:?}");
        // What nobody is killed at is the supervisor's, or is never taken back.
        let told = ["supervisor", "stays"].iter().any(|w| row[3].contains(w) || row[4].contains(w));
        assert!(!row[5].is_empty() || told, "nobody is killed at {row:?}");
    }
}

#[test]
fn every_group_of_kill_points_is_a_structures() {
    let text = read("crates/world/src/killpoint.rs");
    let (_, list) = text.split_once("points! {\n").expect("the list");
    let (list, _) = list.split_once("\n}").expect("it ends");
    let groups: BTreeSet<String> = list
        .lines()
        .filter_map(|l| l.trim().strip_prefix('"')?.split_once('"'))
        .map(|(g, _)| g.to_owned())
        .collect();
    assert!(groups.len() > 20, "{groups:?}");
    let told: BTreeSet<String> = rows()
        .iter()
        .flat_map(|r| r[5].split(", ").map(str::to_owned).collect::<Vec<_>>())
        .filter(|g| !g.is_empty())
        .collect();
    assert_eq!(told, groups);
}

#[test]
fn the_readmes_test_command_is_what_must_pass() {
    let (readme, run) = (read("README.md"), read(".ci/run"));
    let section = readme.split("## Two commands").nth(1).expect("the section");
    let commands: Vec<&str> = section.split("```sh\n").skip(1).filter_map(|b| b.lines().next()).collect();
    assert!(commands[0].starts_with("cargo run --release -- run cg "), "{commands:?}");
    assert!(run.lines().any(|l| l == format!("step {}", commands[1])), "{commands:?}");
}

/// Every file below `dir` that is ours.
fn files(dir: &Path, into: &mut Vec<String>) {
    for entry in fs::read_dir(dir).expect("a directory").flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if name == "target" || name == ".git" {
            continue;
        }
        if path.is_dir() {
            files(&path, into);
        } else {
            into.push(path.display().to_string());
        }
    }
}

#[test]
fn every_file_that_the_documents_name_is_there() {
    let mut all = Vec::new();
    files(&root().canonicalize().expect("the workspace"), &mut all);
    let mut named = 0;
    let mut missing = Vec::new();
    for document in ["ARCHITECTURE.md", "README.md", "CONTRIBUTING.md", "docs/portability.md"] {
        let text = read(document);
        let sources = text.split('`').skip(1).step_by(2).filter(|w| w.ends_with(".rs") && !w.contains(' '));
        for source in sources {
            named += 1;
            if !all.iter().any(|f| f.ends_with(&format!("/{source}"))) {
                missing.push(format!("{document}: {source}"));
            }
        }
    }
    assert!(named > 15, "{named}");
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn every_variable_that_a_world_reads_is_in_the_readme() {
    let (config, readme) = (read("crates/world/src/config.rs"), read("README.md"));
    let variables: BTreeSet<&str> = config
        .split('"')
        .filter(|w| w.starts_with("PEREGRINE_") && w.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
        .collect();
    assert!(variables.len() > 15, "{variables:?}");
    let missing: Vec<_> = variables.iter().filter(|v| !readme.contains(&format!("`{v}`"))).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
