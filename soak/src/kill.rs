//! Kill points and long forms, again and again: nodes and supervisors killed at each of their steps, each round with a seed of its
//! own; storms of moves, millions of messages, scripts that cross a thousand times.
//!
//! The tests do the work; here they are told to be long. A round's seed is printed, so that a failure can be tried again with
//! `PEREGRINE_SEED`.

use std::process::Command;
use std::time::{Duration, Instant};

fn test(arguments: &[&str], seed: u64) -> bool {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .args(["test", "--release", "--quiet"])
        .args(arguments);
    cargo
        .env("PEREGRINE_SEED", seed.to_string())
        .env("PEREGRINE_KILL_POINTS", "6")
        .env("PEREGRINE_TIMES", "3");
    cargo.env("TESTKIT_LIMIT", "900").status().is_ok_and(|s| s.success())
}

/// Runs rounds for about `seconds`; `false` after the first failure.
pub fn run(mut seed: u64, seconds: u64) -> bool {
    let end = Instant::now() + Duration::from_secs(seconds);
    println!("soak kill: {seconds} s");
    if !test(
        &[
            "-p",
            "peregrine",
            "--test",
            "values",
            "--test",
            "messages",
            "--test",
            "durable",
            "--",
            "--ignored",
        ],
        seed,
    ) {
        println!("FAILED: a long form, seed {seed}");
        return false;
    }
    while Instant::now() < end {
        println!("round with PEREGRINE_SEED={seed}");
        if !test(
            &["-p", "peregrine-world", "--test", "kill", "--test", "supervisor", "--", "--nocapture"],
            seed,
        ) {
            println!("FAILED: kill points, seed {seed}");
            return false;
        }
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1) >> 16;
    }
    true
}
