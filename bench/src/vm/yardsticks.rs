//! The paper's yardsticks: a trap in adds and in pages scanned; what a handler's own way to a protected page costs; MAP2.

use super::{Goals, Kind, LAYER, Second, UNITS};
use crate::measure::{Options, Pair, alone, time_ns, versus, versus_within};
use crate::report::Report;
use peregrine_sys::io;
use peregrine_sys::mem::{self, MapOptions, Placement, Source};
use peregrine_vm::{Capabilities, PAGE_SIZE, PageCount, PageRange, Protection};
use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::hint::black_box;

pub fn run(report: &mut Report, options: &Options, _caps: &Capabilities, goals: &mut Goals) {
    trap_in_adds_and_pages(report, options, goals);
    own_way(report, options);
    for threads in [1, 2] {
        report.section(&format!("MAP2, {threads} thread(s) running; baseline: bare system calls"));
        let _second = (threads == 2).then(Second::start);
        for (unit_name, unit) in UNITS {
            map2(report, options, goals, unit_name, unit, threads);
        }
    }
}

fn trap_in_adds_and_pages(report: &mut Report, options: &Options, goals: &Goals) {
    report.section("Yardsticks");
    // A trap that this run has not measured can't be told in anything.
    let ways = ["mprotect READ anonymous", "WP+SIGBUS memfd", "guard memfd", "WP+pager memfd"];
    let traps: Vec<_> = ways
        .iter()
        .filter_map(|way| Some((format!("TRAP {way} 4 KiB 1"), goals.get(&format!("TRAP {way} 1"))?)))
        .collect();
    let (add, scan_page) = ("an add", "scan a page for pointers");
    if traps.is_empty() && !options.wants(add) && !options.wants(scan_page) {
        return;
    }
    let adds = alone(options.rounds(50), || {
        const N: u64 = 100_000;
        time_ns(|| {
            let mut sum = black_box(1u64);
            for _ in 0..N {
                // One dependent add each; the barrier keeps the compiler from folding them.
                // SAFETY: registers only.
                unsafe { std::arch::asm!("add {0}, {0}", inout(reg) sum, options(pure, nomem, nostack)) };
            }
            black_box(sum);
        }) / N as f64
    });
    report.single(add, "time", "ns", 100_000, &adds);
    let page = Kind::Anonymous.make(PageCount::new(1));
    page.populate(page.range(), true).expect("populate");
    let scan = alone(options.rounds(50), || {
        const N: usize = 200;
        let start = page.range().start().as_ptr::<u64>();
        time_ns(|| {
            for _ in 0..N {
                let mut pointers = 0usize;
                for word in 0..PAGE_SIZE / 8 {
                    // A collector's first question of every word: is it a pointer into the heap?
                    // SAFETY: in the mapping, which is behind no reference.
                    let value = unsafe { start.add(word).read_volatile() };
                    pointers += usize::from((0x1000..0x7fff_ffff_f000).contains(&value));
                }
                black_box(pointers);
            }
        }) / N as f64
    });
    report.single(scan_page, "time", "ns", 200, &scan);
    for (case, trap) in traps {
        report.value(&case, "in adds", "adds", trap / adds.median(), None);
        report.value(&case, "in pages scanned", "pages", trap / scan.median(), None);
    }
}

fn own_way(report: &mut Report, options: &Options) {
    report.section("A handler's own way to a protected page: a system call against MAP2; ns");
    let memory = Kind::Memfd.make(PageCount::new(64));
    memory.populate(memory.range(), true).expect("populate");
    let alias = memory.alias(Protection::ReadWrite).expect("alias");
    alias.populate(alias.range(), true).expect("populate");
    let mut buffer = vec![7u8; PAGE_SIZE];
    for bytes in [8, 512, PAGE_SIZE] {
        let case = format!("write {bytes} bytes through an alias");
        if !options.wants(&case) {
            continue;
        }
        let mut at = 0;
        let pair = versus(
            options.rounds(100),
            || {
                time_ns(|| {
                    for page in 0..64 {
                        alias.bytes().write(page * PAGE_SIZE, &buffer[..bytes]).expect("in bounds");
                    }
                }) / 64.0
            },
            || {
                at ^= 1;
                let fd = memory.object_fd().expect("a memfd");
                time_ns(|| {
                    for page in 0..64 {
                        // SAFETY: the file is this function's.
                        let n = unsafe {
                            io::write_at_ptr(fd, buffer.as_ptr(), bytes, (page * PAGE_SIZE) as u64)
                        };
                        assert_eq!(n, Ok(bytes));
                    }
                }) / 64.0
            },
        );
        report.pair(&case, "per access", "ns", "pwrite", 64, &pair);
        black_box(at);
    }
    buffer.fill(0);
}

