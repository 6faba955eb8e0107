//! A tracked range never misses a write: every mechanism, memory and number of views by turns.

// The very code that the tests run, so that the two can't differ.
#[path = "../../crates/vm/tests/stress/mod.rs"]
mod stress;

use peregrine_vm::{Capabilities, DirtyMechanism, Mapping, Tracker};
use std::sync::Arc;
use std::time::{Duration, Instant};
use stress::{MEMORY, Plan, never_misses};

/// Runs plans until the time is up.
pub fn run(mut seed: u64, seconds: u64) {
    let caps = Capabilities::probe();
    println!("seed {seed}, {seconds} s\n{caps}");
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut runs = 0;
    while Instant::now() < end {
        for mechanism in DirtyMechanism::ALL {
            for views in [1, 2, 3] {
                for memfd in [true, false] {
                    if views > 1 && !memfd {
                        continue;
                    }
                    let memory = if memfd { Mapping::memfd(MEMORY) } else { Mapping::anonymous(MEMORY) };
                    let memory = Arc::new(memory.expect("memory"));
                    if let Err(why) = Tracker::of(memory.clone()).force(mechanism).start(&caps) {
                        println!("skipped {mechanism}: {why}");
                        continue;
                    }
                    let plan = Plan { seed, time: Duration::from_millis(500), mechanism, views };
                    let tally = never_misses(&memory, plan, &caps);
                    println!(
                        "{mechanism}, {views} view(s), {}: {tally:?}",
                        if memfd { "memfd" } else { "anonymous" }
                    );
                    runs += 1;
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    if Instant::now() >= end {
                        println!("{runs} runs, no write missed");
                        return;
                    }
                }
            }
        }
    }
    println!("{runs} runs, no write missed");
}
