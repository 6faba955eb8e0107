//! One suite for the three kinds of stack: whatever a thread is promised holds wherever its memory lies.
//!
//! Each program is run once for each kind, on several nodes, with few windows: most switches of the window kinds are conflicts.
//! The oracle is the arithmetic: what a thread computed from its stack, its heap, its statics and its thread-locals.

mod deaths;
mod given_back;
mod limits;
mod own;
mod packing;
mod windows;

use own::Own;
use peregrine::testing::{Outcome, Program};
use peregrine::{
    Builder, Receiver, Sender, StackKind, channel, migrate_to, node_count, node_id, spawn, yield_now,
};
use std::time::{Duration, Instant};

/// Runs `program` for each kind with more environment variables.
fn for_each_kind(program: fn() -> Program, env: &[(&str, &str)], check: impl Fn(StackKind, &Outcome)) {
    for kind in StackKind::ALL {
        let name = kind.to_string();
        let mut env = env.to_vec();
        env.push(("PEREGRINE_STACK_KIND", &name));
        let outcome = program().run_with(&env);
        assert!(outcome.success(), "{kind}: {outcome}");
        check(kind, &outcome);
    }
}

fn holds_for_all(program: fn() -> Program) {
    for_each_kind(program, &[], |_, _| {});
}

#[peregrine::test(program, nodes = 2, windows = 4)]
fn owns_everything() {
    let all: Vec<_> = (1..40u64)
        .map(|seed| {
            spawn(
                |seed: u64| {
                    let own = Own::new(seed);
                    for _ in 0..200 {
                        yield_now();
                        own.check();
                    }
                    own.heap.len() as u64 + seed
                },
                seed,
            )
        })
        .collect();
    let sum: u64 = all.into_iter().map(|h| h.join().unwrap()).sum();
    assert_eq!(sum, (1..40u64).map(|s| s + 20).sum::<u64>());
}

#[test]
fn many_threads_in_one_window_keep_stack_heap_statics_and_thread_locals_apart() {
    holds_for_all(owns_everything);
}

#[peregrine::test(program, nodes = 2, windows = 2)]
fn blocks() {
    // Two rings of threads; a number goes round each and grows by one at each station.
    let rounds = 60u64;
    let mut ends = Vec::new();
    for ring in 0..2u32 {
        let (first, mut from) = channel::<u64>();
        let stations = 12u64;
        for station in 0..stations {
            let (to, next) = channel::<u64>();
            Builder::new()
                .node(ring)
                .spawn(
                    |(from, to, station): (Receiver<u64>, Sender<u64>, u64)| {
                        let own = Own::new(station + 1);
                        for n in from.iter() {
                            own.check();
                            if to.send(&(n + 1)).is_err() {
                                break;
                            }
                        }
                    },
                    (from, to, station),
                )
                .unwrap();
            from = next;
        }
        first.send(&0).unwrap();
        for round in 1..=rounds {
            let n = from.recv().unwrap();
            assert_eq!(n, round * stations);
            first.send(&n).unwrap();
        }
        ends.push((first, from));
    }
    drop(ends);
}

#[test]
fn threads_block_and_wake_whoever_is_in_their_window() {
    holds_for_all(blocks);
}

#[peregrine::test(program, nodes = 2, windows = 2, slice_us = 200, least_preemptions = 20)]
fn is_preempted() {
    let work = |seed: u64| {
        let own = Own::new(seed);
        let (mut x, mut f) = (seed, seed as f64);
        for i in 0..3_000_000u64 {
            x = std::hint::black_box(x.wrapping_mul(6364136223846793005).wrapping_add(i));
            f = f.mul_add(1.000001, 0.5);
            if i % 500_000 == 0 {
                own.check();
            }
        }
        (x, f.to_bits())
    };
    let all: Vec<_> = (1..9u64).map(|seed| spawn(work, seed)).collect();
    let found: Vec<_> = all.into_iter().map(|h| h.join().unwrap()).collect();
    for (seed, found) in (1..9u64).zip(found) {
        let (mut x, mut f) = (seed, seed as f64);
        for i in 0..3_000_000u64 {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(i);
            f = f.mul_add(1.000001, 0.5);
        }
        assert_eq!(found, (x, f.to_bits()), "thread {seed}");
    }
}

