//! What the attributes expand to.

use crate::testing::{CHILD, Program};
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
    let ended =
        if std::env::var_os("PEREGRINE_RESUME").is_some() { resume(config) } else { run(config, entry) };
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

/// Runs a test as a child process and panics with its output if it fails.
pub fn test(name: &'static str, settings: &'static [(&'static str, &'static str)]) {
    let outcome = Program { name, settings }.run();
    assert!(outcome.success(), "{outcome}");
}

/// In the child that was started for the test `name`: runs it and ends the process. Returns at once in any other process.
///
/// Called before `main`, when the process has one thread.
pub fn enter_test<T: Termination>(name: &str, entry: fn() -> T) {
    if std::env::var_os(CHILD).is_none_or(|n| n != name) {
        return;
    }
    // What the standard library does before `main`; programs that a test starts get the default again from it.
    peregrine_sys::signal::ignore(peregrine_sys::signal::number::PIPE);
    let config = Config::from_env().unwrap_or_else(|e| end(64, &e));
    let ended = peregrine_world::run(config, repeated::<T>, entry as usize, &[]);
    let ended = ended.unwrap_or_else(|e| end(70, &e));
    let s = &ended.stats;
    let medians = format!("rollback {:.1} ms", peregrine_world::median_ms(&s.recovery_ns));
    eprintln!(
        "peregrine: {} moves ({} of a running thread), {} preemptions, {} kills ({} on a running thread), {} deaths, {} images ({} given up), {} rollbacks ({medians}), {:.1} s",
        s.moves,
        s.preempted_moves,
        s.preemptions,
        s.kills,
        s.kills_hit,
        s.deaths,
        s.images,
        s.images_given_up,
        s.rollbacks,
        s.ran_ns as f64 / 1e9
    );
    if ended.code == 0 {
        let happened = [s.moves, s.kills, s.preemptions, s.preempted_moves];
        if let Some((what, least, happened)) = lacking(happened) {
            end(75, &format!("the test counts only with {least} {what}, and there were {happened}"));
        }
    }
    std::process::exit(ended.code)
}

/// The body of a test's World: what the test needs to have happened depends on how fast the machine is, so a test that ended well
/// before it had is run once more.
fn repeated<T: Termination>(function: usize, _: Vec<u8>, _: Vec<u32>) -> Result<(Vec<u8>, Vec<u32>), String> {
    // SAFETY: `enter_test` passed the address of a `fn() -> T` together with `repeated::<T>`.
    let entry = unsafe { core::mem::transmute::<usize, fn() -> T>(function) };
    loop {
        let code = code_of(entry().report());
        let t = peregrine_world::tally();
        if code != 0 || lacking([t.moves, t.kills, t.preemptions, t.preempted_moves]).is_none() {
            return Ok((vec![code], Vec::new()));
        }
    }
}

/// Of what the test needs, something that has not happened often enough: what, how often it must, how often it has.
fn lacking(happened: [u64; 4]) -> Option<(&'static str, u64, u64)> {
    let needs = [
        ("MOVES", "moves"),
        ("KILLS", "kills"),
        ("PREEMPTIONS", "preemptions"),
        ("PREEMPTED_MOVES", "moves of a running thread"),
    ];
    needs.into_iter().zip(happened).find_map(|((variable, what), happened)| {
        let least = std::env::var(format!("PEREGRINE_TEST_LEAST_{variable}")).ok()?.parse().ok()?;
        (happened < least).then_some((what, least, happened))
    })
}

fn end(code: i32, why: &dyn std::fmt::Display) -> ! {
    eprintln!("peregrine: {why}");
    std::process::exit(code)
}
