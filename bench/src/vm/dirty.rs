//! DIRTY: the cost of a first write, of a dirty page taken, of a clean page scanned.

use super::{Goals, Kind, Second};
use crate::measure::{Options, Rng, alone, time_ns, versus};
use crate::report::Report;
use peregrine_sys::pagemap::{PageRegion, Pagemap, ScanArgs};
use peregrine_vm::{Capabilities, DirtyMechanism, Mapping, PAGE_SIZE, PageCount, PageRange, Tracker};
use std::sync::Arc;

const PAGES: usize = 8192;

fn write_pages(memory: &Mapping, order: &[usize], value: u8) {
    let start = memory.range().start().as_ptr::<u8>();
    for &page in order {
        // SAFETY: in the mapping, which is behind no reference.
        unsafe { start.add(page * PAGE_SIZE).write_volatile(value) };
    }
}

/// The floor: the system call in a loop, on the same memory.
struct Bare {
    range: PageRange,
    pagemap: Pagemap,
    found: Vec<PageRegion>,
}

impl Bare {
    fn take(&mut self) -> usize {
        let mut rest = self.range;
        let mut pages = 0;
        while !rest.is_empty() {
            let scanned =
                self.pagemap.by_ref().scan(ScanArgs::take_written(rest), &mut self.found).expect("scan");
            pages += self.found[..scanned.regions].iter().map(|r| r.range().pages().get()).sum::<usize>();
            let left = rest.end().as_usize() - scanned.walk_end.as_usize();
            rest = PageRange::new(scanned.walk_end, PageCount::for_bytes(left));
        }
        pages
    }
}

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
        let mut bare = Bare {
            range: memory.range(),
            pagemap: Pagemap::open().expect("pagemap"),
            found: vec![PageRegion::default(); 256],
        };
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
            let pair = versus(
                rounds,
                || {
                    value = value.wrapping_add(1);
                    writes.push(time_ns(|| write_pages(&memory, dirty, value)) / dirty.len().max(1) as f64);
                    let mut found = 0;
                    let ns = time_ns(|| {
                        let count = |run: PageRange| found += run.pages().get();
                        tracker.take_dirty_each(memory.range(), count).expect("take");
                    });
                    assert!(found == dirty.len() || writes.len() == 1, "{found} of {}", dirty.len());
                    ns
                },
                || {
                    bare_writes.push(time_ns(|| write_pages(&memory, dirty, 1)) / dirty.len().max(1) as f64);
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
                report.value(
                    &case,
                    "per clean page",
                    "ns",
                    clean_ns / PAGES as f64,
                    Some(("bare system calls", pair.baseline.median() / PAGES as f64)),
                );
                goals.number(
                    "clean page",
                    goals.get("clean page").unwrap_or(0.0).max(clean_ns / PAGES as f64),
                );
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
                goals.number("first write", goals.get("first write").unwrap_or(0.0).max(first));
            }
        }
    }
    report.section("DIRTY, every mechanism, 10 % of the pages of a memfd written in random order; ns");
    for threads in [1, 2] {
        let second = (threads == 2).then(Second::start);
        for mechanism in DirtyMechanism::ALL {
            let case = format!("DIRTY {mechanism} memfd 10 % {threads}");
            if !options.wants(&case) {
                continue;
            }
            let memory = Arc::new(Kind::Memfd.make(PageCount::new(PAGES)));
            memory.populate(memory.range(), true).expect("populate");
            let mut tracker = Tracker::of(memory.clone()).force(mechanism).start(caps).expect("tracker");
            let order = Rng(9).permutation(PAGES);
            let dirty = &order[..PAGES / 10];
            let mut value = 0;
            let mut take = crate::measure::Samples::default();
            let take_all = |tracker: &mut Tracker| {
                time_ns(|| {
                    tracker.take_dirty_each(memory.range(), |_| ()).expect("take");
                })
            };
            let writes = alone(options.rounds(30), || {
                let ns = Second::beside(second.as_ref(), || {
                    // A sample that has to be repeated begins with clean pages too.
                    take_all(&mut tracker);
                    value += 1;
                    time_ns(|| write_pages(&memory, dirty, value)) / dirty.len() as f64
                });
                take.push(take_all(&mut tracker));
                ns
            });
            report.single(&case, "first write", "ns", dirty.len(), &writes);
            report.single(&case, "take of all", "ns", 1, &take);
        }
    }
}
