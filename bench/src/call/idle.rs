//! What an activation costs when the calls end: it looks for the next one for a moment, and then uses no processor.
//!
//! The processor time of all the domain's threads, by the kernel's count, for one call after many and the 200 ms that follow it, beside the
//! time that it may look for (`Limits::spin`). The call and its wake-up are in it.

use super::again;
use super::ours::{self, Form, Place};
use super::subject::Caller;
use super::ways::Cores;
use crate::measure::{Options, Samples};
use crate::report::Report;
use std::process::ExitCode;
use std::time::Duration;

/// Calls before the rest.
const CALLS: usize = 2000;
const REST: Duration = Duration::from_millis(200);

const PLACES: [(&str, &str, Cores, Place); 2] = [
    ("one", "one core", Cores::One, Place::Default),
    ("hot", "hot on another core", Cores::Two, Place::Apart),
];

pub fn run(report: &mut Report, options: &Options) {
    report.section("Processor time of the domain for a call and 200 ms without one, us");
    let allowed = peregrine_call::Limits::default().spin.as_secs_f64() * 1e6;
    for (name, title, _, _) in PLACES {
        let (mut ours, mut most) = (Samples::default(), Samples::default());
        for _ in 0..options.rounds(7) {
            ours.push(again(&["call-case", "idle", name])[0] * 1e-3);
            most.push(allowed);
        }
        report.samples(
            &format!("a call, then idle, {title}"),
            "processor time",
            "us",
            &ours,
            ("its limit", &most),
        );
    }
}

/// One rest in this process.
pub fn case(words: &[&str]) -> ExitCode {
    let Some((_, _, cores, place)) = PLACES.iter().find(|place| words.first() == Some(&place.0)) else {
        return ExitCode::from(2);
    };
    let mut caller = ours::start(0, *cores, Form::In, *place);
    for _ in 0..CALLS {
        caller.call();
    }
    // The counts are read in files, which takes longer than a look: so the call that is looked after comes after the first reading.
    std::thread::sleep(REST);
    let before = cpu_ns(caller.domain_pid());
    caller.call();
    std::thread::sleep(REST);
    println!("{}", cpu_ns(caller.domain_pid()) - before);
    ExitCode::SUCCESS
}

/// Processor time of all threads of a process so far.
fn cpu_ns(pid: i32) -> f64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the domain lives");
    tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok())
        .filter_map(|text| text.split_whitespace().next()?.parse::<f64>().ok())
        .sum()
}
