//! `soak SUITE [--seed N] [--seconds S]`: the tests' random runs, for as long as one likes.
//!
//! The seed is printed; with the same one the same plans are tried in the same order (how threads interleave is the
//! machine's). The first failure ends the run.

mod call;
mod kill;
mod space;
mod thread;
mod vm;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |flag: &str| {
        let at = arguments.iter().position(|a| a == flag)?;
        arguments.get(at + 1)?.parse::<u64>().ok()
    };
    let seed = number("--seed").unwrap_or_else(|| u64::from(std::process::id()));
    let seconds = number("--seconds").unwrap_or(60);
    match arguments.first().map(String::as_str) {
        Some("call") => {
            call::run(seed, seconds);
            ExitCode::SUCCESS
        }
        Some("vm") => {
            vm::run(seed, seconds);
            ExitCode::SUCCESS
        }
        Some("space") => {
            let has = |word| arguments.iter().any(|a| a == word);
            space::run(seed, seconds, [!has("--kill"), !has("--stop")]);
            ExitCode::SUCCESS
        }
        Some("kill") if kill::run(seed, seconds) => ExitCode::SUCCESS,
        Some("kill") => ExitCode::FAILURE,
        Some("thread") if thread::run(seed, seconds) => ExitCode::SUCCESS,
        Some("thread") => ExitCode::FAILURE,
        _ => {
            eprintln!(
                "usage: soak call|kill|space|thread|vm [--seed N] [--seconds S]; space: --stop or --kill for one half"
            );
            ExitCode::from(2)
        }
    }
}
