//! What is too much for a stack, a window, and an address space.

use crate::for_each_kind;
use crate::own::Own;
use peregrine::testing::{Outcome, Program};
use peregrine::{Builder, Receiver, Sender, StackKind, channel, migrate_to, node_count, spawn};
use std::time::{Duration, Instant};

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

/// A thread's heap grows until a collection ends the node, once after somebody has seen a refusal and gone on.
#[peregrine::test(program, nodes = 2, memory_mib = 64, window_kib = 2048, window_stack_kib = 1024)]
fn wants_too_much() {
    let hungry = |_: ()| {
        let refused = Vec::<u8>::new().try_reserve_exact(2 << 30);
        assert!(refused.is_err());
        let mut held = Vec::new();
        loop {
            held.push(vec![1u8; 1000]);
        }
    };
    let e: peregrine::JoinError =
        Result::<(), _>::unwrap_err(Builder::new().name("hungry").spawn(hungry, ()).unwrap().join());
    println!("{e}");
    let modest = |_: ()| {
        let refused = Vec::<u8>::new().try_reserve_exact(2 << 30);
        assert!(refused.is_err());
        peregrine::sleep(Duration::from_millis(1));
        refused.is_err()
    };
    assert!(spawn(modest, ()).join().unwrap());
}

#[test]
fn a_heap_that_is_full_is_named_with_the_thread_and_what_would_make_room() {
    for_each_kind(wants_too_much, &[], |kind, o| {
        let remedy = match kind {
            StackKind::Isomalloc => {
                "all threads together use the 64 MiB they may; set PEREGRINE_MEMORY higher"
            }
            _ => "its window of 2048 KiB is full; set PEREGRINE_WINDOW higher",
        };
        let said = "SIGABRT after its heap had no room: ";
        let lines = |text: &str| text.lines().filter(|l| l.contains(said) && l.contains(remedy)).count();
        assert!(o.stderr.contains("'hungry' crashed its node with SIGABRT after"), "{o}");
        assert!(lines(&o.stderr) >= 3 && lines(&o.stdout) == 1, "{o}");
    });
}

/// 10,000 threads with a stack of 1 MiB each, in 128 windows of 2 MiB; prints the node's largest address space in MiB.
#[peregrine::test(
    program,
    nodes = 2,
    windows = 128,
    window_kib = 2048,
    slots = 1,
    image_interval_ms = 500,
    timeout_s = 100
)]
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
    // Neither mappings nor descriptors grow with the threads: a node has both for its windows, and some hundreds besides.
    let mappings = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(mappings < 2_000 && descriptors < 200, "{mappings} mappings, {descriptors} descriptors");
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find(|l| l.starts_with("VmPeak:")).unwrap();
    let kib: u64 = peak.split_whitespace().nth(1).unwrap().parse().unwrap();
    println!("{}", kib >> 10);
}

/// Runs `program` under a limit on the address space of each of its processes, with more environment variables.
fn under(program: &Program, limit_mib: u64, env: &[(&str, &str)]) -> Outcome {
    let inner = program.command();
    let mut limited = std::process::Command::new("sh");
    let line = format!("ulimit -v {} && exec \"$0\"", limit_mib << 10);
    limited.arg("-c").arg(line).arg(inner.get_program());
    limited.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    limited.envs(env.iter().copied());
    program.start_command(limited).wait()
}

/// The tightest limit that is promised.
const LEAST_MIB: u64 = 1536;

#[test]
fn ten_thousand_threads_in_windows_run_under_a_tight_limit_on_address_space() {
    // Copy threads that wait fill the arena, and are packed when it is full, not after a while.
    for (kind, pack_after) in [("alias", "100"), ("copy", "3600000")] {
        let program = ten_thousand_live_in_little_address_space();
        let settings = [("PEREGRINE_STACK_KIND", kind), ("PEREGRINE_PACK_AFTER", pack_after)];
        let outcome = under(&program, LEAST_MIB, &settings);
        assert!(outcome.success(), "{kind}: {outcome}");
        let peak: u64 = outcome.stdout.trim().parse().expect("a number");
        println!("{kind}: a node used {peak} MiB of addresses");
        // Their stacks alone would be 9.8 GiB.
        assert!(peak < LEAST_MIB, "{outcome}");
    }
}

/// More is held by threads that wait than the arena has addresses for, while nodes are killed.
#[peregrine::test(
    program,
    nodes = 2,
    windows = 16,
    slots = 1,
    kill_every_ms = 150,
    image_interval_ms = 60,
    least_kills = 3
)]
fn wait_for_more_than_the_arena_has() {
    const THREADS: usize = 1_000;
    const BYTES: usize = 120 << 10;
    let (all, answers) = channel::<u64>();
    let wakes: Vec<Sender<Vec<u8>>> = (0..THREADS)
        .map(|i| {
            let (wake, woken) = channel::<Vec<u8>>();
            let waits = |(seed, woken, all): (u8, Receiver<Vec<u8>>, Sender<u64>)| {
                let own = Own::new(seed.into());
                let held = vec![seed; BYTES];
                for message in woken.iter() {
                    own.check();
                    let same = |bytes: &[u8]| bytes.iter().all(|byte| *byte == seed);
                    assert!(same(&held) && same(&message));
                    all.send(&message.len().try_into().unwrap()).unwrap();
                }
            };
            let start = Builder::new().kind(StackKind::Copy).node((i % 2) as u32);
            start.spawn(waits, (i as u8, woken, all.clone())).unwrap();
            wake
        })
        .collect();
    for round in 1..4 {
        // Messages need room as well.
        wakes.iter().enumerate().for_each(|(i, wake)| wake.send(&vec![i as u8; round << 10]).unwrap());
        let sum: u64 = wakes.iter().map(|_| answers.recv().unwrap()).sum();
        assert_eq!(sum, (THREADS * (round << 10)) as u64);
    }
}

