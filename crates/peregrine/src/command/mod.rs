//! What can be typed after `peregrine`. One file for each command.
//!
//! Exit codes: 0 it did what was asked; 1 it ran, but the result is not what was asked for; 2 the command line makes no
//! sense (clap's); 70 the system refused something; 128 + n a signal n ended it.

mod ask;
mod beside;
mod cg;
mod doctor;
mod finished;
mod js;
mod ps;
mod report;
mod resume;
mod symbols;
mod world_options;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// The system refused something.
const SYSTEM: u8 = 70;

/// Threads that move between processes, go to disk and survive kill -9.
#[derive(Debug, Parser)]
#[command(name = "peregrine", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a program whose threads are preempted, moved, imaged and killed
    #[command(subcommand)]
    Run(Program),
    /// Go on with the last image in a store, after all processes of its World were killed
    Resume(resume::ResumeOptions),
    /// List the Worlds that run, their nodes and their threads
    Ps(ps::PsOptions),
    /// Move a thread to another node
    Migrate(ask::MigrateOptions),
    /// Take an image of all threads now, on disk if the World has a store
    Checkpoint(ask::CheckpointOptions),
    /// Tell what this machine allows, what is used instead, and what to change
    Doctor(doctor::DoctorOptions),
    /// Measure: `peregrine bench --help` lists the suites
    Bench(beside::BesideOptions),
    /// Try for as long as one likes what the tests try briefly: `peregrine soak --help` lists the suites
    Soak(beside::BesideOptions),
}

#[derive(Debug, Subcommand)]
enum Program {
    /// The NAS benchmark CG: threads exchange vectors by messages; the result is verified
    Cg(cg::CgOptions),
    /// A JavaScript file in an unmodified engine, preempted, moved and imaged at any instruction
    Js(js::JsOptions),
}

/// Parses the command line and obeys.
pub(crate) fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(Program::Cg(options)) => cg::run(&options),
        Command::Run(Program::Js(options)) => js::run(&options),
        Command::Resume(options) => resume::run(&options),
        Command::Ps(options) => ps::run(&options),
        Command::Migrate(options) => ask::migrate(&options),
        Command::Checkpoint(options) => ask::checkpoint(&options),
        Command::Doctor(options) => doctor::run(&options),
        Command::Bench(options) => beside::run(&beside::BENCH, &options),
        Command::Soak(options) => beside::run(&beside::SOAK, &options),
    }
}

/// Prints an error as this command does and gives the exit code.
fn fail(code: u8, message: impl std::fmt::Display) -> ExitCode {
    eprintln!("peregrine: {message}");
    ExitCode::from(code)
}
