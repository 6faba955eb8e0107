//! A program ends when `main` does, whatever keeps its other threads; and who keeps it waiting is named.

mod examples;

use peregrine::{Builder, Sender, channel, sleep};
use peregrine_sys::signal::{self, number};
use std::fs::read_to_string;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep as sleep_here;
use std::time::{Duration, Instant};

/// Reads what nobody writes.
fn reads_for_ever() {
    let (mut from, to) = std::io::pipe().unwrap();
    let _ = from.read(&mut [0]);
    drop(to);
}

/// Has `stuck` run on the other node, and ends when that waits in the kernel. It first tells its process.
fn ends_beside(name: &str, stuck: fn(Sender<u32>)) {
    let (tx, rx) = channel();
    Builder::new().name(name).node(1).spawn(stuck, tx).unwrap();
    let stat = format!("/proc/{}/stat", rx.recv().unwrap());
    let waits = |stat: String| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(['S', 'T']));
    // Again and again: in a pause for an image it waits too.
    let mut seen = 0;
    while seen < 10 {
        seen = if waits(read_to_string(&stat).unwrap()) { seen + 1 } else { 0 };
        sleep(Duration::from_millis(5));
    }
    println!("main is done");
}

#[peregrine::test(program, nodes = 2)]
fn beside_a_reader() {
    ends_beside("reader", |tx| {
        tx.send(&std::process::id()).unwrap();
        reads_for_ever()
    });
}

#[test]
fn a_thread_that_waits_in_the_kernel_does_not_keep_its_program_from_ending() {
    let outcome = beside_a_reader().run();
    assert!(outcome.success(), "{outcome}");
    assert_eq!(outcome.stdout, "main is done\n", "{outcome}");
    assert!(!outcome.stderr.contains("blocks node"), "{outcome}");
}

#[peregrine::test(program, nodes = 2)]
fn beside_one_that_hears_nothing() {
    ends_beside("deaf", |tx| {
        tx.send(&std::process::id()).unwrap();
        // By a bare system call: what goes through libc leaves the runtime's signals open.
        signal::set_mask(!0);
        reads_for_ever();
    });
}

#[test]
fn a_thread_that_blocks_its_node_is_named_and_ended_with_the_program() {
    let outcome = beside_one_that_hears_nothing().run_with(&[("PEREGRINE_END_PATIENCE", "700")]);
    assert!(outcome.success(), "{outcome}");
    assert_eq!(outcome.stdout, "main is done\n");
    let said = &outcome.stderr;
    assert!(
        said.contains("peregrine: main has ended, but thread 1 'deaf' blocks node 1 (process "),
        "{outcome}"
    );
    assert!(said.contains("it waits in read on descriptor ") && said.contains("(pipe:["), "{outcome}");
    assert!(said.contains("it is ended with the program"), "{outcome}");
}

/// Runs the example `blocks` with a store, or from one: exit code, and what it said on standard error.
fn blocks(how: &str, variable: &str, dir: &Path) -> (Option<i32>, String) {
    let mut command = Command::new(examples::example("blocks"));
    command.arg(how).env(variable, dir.join("store")).env("PEREGRINE_OUTPUT", dir.join("output"));
    command.env("PEREGRINE_NODES", "2").env("PEREGRINE_END_PATIENCE", "700").stdin(Stdio::null());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() && begun.elapsed() < Duration::from_secs(60) {
        sleep_here(Duration::from_millis(5));
    }
    let _ = child.kill();
    let done = child.wait_with_output().unwrap();
    (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned())
}

#[test]
fn such_an_end_is_stored_and_a_resume_comes_to_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for variable in ["PEREGRINE_STORE", "PEREGRINE_RESUME"] {
        let (code, said) = blocks("deaf", variable, dir.path());
        assert_eq!(code, Some(0), "{said}");
        assert_eq!(read_to_string(dir.path().join("output")).unwrap(), "main is done\n", "{said}");
        let named = said.contains("'deaf' blocks node 1");
        assert_eq!(named, variable == "PEREGRINE_STORE", "the stored end has no such thread\n{said}");
    }
}

#[test]
fn an_end_that_can_t_be_stored_is_an_error_and_nothing_is_shown_that_is_not_stored() {
    let dir = tempfile::tempdir().unwrap();
    let (code, said) = blocks("runtime", "PEREGRINE_STORE", dir.path());
    assert_eq!(code, Some(70), "{said}");
    assert!(
        said.contains("main has ended, but a node can't be paused") && said.contains("resume it"),
        "{said}"
    );
    assert_eq!(read_to_string(dir.path().join("output")).unwrap(), "");
}

#[peregrine::test(program, nodes = 2)]
fn beside_one_that_stops_its_node() {
    ends_beside("stopped", |tx| {
        tx.send(&std::process::id()).unwrap();
        signal::kill(std::process::id() as i32, number::STOP).unwrap();
    });
}

#[test]
fn a_stopped_node_is_named_and_ended_with_the_program() {
    let outcome = beside_one_that_stops_its_node().run_with(&[("PEREGRINE_END_PATIENCE", "700")]);
    assert!(outcome.success(), "{outcome}");
    assert_eq!(outcome.stdout, "main is done\n");
    assert!(outcome.stderr.contains("it is stopped, by a signal (kill -CONT "), "{outcome}");
}
