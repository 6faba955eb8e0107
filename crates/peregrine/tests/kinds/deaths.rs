//! Threads of all kinds whose nodes are killed, that crash, and that wait for so long that they are packed.

use crate::own::{Own, STATIC};
use crate::{for_each_kind, holds_for_all};
use peregrine::{Receiver, Sender, StackKind, channel, sleep, spawn};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Threads that wait for messages and for time, compute, spawn and end; what each says is checked.
fn exchange(workers: u64, steps: u64) {
    let (all, answers) = channel::<(u64, u64, u64)>();
    let mut asks = Vec::new();
    for seed in 1..=workers {
        let (ask, asked) = channel::<u64>();
        spawn(
            |(seed, asked, all): (u64, Receiver<u64>, Sender<(u64, u64, u64)>)| {
                let own = Own::new(seed);
                let mut sum = 0;
                for n in asked.iter() {
                    sum += n;
                    own.check();
                    if n % 16 == seed % 16 {
                        sleep(Duration::from_micros(500));
                    }
                    if n % 50 == 0 {
                        sum += spawn(|n: u64| n + STATIC.load(Ordering::Relaxed), n).join().unwrap() - n;
                    }
                    all.send(&(seed, n, sum)).unwrap();
                }
            },
            (seed, asked, all.clone()),
        );
        asks.push(ask);
    }
    drop(all);
    for n in 1..=steps {
        for ask in &asks {
            ask.send(&n).unwrap();
        }
        let mut seen: Vec<_> = (0..workers).map(|_| answers.recv().unwrap()).collect();
        seen.sort_unstable();
        let expected: Vec<_> = (1..=workers).map(|seed| (seed, n, n * (n + 1) / 2)).collect();
        assert_eq!(seen, expected);
    }
}

#[peregrine::test(
    program,
    nodes = 3,
    windows = 2,
    kill_every_ms = 40,
    image_interval_ms = 10,
    least_kills = 5
)]
fn is_killed() {
    let begun = Instant::now();
    exchange(10, 150);
    while begun.elapsed() < Duration::from_millis(900) {
        exchange(6, 20);
    }
}

#[test]
fn nodes_are_killed_and_every_message_and_result_is_right_all_the_same() {
    for_each_kind(is_killed, &[], |kind, o| println!("{kind}: {}", o.stderr.lines().last().unwrap_or("")));
}

#[test]
fn the_same_holds_where_the_kernel_tracks_no_writes() {
    for_each_kind(is_killed, &[("PEREGRINE_TRACK", "0")], |_, _| {});
}

#[test]
fn the_same_holds_for_threads_that_are_packed_at_once_and_moved_about() {
    let env = [("PEREGRINE_PACK_AFTER", "0"), ("PEREGRINE_MOVE_EVERY", "2")];
    for_each_kind(is_killed, &env, |_, _| {});
}

#[peregrine::test(program, nodes = 2, windows = 2, pack_after_ms = 1, image_interval_ms = 20)]
fn waits_for_long() {
    let (done, all_done) = channel::<u64>();
    let wakes: Vec<Sender<u64>> = (1..61u64)
        .map(|seed| {
            let (wake, woken) = channel::<u64>();
            spawn(
                |(seed, woken, done): (u64, Receiver<u64>, Sender<u64>)| {
                    let own = Own::new(seed);
                    let here = &own.stack[3];
                    for n in woken.iter() {
                        own.check();
                        assert_eq!(*here, seed * 1000 + 3);
                        done.send(&(seed * n)).unwrap();
                    }
                },
                (seed, woken, done.clone()),
            );
            wake
        })
        .collect();
    let windowed = std::env::var("PEREGRINE_STACK_KIND").is_ok_and(|kind| kind != "isomalloc");
    for round in 1..4u64 {
        sleep(Duration::from_millis(60));
        // Most of them; two windows a node keep their last owner.
        while windowed && peregrine::packing().packed < 40 * round {
            sleep(Duration::from_millis(5));
        }
        for wake in &wakes {
            wake.send(&round).unwrap();
        }
        let sum: u64 = (0..60).map(|_| all_done.recv().unwrap()).sum();
        assert_eq!(sum, round * (1..61u64).sum::<u64>());
    }
    let peregrine::Packing { packed, unpacked, .. } = peregrine::packing();
    println!("packed {packed}, unpacked {unpacked}");
}

#[test]
fn idle_threads_are_packed_and_wake_with_all_that_they_had() {
    for_each_kind(waits_for_long, &[], |kind, o| {
        let counts: Vec<u64> =
            o.stdout.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
        if kind == StackKind::Isomalloc {
            assert_eq!(counts, [0, 0]);
        } else {
            assert!(counts[0] >= 100 && counts[1] >= 100, "{o}");
        }
    });
}

#[peregrine::test(program, nodes = 2, image_interval_ms = 1, timeout_s = 30)]
fn crashes_before_it_takes_its_argument() {
    let (tx, rx) = channel::<u64>();
    // The image that is gone back to holds the thread with its argument still unread.
    let h = spawn(|_held: Sender<u64>| -> u32 { std::process::abort() }, tx);
    assert_eq!(rx.recv(), Err(peregrine::RecvError::Closed));
    assert!(h.join().is_err());
}

#[test]
fn channel_ends_in_the_argument_of_a_thread_that_crashes_at_once_are_closed() {
    holds_for_all(crashes_before_it_takes_its_argument);
}
