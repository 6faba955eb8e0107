//! DIRTY: the cost of a first write, of a dirty page taken, of a clean page scanned.

use super::floor::{Floor, Scan};
use super::{Goals, Kind, LAYER, ONE, Second, UNITS, write_units};
use crate::measure::{Options, Pair, Rng, Samples, time_ns, versus_within};
use crate::report::Report;
use peregrine_vm::{Capabilities, DirtyMechanism, Mapping, PageCount, PageKind, PageRange, Tracker};
use std::sync::Arc;

const PAGES: usize = 8192;
/// Clean pages are scanned over more: the call itself must not count.
const CLEAN_PAGES: usize = 32_768;

pub fn run(report: &mut Report, options: &Options, caps: &Capabilities, goals: &mut Goals) {
    report.section(&format!("DIRTY over {PAGES} pages; baseline: bare system calls"));
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let name = |what: &str| format!("DIRTY PAGEMAP_SCAN {} {what}", kind.name());
        if !options.wants(&name("")) && !options.wants("DIRTY") {
            continue;
        }
        let memory = Arc::new(kind.make(PageCount::new(PAGES)));
        let mut tracker = Tracker::of(memory.clone())
            .force(DirtyMechanism::AsyncWriteProtect)
            .start(caps)
            .expect("tracker");
        let mut bare = Scan::of(&memory);
        let mut value = 0u8;
        let mut rng = Rng(5);
        let mut clean_ns = 0.0;
        for percent in [0, 1, 10, 50, 100] {
            let order = rng.permutation(PAGES);
            let dirty = &order[..PAGES * percent / 100];
            let rounds = options.rounds(if percent == 0 { 300 } else { 60 });
            // Both values of a round come from the same pages and the same order.
            let mut writes = Vec::new();
            let mut bare_writes = Vec::new();
            let pair = versus_within(
                LAYER,
                rounds,
                || {
                    value = value.wrapping_add(1);
                    writes.push(
                        time_ns(|| write_units(&memory, ONE, dirty, value)) / dirty.len().max(1) as f64,
                    );
                    let mut found = 0;
                    let ns = time_ns(|| {
                        let count = |run: PageRange| found += run.pages().get();
                        tracker.take_dirty_each(memory.range(), count).expect("take");
                    });
                    assert!(found == dirty.len() || writes.len() == 1, "{found} of {}", dirty.len());
                    ns
                },
                || {
                    bare_writes
                        .push(time_ns(|| write_units(&memory, ONE, dirty, 1)) / dirty.len().max(1) as f64);
                    time_ns(|| {
                        std::hint::black_box(bare.take());
                    })
                },
            );
            let case = name(&format!("{percent} % dirty"));
            report.pair(&case, "take of all", "ns", "bare system calls", 1, &pair);
            goals.layer(&case, &pair);
            if percent == 0 {
                clean_ns = pair.ours.median();
            } else {
                let per_dirty =
                    (pair.ours.median() - clean_ns * (1.0 - percent as f64 / 100.0)) / dirty.len() as f64;
                report.value(&case, "per dirty page", "ns", per_dirty, None);
                let median = |v: &[f64]| {
                    let mut v = v[v.len().min(2)..].to_vec();
                    v.sort_unstable_by(f64::total_cmp);
                    v[v.len() / 2]
                };
                let (first, bare_first) = (median(&writes), median(&bare_writes));
                report.value(&case, "first write", "ns", first, Some(("bare system calls", bare_first)));
                goals.worst("first write", first);
                goals.worst("floor first write", bare_first);
            }
        }
    }
    clean_pages(report, options, caps, goals);
    report.section("DIRTY over a memfd, every mechanism; baseline: a bare handler that sets a byte, and bare calls that protect what is set (compare: memcmp); ns");
    for threads in [1, 2] {
        let second = (threads == 2).then(Second::start);
        for mechanism in DirtyMechanism::ALL {
            for percent in [1, 10, 50, 100] {
                let case = format!("DIRTY {mechanism} memfd {percent} % {threads}");
                if !options.wants(&case) {
                    continue;
                }
                let rounds = options.rounds(if percent <= 10 { 30 } else { 10 });
                let shape = Shape { unit: PageCount::new(1), units: PAGES, percent, kind: PageKind::Base };
                let Measured { write, take } = measure(caps, mechanism, shape, rounds, second.as_ref());
                report.pair(&case, "first write", "ns", "bare calls", PAGES * percent / 100, &write);
                report.pair(&case, "take of all", "ns", "bare calls", 1, &take);
                if mechanism == DirtyMechanism::AsyncWriteProtect {
                    goals.worst("first write", write.ours.median());
                    goals.worst("floor first write", write.baseline.median());
                }
                // Whoever compares keeps a copy up to date, which no call does for him.
                if mechanism != DirtyMechanism::Compare && second.is_none() {
                    goals.layer(&format!("{case}: first write"), &write);
                    goals.layer(&format!("{case}: take"), &take);
                }
            }
        }
    }
    by_unit(report, options, caps, goals);
}

