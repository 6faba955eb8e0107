//! One way from node to node, in its parts: the receiver's wake-up, our own work, and the pages touched again.
//!
//! ```text
//!   node 0 (CPU 0)  fill fresh pages │ migrate_to(1) ─┐
//!   node 1 (CPU 1)        asleep, or looking          └─▶ │ touch each page │ touch each page again
//!                                     ├─── one way ──────┤├── re-faults ────┤
//! ```
//!
//! The nodes are bound to a processor each, so that the way is one from processor to processor; but by default they are not, and then
//! whoever leaves nothing to do behind takes its processor along to a node that sleeps. That is a row of its own, beside a bare
//! futex wake between processes that the kernel places as it likes.
//!
//! Three receivers: one that *still looks* for work, as a node does with the default settings for 50 us after it had some, if
//! that lately paid; one that is *asleep*; and one that never sleeps, with which the way is our own work alone. What it takes
//! longer with the others is the wake-up. That of the sleeper stands beside a bare futex wake between two processes of the same
//! run that have just written and read as many bytes.
//!
//! **How long the receiver has slept** decides what its wake-up takes, ours and a bare one alike: a virtual processor that has
//! been halted for some hundred us is still at hand, one that was for 20 ms has to be fetched. To fill 16 MiB takes more than
//! 10 ms. So after the pages are filled, and before the clock starts, the receiver is woken some times (the thread goes there and
//! back without touching them) and has then slept equally long whatever the size; and so is the baseline's. What it takes after a
//! long sleep is measured too, beside a bare wake-up after as long a one.
//!
//! A process counts with its best tenth, ours and the baseline's alike: with neighbours on the same processors the middle
//! tells how long the receiver waits for its turn.

use super::{columns, in_world, numbers, quiet_world};
use crate::measure::{Options, Pair, Samples, versus};
use crate::report::Report;
use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering};
use peregrine_base::{PageCount, Protection, VirtAddr};
use peregrine_sys::mem::{MapOptions, Placement, Source, map};
use peregrine_sys::process::{ForkFlags, Forked, exit_now, fork_with, pin_to_cpu};
use peregrine_sys::timer::monotonic_ns;
use peregrine_sys::{futex, memfd};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

const SIZES: [(usize, &str, u32); 3] =
    [(64 << 10, "64 KiB", 124), (1 << 20, "1 MiB", 449), (16 << 20, "16 MiB", 7185)];
const SAMPLES: usize = 15;
/// Long enough for an idle node to fall asleep.
const CALM: Duration = Duration::from_micros(400);
/// Long enough for its processor to be away.
const LONG_CALM: Duration = Duration::from_millis(20);
/// Short enough for one that looks not to.
const LATELY: Duration = Duration::from_micros(10);
/// Moves to and fro before one that is measured, after which both nodes know whether looking pays, and processors and host
/// whether sleeps are short.
const HOPS: usize = 4;

pub fn run(report: &mut Report, options: &Options) {
    report.section("Move between two nodes, one way, us");
    for (bytes, name, ampi) in SIZES {
        let case = format!("move with {name} of heap");
        if !options.wants(&case) {
            continue;
        }
        let rounds = super::rounds(options, 7);
        let mut parts: [Samples; 4] = Default::default();
        let mut keep = |of: usize, sample: f64| {
            parts[of].push(sample);
            sample
        };
        let asleep = versus(
            rounds,
            || {
                let c = columns(&format!("move {bytes} asleep"));
                keep(0, calm(&c[1]));
                keep(1, calm(&c[2]));
                calm(&c[0])
            },
            || best(&format!("copy pipe {bytes}")),
        );
        report.pair(&case, "one way, receiver asleep", "us", "pipe between two processes", SAMPLES, &asleep);
        let unbound = versus(
            rounds,
            || best(&format!("move {bytes} asleep unbound")),
            || best(&format!("wake {bytes} unbound")),
        );
        report.pair(
            &case,
            "one way, receiver asleep, nodes not bound",
            "us",
            "futex wake, not bound",
            SAMPLES,
            &unbound,
        );
        let looking =
            versus(rounds, || best(&format!("move {bytes} looking")), || best(&format!("copy pipe {bytes}")));
        report.pair(
            &case,
            "one way, receiver still looking",
            "us",
            "pipe between two processes",
            SAMPLES,
            &looking,
        );
        let awake =
            versus(rounds, || best(&format!("move {bytes} awake")), || best(&format!("copy memfd {bytes}")));
        report.pair(&case, "own work (receiver awake)", "us", "copy through a memfd", SAMPLES, &awake);
        let mut found = Samples::default();
        found.push(looking.ours.median() - awake.ours.median());
        report.single(&case, "wake-up (still looking less awake)", "us", SAMPLES, &found);
        let wake =
            versus(1, || asleep.ours.median() - awake.ours.median(), || best(&format!("wake {bytes}")));
        report.pair(
            &case,
            "wake-up (asleep less awake)",
            "us",
            "futex wake across processors",
            SAMPLES,
            &wake,
        );
        report.single(&case, "first touch of all pages there", "us", SAMPLES, &parts[0]);
        report.single(&case, "second touch", "us", SAMPLES, &parts[1]);
        let long = versus(
            rounds,
            || best(&format!("move {bytes} asleep long")),
            || best(&format!("wake {bytes} long")),
        );
        report.pair(
            &case,
            "one way, receiver asleep for 20 ms",
            "us",
            "futex wake after as long",
            SAMPLES,
            &long,
        );
        judge(report, "still looking", &looking);
        judge(report, "asleep, as nodes are by default (not bound to processors)", &unbound);
        judge(report, "asleep, on another processor that it is bound to", &asleep);
        report.note(&format!("    quoted, not measured here: AMPI {ampi} us"));
    }
}

