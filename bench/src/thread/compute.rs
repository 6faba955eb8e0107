//! CG class A in one thread on one node, beside the same solver as a plain function in a plain process.

use super::{columns, in_world, quiet_world, rounds};
use crate::measure::{Options, Samples, versus_within};
use crate::report::Report;
use cg::{Class, solve_serial};
use peregrine_sys::process::pin_to_cpu;
use peregrine_sys::timer::process_cpu_ns;
use peregrine_world::Config;

/// The most that a thread may take, against the plain function.
const GOAL: f64 = 1.03;

pub fn run(report: &mut Report, options: &Options) {
    report.section("CG class A, one thread, s");
    for (world, what) in [("default", "default settings"), ("quiet", "no images")] {
        let case = format!("CG class A, {what}");
        if !options.wants(&case) {
            continue;
        }
        let mut rest: [[Samples; 2]; 2] = Default::default();
        let [ours, theirs] = &mut rest;
        let subject = |of: &str, keep: &mut [Samples; 2]| {
            let c = columns(&format!("cg {of}"));
            keep[0].push(c[1].median());
            keep[1].push(c[2].median());
            c[0].median()
        };
        // Two rounds tell nothing of three in a hundred; neighbours of the machine make a single one of them ten slower.
        let pair = versus_within(
            GOAL,
            rounds(options, 7).max(5),
            || subject(world, ours),
            || subject("plain", theirs),
        );
        report.pair(&case, "timed part", "s", "plain function", 1, &pair);
        for (of, metric) in ["making the matrix", "processor time of all"].into_iter().enumerate() {
            let (a, b) = (rest[0][of].median(), rest[1][of].median());
            report.value(&case, metric, "s", a, Some(("plain function", b)));
        }
        let (low, high) = pair.ratio_bounds();
        let verdict = match pair.ratio() <= GOAL {
            true if high <= GOAL => "met",
            true => "met, but not for certain",
            false if low > GOAL => "MISSED",
            false => "MISSED, but not for certain",
        };
        report
            .note(&format!("    goal: within 3 %: {verdict}; the ratio lies between {low:.3} and {high:.3}"));
    }
}

pub fn case(name: &str, words: &[&str]) -> bool {
    match (name, words.first()) {
        ("cg", Some(&"plain")) => solve(""),
        ("cg", Some(&"default")) => drop(in_world(Config { nodes: 1, ..Config::default() }, solve, "")),
        ("cg", Some(&"quiet")) => drop(in_world(quiet_world(1), solve, "")),
        _ => return false,
    }
    true
}

fn solve(_: &str) {
    // On one processor, ours and the plain function alike: the supervisor keeps to another.
    let _ = pin_to_cpu(1);
    let begun = process_cpu_ns();
    let outcome = solve_serial(Class::A, &mut |_| ());
    assert!(outcome.verified, "{outcome}");
    println!(
        "{} {} {}",
        outcome.seconds,
        outcome.initialisation_seconds,
        (process_cpu_ns() - begun) as f64 / 1e9
    );
}