/// What a unit of several pages costs, dirty (each of its pages written) and clean; last, units that are pages of the pool.
fn by_unit(report: &mut Report, options: &Options, caps: &Capabilities, goals: &mut Goals) {
    report.section(
        "DIRTY over a memfd in units that are written whole or not at all; baseline: as above; ns a unit",
    );
    let percents: &[usize] = if options.quick { &[0, 10] } else { &[0, 1, 10, 50, 100] };
    let pool = ("2 MiB of the pool", PageCount::new(512));
    for (unit_name, unit) in UNITS.into_iter().filter(|(_, unit)| unit.get() > 1).chain([pool]) {
        let kind = if unit_name == pool.0 { PageKind::Huge2M } else { PageKind::Base };
        let units = match (unit.get(), options.quick) {
            (512, true) => 20,
            (512, false) => 100,
            _ => 500,
        };
        let pages = PageCount::new(units * unit.get());
        // The kernel write-protects such a page as one, which only the two that note no single pages can follow.
        let follows = |m| {
            kind == PageKind::Base || matches!(m, DirtyMechanism::AsyncWriteProtect | DirtyMechanism::Compare)
        };
        for mechanism in DirtyMechanism::ALL.into_iter().filter(|m| follows(*m)) {
            let mut clean = None;
            for &percent in percents {
                let case = format!("DIRTY {mechanism} memfd {unit_name} {percent} % 1");
                if !options.wants(&case) {
                    continue;
                }
                if let Err(why) = Mapping::memfd_of(pages, kind) {
                    report.note(&format!("{case}: {why}"));
                    continue;
                }
                let faults = units * percent / 100 * if kind == PageKind::Base { unit.get() } else { 1 };
                let rounds = options.rounds((20_000 / faults.max(1)).clamp(5, 100));
                let shape = Shape { unit, units, percent, kind };
                let Measured { write, take } = measure(caps, mechanism, shape, rounds, None);
                let take = take.scaled(1.0 / units as f64);
                report.pair(&case, "take, of each unit", "ns", "bare calls", units, &take);
                let counts = mechanism != DirtyMechanism::Compare;
                if counts {
                    goals.layer(&format!("{case}: take"), &take);
                }
                let taken = (take.ours.median(), take.baseline.median());
                if percent == 0 {
                    clean = Some(taken);
                    continue;
                }
                let write = write.scaled(unit.get() as f64);
                report.pair(&case, "first writes", "ns", "bare calls", units * percent / 100, &write);
                if counts {
                    goals.layer(&format!("{case}: first writes"), &write);
                }
                if let Some(clean) = clean {
                    let share = percent as f64 / 100.0;
                    let dirty = |taken: f64, clean: f64| (taken - clean * (1.0 - share)) / share;
                    let bare = dirty(taken.1, clean.1);
                    let ours = dirty(taken.0, clean.0);
                    report.value(&case, "take, of a dirty unit", "ns", ours, Some(("bare calls", bare)));
                }
            }
        }
    }
}