/// What is left when nobody is in the way.
fn calm(samples: &Samples) -> f64 {
    samples.quantile(0.1)
}

fn best(arguments: &str) -> f64 {
    calm(&columns(arguments)[0])
}

fn judge(report: &Report, receiver: &str, way: &Pair) {
    let us = way.ours.median();
    report.note(&format!(
        "    goal: at most 25 us for wake-up and own work, receiver {receiver}: {}",
        if us <= 25.0 { "met" } else { "MISSED" }
    ));
}

pub fn case(name: &str, words: &[&str]) -> bool {
    let bytes = numbers(words).first().copied().unwrap_or(0);
    match name {
        "move" => {
            let mut config = quiet_world(2);
            if words.contains(&"awake") {
                config.spin = Duration::from_secs(100);
            }
            in_world(config, travel, &words.join(" "));
        }
        "wake" => wake(bytes, words.contains(&"long"), !words.contains(&"unbound")),
        "copy" if words.contains(&"pipe") => copy_by_pipe(bytes),
        "copy" => copy_by_memfd(bytes),
        _ => return false,
    }
    true
}

fn busy(time: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        std::hint::spin_loop();
    }
}

fn micros(d: Duration) -> f64 {
    d.as_nanos() as f64 / 1000.0
}

fn touch(bytes: &mut [u8]) -> u64 {
    bytes
        .iter_mut()
        .step_by(4096)
        .map(|b| {
            *b = b.wrapping_add(1);
            u64::from(*b)
        })
        .sum()
}

fn travel(argument: &str) {
    let words: Vec<&str> = argument.split_whitespace().collect();
    let (bytes, looking) = (numbers(&words)[0], words.contains(&"looking"));
    let calm = match (looking, words.contains(&"long")) {
        (true, _) => LATELY,
        (_, true) => LONG_CALM,
        _ => CALM,
    };
    let bound = !words.contains(&"unbound");
    let go = |node: u32| {
        peregrine_world::migrate_to(node).expect("two nodes");
        if bound {
            // The process that the thread now runs in.
            let _ = pin_to_cpu(node as usize);
        }
    };
    go(1);
    go(0);
    // Blocks are kept, so that each round's pages are new to node 1.
    let (mut kept, mut lines) = (Vec::new(), Vec::new());
    for _ in 0..SAMPLES {
        let mut block = vec![1u8; bytes];
        for _ in 0..HOPS {
            if !looking {
                busy(CALM);
            }
            go(1);
            go(0);
        }
        busy(calm);
        let begun = Instant::now();
        peregrine_world::migrate_to(1).expect("two nodes");
        let there = Instant::now();
        let sum = touch(&mut block);
        let touched = Instant::now();
        let again = touch(&mut block);
        let end = Instant::now();
        assert_eq!((sum, again), ((bytes / 4096) as u64 * 2, (bytes / 4096) as u64 * 3));
        lines.push([there - begun, touched - there, end - touched].map(micros));
        kept.push(block);
        busy(CALM);
        peregrine_world::migrate_to(0).expect("two nodes");
    }
    for [way, first, second] in lines {
        println!("{way} {first} {second}");
    }
}

/// What two processes of a baseline share; data begin a page further.
#[repr(C)]
struct Shared {
    turn: AtomicU32,
    sent_ns: AtomicU64,
    took_ns: AtomicU64,
}

const SHARED: usize = 0x0500_0000_0000;

