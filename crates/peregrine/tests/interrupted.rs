//! Signals and ends that come at a bad moment.

use peregrine::{Builder, migrate_to, node_id, sleep, spawn, tally};
use peregrine_sys::signal::{self, HandlerFlags, SigInfo, UContext, number};
use peregrine_thread::preempt::{SIG_RESET, SIG_TRACE};
use std::process::id;
use std::time::{Duration, Instant};

/// They are queued while a process is stopped, and all come when it goes on.
#[peregrine::test(nodes = 1)]
fn signals_that_have_queued_up_do_not_nest_until_the_alternate_stack_is_full() {
    for signo in [SIG_TRACE, SIG_RESET] {
        let before = signal::set_mask(signal::bit(signo));
        for _ in 0..500 {
            signal::kill(id() as i32, signo).unwrap();
        }
        signal::set_mask(before);
    }
    assert_eq!(tally().rollbacks, 0, "the node has crashed");
}

#[peregrine::test(program, nodes = 2, image_interval_ms = 3_600_000)]
fn exits_while_the_world_goes_back() {
    migrate_to(0).unwrap();
    let worker = Builder::new().node(1).spawn(
        |victim: u32| {
            migrate_to(1).unwrap();
            if tally().rollbacks > 0 {
                return println!("after");
            }
            println!("before");
            // Deaf to the reset that comes.
            signal::set_mask(!0);
            signal::kill(victim as i32, number::KILL).unwrap();
            // Buried: the World is about to go back. A node that does not come is killed after a second.
            while signal::kill(victim as i32, 0).is_ok() {
                std::hint::spin_loop();
            }
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(200) {
                std::hint::spin_loop();
            }
            std::process::exit(3)
        },
        id(),
    );
    while !worker.as_ref().unwrap().is_finished() {
        sleep(Duration::from_millis(5));
    }
    worker.unwrap().join().unwrap();
    assert_eq!(node_id(), 0);
}

#[test]
fn what_was_written_before_an_exit_that_is_taken_back_is_taken_back_too() {
    let outcome = exits_while_the_world_goes_back().run();
    assert!(outcome.success(), "{outcome}");
    assert_eq!(outcome.stdout, "after\n", "{outcome}");
}

/// A slice ends while it runs, and then it comes out of a runtime section.
extern "C" fn asks_the_runtime(_: i32, _: *mut SigInfo, _: *mut UContext) {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1) {
        std::hint::spin_loop();
    }
    node_id();
}

#[peregrine::test(nodes = 1, slice_us = 100)]
fn a_handler_on_the_alternate_stack_is_not_suspended_there() {
    const SIGUSR1: i32 = 10;
    // SAFETY: the handler spins, and asks the runtime as any code may.
    unsafe { signal::install(SIGUSR1, asks_the_runtime, HandlerFlags::ON_ALTSTACK).unwrap() };
    let work = |seed: u64| {
        (0..40).fold(seed, |sum, n| {
            signal::kill(id() as i32, SIGUSR1).unwrap();
            sum + n
        })
    };
    let all: Vec<_> = (0..3).map(|seed| spawn(work, seed)).collect();
    assert_eq!(all.into_iter().map(|t| t.join().unwrap()).sum::<u64>(), 3 + 3 * 780);
    assert_eq!(tally().rollbacks, 0, "the node has crashed");
}
