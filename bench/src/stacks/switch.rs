//! Switch time: three kinds, hit and conflict, over the live stack and over the number of threads.
//!
//! All threads yield in turn, each at the bottom of so many bytes of live stack; the first looks at the clock. A sample is
//! the processor time of some rounds divided by rounds and threads.

use super::{numbers, subject};
use crate::measure::{Options, Samples};
use crate::others::CPU;
use crate::report::Report;
use peregrine_sys::timer::process_cpu_ns;
use peregrine_world::{Builder, Config, StackKind};

/// Samples of a process.
const SAMPLES: usize = 11;
/// Live stacks, in bytes.
const LIVE: [usize; 6] = [8 << 10, 32 << 10, 128 << 10, 512 << 10, 2 << 20, 8 << 20];
/// Numbers of threads.
const THREADS: [usize; 5] = [2, 100, 1_000, 10_000, 100_000];
/// Most bytes of live stack of all threads of a case together.
const MOST_LIVE: usize = 3 << 30;

/// A curve of a figure: its name and points `(x, ns)`.
pub type Curve = (String, Vec<(f64, f64)>);

/// Figures: switch time over live stack, and over threads.
#[derive(Default)]
pub struct Curves {
    pub over_live: Vec<Curve>,
    pub over_threads: Vec<Curve>,
}

/// The ways of ours: name, kind, and whether every thread has a window of its own.
const WAYS: [(&str, StackKind, bool); 5] = [
    ("isomalloc", StackKind::Isomalloc, true),
    ("alias, hit", StackKind::Alias, true),
    ("alias, conflict", StackKind::Alias, false),
    ("copy, hit", StackKind::Copy, true),
    ("copy, conflict", StackKind::Copy, false),
];

pub fn run(report: &mut Report, options: &Options) -> Curves {
    let mut curves = Curves::default();
    report.section(
        "Switch over live stack, 2 threads, ns (baseline: isomalloc; of a conflict, the bare memcpy, or remap and faults)",
    );
    for (way, kind, hit) in WAYS {
        let mut points = Vec::new();
        for live in LIVE {
            let case = format!("{way}, {} KiB live", live >> 10);
            if !options.wants(&case) {
                continue;
            }
            let baseline = match (kind, hit) {
                (StackKind::Isomalloc, _) => None,
                (StackKind::Copy, false) => subject(&format!("copied {live}"))
                    .map(|bytes| ("memcpy out and in", format!("memcpy 2 {}", bytes.median()))),
                (StackKind::Alias, false) => {
                    let (stack, window) = (stack_for(live), window_for(live));
                    Some(("mmap and two faults", format!("remap 2 {live} {window} {stack}")))
                }
                _ => Some(("isomalloc", format!("world isomalloc 2 {live} 1"))),
            };
            if let Some(v) = row(report, options, &case, kind, 2, live, hit, baseline) {
                points.push((live as f64, v));
            }
        }
        curves.over_live.push((way.to_owned(), points));
    }
    crossover(report, &curves);
    report.section("Switch over the number of flows, 8 KiB live, ns (baseline: OS threads' sched_yield)");
    for (way, kind, hit) in WAYS {
        let mut points = Vec::new();
        for threads in THREADS {
            let case = format!("{way}, {threads} threads");
            if !options.wants(&case) {
                continue;
            }
            if kind == StackKind::Isomalloc && threads > 32_000 {
                report.note(&format!("    {case}: there are 32768 slots"));
                continue;
            }
            if hit && threads > 32_000 {
                report.note(&format!(
                    "    {case}: a mapping for each window is more than vm.max_map_count allows"
                ));
                continue;
            }
            let baseline = (threads <= 1000).then(|| ("OS threads", format!("os {threads}")));
            if let Some(v) = row(report, options, &case, kind, threads, 8 << 10, hit, baseline) {
                points.push((threads as f64, v));
            }
        }
        curves.over_threads.push((way.to_owned(), points));
    }
    for (name, what, most) in [
        ("OS threads", "os", 10_000),
        ("processes", "processes", 1_000),
        ("event objects", "events", 100_000),
    ] {
        let mut points = Vec::new();
        for threads in THREADS.into_iter().filter(|n| *n <= most) {
            let case = format!("{name}, {threads}");
            if options.wants(&case)
                && let Some(s) = subject(&format!("{what} {threads}"))
            {
                points.push((threads as f64, s.median()));
                report.single(&case, "switch", "ns", 1, &s);
            }
        }
        curves.over_threads.push((name.to_owned(), points));
    }
    curves
}