/// Forks: the child calls `receive` for each round on CPU 1 (if `bound`), which notes how long it took since `sent_ns`; the parent
/// calls `send` on CPU 0, `calm` after `before`, and prints that. Between those two, they do so `hops` times without being measured.
fn both(
    (bytes, hops, calm, bound): (usize, usize, Duration, bool),
    mut before: impl FnMut(),
    mut send: impl FnMut(&Shared),
    mut receive: impl FnMut(&Shared),
    mut after: impl FnMut(),
) {
    let all = 4096 + bytes;
    let fd = memfd::create(c"bench", PageCount::for_bytes(all), memfd::Pages::Base).expect("a memfd");
    let shared = Source::Shared(fd.as_fd(), PageCount::new(0));
    let at = Placement::At(VirtAddr::new(SHARED));
    // SAFETY: nothing is replaced.
    unsafe { map(PageCount::for_bytes(all), Protection::ReadWrite, shared, at, MapOptions::default()) }
        .expect("a mapping");
    // SAFETY: just mapped, zeroed; all fields are atomics.
    let s = unsafe { &*(SHARED as *const Shared) };
    let wait_for = |turn: u32| loop {
        let now = s.turn.load(Ordering::Acquire);
        if now == turn {
            return;
        }
        futex::wait(&s.turn, now, None);
    };
    let is_measured = |round: u32| round as usize % (1 + hops) == hops;
    // SAFETY: one thread; the child ends by `exit_now`.
    match unsafe { fork_with(ForkFlags::default()) }.expect("a process") {
        Forked::Child => {
            peregrine_sys::process::die_with_parent();
            if bound {
                let _ = pin_to_cpu(1);
            }
            for round in 0..((1 + SAMPLES) * (1 + hops)) as u32 {
                receive(s);
                s.took_ns.store(monotonic_ns() - s.sent_ns.load(Ordering::Acquire), Ordering::Release);
                if is_measured(round) {
                    after();
                }
                s.turn.store(2 * round + 2, Ordering::Release);
                let _ = futex::wake(&s.turn, 1);
            }
            exit_now(0)
        }
        Forked::Parent(_) => {
            if bound {
                let _ = pin_to_cpu(0);
            }
            for round in 0..((1 + SAMPLES) * (1 + hops)) as u32 {
                if (round as usize).is_multiple_of(1 + hops) {
                    before();
                }
                busy(if is_measured(round) { calm } else { CALM });
                s.sent_ns.store(monotonic_ns(), Ordering::Release);
                send(s);
                wait_for(2 * round + 2);
                // The first touched everything for the first time.
                if is_measured(round) && round as usize > hops {
                    println!("{}", s.took_ns.load(Ordering::Acquire) as f64 / 1000.0);
                }
            }
        }
    }
}

/// Passes the turn on: even numbers are the sender's.
fn pass(s: &Shared) {
    s.turn.fetch_add(1, Ordering::Release);
    let _ = futex::wake(&s.turn, 1);
}

fn await_turn(s: &Shared) {
    loop {
        let now = s.turn.load(Ordering::Acquire);
        if now & 1 == 1 {
            return;
        }
        futex::wait(&s.turn, now, None);
    }
}

fn wake(bytes: usize, long: bool, bound: bool) {
    let mut seen = vec![0u8; bytes];
    // The sender writes fresh pages, the receiver its own: as the two nodes of a move do.
    both(
        (0, HOPS, if long { LONG_CALM } else { CALM }, bound),
        || drop(std::hint::black_box(vec![1u8; bytes])),
        pass,
        await_turn,
        || {
            std::hint::black_box(touch(&mut seen));
        },
    );
}

fn copy_by_pipe(bytes: usize) {
    let (mut from, mut to) = std::io::pipe().expect("a pipe");
    let source = vec![1u8; bytes];
    let mut target = vec![0u8; bytes];
    both(
        (0, 0, CALM, true),
        || (),
        |_| to.write_all(&source).expect("a reader"),
        |_| from.read_exact(&mut target).expect("a writer"),
        || (),
    );
}

fn copy_by_memfd(bytes: usize) {
    let source = vec![1u8; bytes];
    let mut target = vec![0u8; bytes];
    let at = (SHARED + 4096) as *mut u8;
    both(
        (bytes, 0, CALM, true),
        || (),
        |s| {
            // SAFETY: `bytes` are mapped there; the other side looks only after its turn has come.
            unsafe { core::ptr::copy_nonoverlapping(source.as_ptr(), at, bytes) };
            pass(s);
        },
        |s| {
            await_turn(s);
            // SAFETY: as above.
            unsafe { core::ptr::copy_nonoverlapping(at, target.as_mut_ptr(), bytes) };
        },
        || (),
    );
}
