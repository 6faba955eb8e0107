//! A switch through the scheduler, and what others take for theirs.
//!
//! All threads of a case yield in turn; one of them looks at the clock every so many rounds. A sample is the time of
//! those rounds divided by rounds and threads. The clock is the processor time of the process: everything here runs on
//! one processor and never waits, and whoever else wants that processor is not counted.

use super::{CPU, columns, in_world, middle, numbers, plain, quiet_world, rounds};
use crate::measure::{Options, versus};
use crate::report::Report;
use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_sys::timer::process_cpu_ns;
use std::cell::Cell;
use std::hint::black_box;

/// What Charm++ (v8.0.1-devel) takes on a machine like this: quoted, not measured in this run.
const CHARM: [(usize, u32); 3] = [(2, 61), (26, 103), (1000, 198)];
/// The most that the first two ways are to take, ns, for the same numbers of threads.
const GOALS: [f64; 3] = [30.0, 35.0, 50.0];
/// Samples of a process.
const SAMPLES: usize = 15;
/// Bytes from one stack of a bare context to the next, if nothing else is said.
pub const APART: usize = 64 << 10;
/// Rounds before the first sample, in samples' lengths.
const WARM: usize = 3;

thread_local! {
    static MINE: Cell<u64> = const { Cell::new(0) };
}
static SHARED: AtomicU64 = AtomicU64::new(0);

/// What a thread writes between two switches.
const WAYS: [(&str, &str); 5] = [
    ("none", "nothing private written"),
    ("tls", "a thread-local written"),
    ("statics", "a thread-local and a static written"),
    ("std", "std::thread::yield_now"),
    ("compared", "nothing written, all statics compared"),
];

pub fn run(report: &mut Report, options: &Options) {
    report.section("Switch between threads of one node, ns");
    report
        .note(&format!("    this program's statics, which a switch brings along: {} bytes", statics_bytes()));
    for ((threads, charm), goal) in CHARM.into_iter().zip(GOALS) {
        let mut reached: f64 = 0.0;
        for (way, what) in WAYS {
            let case = format!("{what}, {threads} threads");
            if !options.wants(&case) {
                continue;
            }
            let pair = versus(
                rounds(options, 11),
                || middle(&format!("world-switch {threads} {way}")),
                || middle(&format!("coroutines {threads}")),
            );
            report.pair(&case, "switch", "ns", "corosensei resume + suspend", SAMPLES, &pair);
            if matches!(way, "none" | "tls") {
                reached = reached.max(pair.ours.median());
            }
        }
        let case = format!("OS threads and floor, {threads} threads");
        if options.wants(&case) {
            let pair = versus(
                rounds(options, 5),
                || middle(&format!("raw-switch {threads}")),
                || middle(&format!("os-yield {threads}")),
            );
            report.pair(
                &format!("bare switch, no scheduler, {threads} threads"),
                "switch",
                "ns",
                "OS threads, sched_yield",
                SAMPLES,
                &pair,
            );
            let pair = versus(
                rounds(options, 5),
                || columns(&format!("raw-switch {threads}"))[1].median(),
                || middle(&format!("coroutines {threads}")),
            );
            report.pair(
                &format!("bare switch and FS base, {threads} threads"),
                "switch",
                "ns",
                "corosensei",
                SAMPLES,
                &pair,
            );
        }
        if reached > 0.0 {
            report.note(&format!(
                "    goal: at most {goal} ns for the first two: {} (the bare switch with its FS base is the floor)",
                if reached <= goal { "met" } else { "MISSED" }
            ));
        }
        report.note(&format!("    quoted, not measured here: Charm++ {charm} ns at {threads} threads"));
    }
    if options.wants("futex hand-off, 2 threads") {
        let pair = versus(rounds(options, 5), || middle("world-switch 2 none"), || middle("os-futex"));
        report.pair(
            "nothing private written, 2 threads",
            "switch",
            "ns",
            "OS threads, futex hand-off",
            SAMPLES,
            &pair,
        );
    }
}

