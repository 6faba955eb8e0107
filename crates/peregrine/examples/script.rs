//! Runs a JavaScript file in a thread: `script FILE [ARGS]`.
use peregrine_js::Host;
use std::process::ExitCode;

#[peregrine::main]
fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some((file, rest)) = args.split_first() else {
        eprintln!("usage: script FILE [ARGS]");
        return ExitCode::from(64);
    };
    let source = match std::fs::read_to_string(file) {
        Ok(source) => source,
        Err(e) => {
            eprintln!("cannot read {file}: {e}");
            return ExitCode::FAILURE;
        }
    };
    let host = Host { sleep: peregrine::sleep, stack_bytes: 8 << 20 };
    match peregrine_js::run_script_on(host, std::path::Path::new(file), &source, rest) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
