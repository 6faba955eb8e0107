//! What is kept of a thread whose memory leaves its window, or goes back to an image: all of it, wherever its stack pointer is.

use peregrine::testing::Program;
use peregrine::{Builder, StackKind, checkpoint, sleep, spawn, tally, yield_now};
use std::hint::black_box;
use std::time::Duration;

fn holds_for_all(program: fn() -> Program) {
    for kind in StackKind::ALL {
        let outcome = program().run_with(&[("PEREGRINE_STACK_KIND", &kind.to_string())]);
        assert!(outcome.success(), "{kind}: {outcome}");
    }
}

#[peregrine::test(program, nodes = 2, image_interval_ms = 0)]
fn zeros_in_an_image() {
    let worker = Builder::new().node(1).spawn(
        |_: ()| {
            let mut bytes = black_box(vec![0u8; 256 << 10]);
            checkpoint();
            if tally().rollbacks == 0 {
                bytes.fill(1);
                black_box(&bytes);
                peregrine_sys::process::kill_self();
            }
            bytes.iter().filter(|b| **b != 0).count()
        },
        (),
    );
    assert_eq!(
        worker.unwrap().join().unwrap(),
        0,
        "bytes that were zero in the image and are not after the rollback"
    );
}

#[test]
fn a_page_of_zeros_in_an_image_is_zero_after_a_rollback() {
    holds_for_all(zeros_in_an_image);
}

/// Runs `f` on a stack in the caller's heap, as a crate of coroutines does.
#[cfg(target_arch = "x86_64")]
fn on_own_stack(f: extern "C" fn()) {
    let mut stack = vec![0u128; 16 << 10];
    let top = stack.as_mut_ptr_range().end;
    // SAFETY: the stack is 16-byte aligned, large enough for `f`, and used by nothing else; `f` does not unwind.
    unsafe {
        std::arch::asm!("mov r12, rsp", "mov rsp, {top}", "call {f}", "mov rsp, r12", top = in(reg) top, f = in(reg) f,
            out("r12") _, clobber_abi("C"));
    }
}

#[cfg(target_arch = "x86_64")]
#[peregrine::test(program, nodes = 1, windows = 1, pack_after_ms = 1)]
fn coroutines() {
    extern "C" fn waits() {
        for _ in 0..20 {
            yield_now();
        }
        sleep(Duration::from_millis(30));
    }
    let work = |seed: u64| {
        let own: [u64; 400] = std::array::from_fn(|i| seed * 1000 + i as u64);
        black_box(&own);
        for _ in 0..3 {
            on_own_stack(waits);
            assert!(black_box(&own).iter().enumerate().all(|(i, n)| *n == seed * 1000 + i as u64));
        }
        seed
    };
    let all: Vec<_> = (1..5).map(|seed| spawn(work, seed)).collect();
    assert_eq!(all.into_iter().map(|t| t.join().unwrap()).sum::<u64>(), 10);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_thread_that_waits_on_a_stack_of_its_own_making_keeps_the_other_one() {
    holds_for_all(coroutines);
}
