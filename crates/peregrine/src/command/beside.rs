//! `peregrine bench` and `peregrine soak`: programs of their own, so that nobody's first build has to wait for what they are
//! measured against; found beside this one and executed in its place.

use super::{SYSTEM, fail};
use std::ffi::OsString;
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

/// Executes `name`; returns only if that can't be done.
pub(super) fn run(name: &str, options: &BesideOptions) -> ExitCode {
    let me = std::env::current_exe().unwrap_or_default();
    let program = me.with_file_name(name);
    let e = Command::new(&program).args(&options.arguments).exec();
    let how = "build it once: cargo build --release -p ";
    fail(SYSTEM, format_args!("{}: {e}; it lies beside this command: {how}{name}", program.display()))
}
