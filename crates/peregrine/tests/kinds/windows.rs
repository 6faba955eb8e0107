//! A window keeps its last owner until another thread bound to it comes.

use crate::for_each_kind;
use peregrine::{Builder, StackKind, sleep, window_costs, yield_now};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const TURNS: u64 = 500;

/// Written at each turn, so that the window of the statics is never in order by itself.
static TURN: AtomicU64 = AtomicU64::new(0);

/// So many threads, of the kind that is asked for or the one that the environment says, take turns: what that added to each count.
fn costs_of(threads: usize, kind: Option<StackKind>) -> [u64; 3] {
    // One that is alone does not switch when it yields; when it sleeps it does, to the scheduler and back.
    let turns = |alone: bool| {
        for n in 0..TURNS {
            TURN.store(n, Ordering::Relaxed);
            if alone {
                sleep(Duration::from_micros(1))
            } else {
                yield_now()
            }
            assert_eq!(TURN.load(Ordering::Relaxed), n);
        }
    };
    let before = window_costs();
    let new = || kind.map_or_else(Builder::new, |kind| Builder::new().kind(kind));
    let all: Vec<_> = (0..threads).map(|_| new().spawn(turns, threads == 1).unwrap()).collect();
    all.into_iter().for_each(|h| h.join().unwrap());
    let after = window_costs();
    [0, 1, 2].map(|i| after[i] - before[i])
}

/// Threads that are made one after the other are bound to different windows. One process, no image, hardly a preemption: what switches
/// there are, the threads ask for.
#[peregrine::test(program, nodes = 1, windows = 4, slice_us = 1_000_000, image_interval_ms = 0)]
fn takes_turns() {
    for threads in [1, 3, 8] {
        let [alias, copy, statics] = costs_of(threads, None);
        println!("{alias} {copy} {statics}");
    }
}

#[test]
fn only_another_thread_that_comes_to_it_takes_a_window_from_its_last_owner() {
    for_each_kind(takes_turns, &[], |kind, o| {
        let numbers: Vec<u64> = o.stdout.split_whitespace().map(|n| n.parse().unwrap()).collect();
        let [alone, apart, shared] = [0, 3, 6].map(|i| &numbers[i..i + 3]);
        // Each is put into its window once; the thread that spawns them and waits for them is in one too, and comes back for each.
        let few = TURNS / 5;
        for row in 0..2 {
            let kind_of_row = [StackKind::Alias, StackKind::Copy][row];
            assert!(alone[row] < few && apart[row] < few, "{kind}, {kind_of_row}: {o}");
            // All windows have at least two threads that take turns: each turn takes one from the other.
            let all = if kind == kind_of_row { 8 * TURNS - few..8 * TURNS + few } else { 0..1 };
            assert!(all.contains(&shared[row]), "{kind}, {kind_of_row}: {o}");
        }
        // The one window of the statics: kept by a thread that is alone, taken at each turn where there are more.
        assert!(alone[2] < few, "{kind}, statics: {o}");
        assert!(apart[2] >= 3 * TURNS && shared[2] >= 8 * TURNS, "{kind}, statics: {o}");
    });
}

#[peregrine::test(program, nodes = 1, windows = 4, slice_us = 1_000_000, image_interval_ms = 0)]
fn takes_turns_as_asked() {
    for kind in StackKind::ALL {
        let [alias, copy, _] = costs_of(8, Some(kind));
        println!("{alias} {copy}");
    }
}

#[test]
fn a_thread_is_of_the_kind_that_is_asked_for_whatever_the_default() {
    for_each_kind(takes_turns_as_asked, &[], |default, o| {
        let numbers: Vec<u64> = o.stdout.split_whitespace().map(|n| n.parse().unwrap()).collect();
        for (kind, found) in StackKind::ALL.into_iter().zip(numbers.chunks(2)) {
            for (of, found) in [StackKind::Alias, StackKind::Copy].into_iter().zip(found) {
                // Half of the eight are enough to tell; one that spawns them and waits for them comes back for each.
                let taken = *found > 4 * TURNS;
                assert_eq!(
                    taken,
                    kind == of,
                    "{kind} was asked for where {default} is the default, windows of {of}: {o}"
                );
            }
        }
    });
}
