//! Fills: trap, fill a block, go on; ns a page, for blocks of 4 KiB, 64 KiB and 2 MiB.

use super::raw::{self, Fill};
use super::{Goals, Kind, LAYER, Second, UNITS};
use crate::measure::{Options, alone, time_ns, versus_within};
use crate::report::Report;
use peregrine_vm::{
    Capabilities, Inline, Mapping, Mechanism, PAGE_SIZE, PageCount, Protection, Region, Trap,
};
use std::sync::Arc;

const PAGES: usize = 1024;

/// One compiled copy for both sides: where the loop lies alone makes a difference of up to a tenth.
#[inline(never)]
fn touch_all(memory: &Mapping) {
    let start = memory.range().start().as_ptr::<u8>();
    for page in 0..PAGES {
        // SAFETY: in the mapping, which is behind no reference; a trap is what is measured.
        unsafe { start.add(page * PAGE_SIZE).write_volatile(1) };
    }
}

/// Makes every page absent: private ones are lost, a memfd's go with their frames unless they are to be mapped again.
fn empty(memory: &Mapping, fill: Fill) {
    let done = match fill {
        Fill::Continue => memory.evict(memory.range()),
        _ => memory.discard(memory.range()),
    };
    done.expect("drop the pages");
}

/// Makes every page of a source of frames present.
fn refill(source: &Mapping) {
    source.populate(source.range(), true).expect("populate");
}

pub fn run(report: &mut Report, options: &Options, caps: &Capabilities, goals: &mut Goals) {
    for threads in [1, 2] {
        report.section(&format!(
            "Fills of {PAGES} pages inline (SIGBUS), {threads} thread(s) running: ns a page; baseline: bare system calls"
        ));
        let second = (threads == 2).then(Second::start);
        fills(report, options, caps, goals, threads, second.as_ref());
    }
}

fn fills(
    report: &Report,
    options: &Options,
    caps: &Capabilities,
    goals: &mut Goals,
    threads: usize,
    second: Option<&Second>,
) {
    for (what, fill, kind) in [
        ("COPY", Fill::Copy, Kind::Anonymous),
        ("COPY", Fill::Copy, Kind::Memfd),
        ("ZEROPAGE", Fill::Zero, Kind::Anonymous),
        ("ZEROPAGE", Fill::Zero, Kind::Memfd),
        ("CONTINUE", Fill::Continue, Kind::Memfd),
        ("MOVE", Fill::Move, Kind::Anonymous),
    ] {
        for (unit_name, unit) in UNITS {
            let case = format!("fill {what} {} {unit_name} {threads}", kind.name());
            if !options.wants(&case) {
                continue;
            }
            let bytes = Arc::new(Mapping::anonymous(unit).expect("memory"));
            refill(&bytes);
            // Ours.
            let memory = Arc::new(kind.make(PageCount::new(PAGES)));
            let source = Arc::new(Mapping::anonymous(PageCount::new(PAGES)).expect("memory"));
            let (from, block_bytes) = (source.clone(), bytes.clone());
            let handler = move |trap: &Trap<'_>| {
                let block = trap.block(unit);
                let region = trap.region();
                trap.decide(match fill {
                    Fill::Copy => region.fill_from_mapping(
                        block,
                        &block_bytes,
                        block_bytes.range(),
                        Protection::ReadWrite,
                    ),
                    Fill::Zero => region.fill_zero(block, Protection::ReadWrite),
                    Fill::Continue => region.fill_continue(block, Protection::ReadWrite),
                    Fill::Move => {
                        let first = trap.page_index() / unit.get() * unit.get();
                        match from.pages(first, unit.get()) {
                            Ok(part) => region.fill_move(block, &from, part),
                            Err(_) => Ok(PageCount::new(0)),
                        }
                    }
                })
            };
            if fill == Fill::Continue {
                refill(&memory);
            }
            // SAFETY: the trap's operations only.
            let inline = unsafe { Inline::new(handler) };
            let builder = Region::builder(memory.clone()).traps_absent(true).traps_writes(false);
            let region = builder.force(Mechanism::Sigbus).inline(inline).build(caps).expect("region");
            let uffd = region.userfaultfd().expect("it is forced");
            let copy_from = bytes.range().start().as_usize();
            let move_from = source.range().start().as_usize();
            let from = if fill == Fill::Move { move_from } else { copy_from };
            let rounds = options.rounds(if unit.get() == 1 { 40 } else { 80 });
            let pair = versus_within(
                LAYER,
                rounds,
                || {
                    Second::beside(second, || {
                        empty(&memory, fill);
                        if fill == Fill::Move {
                            refill(&source);
                        }
                        time_ns(|| touch_all(&memory)) / PAGES as f64
                    })
                },
                || {
                    Second::beside(second, || {
                        empty(&memory, fill);
                        if fill == Fill::Move {
                            refill(&source);
                        }
                        raw::aim_fill(uffd, memory.range(), unit, fill, from);
                        raw::with_handler(|| time_ns(|| touch_all(&memory)) / PAGES as f64)
                    })
                },
            );
            report.pair(&case, "per page", "ns", "bare system calls", PAGES, &pair);
            goals.layer(&case, &pair);
        }
    }
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let case = format!("fill by the kernel itself {} 4 KiB {threads}", kind.name());
        if options.wants(&case) {
            let memory = kind.make(PageCount::new(PAGES));
            let samples = alone(options.rounds(40), || {
                empty(&memory, Fill::Copy);
                time_ns(|| touch_all(&memory)) / PAGES as f64
            });
            report.single(&case, "per page", "ns", PAGES, &samples);
        }
    }
}
