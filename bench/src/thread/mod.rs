//! Threads that own everything they write, beside what else there is: switch, move, compute, talk, image.
//!
//! ```text
//!   bench thread ──▶ bench thread-case world-switch 26 tls     a World, from a process of one thread
//!       │       ◀── samples, one a line ──
//!       └──────────▶ bench thread-case coroutine 26            its baseline, likewise
//! ```
//!
//! A World is started from a process with one thread and owns the process tree under it, so each subject is this program
//! again with a hidden sub-command. Subject and baseline take turns; a process gives several samples, of which the
//! middle one counts, and a row is the middle of the processes.

mod compute;
mod image;
mod moving;
mod plain;
mod switch;
mod talk;

pub use switch::APART;

use crate::measure::{Options, Samples};
// The processor that single-node cases share with nobody of their own.
use crate::others::CPU;
use crate::report::Report;
use peregrine_world::{Config, Ended};
use std::process::{Command, ExitCode, Stdio};

/// The whole suite.
pub fn run(report: &mut Report, options: &Options) {
    report.note("# peregrine bench thread");
    switch::run(report, options);
    moving::run(report, options);
    compute::run(report, options);
    talk::run(report, options);
    image::run(report, options);
}

/// Rounds of a row, `full` or, in a quick run, so few that the whole suite takes less than two minutes: each subject starts a
/// World, and some wait for kills.
const fn rounds(options: &Options, full: usize) -> usize {
    if options.quick { 2 } else { full }
}

/// One subject, in this process; prints its samples.
pub fn run_case(arguments: &[String]) -> ExitCode {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let known = match words.split_first() {
        Some((name, rest)) => {
            switch::case(name, rest)
                || moving::case(name, rest)
                || compute::case(name, rest)
                || talk::case(name, rest)
                || image::case(name, rest)
        }
        None => false,
    };
    if known { ExitCode::SUCCESS } else { ExitCode::from(2) }
}

/// Runs one subject in a process of its own; the samples of each of its columns.
pub fn columns(arguments: &str) -> Vec<Samples> {
    columns_without(arguments, None)
}

/// As [`columns`]; lines on standard error that hold `expected` are what the subject is about, and not shown.
pub fn columns_without(arguments: &str, expected: Option<&str>) -> Vec<Samples> {
    let program = std::env::current_exe().expect("this program's path");
    let out = Command::new(program)
        .arg("thread-case")
        .args(arguments.split_whitespace())
        .stderr(Stdio::piped())
        .output()
        .expect("this program runs again");
    for line in String::from_utf8_lossy(&out.stderr).lines() {
        if expected.is_none_or(|text| !line.contains(text)) {
            eprintln!("{line}");
        }
    }
    assert!(out.status.success(), "thread-case {arguments}: {}", out.status);
    let mut columns: Vec<Samples> = Vec::new();
    for line in String::from_utf8_lossy(&out.stdout).lines() {
        for (i, word) in line.split_whitespace().enumerate() {
            if columns.len() <= i {
                columns.push(Samples::default());
            }
            columns[i].push(word.parse().unwrap_or(f64::NAN));
        }
    }
    assert!(!columns.is_empty(), "thread-case {arguments}: no samples");
    columns
}

/// The middle sample of a subject with one column.
fn middle(arguments: &str) -> f64 {
    columns(arguments)[0].median()
}

/// A World of `nodes` nodes without images.
fn quiet_world(nodes: u32) -> Config {
    Config { nodes, image_interval: None, ..Config::default() }
}

/// Runs `entry(argument)` as the main thread of a World.
fn in_world(config: Config, entry: fn(&str), argument: &str) -> Ended {
    let ended = peregrine_world::run(config, body, entry as usize, argument.as_bytes()).expect("a World");
    assert!(ended.code == 0, "the case failed");
    ended
}

fn body(entry: usize, argument: Vec<u8>, _: Vec<u32>) -> Result<(Vec<u8>, Vec<u32>), String> {
    // SAFETY: `in_world` passes the address of a `fn(&str)`.
    let entry = unsafe { core::mem::transmute::<usize, fn(&str)>(entry) };
    entry(std::str::from_utf8(&argument).map_err(|e| e.to_string())?);
    Ok((vec![0], Vec::new()))
}

/// The numbers among `words`.
fn numbers(words: &[&str]) -> Vec<usize> {
    words.iter().filter_map(|w| w.parse().ok()).collect()
}
