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

use clap::{Args, Parser, Subcommand};
use report::{Format, Report};
use std::path::PathBuf;
use std::process::ExitCode;

/// Measure one suite, each row beside its baseline in the same run.
#[derive(Debug, Parser)]
#[command(name = "bench", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Debug, Subcommand)]
enum Suite {
    /// Calls between processes: null, small and large, beside pipes, sockets, RPC and shared-memory crates
    Call(How),
    /// A million parked threads, beside tokio's tasks and Go's goroutines
    Million {
        #[command(flatten)]
        how: How,
        /// So many
        #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = at_least_one)]
        threads: usize,
    },
    /// RadixVM's evaluation on processes, beside bare calls and Linux threads
    Space(How),
    /// Three kinds of stack, beside OS threads, processes and event objects
    Stacks {
        #[command(flatten)]
        how: How,
        /// Draw the curves into this directory too
        #[arg(long, value_name = "DIR")]
        figures: Option<PathBuf>,
    },
    /// Switch, move, computation, messages and images of threads
    Thread(How),
    /// Appel and Li's primitives, beside bare calls
    Vm(How),
}

#[derive(Debug, Args)]
struct How {
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Fewer rounds: less time, wider spread
    #[arg(long)]
    quick: bool,
    /// Only cases whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// A number of threads; none can't be measured.
fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("the least is 1".to_owned()),
        Ok(n) => Ok(n),
        Err(e) => Err(format!("{e}")),
    }
}

impl How {
    /// A report on `suite` in the form asked for, and what the suite is told.
    fn begin(self, suite: &'static str) -> (Report, measure::Options) {
        let format = if self.json { Format::Json } else { Format::Table };
        (Report::new(suite, format), measure::Options { quick: self.quick, only: self.only })
    }
}

/// What is no suite: one subject of a suite, in a process of its own that the suite starts.
fn run_case(arguments: &[String]) -> Option<ExitCode> {
    let (case, rest) = arguments.split_first()?;
    Some(match case.as_str() {
        "call-case" => call::run_case(rest),
        "million-case" => million::run_case(rest),
        "space-case" => space::index::run_case(rest),
        "space-path" => space::structures::path::run_one(rest),
        "space-record" => space::memory::record(rest),
        "space-scene" => space::structures::trace::run_scene(rest),
        "stacks-case" => stacks::run_case(rest),
        "thread-case" => thread::run_case(rest),
        "vm-path" => {
            vm::path::run_one(rest);
            ExitCode::SUCCESS
        }
        _ => return None,
    })
}

fn main() -> ExitCode {
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    if let Some(code) = run_case(&arguments) {
        return code;
    }
    match Cli::parse().suite {
        Suite::Call(how) => {
            let (mut report, options) = how.begin("call");
            call::run(&mut report, &options);
        }
        Suite::Million { how, threads } => {
            let (mut report, options) = how.begin("million");
            million::run(&mut report, &options, threads);
        }
        Suite::Space(how) => {
            let (mut report, options) = how.begin("space");
            space::run(&mut report, &options);
        }
        Suite::Stacks { how, figures } => {
            let (mut report, options) = how.begin("stacks");
            stacks::run(&mut report, &options, figures.as_deref());
        }
        Suite::Thread(how) => {
            let (mut report, options) = how.begin("thread");
            thread::run(&mut report, &options);
        }
        Suite::Vm(how) => {
            let (mut report, options) = how.begin("vm");
            vm::run(&mut report, &options);
        }
    }
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    #[test]
    fn every_suite_tells_its_options_and_refuses_others() {
        Cli::command().debug_assert();
        for suite in ["call", "million", "space", "stacks", "thread", "vm"] {
            for (word, kind) in [
                ("--help", ErrorKind::DisplayHelp),
                ("--quik", ErrorKind::UnknownArgument),
                ("--only", ErrorKind::InvalidValue),
                ("more", ErrorKind::UnknownArgument),
            ] {
                let answer = Cli::try_parse_from(["bench", suite, word]).expect_err("no run begins");
                assert_eq!(answer.kind(), kind, "bench {suite} {word}");
            }
        }
    }
}
