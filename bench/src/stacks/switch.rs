//! Switch time: three kinds, hit and conflict, over the live stack and over the number of threads.
//!
//! All threads yield in turn, each at the bottom of so many bytes of live stack; the first looks at the clock. A sample is
//! the processor time of some rounds divided by rounds and threads.

use super::{numbers, subject};
use crate::measure::{Options, Samples};
use crate::others::CPU;
use crate::report::Report;
use crate::thread::APART;
use peregrine_sys::timer::process_cpu_ns;
use peregrine_thread::window::GAP_PAGES;
use peregrine_world::{Builder, Config, StackKind};
use std::collections::BTreeMap;
use std::time::Duration;

/// Samples of a process.
const SAMPLES: usize = 9;
/// Processes of a row, turn and turn about with its baseline's.
const PROCESSES: usize = 3;
/// The same with more threads than this: one, for most of its time goes into making them.
const MANY: usize = 10_000;
/// Numbers of contexts that are switched between without anything else, how far their stacks are apart, and what the registers
/// of each may take. So many are there twice: when stacks lie near each other, so do their entries in the page tables.
const BARE: [(usize, usize, f64); 4] =
    [(2, APART, 3.0), (1_000, APART, 10.0), (10_000, 8 << 10, 10.0), (10_000, APART, 10.0)];
/// Processes of each of them.
const BARE_PROCESSES: usize = 9;
/// What a write of the FS base may add to that, ns.
const FS_GOAL: f64 = 7.0;
/// What a hit may take, in switches of isomalloc.
const HIT_GOAL: f64 = 1.5;
/// What a conflict of memory aliasing may take, ns.
const ALIAS_GOAL: f64 = 4500.0;
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
    registers(report, options);
    let mut table = Table { report, options, baselines: BTreeMap::new() };
    let mut curves = Curves { over_live: table.over_live(), over_threads: Vec::new() };
    crossover(report, &curves);
    pieces(report, options);
    let mut table = Table { report, options, baselines: BTreeMap::new() };
    curves.over_threads = table.over_threads();
    curves
}

/// What of a switch is the switch: registers alone, and with the thread pointer.
fn registers(report: &mut Report, options: &Options) {
    report.section("Registers alone (this crate's switch between bare contexts), ns");
    for (threads, apart, goal) in BARE {
        let case = match threads {
            MANY => format!("isomalloc, registers, {threads} threads, {} KiB apart", apart >> 10),
            _ => format!("isomalloc, registers, {threads} threads"),
        };
        if !options.wants(&case) {
            continue;
        }
        // A process is given its pages where the kernel has some, and keeps them: of many, no two processes are alike.
        let (mut bare, mut with_fs) = (Samples::default(), Samples::default());
        for _ in 0..if options.quick { 1 } else { BARE_PROCESSES } {
            let columns = crate::thread::columns(&format!("raw-switch {threads} {apart}"));
            bare.push(columns[0].median());
            with_fs.push(columns[1].median());
        }
        report.single(&case, "switch", "ns", 1, &bare);
        report.single(&format!("{case}, and FS base"), "switch", "ns", 1, &with_fs);
        let (bare, with_fs) = (bare.median(), with_fs.median());
        if threads == BARE[0].0
            && let Some(s) = subject("fs-base")
        {
            report.single("a write of the FS base, alone", "wrfsbase", "ns", 1, &s);
        }
        report.note(&format!(
            "    goal: {goal} ns and {FS_GOAL} for the FS base: {}, {}",
            reached(bare, goal),
            reached(with_fs, goal + FS_GOAL)
        ));
    }
}

fn reached(value: f64, goal: f64) -> String {
    if value <= goal { "met".to_owned() } else { format!("MISSED by {:.1}", value - goal) }
}

/// Rows of ours beside their baselines.
struct Table<'a> {
    report: &'a mut Report,
    options: &'a Options,
    /// What has been measured in this part of the run, by the subject's arguments.
    baselines: BTreeMap<String, Samples>,
}