pub fn case(name: &str, words: &[&str]) -> bool {
    let n = numbers(words).first().copied().unwrap_or(2);
    match name {
        "world-switch" => {
            let _ = peregrine_sys::process::pin_to_cpu(CPU);
            let mut config = quiet_world(1);
            if words.contains(&"compared") {
                config.seal_every = 0;
            }
            in_world(config, main, &words.join(" "));
        }
        "coroutines" => coroutines(n),
        "os-yield" => crate::others::os_threads(n, SAMPLES),
        "os-futex" => plain::os_futex(SAMPLES),
        "raw-switch" => plain::raw_switch(n, numbers(words).get(1).copied().unwrap_or(APART), SAMPLES),
        _ => return false,
    }
    true
}

/// Bytes of the window.
fn statics_bytes() -> usize {
    peregrine_thread::template::taken().map_or(0, |t| t.statics_len)
}

/// Rounds of one sample, so that it takes about 10 ms.
pub const fn rounds_of(threads: usize) -> usize {
    let n = 200_000 / threads;
    if n < 50 { 50 } else { n }
}

fn main(argument: &str) {
    let words: Vec<&str> = argument.split_whitespace().collect();
    let threads = numbers(&words)[0];
    let way = words.get(1).copied().unwrap_or("none").to_owned();
    let make = |i: usize| {
        peregrine_world::Builder::new()
            .stack_size(64 << 10)
            .spawn(turns, (threads, i == 0, way.clone()))
            .expect("a thread")
    };
    let handles: Vec<_> = (0..threads).map(make).collect();
    for handle in handles {
        for sample in handle.join().expect("its samples") {
            println!("{sample}");
        }
    }
}

/// One thread of the round; the one that keeps time returns the samples.
fn turns((threads, keeps_time, way): (usize, bool, String)) -> Vec<f64> {
    let step: fn() = match way.as_str() {
        "tls" => || {
            MINE.set(MINE.get() + 1);
            peregrine_world::yield_now();
        },
        "statics" => || {
            MINE.set(MINE.get() + 1);
            SHARED.store(SHARED.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            peregrine_world::yield_now();
        },
        "std" => std::thread::yield_now,
        _ => peregrine_world::yield_now,
    };
    let rounds = rounds_of(threads);
    let mut samples = Vec::with_capacity(SAMPLES);
    // Caches, predictors, and the pages of the statics that nobody writes.
    for _ in 0..WARM * rounds {
        step();
    }
    for _ in 0..SAMPLES {
        let begun = process_cpu_ns();
        for _ in 0..rounds {
            step();
        }
        samples.push((process_cpu_ns() - begun) as f64 / (rounds * threads) as f64);
    }
    for _ in 0..rounds {
        step();
    }
    // Each thread counted its own turns and nobody else's.
    let turns = (rounds * (SAMPLES + WARM + 1)) as u64;
    assert_eq!(MINE.get(), if matches!(way.as_str(), "tls" | "statics") { turns } else { 0 });
    assert_eq!(SHARED.load(Ordering::Relaxed), if way == "statics" { turns } else { 0 });
    if keeps_time { samples } else { Vec::new() }
}

/// Coroutines that take turns: resume and suspend together are one switch.
fn coroutines(threads: usize) {
    use corosensei::stack::DefaultStack;
    use corosensei::{Coroutine, CoroutineResult};
    let _ = peregrine_sys::process::pin_to_cpu(CPU);
    let mut all: Vec<Coroutine<(), (), ()>> = (0..threads)
        .map(|_| {
            let stack = DefaultStack::new(64 << 10).expect("a stack");
            Coroutine::with_stack(stack, |yielder, ()| {
                loop {
                    yielder.suspend(());
                }
            })
        })
        .collect();
    let rounds = rounds_of(threads);
    let mut turn = || {
        for _ in 0..rounds {
            for c in &mut all {
                if let CoroutineResult::Return(()) = c.resume(()) {
                    return;
                }
            }
        }
    };
    turn();
    for _ in 0..SAMPLES {
        let begun = process_cpu_ns();
        turn();
        println!("{}", (process_cpu_ns() - begun) as f64 / (rounds * threads) as f64);
    }
    black_box(&mut all);
    for c in &mut all {
        // SAFETY: the coroutines own nothing.
        unsafe { c.force_reset() };
    }
}
