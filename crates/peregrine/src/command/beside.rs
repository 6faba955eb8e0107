//! `peregrine bench` and `peregrine soak`: programs of their own, so that nobody's first build has to wait for what they are
//! measured against; found beside this one and executed in its place. Until they are built, what they offer is told from here
//! (a test compares it with what they say themselves).

use super::{SYSTEM, fail};
use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

/// What is passed on, whatever it is.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(super) struct BesideOptions {
    /// The program's own arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// A program that lies beside this one.
pub(super) struct Beside {
    name: &'static str,
    about: &'static str,
    suites: &'static [(&'static str, &'static str)],
    /// The options that all suites have.
    options: &'static str,
}

/// The papers' tables beside today's alternatives.
pub(super) const BENCH: Beside = Beside {
    name: "bench",
    about: "Measure one suite, each row beside its baseline in the same run",
    suites: &[
        (
            "call",
            "Calls between processes: null, small and large, beside pipes, sockets, RPC and shared-memory crates",
        ),
        ("million", "A million parked threads, beside tokio's tasks and Go's goroutines"),
        ("space", "RadixVM's evaluation on processes, beside bare calls and Linux threads"),
        ("stacks", "Three kinds of stack, beside OS threads, processes and event objects"),
        ("thread", "Switch, move, computation, messages and images of threads"),
        ("vm", "Appel and Li's primitives, beside bare calls"),
    ],
    options: "--json, --quick, --only TEXT",
};

/// Long random runs.
pub(super) const SOAK: Beside = Beside {
    name: "soak",
    about: "Try for as long as one likes what the tests try briefly. The first failure ends the run",
    suites: &[
        (
            "call",
            "Hostile clients and hostile domains; domains killed at random beneath many callers; ten thousand idle clients",
        ),
        (
            "kill",
            "Nodes and supervisors killed at each of their steps, and the tests' long forms; builds them with cargo first",
        ),
        ("space", "The address space over processes: members stopped at random, and killed at every step"),
        (
            "thread",
            "CG and a script under kills, moves and resumes at random moments; builds the command with cargo first",
        ),
        ("vm", "Writes to tracked memory: none is missed by any mechanism"),
    ],
    options: "--seed N, --seconds S",
};

/// Executes the program; returns only if that can't be done.
pub(super) fn run(beside: &Beside, options: &BesideOptions) -> ExitCode {
    let me = std::env::current_exe().unwrap_or_default();
    let program = me.with_file_name(beside.name);
    let e = Command::new(&program).args(&options.arguments).exec();
    if e.kind() != ErrorKind::NotFound {
        return fail(SYSTEM, format_args!("{}: {e}", program.display()));
    }
    let name = beside.name;
    let first = options.arguments.first().and_then(|a| a.to_str());
    match first {
        Some("--help" | "-h" | "help") => {
            print!("{}", help(beside));
            ExitCode::SUCCESS
        }
        None => {
            eprint!("{}", help(beside));
            ExitCode::from(2)
        }
        Some(suite) if beside.suites.iter().any(|(s, _)| *s == suite) => fail(
            SYSTEM,
            format_args!(
                "there is no {} yet; in the clone, `cargo run --release -p {name} -- {suite}` builds and runs it, and after \
                 that `target/release/peregrine {name} {suite}` does",
                program.display()
            ),
        ),
        Some(other) => {
            let suites: Vec<_> = beside.suites.iter().map(|(s, _)| *s).collect();
            fail(2, format_args!("{name} has no suite {other:?}; it has {}", suites.join(", ")))
        }
    }
}

fn help(beside: &Beside) -> String {
    let Beside { name, about, suites, options } = beside;
    let lines: String = suites.iter().map(|(suite, what)| format!("  {suite:<8} {what}\n")).collect();
    format!(
        "{about}\n\nUsage: peregrine {name} <SUITE> [OPTIONS]\n\nSuites:\n{lines}\nOptions of each: {options}; SUITE --help tells \
         more.\n\nThis is a program of its own, and not built yet. In the clone, `cargo run --release -p {name} -- SUITE` builds and \
         runs it.\n"
    )
}