impl Table<'_> {
    fn over_live(&mut self) -> Vec<Curve> {
        self.report.section(
            "Switch over live stack, 2 threads, ns (baseline: isomalloc; of a conflict, the bare memcpy, or remap and faults)",
        );
        let mut curves = Vec::new();
        for (way, kind, hit) in WAYS {
            let mut points = Vec::new();
            for live in LIVE {
                let case = format!("{way}, {} KiB live", live >> 10);
                if !self.options.wants(&case) {
                    continue;
                }
                let baseline = match (kind, hit) {
                    (StackKind::Isomalloc, _) => None,
                    (StackKind::Copy, false) => subject(&format!("copied {live}"))
                        .map(|bytes| ("memcpy out and in", format!("memcpy 2 {}", bytes.median()))),
                    (StackKind::Alias, false) => {
                        let (stack, window) = (stack_for(live), window_for(live));
                        Some(("mmap and two faults", format!("remap {live} {window} {stack} 2 {GAP_PAGES}")))
                    }
                    _ => Some(("isomalloc", format!("world isomalloc 2 {live} 1"))),
                };
                if let Some((ours, other)) = self.row(&case, kind, 2, live, hit, baseline) {
                    points.push((live as f64, ours));
                    self.judge(kind, hit, ours, other);
                }
            }
            curves.push((way.to_owned(), points));
        }
        curves
    }

    /// Says whether a row reached its goal.
    fn judge(&self, kind: StackKind, hit: bool, ours: f64, other: f64) {
        let text = match (kind, hit) {
            (StackKind::Isomalloc, _) => return,
            (_, true) => format!("at most {HIT_GOAL} of isomalloc: {}", reached(ours / other, HIT_GOAL)),
            (StackKind::Alias, false) => format!(
                "at most {ALIAS_GOAL} ns: {}{}",
                reached(ours, ALIAS_GOAL),
                if other > ALIAS_GOAL { ", and the bare calls miss it here" } else { "" }
            ),
            (StackKind::Copy, false) => format!(
                "no dearer than the memcpy: {}{:.0} ns, with the switch through the scheduler",
                if ours > other { "over it by " } else { "met, below it by " },
                (ours - other).abs()
            ),
        };
        self.report.note(&format!("    goal: {text}"));
    }

    fn over_threads(&mut self) -> Vec<Curve> {
        self.report
            .section("Switch over the number of flows, 8 KiB live, ns (baseline: OS threads' sched_yield)");
        let mut curves = Vec::new();
        for (way, kind, hit) in WAYS {
            let mut points = Vec::new();
            for threads in self.numbers() {
                let case = format!("{way}, {threads} threads");
                if !self.options.wants(&case) {
                    continue;
                }
                if hit && threads > 32_000 {
                    let why = match kind {
                        StackKind::Isomalloc => "there are 32768 slots",
                        _ => "a mapping for each window is more than vm.max_map_count allows",
                    };
                    self.report.note(&format!("    {case}: {why}"));
                    continue;
                }
                let baseline = (threads <= 1000).then(|| ("OS threads", format!("os {threads}")));
                if let Some((ours, _)) = self.row(&case, kind, threads, 8 << 10, hit, baseline) {
                    points.push((threads as f64, ours));
                }
            }
            curves.push((way.to_owned(), points));
        }
        for (name, what, most) in [
            ("OS threads", "os", 10_000),
            ("processes", "processes", 1_000),
            ("event objects", "events", 100_000),
        ] {
            let mut points = Vec::new();
            for threads in self.numbers() {
                let case = format!("{name}, {threads}");
                if !self.options.wants(&case) {
                    continue;
                }
                if threads > most {
                    self.report.note(&format!(
                        "    {case}: left out, for making so many takes minutes and they may not fit (flows that can be made: below)"
                    ));
                    continue;
                }
                if let Some(s) = self.baseline(&format!("{what} {threads}")) {
                    points.push((threads as f64, s.median()));
                    self.report.single(&case, "switch", "ns", SAMPLES, &s);
                } else {
                    self.report.note(&format!("    {case}: failed"));
                }
            }
            curves.push((name.to_owned(), points));
        }
        curves
    }

    fn numbers(&self) -> impl Iterator<Item = usize> + use<> {
        let most = if self.options.quick { MANY } else { usize::MAX };
        THREADS.into_iter().filter(move |n| *n <= most)
    }

    /// The middles of this subject's processes; those of a subject that was measured before.
    fn baseline(&mut self, arguments: &str) -> Option<Samples> {
        if !self.baselines.contains_key(arguments) {
            let mut middles = Samples::default();
            for _ in 0..if self.options.quick { 1 } else { PROCESSES } {
                middles.push(subject(arguments)?.median());
            }
            self.baselines.insert(arguments.to_owned(), middles);
        }
        self.baselines.get(arguments).cloned()
    }

    /// Prints a row; its value, and its baseline's.
    fn row(
        &mut self,
        case: &str,
        kind: StackKind,
        threads: usize,
        live: usize,
        hit: bool,
        baseline: Option<(&str, String)>,
    ) -> Option<(f64, f64)> {
        if threads * live > MOST_LIVE {
            self.report.note(&format!("    {case}: more memory than is set aside for a case"));
            return None;
        }
        let windows = if hit { threads.next_power_of_two() } else { 1 };
        let processes = if self.options.quick || threads >= MANY { 1 } else { PROCESSES };
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        // OS threads are slow to measure and the same for every row.
        let shared = baseline.as_ref().filter(|(_, a)| a.starts_with("os ")).map(|(_, a)| a.clone());
        if let Some(arguments) = &shared {
            theirs = self.baseline(arguments)?;
        }
        for _ in 0..processes {
            let Some(s) = subject(&format!("world {kind} {threads} {live} {windows}")) else {
                self.report.note(&format!("    {case}: failed"));
                return None;
            };
            ours.push(s.median());
            if let (Some((_, arguments)), None) = (&baseline, &shared) {
                theirs.push(subject(arguments)?.median());
            }
        }
        match baseline {
            Some((name, _)) => self.report.samples(case, "switch", "ns", &ours, (name, &theirs)),
            None => self.report.single(case, "switch", "ns", SAMPLES, &ours),
        }
        Some((ours.median(), theirs.median()))
    }
}

