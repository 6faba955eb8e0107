//! What is too much for a stack, a window, and an address space.

use crate::for_each_kind;
use peregrine::{Builder, Receiver, Sender, channel, spawn};

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
