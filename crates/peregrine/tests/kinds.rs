//! One suite for the three kinds of stack: whatever a thread is promised holds wherever its memory lies.
//!
//! Each program is run once for each kind, on several nodes, with few windows: most switches of the window kinds are conflicts.
//! The oracle is the arithmetic: what a thread computed from its stack, its heap, its statics and its thread-locals.

use peregrine::testing::{Outcome, Program};
use peregrine::{
    Builder, Receiver, Sender, StackKind, channel, migrate_to, node_count, node_id, sleep, spawn, yield_now,
};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
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

/// What a thread has in all four places, and a check that it is still there.
struct Own {
    seed: u64,
    stack: [u64; 40],
    heap: BTreeMap<u64, String>,
}

static STATIC: AtomicU64 = AtomicU64::new(0);
static LOCKED: Mutex<Vec<u64>> = Mutex::new(Vec::new());
thread_local! {
    static LOCAL: Cell<u64> = const { Cell::new(0) };
    static NAMES: std::cell::RefCell<Vec<String>> = const { std::cell::RefCell::new(Vec::new()) };
}

impl Own {
    fn new(seed: u64) -> Self {
        assert_eq!(STATIC.load(Ordering::Relaxed), 0, "a new thread starts with pristine statics");
        assert_eq!(LOCAL.get(), 0, "and pristine thread-locals");
        STATIC.store(seed * 3, Ordering::Relaxed);
        LOCAL.set(seed * 5);
        LOCKED.lock().unwrap().push(seed * 7);
        NAMES.with_borrow_mut(|n| n.push(format!("name {seed}")));
        let heap = (0..20).map(|i| (i, format!("{seed}/{i}"))).collect();
        Self { seed, stack: std::array::from_fn(|i| seed * 1000 + i as u64), heap }
    }

    fn check(&self) {
        let seed = self.seed;
        assert_eq!(STATIC.load(Ordering::Relaxed), seed * 3);
        assert_eq!(LOCAL.get(), seed * 5);
        assert_eq!(*LOCKED.lock().unwrap(), [seed * 7]);
        NAMES.with_borrow(|n| assert_eq!(*n, [format!("name {seed}")]));
        assert!(self.stack.iter().enumerate().all(|(i, v)| *v == seed * 1000 + i as u64));
        assert!(self.heap.iter().all(|(i, v)| *v == format!("{seed}/{i}")));
    }
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
    for round in 1..4u64 {
        sleep(Duration::from_millis(60));
        for wake in &wakes {
            wake.send(&round).unwrap();
        }
        let sum: u64 = (0..60).map(|_| all_done.recv().unwrap()).sum();
        assert_eq!(sum, round * (1..61u64).sum::<u64>());
    }
    let (packed, unpacked) = peregrine::packing();
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
            // Two windows a node keep their last owner.
            assert!(counts[0] >= 100 && counts[1] >= 100, "{o}");
        }
    });
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

#[inline(never)]
fn dives(n: u64) -> u64 {
    let block = std::hint::black_box([n; 64]);
    if n == u64::MAX { 0 } else { dives(n + 1).wrapping_add(block[n as usize % 64]) }
}

#[peregrine::test(program, nodes = 2)]
fn overflows() {
    let h = Builder::new().name("diver").spawn(dives, 0).unwrap();
    let e = h.join().unwrap_err();
    assert!(e.to_string().contains("diver"), "{e}");
    assert_eq!(spawn(|n: u32| n + 1, 1).join().unwrap(), 2);
}

#[test]
fn an_overflow_hits_a_guard_and_is_named() {
    for_each_kind(overflows, &[], |_, o| {
        assert!(o.stderr.contains("'diver' has overflowed its stack"), "{o}");
    });
}

#[peregrine::test(program, nodes = 1)]
fn asks_for_too_much() {
    let e = Builder::new().stack_size(64 << 20).spawn(|_: ()| (), ()).map(|_| ()).unwrap_err();
    println!("{e}");
}

#[test]
fn a_stack_that_no_window_has_is_refused_with_the_setting_that_would_do() {
    for kind in ["alias", "copy"] {
        let outcome = asks_for_too_much().run_with(&[("PEREGRINE_STACK_KIND", kind)]);
        assert!(outcome.success() && outcome.stdout.contains("PEREGRINE_WINDOW_STACK"), "{outcome}");
    }
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

/// 10,000 threads with a stack of 1 MiB each, in 128 windows of 2 MiB; prints the node's largest address space in MiB.
#[peregrine::test(program, nodes = 2, windows = 128, slots = 1, image_interval_ms = 500, timeout_s = 100)]
fn ten_thousand_live_in_little_address_space() {
    const THREADS: u64 = 10_000;
    let (all, answers) = channel::<u64>();
    let wakes: Vec<Sender<u64>> = (1..=THREADS)
        .map(|seed| {
            let (wake, woken) = channel::<u64>();
            Builder::new()
                .stack_size(1 << 20)
                .node((seed % 2) as u32)
                .spawn(
                    |(seed, woken, all): (u64, Receiver<u64>, Sender<u64>)| {
                        let deep = [seed; 1000];
                        let heap: Vec<String> = (0..8).map(|i| format!("{seed}/{i}")).collect();
                        for n in woken.iter() {
                            assert!(std::hint::black_box(&deep).iter().all(|d| *d == seed));
                            assert!(heap.iter().enumerate().all(|(i, h)| *h == format!("{seed}/{i}")));
                            all.send(&(seed * n)).unwrap();
                        }
                    },
                    (seed, woken, all.clone()),
                )
                .unwrap();
            wake
        })
        .collect();
    for n in 1..2 {
        wakes.iter().for_each(|w| w.send(&n).unwrap());
        let sum: u64 = wakes.iter().map(|_| answers.recv().unwrap()).sum();
        assert_eq!(sum, n * (THREADS * (THREADS + 1) / 2));
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find(|l| l.starts_with("VmPeak:")).unwrap();
    let kib: u64 = peak.split_whitespace().nth(1).unwrap().parse().unwrap();
    println!("{}", kib >> 10);
}

#[test]
fn ten_thousand_threads_in_windows_run_under_a_tight_limit_on_address_space() {
    const LIMIT_MIB: u64 = 5 << 10;
    for kind in ["alias", "copy"] {
        let program = ten_thousand_live_in_little_address_space();
        let inner = program.command();
        let mut limited = std::process::Command::new("sh");
        limited
            .arg("-c")
            .arg(format!("ulimit -v {} && exec \"$0\"", LIMIT_MIB << 10))
            .arg(inner.get_program());
        limited.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
        limited.env("PEREGRINE_STACK_KIND", kind);
        let outcome = program.start_command(limited).wait();
        assert!(outcome.success(), "{kind}: {outcome}");
        let peak: u64 = outcome.stdout.trim().parse().expect("a number");
        println!("{kind}: a node used {peak} MiB of addresses");
        // Their stacks alone would be 9.8 GiB.
        assert!(peak < LIMIT_MIB, "{outcome}");
    }
}
