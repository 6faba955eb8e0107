//! Three kinds of stack beside the other flows of control: what a switch costs, what each needs, how many there can be.
//!
//! ```text
//!   bench stacks ──▶ bench stacks-case world copy 2 8192 1     a World, from a process of one thread
//!       │        ◀── samples, one a line ──
//!       └──────────▶ bench stacks-case os 2                    OS threads, processes, event objects, memcpy: likewise
//! ```
//!
//! This is the measurement of Zheng, Lawlor and Kalé, "Multiple Flows of Control in Migratable Parallel Programs": switch
//! time over the live stack and over the number of flows, for processes, OS threads, user-level threads of three kinds and
//! event-driven objects. *Hit*: every thread has a window of its own. *Conflict*: one window for all.

mod flows;
mod plot;
mod space;
mod switch;

use crate::measure::{Options, Samples};
use crate::report::Report;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

/// The whole suite; figures go to `figures`, if that is given.
pub fn run(report: &mut Report, options: &Options, figures: Option<&Path>) {
    report.note("# peregrine bench stacks");
    let curves = switch::run(report, options);
    space::run(report, options);
    flows::run(report, options);
    if let Some(dir) = figures {
        match plot::draw(dir, &curves) {
            Ok(()) => report.note(&format!("    figures: {}", dir.display())),
            Err(e) => report.note(&format!("    no figures: {e}")),
        }
    }
}

/// One subject, in this process; prints its samples.
pub fn run_case(arguments: &[String]) -> ExitCode {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let known = match words.split_first() {
        Some((name, rest)) => {
            switch::case(name, rest)
                || crate::others::case(name, rest)
                || space::case(name, rest)
                || flows::case(name, rest)
        }
        None => false,
    };
    if known { ExitCode::SUCCESS } else { ExitCode::from(2) }
}

/// Runs one subject in a process of its own; `None` if it could not be done, with the reason on standard error.
pub fn subject(arguments: &str) -> Option<Samples> {
    let out = Command::new(std::env::current_exe().ok()?)
        .arg("stacks-case")
        .args(arguments.split_whitespace())
        .stderr(Stdio::inherit())
        .output()
        .ok()?;
    let mut samples = Samples::default();
    for line in String::from_utf8_lossy(&out.stdout).lines() {
        samples.push(line.trim().parse().ok()?);
    }
    (out.status.success() && samples.len() != 0).then_some(samples)
}

/// The numbers among `words`.
pub fn numbers(words: &[&str]) -> Vec<usize> {
    words.iter().filter_map(|w| w.parse().ok()).collect()
}
