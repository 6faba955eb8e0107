//! The paper's yardsticks: a trap in adds and in pages scanned; what a handler's own way to a protected page costs; MAP2.

use super::{Goals, Kind, LAYER, Second};
use crate::measure::{Options, alone, time_ns, versus, versus_within};
use crate::report::Report;
use peregrine_sys::io;
use peregrine_sys::mem::{self, MapOptions, Placement, Source};
use peregrine_vm::{Capabilities, PAGE_SIZE, PageCount, PageRange, Protection};
use std::any::Any;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::hint::black_box;

pub fn run(report: &mut Report, options: &Options, _caps: &Capabilities, goals: &mut Goals) {
    report.section("Yardsticks");
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
    report.single("an add", "time", "ns", 100_000, &adds);
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
    report.single("scan a page for pointers", "time", "ns", 200, &scan);
    for way in ["mprotect READ anonymous", "WP+SIGBUS memfd", "guard memfd", "WP+pager memfd"] {
        if let Some(trap) = goals.get(&format!("TRAP {way} 1")) {
            report.value(&format!("TRAP {way} 4 KiB"), "in adds", "adds", trap / adds.median(), None);
            report.value(
                &format!("TRAP {way} 4 KiB"),
                "in pages scanned",
                "pages",
                trap / scan.median(),
                None,
            );
        }
    }

    report.section("A handler's own way to a protected page: a system call against MAP2; ns");
    let memory = Kind::Memfd.make(PageCount::new(64));
    memory.populate(memory.range(), true).expect("populate");
    let alias = memory.alias(Protection::ReadWrite).expect("alias");
    alias.populate(alias.range(), true).expect("populate");
    let mut buffer = vec![7u8; PAGE_SIZE];
    for bytes in [8, 512, PAGE_SIZE] {
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
        report.pair(
            &format!("write {bytes} bytes through an alias"),
            "per access",
            "ns",
            "pwrite",
            64,
            &pair,
        );
        black_box(at);
    }
    buffer.fill(0);

    for threads in [1, 2] {
        report.section(&format!("MAP2, {threads} thread(s) running; baseline: bare system calls"));
        let _second = (threads == 2).then(Second::start);
        map2(report, options, goals, threads);
    }
}

/// What a bare `mmap` made.
struct BareAlias(PageRange);

impl Drop for BareAlias {
    fn drop(&mut self) {
        // SAFETY: made by `bare_map`, and nothing refers to it.
        unsafe { mem::unmap(self.0).expect("munmap") }
    }
}

fn map2(report: &Report, options: &Options, goals: &mut Goals, threads: usize) {
    let pages = PageCount::new(256);
    let memory = Kind::Memfd.make(pages);
    memory.populate(memory.range(), true).expect("populate");
    let fd = memory.object_fd().expect("a memfd");
    let bare_map = |populate: bool| {
        let options = MapOptions { populate, ..MapOptions::default() };
        // SAFETY: a new mapping at a place of the kernel's choice.
        unsafe {
            mem::map(
                pages,
                Protection::ReadWrite,
                Source::Shared(fd, PageCount::new(0)),
                Placement::Anywhere,
                options,
            )
            .expect("mmap")
        }
    };
    const REPEAT: usize = 64;
    let pair = versus_within(
        LAYER,
        options.rounds(100),
        || {
            let mut made = Vec::with_capacity(REPEAT);
            time_ns(|| made.extend((0..REPEAT).map(|_| memory.alias(Protection::ReadWrite).expect("alias"))))
                / REPEAT as f64
        },
        || {
            let mut made = Vec::with_capacity(REPEAT);
            let ns = time_ns(|| made.extend((0..REPEAT).map(|_| bare_map(false)))) / REPEAT as f64;
            made.into_iter().for_each(|range| drop(BareAlias(range)));
            ns
        },
    );
    let case = format!("MAP2 set-up of 1 MiB {threads}");
    report.pair(&case, "per alias", "ns", "bare system calls", REPEAT, &pair);
    goals.layer(&case, &pair);
    let touch = |start: *mut u8| {
        for page in 0..pages.get() {
            // SAFETY: in the mapping that starts there.
            unsafe { start.add(page * PAGE_SIZE).write_volatile(1) };
        }
    };
    // Which frame the kernel takes for the alias's page table makes a first touch a quarter dearer or cheaper, and it takes the one
    // that was freed last: so aliases go some rounds later, and both sides come by the same ones in turn.
    let mut kept: VecDeque<Box<dyn Any>> = VecDeque::new();
    let keep = RefCell::new(move |alias: Box<dyn Any>| {
        kept.push_back(alias);
        if kept.len() > 4 {
            kept.pop_front();
        }
    });
    for populate in [false, true] {
        let pair = versus_within(
            LAYER,
            options.rounds(100),
            || {
                let alias = memory.alias(Protection::ReadWrite).expect("alias");
                let ns = time_ns(|| {
                    if populate {
                        alias.populate(alias.range(), true).expect("populate");
                    }
                    touch(alias.range().start().as_ptr());
                });
                (keep.borrow_mut())(Box::new(alias));
                ns / pages.get() as f64
            },
            || {
                let alias = BareAlias(bare_map(false));
                let range = alias.0;
                let ns = time_ns(|| {
                    if populate {
                        // SAFETY: the mapping made above.
                        unsafe { mem::advise(range, mem::Advice::PopulateWrite).expect("populate") };
                    }
                    touch(range.start().as_ptr());
                });
                (keep.borrow_mut())(Box::new(alias));
                ns / pages.get() as f64
            },
        );
        let case = if populate { "MAP2 populate and first touch" } else { "MAP2 first touch" };
        let case = format!("{case} {threads}");
        report.pair(&case, "per page", "ns", "bare system calls", pages.get(), &pair);
        goals.layer(&case, &pair);
    }
}
