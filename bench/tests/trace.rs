//! The recorder of cache lines says what the processor does: checked against a memory trace of the real code, in which a plain store
//! that the recorder can't see is found.

use std::process::Command;

/// As `space-scene check` says it.
const NO_VALGRIND: i32 = 77;

#[test]
fn a_memory_trace_agrees_with_the_recording_and_shows_a_planted_plain_store() {
    let output = Command::new(env!("CARGO_BIN_EXE_bench")).args(["space-scene", "check"]).output().unwrap();
    if output.status.code() == Some(NO_VALGRIND) {
        println!("skipped: no valgrind here to trace memory with; install it");
        return;
    }
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
}