#[expect(clippy::too_many_arguments)]
fn row(
    report: &Report,
    options: &Options,
    case: &str,
    kind: StackKind,
    threads: usize,
    live: usize,
    hit: bool,
    baseline: Option<(&str, String)>,
) -> Option<f64> {
    if threads * live > MOST_LIVE {
        report.note(&format!("    {case}: more memory than is set aside for a case"));
        return None;
    }
    let windows = if hit { threads.next_power_of_two() } else { 1 };
    let rounds = options.rounds(5).min(5);
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    for _ in 0..if options.quick { 1 } else { rounds } {
        match subject(&format!("world {kind} {threads} {live} {windows}")) {
            Some(s) => ours.push(s.median()),
            None => {
                report.note(&format!("    {case}: failed"));
                return None;
            }
        }
        if let Some((_, arguments)) = &baseline {
            theirs.push(subject(arguments).map_or(f64::NAN, |s| s.median()));
        }
    }
    match baseline {
        Some((name, _)) => report.samples(case, "switch", "ns", &ours, (name, &theirs)),
        None => report.single(case, "switch", "ns", SAMPLES, &ours),
    }
    Some(ours.median())
}

/// Where remapping begins to be cheaper than copying.
fn crossover(report: &Report, curves: &Curves) {
    let of =
        |name: &str| curves.over_live.iter().find(|c| c.0 == name).map(|c| c.1.clone()).unwrap_or_default();
    let (alias, copy) = (of("alias, conflict"), of("copy, conflict"));
    for (a, c) in alias.windows(2).zip(copy.windows(2)) {
        let (d0, d1) = (c[0].1 - a[0].1, c[1].1 - a[1].1);
        if d0 <= 0.0 && d1 > 0.0 {
            let share = -d0 / (d1 - d0);
            let at = a[0].0 * (a[1].0 / a[0].0).powf(share);
            report.value("crossover of alias and copy", "live stack", "KiB", (at / 1024.0).round(), None);
        }
    }
}

pub fn case(name: &str, words: &[&str]) -> bool {
    if let ("copied", [live]) = (name, &numbers(words)[..]) {
        println!("{}", copied_bytes(*live));
        return true;
    }
    let ("world", [kind, rest @ ..]) = (name, words) else { return false };
    let Ok(kind) = kind.parse::<StackKind>() else { return false };
    let [threads, live, windows] = numbers(rest)[..] else { return false };
    let copies = kind == StackKind::Copy && windows < threads;
    let argument = (kind as u32, copies, threads as u64, live as u64);
    let ended = peregrine_world::run_with(config(live, windows), main, &argument).expect("a World");
    let samples: Vec<f64> = ended.value().expect("its samples");
    samples.iter().for_each(|s| println!("{s}"));
    true
}

fn config(live: usize, windows: usize) -> Config {
    let _ = peregrine_sys::process::pin_to_cpu(CPU);
    Config {
        nodes: 1,
        image_interval: None,
        windows,
        window_stack_bytes: stack_for(live),
        window_bytes: window_for(live),
        memory_bytes: 16 << 30,
        pack_after: None,
        ..Config::default()
    }
}

