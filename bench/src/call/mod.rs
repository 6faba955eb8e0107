//! A call into another process and back, beside what else there is, in one run and with the same arguments.
//!
//! Each round runs every way once, in a process of its own (see `subject`); a row is the middle of the rounds. The column
//! *baseline* is the floor of the same run: eventfd and shared memory in place on one core, spinning on shared memory in
//! place on two. One row has another: our hot call whose argument the domain copies is compared with the spinning server that copies too, for
//! the floor is what the same work costs without a call around it. Beside the floor in place, which copies nothing, it has a further row.

mod carried;
mod clients;
mod goals;
mod idle;
mod memory;
mod ours;
#[cfg(target_arch = "x86_64")]
mod path;
mod peers;
mod remote;
mod shared;
mod stream;
mod subject;
mod ways;

use crate::measure::{Options, Pair, Samples};
use crate::report::Report;
use std::collections::BTreeMap;
use std::process::{Command, ExitCode, Stdio};
use ways::{Cores, SPINNING_FLOOR, WAYS, Way, floor_of};

/// Argument sizes in bytes, and how many calls a process times.
const SIZES: [(usize, &str, usize); 6] = [
    (0, "null", 4000),
    (64, "64 B", 4000),
    (4 << 10, "4 KiB", 4000),
    (64 << 10, "64 KiB", 1500),
    (1 << 20, "1 MiB", 200),
    (16 << 20, "16 MiB", 20),
];
/// Rounds of a run.
const ROUNDS: usize = 7;

/// The three numbers of a way, a sample a round.
#[derive(Default, Clone)]
struct Row {
    min: Samples,
    median: Samples,
    p99: Samples,
    calls: usize,
}

/// Rows by cores, size and way.
type Rows = BTreeMap<(&'static str, usize, &'static str), Row>;

/// The whole suite.
pub fn run(report: &mut Report, options: &Options) {
    report.note("# peregrine bench call");
    let mut rows = Rows::new();
    for cores in [Cores::One, Cores::Two] {
        for (bytes, size, calls) in SIZES {
            let case = format!("{size}, {} core{}", cores.name(), if cores == Cores::One { "" } else { "s" });
            if !options.wants(&case) {
                continue;
            }
            measure(&mut rows, cores, bytes, calls, options);
            table(report, &rows, cores, bytes, &case);
        }
    }
    if options.wants("attributes") {
        goals::attributes(report, options);
    }
    if options.wants("idle") {
        idle::run(report, options);
    }
    if options.wants("clients") {
        clients::run(report, options);
    }
    if options.wants("memory") {
        memory::run(report, options);
    }
    #[cfg(target_arch = "x86_64")]
    if options.wants("path") {
        path::run(report, options);
    }
    goals::run(report, &rows);
}

/// Runs this program again with a hidden sub-command; what it printed, as numbers.
fn again(arguments: &[&str]) -> Vec<f64> {
    let program = std::env::current_exe().expect("this program's path");
    let out = Command::new(program)
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()
        .expect("this program runs again");
    assert!(out.status.success(), "{arguments:?}: {}", out.status);
    String::from_utf8_lossy(&out.stdout).split_whitespace().map(|w| w.parse().unwrap_or(f64::NAN)).collect()
}

/// Whether a way can be measured so.
fn fits(way: &Way, cores: Cores) -> bool {
    way.only.is_none_or(|only| only == cores)
}

fn measure(rows: &mut Rows, cores: Cores, bytes: usize, calls: usize, options: &Options) {
    for round in 0..options.rounds(ROUNDS) {
        let mut order: Vec<&Way> = WAYS.iter().filter(|w| fits(w, cores)).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for way in order {
            let row = rows.entry((cores.name(), bytes, way.name)).or_default();
            // What sleeps on one core and wakes on another takes ten times as long.
            let calls = if cores == Cores::Two && way.only.is_none() { (calls / 4).max(20) } else { calls };
            let [min, median, p99] = case(way.name, bytes, cores, calls);
            row.min.push(min);
            row.median.push(median);
            row.p99.push(p99);
            row.calls = calls;
        }
    }
}

/// Runs one case in a process of its own.
fn case(way: &str, bytes: usize, cores: Cores, calls: usize) -> [f64; 3] {
    let numbers = again(&["call-case", way, &bytes.to_string(), cores.name(), &calls.to_string()]);
    numbers[..].try_into().expect("three numbers")
}

fn table(report: &mut Report, rows: &Rows, cores: Cores, bytes: usize, title: &str) {
    report.section(&format!("Call and return, {title}, us"));
    for way in WAYS {
        let floor = floor_of(way.name, cores, bytes);
        let case = format!("{}, {title}", way.title);
        beside(report, rows, cores, bytes, &case, way.name, floor);
        if cores == Cores::Two && floor != SPINNING_FLOOR {
            let case = format!("{}, beside the floor in place, {title}", way.title);
            beside(report, rows, cores, bytes, &case, way.name, SPINNING_FLOOR);
        }
    }
}

/// A row: a way beside its floor.
fn beside(
    report: &mut Report,
    rows: &Rows,
    cores: Cores,
    bytes: usize,
    case: &str,
    way: &'static str,
    floor: &'static str,
) {
    let row = |way| rows.get(&(cores.name(), bytes, way));
    let (Some(row), Some(base)) = (row(way), row(floor)) else { return };
    for (metric, ours, baseline) in
        [("min", &row.min, &base.min), ("median", &row.median, &base.median), ("p99", &row.p99, &base.p99)]
    {
        let pair = Pair::of(&ours.scaled(1e-3), &baseline.scaled(1e-3));
        report.pair(case, metric, "us", floor, row.calls, &pair);
    }
}

/// One way in this process: `WAY BYTES one|two CALLS`.
pub fn run_case(arguments: &[String]) -> ExitCode {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.split_first() {
        Some((&"attributes", rest)) => return goals::case(rest),
        Some((&"idle", rest)) => return idle::case(rest),
        Some((&"clients", rest)) => return clients::case(rest),
        Some((&"memory", rest)) => return memory::case(rest),
        #[cfg(target_arch = "x86_64")]
        Some((&"path", rest)) => return path::case(rest),
        _ => {}
    }
    let [name, bytes, cores, calls] = words[..] else { return ExitCode::from(2) };
    let (Some(way), Ok(bytes), Ok(calls)) =
        (WAYS.iter().find(|w| w.name == name), bytes.parse::<usize>(), calls.parse::<usize>())
    else {
        return ExitCode::from(2);
    };
    let cores = if cores == "one" { Cores::One } else { Cores::Two };
    let timed = way.time(bytes, cores, calls);
    println!("{} {} {}", timed.min, timed.median, timed.p99);
    ExitCode::SUCCESS
}