/// Aliases made in a sample of their set-up.
const SET_UPS: usize = 64;

/// What a bare `mmap` made.
struct BareAlias(PageRange);

impl Drop for BareAlias {
    fn drop(&mut self) {
        // SAFETY: made by `bare_map`, and nothing refers to it.
        unsafe { mem::unmap(self.0).expect("munmap") }
    }
}

/// An alias of one unit, made, touched, and touched after it was populated.
fn map2(
    report: &Report,
    options: &Options,
    goals: &mut Goals,
    unit_name: &str,
    unit: PageCount,
    threads: usize,
) {
    // So many in each sample that the clock does not count.
    let count = match unit.get() {
        1 => 64,
        16 => 16,
        _ => 2,
    };
    let memory = Kind::Memfd.make(unit);
    memory.populate(memory.range(), true).expect("populate");
    let fd = memory.object_fd().expect("a memfd");
    let bare_map = || {
        // SAFETY: a new mapping at a place of the kernel's choice.
        let range = unsafe {
            mem::map(
                unit,
                Protection::ReadWrite,
                Source::Shared(fd, PageCount::new(0)),
                Placement::Anywhere,
                MapOptions::default(),
            )
        };
        BareAlias(range.expect("mmap"))
    };
    let ours = || memory.alias(Protection::ReadWrite).expect("alias");
    let mut judge = |what: &str, pair: &Pair| {
        let case = format!("MAP2 {what} {unit_name} {threads}");
        report.pair(&case, "per unit", "ns", "bare system calls", count, pair);
        goals.layer(&case, pair);
    };
    let wants = |what: &str| options.wants(&format!("MAP2 {what} {unit_name} {threads}"));
    if wants("set-up") {
        let pair = versus_within(
            LAYER,
            options.rounds(100),
            || {
                let mut made = Vec::with_capacity(SET_UPS);
                time_ns(|| made.extend((0..SET_UPS).map(|_| ours()))) / SET_UPS as f64
            },
            || {
                let mut made = Vec::with_capacity(SET_UPS);
                time_ns(|| made.extend((0..SET_UPS).map(|_| bare_map()))) / SET_UPS as f64
            },
        );
        judge("set-up", &pair);
    }
    let touch = |start: *mut u8| {
        for page in 0..unit.get() {
            // SAFETY: in the mapping that starts there.
            unsafe { start.add(page * PAGE_SIZE).write_volatile(1) };
        }
    };
    // Which frame the kernel takes for the alias's page table makes a first touch a quarter dearer or cheaper, and it takes the one
    // that was freed last: so aliases go some rounds later, and both sides come by the same ones in turn.
    let mut kept: VecDeque<Box<dyn Any>> = VecDeque::new();
    let keep = RefCell::new(move |aliases: Box<dyn Any>| {
        kept.push_back(aliases);
        if kept.len() > 4 {
            kept.pop_front();
        }
    });
    for (what, populate) in [("first touch", false), ("populate and first touch", true)] {
        if !wants(what) {
            continue;
        }
        let pair = versus_within(
            LAYER,
            options.rounds(100),
            || {
                let aliases: Vec<_> = (0..count).map(|_| ours()).collect();
                let ns = time_ns(|| {
                    for alias in &aliases {
                        if populate {
                            alias.populate(alias.range(), true).expect("populate");
                        }
                        touch(alias.range().start().as_ptr());
                    }
                });
                (keep.borrow_mut())(Box::new(aliases));
                ns / count as f64
            },
            || {
                let aliases: Vec<_> = (0..count).map(|_| bare_map()).collect();
                let ns = time_ns(|| {
                    for BareAlias(range) in &aliases {
                        if populate {
                            // SAFETY: the mapping made above.
                            unsafe { mem::advise(*range, mem::Advice::PopulateWrite).expect("populate") };
                        }
                        touch(range.start().as_ptr());
                    }
                });
                (keep.borrow_mut())(Box::new(aliases));
                ns / count as f64
            },
        );
        judge(what, &pair);
    }
}