/// What a conflict of memory aliasing consists of, in bare calls: so that who misses the goal sees what is the kernel's.
fn pieces(report: &mut Report, options: &Options) {
    report.section("Pieces of a remap, bare calls, ns (window of 512 KiB; 16 MiB)");
    let mut null = Samples::default();
    for (name, live) in [("512 KiB", 8 << 10), ("16 MiB", 8 << 20)] {
        let (stack, window) = (stack_for(live), window_for(live));
        for (what, touched, gap) in [
            ("mmap over", 0, 0),
            ("mmap over, one page written", 1, 0),
            ("two pages written", 2, 0),
            ("two pages written, a gap between them", 2, GAP_PAGES),
        ] {
            let case = format!("bare, window of {name}, {what}");
            if options.wants(&case)
                && let Some(s) = subject(&format!("remap {live} {window} {stack} {touched} {gap}"))
            {
                report.single(&case, "remap", "ns", 1, &s);
                null = s;
            }
        }
        // What was tried in their place.
        for (what, subject_name) in [
            ("two mremap of kept mappings, two pages written", "parked"),
            ("mmap over, 4 KiB of header copied, one page written", "header-copied"),
        ] {
            let case = format!("bare, window of {name}, {what}");
            if options.wants(&case)
                && let Some(s) = subject(&format!("{subject_name} {live} {window} {stack}"))
            {
                report.single(&case, "remap", "ns", 1, &s);
            }
        }
    }
    if null.len() != 0
        && let Some(s) = subject("null-call")
    {
        report.single("bare, getppid", "call", "ns", 1, &s);
    }
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
    let hits = kind == StackKind::Isomalloc || windows >= threads;
    let rounds = rounds_of(hits, !hits && kind == StackKind::Copy, threads, live);
    let argument = (kind as u32, rounds as u64, threads as u64, live as u64);
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
        // Nobody is preempted: else the first of many threads have had their turns before the last are made.
        slice: Duration::from_secs(600),
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

fn main((kind, rounds, threads, live): (u32, u64, u64, u64)) -> Vec<f64> {
    let kind = StackKind::ALL[kind as usize];
    let stack = stack_for(live as usize);
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
fn rounds_of(hits: bool, copies: bool, threads: usize, live: usize) -> usize {
    let full = if hits { (100_000 / threads).max(20) } else { (4_000 / threads).max(2) };
    let copied = (200 << 20) / (threads * live);
    if copies { full.min(copied.max(2)) } else { full }
}

fn take_turns(threads: usize, rounds: usize, keeps_time: bool) -> Vec<f64> {
    let mut samples = Vec::with_capacity(SAMPLES);
    // Until all pages are there, and statics that nobody writes have been sealed.
    for _ in 0..2 * rounds {
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
