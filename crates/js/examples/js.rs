//! Runs a file on the main thread: `cargo run --release -p peregrine-js --example js -- FILE [ARGS]`.

use std::path::PathBuf;
use std::process::ExitCode;

use peregrine_js::{Host, run_script_on};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let Some(file) = args.next().map(PathBuf::from) else {
        eprintln!("which script? Usage: js FILE [ARGS]");
        return ExitCode::from(2);
    };
    let source = match std::fs::read_to_string(&file) {
        Ok(source) => source,
        Err(error) => {
            eprintln!("can't read {}: {error}", file.display());
            return ExitCode::from(2);
        }
    };
    let host = Host { stack_bytes: 7 << 20, ..Host::default() };
    match run_script_on(host, &file, &source, &args.collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
