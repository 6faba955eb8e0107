//! Address space per thread, by kind: how much larger a node is that runs so many threads than one that can run none but `main`.

use super::{numbers, subject};
use crate::measure::Options;
use crate::report::Report;
use peregrine_world::{Builder, Config, StackKind, channel};

const THREADS: usize = 10_000;

pub fn run(report: &mut Report, options: &Options) {
    report.section("Address space per thread with a stack of 1 MiB, KiB (128 windows of 2 MiB)");
    for kind in StackKind::ALL {
        let case = format!("address space, {kind}");
        if options.wants(&case)
            && let Some(s) = subject(&format!("space {kind} {THREADS}"))
        {
            report.single(&case, "per thread", "KiB", THREADS, &s);
        }
    }
}

pub fn case(name: &str, words: &[&str]) -> bool {
    let ("space", [kind, rest @ ..]) = (name, words) else { return false };
    let (Ok(kind), [threads]) = (kind.parse::<StackKind>(), &numbers(rest)[..]) else { return false };
    let threads = *threads;
    let config = Config {
        nodes: 1,
        image_interval: None,
        windows: 128,
        window_bytes: 2 << 20,
        // Slots are reserved when the World begins: as many as there are threads, and one for main.
        slots: if kind == StackKind::Isomalloc { threads + 1 } else { 1 },
        ..Config::default()
    };
    // Slots are reserved when the World begins, so what they take is seen beside a World that has but one.
    if threads == 0 {
        let ended = peregrine_world::run_with(config, |(): ()| vm_size_kib(), &()).expect("a World");
        println!("{}", ended.value::<u64>().expect("a size"));
        return true;
    }
    let Some(before) = subject(&format!("space {kind} 0")) else { return false };
    let ended = peregrine_world::run_with(config, main, &(kind as u32, threads as u64)).expect("a World");
    let (before, after) = (before.median(), ended.value::<u64>().expect("a size"));
    println!("{}", (after as f64 - before) / threads as f64);
    true
}

fn main((kind, threads): (u32, u64)) -> u64 {
    let kind = StackKind::ALL[kind as usize];
    let (up, all_up) = channel::<()>();
    let waiting: Vec<_> = (0..threads)
        .map(|_| {
            let (wake, woken) = channel::<()>();
            let body = |(woken, up): (peregrine_world::Receiver<()>, peregrine_world::Sender<()>)| {
                up.send(&()).expect("main listens");
                let _ = woken.recv();
            };
            Builder::new().kind(kind).stack_size(1 << 20).spawn(body, (woken, up.clone())).expect("a thread");
            wake
        })
        .collect();
    waiting.iter().for_each(|_| all_up.recv().expect("each thread runs"));
    vm_size_kib()
}

/// `VmSize` of this process.
fn vm_size_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("a status");
    let line = text.lines().find(|l| l.starts_with("VmSize:")).expect("VmSize");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}
