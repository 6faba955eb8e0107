//! DIRTY: the cost of a first write, of a dirty page taken, of a clean page scanned.

use super::{Goals, Kind, Second};
use crate::measure::{Options, Rng, Samples, time_ns, versus};
use crate::report::Report;
use peregrine_sys::mem;
use peregrine_sys::pagemap::{PageRegion, Pagemap, ScanArgs};
use peregrine_sys::uffd::{Features, RegisterMode, Uffd};
use peregrine_vm::{
    Capabilities, DirtyMechanism, Mapping, PAGE_SIZE, PageCount, PageKind, PageRange, Protection, Tracker,
};
use std::sync::Arc;

const PAGES: usize = 8192;
/// Clean pages are scanned over more: the call itself must not count.
const CLEAN_PAGES: usize = 32_768;

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
                goals.number(
                    "floor first write",
                    goals.get("floor first write").unwrap_or(0.0).max(bare_first),
                );
                goals.number("first write", goals.get("first write").unwrap_or(0.0).max(first));
            }
        }
    }
    clean_pages(report, options, caps, goals);
    report.section("DIRTY over a memfd, every mechanism; baseline of a take: bare calls that protect the same runs again (compare: memcmp); ns");
    for threads in [1, 2] {
        let second = (threads == 2).then(Second::start);
        for mechanism in DirtyMechanism::ALL {
            for percent in [1, 10, 50, 100] {
                let case = format!("DIRTY {mechanism} memfd {percent} % {threads}");
                if options.wants(&case) {
                    one(report, options, caps, goals, mechanism, percent, &case, second.as_ref());
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
        let mut bare = Bare {
            range: memory.range(),
            pagemap: Pagemap::open().expect("pagemap"),
            found: vec![PageRegion::default(); 256],
        };
        let pair = versus(
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
            let worst = |name: &str, value: f64| goals.get(name).unwrap_or(0.0).max(value);
            let (ours, floor) =
                (worst("clean page", pair.ours.median()), worst("floor clean page", pair.baseline.median()));
            goals.number("clean page", ours);
            goals.number("floor clean page", floor);
        }
    }
}

/// What a take comes down to where the kernel keeps no books: the same runs, protected again.
enum Floor {
    Protect { memory: Mapping, uffd: Option<Uffd>, runs: Vec<PageRange> },
    Compare { now: Vec<u8>, shadow: Vec<u8> },
    Scan(Bare),
}

impl Floor {
    fn new(mechanism: DirtyMechanism, dirty: &[usize], tracked: &Mapping) -> Self {
        match mechanism {
            DirtyMechanism::AsyncWriteProtect => Self::Scan(Bare {
                range: tracked.range(),
                pagemap: Pagemap::open().expect("pagemap"),
                found: vec![PageRegion::default(); 256],
            }),
            DirtyMechanism::Compare => {
                let bytes = PAGES * PAGE_SIZE;
                Self::Compare { now: vec![1; bytes], shadow: vec![1; bytes] }
            }
            _ => {
                let memory = Kind::Memfd.make(PageCount::new(PAGES));
                memory.populate(memory.range(), true).expect("populate");
                let uffd = (mechanism != DirtyMechanism::Mprotect).then(|| {
                    let features =
                        Features::SIGBUS | Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM;
                    let uffd = Uffd::open(features).expect("userfaultfd");
                    // SAFETY: the memory is this function's.
                    unsafe { uffd.by_ref().register(memory.range(), RegisterMode::WP).expect("register") };
                    uffd
                });
                let mut sorted = dirty.to_vec();
                sorted.sort_unstable();
                let mut runs: Vec<PageRange> = Vec::new();
                for page in sorted {
                    let page = memory.pages(page, 1).expect("in bounds");
                    match runs.last_mut() {
                        Some(last) if last.end() == page.start() => {
                            *last = PageRange::new(last.start(), PageCount::new(last.pages().get() + 1));
                        }
                        _ => runs.push(page),
                    }
                }
                let floor = Self::Protect { memory, uffd, runs };
                floor.set_all(Protection::Read);
                floor
            }
        }
    }

    fn set(&self, range: PageRange, access: Protection) {
        if let Self::Protect { uffd, .. } = self {
            match uffd {
                Some(uffd) => {
                    uffd.by_ref().write_protect(range, access == Protection::Read).expect("protect")
                }
                // SAFETY: the range lies in this value's memory.
                None => unsafe { mem::protect(range, access).expect("protect") },
            }
        }
    }

    fn set_all(&self, access: Protection) {
        if let Self::Protect { memory, .. } = self {
            self.set(memory.range(), access);
        }
    }

    /// One sample; `tracked` has been written where our side's is, page by page as traps would have opened it.
    fn sample(&mut self, tracked: &Mapping, dirty: &[usize]) -> f64 {
        match self {
            Self::Scan(bare) => {
                write_pages(tracked, dirty, 1);
                time_ns(|| {
                    std::hint::black_box(bare.take());
                })
            }
            Self::Compare { now, shadow } => time_ns(|| {
                let same =
                    now.chunks_exact(PAGE_SIZE).zip(shadow.chunks_exact(PAGE_SIZE)).filter(|(a, b)| a == b);
                std::hint::black_box(same.count());
            }),
            Self::Protect { .. } => {
                let Self::Protect { memory, runs, .. } = &*self else { return f64::NAN };
                for &page in dirty {
                    self.set(memory.pages(page, 1).expect("in bounds"), Protection::ReadWrite);
                }
                write_pages(memory, dirty, 1);
                time_ns(|| runs.iter().for_each(|run| self.set(*run, Protection::Read)))
            }
        }
    }
}

#[expect(clippy::too_many_arguments, reason = "one row of a table, spelled out once")]
fn one(
    report: &Report,
    options: &Options,
    caps: &Capabilities,
    goals: &mut Goals,
    mechanism: DirtyMechanism,
    percent: usize,
    case: &str,
    second: Option<&Second>,
) {
    let memory = Arc::new(Kind::Memfd.make(PageCount::new(PAGES)));
    memory.populate(memory.range(), true).expect("populate");
    let mut tracker = Tracker::of(memory.clone()).force(mechanism).start(caps).expect("tracker");
    let order = Rng(9).permutation(PAGES);
    let dirty = &order[..PAGES * percent / 100];
    let mut floor = Floor::new(mechanism, dirty, &memory);
    let mut value = 0u8;
    let mut writes = Samples::default();
    let take_all = |tracker: &mut Tracker| {
        time_ns(|| {
            tracker.take_dirty_each(memory.range(), |_| ()).expect("take");
        })
    };
    let rounds = options.rounds(if percent <= 10 { 30 } else { 10 });
    let pair = versus(
        rounds,
        || {
            let write = Second::beside(second, || {
                // A sample that has to be repeated begins with clean pages too.
                take_all(&mut tracker);
                value = value.wrapping_add(1);
                time_ns(|| write_pages(&memory, dirty, value)) / dirty.len() as f64
            });
            writes.push(write);
            take_all(&mut tracker)
        },
        || floor.sample(&memory, dirty),
    );
    report.single(case, "first write", "ns", dirty.len(), &writes);
    report.pair(case, "take of all", "ns", "bare calls", 1, &pair);
    if mechanism != DirtyMechanism::Compare && second.is_none() {
        goals.layer(&format!("{case}: take"), &pair);
    }
}
