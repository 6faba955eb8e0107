//! Sharing by counting (item 2): cache lines that one simulated core wrote and another touched, per operation.
//!
//! The numbers are exact, not sampled: a machine with 80 cores would see these lines travel. What is allowed (the paper's cases) is
//! counted by itself: the first use of a range makes nodes, and ticks are the epoch's upkeep.

use super::recorded::base::sync::record::{as_core, shared_lines, take};
use super::recorded::counters::{Cached, Counter, Sharded, Shared, Snzi};
use super::recorded::scene::{CYCLE, Step, arena, open};
use super::recorded::space::model::{Delivery, ModelMmu, Tables};
use crate::report::Report;
use base_recorded::sync::{AtomicBool, AtomicI64, Ordering};
use std::collections::BTreeMap;

const CORES: [usize; 4] = [1, 10, 40, 80];
const ROUNDS: usize = 4;

/// Lines shared per operation, for each operation of the cycle, and in the cases that are allowed.
struct Found {
    steady: Vec<(&'static str, f64)>,
    first_use: f64,
    upkeep: f64,
}

fn ours(cores: usize, page_of: impl Fn(usize) -> usize, tables: Tables) -> Found {
    let (arena, frames) = arena(cores, cores * 8);
    let mmu = ModelMmu::new(&frames, cores, tables, Delivery::Interrupt);
    let (space, mut members) = open(&arena, &mmu, &frames, cores);
    let per_op = |lines: usize, rounds: usize| lines as f64 / (cores * rounds) as f64;
    take();
    let mut all = |step: Step| {
        for (core, m) in members.iter_mut().enumerate() {
            as_core(core as u32, || step(&space, m, page_of(core)));
        }
    };
    all(CYCLE[0].1);
    let first_use = per_op(shared_lines(&take()).len(), 1);
    CYCLE[1..].iter().for_each(|(_, step)| all(*step));
    let mut logs: Vec<Vec<_>> = CYCLE.iter().map(|_| Vec::new()).collect();
    take();
    for _ in 0..ROUNDS {
        for (log, (_, step)) in logs.iter_mut().zip(CYCLE) {
            all(*step);
            log.extend(take());
        }
    }
    let steady = CYCLE
        .iter()
        .zip(&logs)
        .map(|((name, _), log)| (*name, per_op(shared_lines(log).len(), ROUNDS)))
        .collect();
    let _ = take();
    for (core, m) in members.iter_mut().enumerate() {
        as_core(core as u32, || m.tick(&frames));
    }
    Found { steady, first_use, upkeep: per_op(shared_lines(&take()).len(), 1) }
}

/// A B-tree behind one lock: at least the lock's own line. (The nodes' lines are in the memory trace below.)
fn locked(cores: usize) -> f64 {
    let lock = AtomicBool::new(false);
    let mut tree = BTreeMap::new();
    take();
    for core in 0..cores {
        as_core(core as u32, || {
            while lock.swap(true, Ordering::Acquire) {}
            tree.insert(core << 20, core);
            lock.store(false, Ordering::Release);
        });
    }
    shared_lines(&take()).len() as f64 * cores as f64 / cores as f64
}

fn counter(counter: &dyn Counter, cores: usize) -> f64 {
    (0..cores).for_each(|core| counter.take_and_drop(core));
    take();
    for core in 0..cores {
        as_core(core as u32, || counter.take_and_drop(core));
    }
    shared_lines(&take()).len() as f64
}

pub fn run(report: &mut Report) {
    report.section("Written cache lines shared between cores, per operation (recorded; 0 scales)");
    for cores in CORES {
        // Pages of one leaf lie side by side, 64 of them; far apart is the paper's placement.
        let near = |core: usize| 64 * 1000 + core;
        let far = |core: usize| (core + 1) << 20;
        for (place, found) in [
            ("neighbouring pages", ours(cores, near, Tables::Views)),
            ("4 GiB apart", ours(cores, far, Tables::Views)),
        ] {
            for (name, lines) in &found.steady {
                report.value(
                    &format!("counted: {name}, {place}, {cores} cores"),
                    "shared lines",
                    "/op",
                    *lines,
                    None,
                );
            }
            let allowed = [("first use (nodes are made)", found.first_use), ("a tick (epoch)", found.upkeep)];
            for (name, lines) in allowed {
                report.value(
                    &format!("counted, allowed: {name}, {place}, {cores} cores"),
                    "shared lines",
                    "/op",
                    lines,
                    None,
                );
            }
        }
        let shared_table = ours(cores, near, Tables::Shared);
        for (name, lines) in shared_table.steady.iter().filter(|(n, _)| *n == "fault" || *n == "unmap") {
            report.value(
                &format!("counted, one shared table: {name}, neighbouring pages, {cores} cores"),
                "shared lines",
                "/op",
                *lines,
                None,
            );
        }
        report.value(
            &format!("counted, baseline: locked B-tree insert, {cores} cores"),
            "lines that every op shares",
            "/op",
            locked(cores),
            None,
        );
        let counters: [(&str, Box<dyn Counter>); 4] = [
            ("Refcache", Box::new(Cached::new(cores))),
            ("SNZI", Box::new(Snzi::new(cores))),
            ("one shared count", Box::new(Shared(AtomicI64::new(1)))),
            ("a count a core", Box::new(Sharded::new(cores))),
        ];
        for (name, c) in &counters {
            report.value(
                &format!("counted: {name}, a reference taken and dropped by each of {cores} cores"),
                "shared lines in all",
                "",
                counter(&**c, cores),
                None,
            );
        }
    }
    report.note(
        "the commuter (every commuting pair on two pages) is a test of peregrine-space: cargo test -p peregrine-space --test \
         conflict -- --nocapture",
    );
}
