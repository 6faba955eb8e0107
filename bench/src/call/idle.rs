//! What an activation costs when the calls end: it looks for the next one for a moment, and then uses no processor.
//!
//! The processor time of all the domain's threads, by the kernel's count, for one call after many and the 200 ms that follow it, beside the
//! same of a domain that does not look (`Limits::spin` of zero). The call and its wake-up are in both; the difference may be 20 us.

use super::again;
use super::ours::{self, Form, Place};
use super::subject::Caller;
use super::ways::Cores;
use crate::measure::{Options, Samples};
use crate::report::Report;
use peregrine_call::Limits;
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
    for (name, title, _, _) in PLACES {
        let (mut looks, mut asleep) = (Samples::default(), Samples::default());
        for _ in 0..options.rounds(7) {
            let us = |what| again(&["call-case", "idle", name, what])[0] * 1e-3;
            looks.push(us("looks"));
            asleep.push(us("asleep"));
        }
        let case = format!("a call, then idle, {title}");
        report.samples(&case, "processor time", "us", &looks, ("a domain that does not look", &asleep));
    }
}

/// One rest in this process: `one|hot looks|asleep`.
pub fn case(words: &[&str]) -> ExitCode {
    let [name, what] = words[..] else { return ExitCode::from(2) };
    let Some((_, _, cores, place)) = PLACES.iter().find(|place| place.0 == name) else {
        return ExitCode::from(2);
    };
    let mut limits = Limits::default();
    if what == "asleep" {
        limits.spin = Duration::ZERO;
    }
    let mut caller = ours::start_with(0, *cores, Form::In, *place, limits);
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