#[test]
fn threads_are_preempted_at_any_instruction_and_go_on_with_the_same_registers() {
    holds_for_all(is_preempted);
}

#[peregrine::test(program, nodes = 2, windows = 2)]
fn panics() {
    struct Leaves(Sender<u64>, u64);
    impl Drop for Leaves {
        fn drop(&mut self) {
            self.0.send(&self.1).unwrap();
        }
    }
    let (tx, rx) = channel::<u64>();
    let all: Vec<_> = (1..9u64)
        .map(|seed| {
            spawn(
                |(seed, tx): (u64, Sender<u64>)| {
                    let own = Own::new(seed);
                    let _leaves = Leaves(tx, seed);
                    yield_now();
                    let caught = std::panic::catch_unwind(|| {
                        yield_now();
                        panic!("inner {seed}");
                    });
                    assert!(caught.is_err());
                    own.check();
                    if seed % 2 == 0 {
                        panic!("outer {seed}");
                    }
                    seed
                },
                (seed, tx.clone()),
            )
        })
        .collect();
    drop(tx);
    for (seed, h) in (1..9u64).zip(all) {
        match h.join() {
            Ok(n) => assert!(n == seed && seed % 2 == 1),
            Err(e) => assert!(seed % 2 == 0 && e.to_string().contains(&format!("outer {seed}")), "{e}"),
        }
    }
    let mut left: Vec<u64> = rx.iter().collect();
    left.sort_unstable();
    assert_eq!(left, (1..9).collect::<Vec<_>>(), "each destructor ran once");
}

#[test]
fn a_panic_unwinds_and_is_told_to_who_joins() {
    holds_for_all(panics);
}

#[peregrine::test(program, nodes = 3, windows = 2, slice_us = 300, move_every_ms = 1, least_moves = 50)]
fn moves() {
    let all: Vec<_> = (1..13u64)
        .map(|seed| {
            spawn(
                |seed: u64| {
                    let own = Own::new(seed);
                    let kept = &own.stack[7];
                    for i in 0..60u64 {
                        let to = ((seed + i) % node_count() as u64) as u32;
                        migrate_to(to).unwrap();
                        // Others may move it on at once.
                        let _ = node_id();
                        own.check();
                        assert_eq!(*kept, seed * 1000 + 7);
                        let begun = Instant::now();
                        while begun.elapsed() < Duration::from_micros(200) {
                            std::hint::black_box(kept);
                        }
                    }
                    seed
                },
                seed,
            )
        })
        .collect();
    assert_eq!(all.into_iter().map(|h| h.join().unwrap()).sum::<u64>(), (1..13u64).sum::<u64>());
}

#[test]
fn threads_move_between_nodes_that_use_the_same_window_at_the_same_time() {
    holds_for_all(moves);
}

#[peregrine::test(
    program,
    nodes = 3,
    windows = 2,
    slice_us = 300,
    move_every_ms = 2,
    kill_every_ms = 60,
    image_interval_ms = 15
)]
fn lives_side_by_side() {
    let (all, answers) = channel::<(u64, u64)>();
    let mut asks = Vec::new();
    for seed in 1..=24u64 {
        let (ask, asked) = channel::<u64>();
        let kind = StackKind::ALL[seed as usize % 3];
        Builder::new()
            .kind(kind)
            .node(seed as u32 % 3)
            .spawn(
                |(seed, asked, all): (u64, Receiver<u64>, Sender<(u64, u64)>)| {
                    let own = Own::new(seed);
                    for n in asked.iter() {
                        own.check();
                        all.send(&(seed, n * seed)).unwrap();
                    }
                },
                (seed, asked, all.clone()),
            )
            .unwrap();
        asks.push(ask);
    }
    let begun = Instant::now();
    let mut n = 0;
    while begun.elapsed() < Duration::from_millis(1000) {
        n += 1;
        asks.iter().for_each(|ask| ask.send(&n).unwrap());
        let mut seen: Vec<_> = asks.iter().map(|_| answers.recv().unwrap()).collect();
        seen.sort_unstable();
        assert_eq!(seen, (1..=24).map(|seed| (seed, n * seed)).collect::<Vec<_>>());
    }
}

#[test]
fn threads_of_all_kinds_live_side_by_side_on_several_nodes() {
    let outcome = lives_side_by_side().run();
    assert!(outcome.success(), "{outcome}");
}
