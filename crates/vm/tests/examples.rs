//! The example programs run, each as a program of its own, and say what they should.

use std::path::PathBuf;
use std::process::Command;
use testkit::Outcome;

fn run(example: &str, says: &[&str]) -> Outcome {
    // Cargo builds the examples before it runs the tests, beside them.
    let mut path: PathBuf = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.push("examples");
    path.push(example);
    assert!(
        path.exists(),
        "{} is not built: cargo test builds examples unless told not to (--test); cargo build --examples does",
        path.display()
    );
    let output = Command::new(&path).output().unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{text}");
    assert!(output.status.success(), "{}: {text}", output.status);
    for word in says {
        assert!(text.contains(word), "{word:?} in {text}");
    }
    Outcome::Passed
}

fn a_sparse_file_is_paged_in() -> Outcome {
    run("sparse_file", &["paged by", "write(2) from absent memory"])
}

fn a_buffer_is_flushed_by_what_changed() -> Outcome {
    run("flush", &["first flush: 3 of 1024 pages", "second flush: 1", "a flush that fails"])
}

fn a_heap_grows_and_collects_by_traps() -> Outcome {
    run("heap_overflow", &["traps", "collections"])
}

fn a_remembered_set_is_kept_by_protection_and_by_dirty() -> Outcome {
    run("remembered_set", &["a store", "a collection"])
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        a_sparse_file_is_paged_in,
        a_buffer_is_flushed_by_what_changed,
        a_heap_grows_and_collects_by_traps,
        a_remembered_set_is_kept_by_protection_and_by_dirty,
    ])
}
