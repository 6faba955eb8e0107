//! Panics and backtraces of threads that move while they unwind.

use peregrine::{migrate_to, node_count, node_id, spawn};

/// To the next node.
fn hop() {
    migrate_to((node_id() + 1) % node_count()).unwrap();
}

fn panics_while_moving(n: u32) -> u32 {
    struct Moves;
    impl Drop for Moves {
        fn drop(&mut self) {
            assert!(std::thread::panicking());
            hop();
            assert!(std::thread::panicking(), "a move in the middle of unwinding is not noticed");
        }
    }
    for i in 0..n {
        let caught = std::panic::catch_unwind(|| {
            let _moves = Moves;
            hop();
            if i % 2 == 0 {
                std::panic::panic_any(i);
            }
            panic!("number {i}");
        });
        assert!(!std::thread::panicking());
        let payload = caught.unwrap_err();
        match payload.downcast_ref::<u32>() {
            Some(k) => assert_eq!(*k, i),
            None => assert_eq!(*payload.downcast_ref::<String>().unwrap(), format!("number {i}")),
        }
    }
    n
}

#[peregrine::test(nodes = 2, move_every_ms = 1)]
fn panics_unwind_and_are_caught_across_moves() {
    std::panic::set_hook(Box::new(|_| {}));
    assert_eq!(spawn(panics_while_moving, 10).join().unwrap(), 10);
    let _ = std::panic::take_hook();
    let e = spawn(|n: u32| -> u32 { panic!("the answer is {n}") }, 42).join().unwrap_err();
    assert!(e.to_string().contains("the answer is 42"), "{e}");
}

#[inline(never)]
fn a_function_with_a_name() -> String {
    let trace = std::backtrace::Backtrace::force_capture();
    std::hint::black_box(trace.to_string())
}

#[peregrine::test(nodes = 2, move_every_ms = 2, least_moves = 2)]
fn backtraces_name_their_frames_before_and_after_a_move() {
    let kept = std::backtrace::Backtrace::force_capture();
    for _ in 0..2 {
        let text = a_function_with_a_name();
        assert!(text.contains("a_function_with_a_name"), "{text}");
        assert!(text.contains("unwinding.rs"), "{text}");
        hop();
    }
    assert!(kept.to_string().contains("backtraces_name_their_frames"), "{kept}");
}

fn backtraces(rounds: u32) -> u32 {
    for _ in 0..rounds {
        assert!(a_function_with_a_name().contains("a_function_with_a_name"));
    }
    rounds
}

#[peregrine::test(nodes = 2, move_every_ms = 1, slice_us = 200, least_moves = 5)]
fn backtraces_of_many_threads_do_not_hinder_each_other() {
    let all: Vec<_> = (0..4).map(|_| spawn(backtraces, 2)).collect();
    for h in all {
        assert_eq!(h.join().unwrap(), 2);
    }
}

#[peregrine::test(program, nodes = 2)]
fn panics_with_a_backtrace() {
    hop();
    panic!("after a move");
}

#[test]
fn a_panic_prints_its_backtrace() {
    let outcome = panics_with_a_backtrace().run_with(&[("RUST_BACKTRACE", "1")]);
    assert_eq!(outcome.code, Some(101), "{outcome}");
    assert!(
        outcome.stderr.contains("after a move") && outcome.stderr.contains("panics_with_a_backtrace"),
        "{outcome}"
    );
}
