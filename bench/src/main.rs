//! `bench SUITE [--json] [--quick] [--only TEXT]`: measures one suite. `stacks` takes `--figures DIR`, `million` `--threads N`.
//!
//! Every row is measured beside its baseline in the same run, turn and turn about, and printed with its spread; where we
//! lose stays in the table. With `--json`, one object a line: suite, case, metric, unit, value, baseline,
//! baseline_value, ratio, n.

mod call;
mod measure;
mod million;
mod others;
mod report;
mod space;
mod stacks;
mod thread;
mod vm;

use report::{Format, Report};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| arguments.iter().any(|a| a == flag);
    let value_of =
        |flag: &str| arguments.iter().position(|a| a == flag).and_then(|i| arguments.get(i + 1)).cloned();
    let format = if has("--json") { Format::Json } else { Format::Table };
    let options = measure::Options { quick: has("--quick"), only: value_of("--only") };
    match arguments.first().map(String::as_str) {
        Some("thread") => thread::run(&mut Report::new("thread", format), &options),
        // Not a suite: one subject of `thread`, in a process of its own.
        Some("thread-case") => return thread::run_case(&arguments[1..]),
        Some("call") => call::run(&mut Report::new("call", format), &options),
        // Not a suite: one way of `call`, in a process of its own.
        Some("call-case") => return call::run_case(&arguments[1..]),
        Some("space") => space::run(&mut Report::new("space", format), &options),
        // Not a suite: the recorder of what `space` puts into a radix array.
        Some("space-record") => return space::memory::record(&arguments[1..]),
        // Not a suite: the paper's application in a World, in a process of its own.
        Some("space-case") => return space::index::run_case(&arguments[1..]),
        // Not suites: the programs whose memory `space` traces and whose instructions it counts.
        Some("space-scene") => return space::structures::trace::run_scene(&arguments[1..]),
        Some("space-path") => return space::structures::path::run_one(&arguments[1..]),
        Some("stacks") => {
            let figures = value_of("--figures").map(std::path::PathBuf::from);
            stacks::run(&mut Report::new("stacks", format), &options, figures.as_deref());
        }
        // Not a suite: one subject of `stacks`, in a process of its own.
        Some("stacks-case") => return stacks::run_case(&arguments[1..]),
        Some("million") => {
            let threads = value_of("--threads").and_then(|n| n.parse().ok()).unwrap_or(1_000_000);
            million::run(&mut Report::new("million", format), &options, threads);
        }
        // Not a suite: one subject of `million`, in a process of its own.
        Some("million-case") => return million::run_case(&arguments[1..]),
        Some("vm") => vm::run(&mut Report::new("vm", format), &options),
        // Not a suite: the two programs whose instructions `vm` has counted.
        Some("vm-path") => vm::path::run_one(&arguments[1..]),
        _ => {
            eprintln!(
                "usage: bench call|million|space|stacks|thread|vm [--json] [--quick] [--only TEXT] [--figures DIR] [--threads N]"
            );
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}
