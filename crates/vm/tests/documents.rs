//! What the pages say is what the tests show.

use std::collections::BTreeSet;
use std::path::Path;

fn read(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Names of the functions of a test file that run as tests: those in its list.
fn tests_of(file: &str) -> BTreeSet<String> {
    let text = match file {
        // Its list is in `main.rs`, its checks beside it.
        "tests/conformance" => {
            ["tracking", "regions", "main"].map(|part| read(&format!("{file}/{part}.rs"))).concat()
        }
        _ => read(file),
    };
    let list = text.rsplit("fn main()").next().unwrap_or_default();
    let names = list.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|w| w.len() > 12);
    let names: BTreeSet<String> =
        names.filter(|w| text.contains(&format!("fn {w}("))).map(str::to_owned).collect();
    assert!(!names.is_empty(), "{file} lists its tests in main");
    names
}

/// The rows of the table: what happens to what, and the tests named in the last column.
fn rows() -> Vec<(String, Vec<String>)> {
    let page = read("docs/semantics.md");
    let rows = page.lines().filter(|l| l.starts_with("| ")).skip(1).map(|line| {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").collect();
        assert_eq!(cells.len(), 3, "three columns: {line}");
        let named = cells[2].split('`').skip(1).step_by(2).map(str::to_owned).collect();
        (cells[0].to_owned(), named)
    });
    rows.collect()
}

/// Where the tests that the page names may be.
const FILES: [&str; 8] = [
    "semantics.rs",
    "contents.rs",
    "traps.rs",
    "lifetimes.rs",
    "answers.rs",
    "conformance",
    "bare.rs",
    "safe_code.rs",
];

#[test]
fn every_row_of_the_semantics_page_has_tests_that_exist() {
    let all: BTreeSet<String> = FILES.iter().flat_map(|file| tests_of(&format!("tests/{file}"))).collect();
    for (what, named) in rows() {
        assert!(!named.is_empty(), "{what}: no test is named");
        for name in named {
            let prefix = name.trim_end_matches('…');
            let found = all.iter().filter(|t| t.starts_with(prefix)).count();
            assert!(found == 1, "{what}: {found} tests are called {name}");
        }
    }
}

#[test]
fn every_test_of_semantics_is_on_the_page() {
    let named: Vec<String> = rows().into_iter().flat_map(|(_, named)| named).collect();
    let mut all = tests_of("tests/semantics.rs");
    all.append(&mut tests_of("tests/contents.rs"));
    for test in all.iter().filter(|t| !t.starts_with("helper_")) {
        assert!(
            named.iter().any(|n| test.starts_with(n.trim_end_matches('…'))),
            "{test} shows something that docs/semantics.md does not say"
        );
    }
}

#[test]
fn what_the_page_must_speak_of_it_speaks_of() {
    let page = read("docs/semantics.md");
    for word in [
        "read(2)",
        "write(2)",
        "fork",
        "mremap",
        "MADV_DONTNEED",
        "swap",
        "MADV_COLLAPSE",
        "two trackers",
        "unmapping what is tracked",
        "max_map_count",
        "EPERM",
    ] {
        assert!(page.contains(word), "docs/semantics.md says nothing of {word}");
    }
}