/// Scans of pages that nobody wrote.
fn clean_pages(report: &mut Report, options: &Options, caps: &Capabilities, goals: &mut Goals) {
    report.section(&format!("DIRTY over {CLEAN_PAGES} clean pages; baseline: bare system calls"));
    let pages = PageCount::new(CLEAN_PAGES);
    let huge = || {
        let memory = Mapping::anonymous_of(pages, PageKind::TransparentHuge).ok()?;
        memory.populate(memory.range(), true).ok()?;
        Some(memory)
    };
    for (what, make) in [
        ("anonymous", &(|| Some(Kind::Anonymous.make(pages))) as &dyn Fn() -> Option<Mapping>),
        ("memfd", &|| Some(Kind::Memfd.make(pages))),
        ("transparent huge", &huge),
    ] {
        let case = format!("DIRTY PAGEMAP_SCAN {what} clean page");
        if !options.wants(&case) {
            continue;
        }
        let Some(memory) = make() else {
            report.note(&format!("{case}: this kernel has no such pages"));
            continue;
        };
        let memory = Arc::new(memory);
        memory.populate(memory.range(), true).expect("populate");
        let mut tracker = Tracker::of(memory.clone())
            .force(DirtyMechanism::AsyncWriteProtect)
            .start(caps)
            .expect("tracker");
        let mut bare = Scan::of(&memory);
        let pair = versus_within(
            LAYER,
            options.rounds(300),
            || {
                time_ns(|| {
                    let none = |run: PageRange| unreachable!("{run:?} was not written");
                    tracker.take_dirty_each(memory.range(), none).expect("take");
                }) / CLEAN_PAGES as f64
            },
            || time_ns(|| assert_eq!(bare.take(), 0)) / CLEAN_PAGES as f64,
        );
        report.pair(&case, "scanned", "ns", "bare system calls", CLEAN_PAGES, &pair);
        goals.layer(&case, &pair);
        if what != "transparent huge" {
            goals.worst("clean page", pair.ours.median());
            goals.worst("floor clean page", pair.baseline.median());
        }
    }
}

/// Which pages of how many are written before each take.
#[derive(Clone, Copy)]
struct Shape {
    unit: PageCount,
    units: usize,
    /// How many of the units are written, each of their pages.
    percent: usize,
    kind: PageKind,
}

struct Measured {
    /// ns a page.
    write: Pair,
    /// ns in all.
    take: Pair,
}

/// One row of the tables above.
fn measure(
    caps: &Capabilities,
    mechanism: DirtyMechanism,
    shape: Shape,
    rounds: usize,
    second: Option<&Second>,
) -> Measured {
    let unit = shape.unit.get();
    let pages = PageCount::new(shape.units * unit);
    let memory = Arc::new(Mapping::memfd_of(pages, shape.kind).expect("memory"));
    memory.populate(memory.range(), true).expect("populate");
    let mut tracker = Tracker::of(memory.clone()).force(mechanism).start(caps).expect("tracker");
    let order = Rng(9).permutation(shape.units);
    let written = order[..shape.units * shape.percent / 100].iter();
    let dirty: Vec<usize> = written.flat_map(|&i| i * unit..(i + 1) * unit).collect();
    let mut floor = Floor::new(mechanism, &memory, &tracker);
    let mut value = 0u8;
    let (mut writes, mut bare_writes) = (Samples::default(), Samples::default());
    let take_all = |tracker: &mut Tracker| {
        time_ns(|| {
            tracker.take_dirty_each(memory.range(), |_| ()).expect("take");
        })
    };
    let take = versus_within(
        LAYER,
        rounds,
        || {
            writes.push(Second::beside(second, || {
                // A sample that has to be repeated begins with clean pages too.
                take_all(&mut tracker);
                value = value.wrapping_add(1);
                time_ns(|| write_units(&memory, ONE, &dirty, value)) / dirty.len().max(1) as f64
            }));
            take_all(&mut tracker)
        },
        || {
            bare_writes.push(Second::beside(second, || {
                floor.take();
                floor.write(&memory, &dirty)
            }));
            floor.take()
        },
    );
    Measured { write: Pair::of(&writes, &bare_writes), take }
}