#[test]
fn threads_that_wait_are_packed_early_when_there_is_no_room_for_them() {
    // An hour: nothing is packed because time has passed.
    let outcome =
        under(&wait_for_more_than_the_arena_has(), LEAST_MIB, &[("PEREGRINE_PACK_AFTER", "3600000")]);
    assert!(outcome.success() && !outcome.stderr.contains("ulimit"), "{outcome}");
}

/// The threads of node 1 hold more than there is room for, and go on holding it: nothing is packed but where room is wanted. Then
/// threads of node 0 that have nothing to pack need some to leave their windows, in the middle of images too, and messages do.
#[peregrine::test(program, nodes = 2, windows = 16, slots = 1, image_interval_ms = 5)]
fn need_what_threads_of_another_node_hold() {
    const BYTES: usize = 120 << 10;
    let holder = |on: u32, i: usize| {
        let (wake, woken) = channel::<Vec<u8>>();
        let (done, answers) = channel::<usize>();
        let holds = |(seed, woken, done): (u8, Receiver<Vec<u8>>, Sender<usize>)| {
            let own = Own::new(seed.into());
            let held = vec![seed; BYTES];
            done.send(&0).unwrap();
            for message in woken.iter() {
                own.check();
                assert!(held.iter().chain(&message).all(|byte| *byte == seed));
                done.send(&message.len()).unwrap();
            }
        };
        let start = Builder::new().kind(StackKind::Copy).node(on).name(format!("{on}/{i}"));
        start.spawn(holds, (i as u8, woken, done)).unwrap();
        assert_eq!(answers.recv(), Ok(0));
        (wake, answers)
    };
    let all: Vec<_> =
        [(1, 700), (0, 40)].into_iter().flat_map(|(on, n)| (0..n).map(move |i| (on, i))).collect();
    let all: Vec<_> = all.into_iter().map(|(on, i)| (i, holder(on, i))).collect();
    for (i, (wake, _)) in &all {
        wake.send(&vec![*i as u8; 8 << 10]).unwrap();
    }
    for (_, (_, answers)) in &all {
        assert_eq!(answers.recv(), Ok(8 << 10));
    }
}

#[test]
fn threads_of_another_node_are_packed_when_there_is_no_room() {
    let program = need_what_threads_of_another_node_hold();
    let outcome = under(&program, LEAST_MIB, &[("PEREGRINE_PACK_AFTER", "3600000")]);
    assert!(outcome.success() && !outcome.stderr.contains("ulimit"), "{outcome}");
}

/// Threads in windows move, are killed with their nodes, and `main`, in the only slot, holds more and less on its heap.
#[peregrine::test(
    program,
    nodes = 3,
    windows = 16,
    slots = 1,
    move_every_ms = 2,
    kill_every_ms = 60,
    image_interval_ms = 15,
    least_moves = 20,
    least_kills = 3
)]
fn moves_and_dies_in_little_address_space() {
    let own = Own::new(77);
    let begun = Instant::now();
    let mut round = 0;
    while begun.elapsed() < Duration::from_millis(900) {
        round += 1;
        let held = vec![round as u8; 1 << (10 + round % 14)];
        let all: Vec<_> = (1..20u64)
            .map(|seed| {
                let kind = [StackKind::Alias, StackKind::Copy][seed as usize % 2];
                let work = |seed: u64| {
                    let own = Own::new(seed);
                    for to in 0..6 {
                        migrate_to(to % node_count() as u32).unwrap();
                        own.check();
                    }
                    seed
                };
                Builder::new().kind(kind).spawn(work, seed).unwrap()
            })
            .collect();
        assert_eq!(all.into_iter().map(|h| h.join().unwrap()).sum::<u64>(), (1..20).sum::<u64>());
        assert!(held.iter().all(|byte| *byte == round as u8));
        own.check();
    }
}

#[test]
fn threads_move_and_nodes_die_under_the_tightest_limit_on_address_space() {
    let outcome = under(&moves_and_dies_in_little_address_space(), LEAST_MIB, &[]);
    assert!(outcome.success(), "{outcome}");
}

/// `main`, in a slot that the limit makes smaller, takes from its heap until there is no more, and asks for too large a stack.
#[peregrine::test(program, nodes = 2, slots = 1, image_interval_ms = 20)]
fn fills_a_small_slot() {
    let mut all: Vec<Vec<u8>> = Vec::new();
    let refused = loop {
        let mut more = Vec::new();
        if let Err(e) = more.try_reserve_exact(16 << 20) {
            break e;
        }
        // Its last byte: one that lies behind what is mapped ends the node.
        more.resize(16 << 20, 0);
        all.push(more);
    };
    println!("{} {refused}", all.len());
    let e = Builder::new().kind(StackKind::Isomalloc).stack_size(400 << 20).spawn(|_: ()| (), ());
    println!("{}", e.map(|_| ()).unwrap_err());
}

#[test]
fn a_slot_is_smaller_under_a_limit_and_says_so() {
    let outcome = under(&fills_a_small_slot(), LEAST_MIB, &[("PEREGRINE_MEMORY", "4096")]);
    assert!(outcome.success(), "{outcome}");
    let mut lines = outcome.stdout.lines();
    let blocks: usize = lines.next().and_then(|l| l.split(' ').next()?.parse().ok()).expect("a number");
    // A fifth of the limit: 306 MiB, of which a stack and a colour take some.
    assert!((14..20).contains(&blocks), "{outcome}");
    assert!(lines.next().is_some_and(|l| l.contains("does not fit")), "{outcome}");
}
