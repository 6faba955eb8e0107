//! What is asked of a call, judged by the rows of the same run; and what attributes cost.

use super::ours::{self, Form, Place};
use super::subject::time;
use super::ways::{Cores, FLOOR, OURS, OURS_HOT, OURS_HOT_LEND, OURS_LEND, floor_of};
use super::{Row, Rows, SIZES, again};
use crate::measure::{Options, Pair, Samples};
use crate::report::Report;
use peregrine_call::Attributes;
use std::process::ExitCode;

/// A bound on a ratio of medians, round by round.
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

/// Prints each goal with what was measured.
pub fn run(report: &Report, rows: &Rows) {
    let row = |cores: Cores, bytes: usize, way: &'static str| rows.get(&(cores.name(), bytes, way));
    let (one, two) = (Cores::One, Cores::Two);
    let judge = |what: &str, ours: Option<&Row>, other: Option<&Row>, bound: &Bound| {
        let (Some(ours), Some(other)) = (ours, other) else { return };
        let (ratio, met, wanted) = match bound {
            Bound::AtMost(most) => {
                let ratio = Pair::of(&ours.median, &other.median).ratio();
                (ratio, ratio <= *most, format!("at most {most}"))
            }
            Bound::AtLeast(least) => {
                let ratio = Pair::of(&other.median, &ours.median).ratio();
                (ratio, ratio >= *least, format!("at least {least}"))
            }
        };
        let verdict = if met { "met" } else { "MISSED" };
        report.note(&format!("goal: {what}: {ratio:.2} (wanted {wanted}): {verdict}"));
    };
    use Bound::{AtLeast, AtMost};
    let (kib64, mib) = (64 << 10, 1 << 20);
    judge("null on one core, times the eventfd floor", row(one, 0, OURS), row(one, 0, FLOOR), &AtMost(1.15));
    judge(
        "null on one core, faster than a Unix stream",
        row(one, 0, OURS),
        row(one, 0, "unix"),
        &AtLeast(1.5),
    );
    judge(
        "null on one core, faster than iceoryx2 with events",
        row(one, 0, OURS),
        row(one, 0, "iceoryx2"),
        &AtLeast(4.0),
    );
    for (bytes, size, _) in SIZES {
        let hot = |how: &str, way| {
            let floor = floor_of(way, two, bytes);
            let what = format!("{size} on two cores, hot{how}, times the spinning floor ({floor})");
            judge(&what, row(two, bytes, way), row(two, bytes, floor), &AtMost(1.3));
        };
        hot("", OURS_HOT);
        if bytes != 0 {
            hot(" and lent", OURS_HOT_LEND);
        }
    }
    judge(
        "64 KiB on one core, faster than a Unix stream",
        row(one, kib64, OURS),
        row(one, kib64, "unix"),
        &AtLeast(1.7),
    );
    judge(
        "1 MiB lent on one core, faster than a pipe",
        row(one, mib, OURS_LEND),
        row(one, mib, "pipe"),
        &AtLeast(4.0),
    );
    judge(
        "1 MiB with a private copy on one core, faster than a pipe",
        row(one, mib, OURS),
        row(one, mib, "pipe"),
        &AtLeast(2.5),
    );
    if let Some(ours) = row(one, 0, OURS) {
        let ratio = Pair::of(&ours.p99, &ours.median).ratio();
        let verdict = if ratio <= 2.0 { "met" } else { "MISSED" };
        report.note(&format!(
            "goal: null on one core, p99 times the median: {ratio:.2} (wanted at most 2): {verdict}"
        ));
    }
}

/// A name, how the attributes are made, and the caller's nice value.
type Named = (&'static str, fn() -> Attributes, i32);

const PRIORITY: fn() -> Attributes = || Attributes { priority: true, ..Attributes::default() };

/// Attributes that a call may have, each alone. The last two are a pair: a caller whose priority is adopted for each call and given back
/// after it, and the same caller without.
const ATTRIBUTES: [Named; 6] = [
    ("default", Attributes::default, 0),
    (
        "deadline",
        || Attributes {
            deadline: Some(peregrine_call::Deadline::after(std::time::Duration::from_secs(3600))),
            ..Attributes::default()
        },
        0,
    ),
    ("priority, nothing to adopt", PRIORITY, 0),
    ("charge", || Attributes { charge: true, ..Attributes::default() }, 0),
    ("priority, adopted and given back", PRIORITY, ours::URGENT),
    ("default, of an urgent caller", Attributes::default, ours::URGENT),
];
const ADOPTED: usize = 4;

/// Prices each attribute against a call without it.
pub fn attributes(report: &mut Report, options: &Options) {
    report.section("What an attribute adds to a null call on one core, us");
    let mut all: Vec<Samples> = ATTRIBUTES.iter().map(|_| Samples::default()).collect();
    let may_be_urgent = peregrine_sys::process::is_root();
    for _ in 0..options.rounds(7) {
        for ((name, _, nice), samples) in ATTRIBUTES.iter().zip(&mut all) {
            if *nice == 0 || may_be_urgent {
                samples.push(again(&["call-case", "attributes", name])[0] * 1e-3);
            }
        }
    }
    let row = |index: usize, base: usize| {
        let pair = Pair::of(&all[index], &all[base]);
        let (name, of) = (ATTRIBUTES[index].0, ATTRIBUTES[base].0);
        report.pair(&format!("null call with {name}"), "median", "us", of, 4000, &pair);
    };
    (1..ADOPTED).for_each(|index| row(index, 0));
    if may_be_urgent {
        row(ADOPTED, ADOPTED + 1);
    } else {
        report.note("skipped: priority that is adopted: a nice value below 0 needs root");
    }
}

/// One attribute in this process.
pub fn case(words: &[&str]) -> ExitCode {
    let Some((_, make, nice)) = ATTRIBUTES.iter().find(|(name, ..)| words.first() == Some(name)) else {
        return ExitCode::from(2);
    };
    let caller = ours::start(0, Cores::One, Form::In, Place::Default);
    if *nice != 0 && peregrine_sys::process::set_nice(0, *nice).is_err() {
        return ExitCode::FAILURE;
    }
    println!("{}", time(&mut caller.with(make()), 4000).median);
    ExitCode::SUCCESS
}
