//! `soak SUITE [--seed N] [--seconds S]`: the tests' random runs, for as long as one likes.
//!
//! The seed is printed; with the same one the same plans are tried in the same order (how threads interleave is the
//! machine's). The first failure ends the run.

mod call;
mod kill;
mod space;
mod thread;
mod vm;

use clap::{Args, Parser, Subcommand};
use std::process::ExitCode;

/// Try for as long as one likes what the tests try briefly. The first failure ends the run.
#[derive(Debug, Parser)]
#[command(name = "soak", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Debug, Subcommand)]
enum Suite {
    /// Hostile clients and hostile domains; domains killed at random beneath many callers; ten thousand idle clients
    Call(Run),
    /// Nodes and supervisors killed at each of their steps, and the tests' long forms; builds them with cargo first
    Kill(Run),
    /// The address space over processes: members stopped at random, and killed at every step
    Space {
        #[command(flatten)]
        run: Run,
        /// Only stop members at random
        #[arg(long, conflicts_with = "kill")]
        stop: bool,
        /// Only kill members
        #[arg(long)]
        kill: bool,
    },
    /// CG and a script under kills, moves and resumes at random moments; builds the command with cargo first
    Thread(Run),
    /// Writes to tracked memory: none is missed by any mechanism
    Vm(Run),
}

#[derive(Debug, Args)]
struct Run {
    /// Seed of all choices [default: another one each time; it is printed]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Begin no further round after this many seconds
    #[arg(long, value_name = "S", default_value_t = 60)]
    seconds: u64,
}

impl Run {
    fn seed(&self) -> u64 {
        self.seed.unwrap_or_else(|| u64::from(std::process::id()))
    }
}

fn main() -> ExitCode {
    let passed = match Cli::parse().suite {
        Suite::Call(run) => {
            call::run(run.seed(), run.seconds);
            true
        }
        Suite::Kill(run) => kill::run(run.seed(), run.seconds),
        Suite::Space { run, stop, kill } => {
            space::run(run.seed(), run.seconds, [!kill, !stop]);
            true
        }
        Suite::Thread(run) => thread::run(run.seed(), run.seconds),
        Suite::Vm(run) => {
            vm::run(run.seed(), run.seconds);
            true
        }
    };
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    #[test]
    fn every_suite_tells_its_options_and_refuses_others() {
        Cli::command().debug_assert();
        for suite in ["call", "kill", "space", "thread", "vm"] {
            for (word, kind) in [
                ("--help", ErrorKind::DisplayHelp),
                ("--sedonds", ErrorKind::UnknownArgument),
                ("--seconds=soon", ErrorKind::ValueValidation),
                ("more", ErrorKind::UnknownArgument),
            ] {
                let answer = Cli::try_parse_from(["soak", suite, word]).expect_err("no run begins");
                assert_eq!(answer.kind(), kind, "soak {suite} {word}");
            }
        }
    }
}
