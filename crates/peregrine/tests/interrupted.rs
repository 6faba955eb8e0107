//! Signals and ends that come at a bad moment.

use peregrine::{Builder, migrate_to, node_id, sleep, tally};
use peregrine_sys::signal::{self, number};
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
