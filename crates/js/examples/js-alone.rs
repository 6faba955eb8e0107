//! Runs a script on the main thread of an ordinary process: the baseline that any other way to run it must equal.
//!
//! ```text
//! js-alone FILE [ARGS]      0: ran to its end   1: an error, on standard error   2: no such script
//! ```

use std::path::PathBuf;
use std::process::ExitCode;

use peregrine_js::{Host, run_script_on};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let Some(file) = args.next().map(PathBuf::from) else {
        eprintln!("which script? Usage: js-alone FILE [ARGS]");
        return ExitCode::from(2);
    };
    let source = match std::fs::read_to_string(&file) {
        Ok(source) => source,
        Err(error) => {
            eprintln!("can't read {}: {error}", file.display());
            return ExitCode::from(2);
        }
    };
    // The kernel gives the main thread 8 MiB if nobody asked for less.
    let host = Host { stack_bytes: 7 << 20, ..Host::default() };
    match run_script_on(host, &file, &source, &args.collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