/// How many bytes a switch copies out of a window, with so much live stack, and into it: with what lies in the frames besides,
/// header, thread-locals and heap.
fn copied_bytes(live: usize) -> u64 {
    fn suspended(_: ()) -> u64 {
        peregrine_world::yield_now();
        let number = peregrine_thread::carrier::current_slot().expect("a thread runs");
        let header = peregrine_thread::slot::SlotHeader::of(number);
        // SAFETY: this thread's own header; its stack pointer is that of the last switch, which was made from here.
        let head = unsafe {
            let t = peregrine_thread::template::template();
            peregrine_thread::window_image::Head::of(&*header, header as usize, t)
        };
        head.len() as u64
    }
    fn main(live: u64) -> u64 {
        let thread = Builder::new().kind(StackKind::Copy).stack_size(stack_for(live as usize));
        // Two, so that there is a switch.
        let other = Builder::new().kind(StackKind::Copy).spawn(suspended, ()).expect("a thread");
        let bytes = thread.spawn(|live: u64| down(live as usize, 1, &mut || suspended(())), live);
        let bytes = bytes.expect("a thread").join().expect("a number");
        let _ = other.join();
        bytes
    }
    let ended = peregrine_world::run_with(config(live, 1), main, &(live as u64)).expect("a World");
    ended.value().expect("a number")
}

/// A stack on which so many bytes can be live: each frame is a little larger than what it holds.
fn stack_for(live: usize) -> usize {
    (live + live / 12 + (96 << 10)).next_multiple_of(4096)
}

/// And a window that has it.
fn window_for(live: usize) -> usize {
    (stack_for(live) + (300 << 10)).next_power_of_two().max(512 << 10)
}

fn main((kind, copies, threads, live): (u32, bool, u64, u64)) -> Vec<f64> {
    let kind = StackKind::ALL[kind as usize];
    let stack = stack_for(live as usize);
    let rounds = rounds_of(copies, threads as usize, live as usize) as u64;
    let handles: Vec<_> = (0..threads)
        .map(|i| {
            let spawned =
                Builder::new().kind(kind).stack_size(stack).spawn(flow, (threads, live, rounds, i == 0));
            spawned.expect("a thread")
        })
        .collect();
    handles.into_iter().map(|h| h.join().expect("its samples")).find(|s| !s.is_empty()).unwrap_or_default()
}

/// One thread: goes down its stack, then takes turns.
fn flow((threads, live, rounds, keeps_time): (u64, u64, u64, bool)) -> Vec<f64> {
    down(live as usize, 1, &mut || take_turns(threads as usize, rounds as usize, keeps_time))
}

/// Calls `bottom` with so many bytes of live stack above.
#[inline(never)]
fn down<R>(left: usize, depth: u64, bottom: &mut dyn FnMut() -> R) -> R {
    const FRAME: usize = 4096;
    let mut frame = [0u8; FRAME];
    // Every page of it is written, and looked at on the way up.
    frame[FRAME / 2] = depth as u8;
    let frame = std::hint::black_box(&mut frame);
    let found = if left > FRAME { down(left - FRAME, depth + 1, bottom) } else { bottom() };
    assert_eq!(frame[FRAME / 2], depth as u8);
    found
}

/// Rounds of a sample: of some ms where a switch is cheap, and of not much more where it is dear.
fn rounds_of(copies: bool, threads: usize, live: usize) -> usize {
    let (full, copied) = ((4_000 / threads).max(2), (200 << 20) / (threads * live));
    if copies { full.min(copied.max(2)) } else { full }
}

fn take_turns(threads: usize, rounds: usize, keeps_time: bool) -> Vec<f64> {
    let mut samples = Vec::with_capacity(SAMPLES);
    for _ in 0..rounds {
        peregrine_world::yield_now();
    }
    for _ in 0..SAMPLES {
        let begun = process_cpu_ns();
        for _ in 0..rounds {
            peregrine_world::yield_now();
        }
        samples.push((process_cpu_ns() - begun) as f64 / (rounds * threads) as f64);
    }
    for _ in 0..rounds {
        peregrine_world::yield_now();
    }
    if keeps_time { samples } else { Vec::new() }
}
