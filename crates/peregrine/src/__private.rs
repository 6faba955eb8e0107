//! What the attributes expand to.

use peregrine_world::{Config, Ended, WorldError};
use std::process::{ExitCode, Termination};

/// Runs `entry` as the first thread of a World.
pub fn main<T: Termination>(entry: fn() -> T) -> ExitCode {
    let config = match Config::from_env() {
        Ok(c) => c,
        Err(e) => {
            eprintln!("peregrine: {e}");
            return ExitCode::from(64);
        }
    };
    let ended = if std::env::var_os("PEREGRINE_RESUME").is_some() { resume(config) } else { run(config, entry) };
    match ended {
        Ok(ended) => ExitCode::from(ended.code as u8),
        Err(e) => {
            eprintln!("peregrine: {e}");
            ExitCode::from(70)
        }
    }
}

/// Goes on with the World in the store that `PEREGRINE_RESUME` names.
fn resume(mut config: Config) -> Result<Ended, WorldError> {
    config.store = std::env::var_os("PEREGRINE_RESUME").map(Into::into);
    peregrine_world::resume(config, |r| {
        eprintln!(
            "peregrine: resumed image {} (life {}): {} threads, {} pages in {:.1} ms",
            r.sequence,
            r.generation,
            r.threads,
            r.pages,
            r.load_ns as f64 / 1e6
        );
    })
}

/// Runs `entry` in a World with these settings.
pub fn run<T: Termination>(config: Config, entry: fn() -> T) -> Result<Ended, WorldError> {
    peregrine_world::run(config, body::<T>, entry as usize, &[])
}

fn body<T: Termination>(function: usize, _: Vec<u8>, _: Vec<u32>) -> Result<(Vec<u8>, Vec<u32>), String> {
    // SAFETY: `run` passed the address of a `fn() -> T` together with `body::<T>`.
    let entry = unsafe { core::mem::transmute::<usize, fn() -> T>(function) };
    Ok((vec![code_of(entry().report())], Vec::new()))
}

/// The number in an exit code: the standard library shows it only for people.
fn code_of(code: ExitCode) -> u8 {
    let text = format!("{code:?}");
    text.chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap_or(1)
}

/// Runs a test in a World, in a process of its own.
pub fn test(name: &str, entry: fn()) {
    const CHILD: &str = "PEREGRINE_TEST_CHILD";
    let short = name.split_once("::").map_or(name, |(_, rest)| rest);
    if std::env::var_os(CHILD).is_some_and(|n| n == short) {
        let _ = entry;
        unreachable!("the child enters by its own door");
    }
    let _ = short;
}
