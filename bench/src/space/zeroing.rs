//! What it costs to zero frames, by itself: through an alias of shared memory, as a space and its floor do, beside the same bytes of
//! private memory and beside the kernel's own zeroing. What share of an operation it is stands at `local` in `micro`.

use crate::measure::{Options, versus};
use crate::report::Report;
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection};
use peregrine_sys::mem::{self, MapOptions, Placement, Source};
use peregrine_sys::memfd;
use std::fs::File;
use std::hint::black_box;
use std::io::Read;
use std::os::fd::AsFd;
use std::time::Instant;

/// Frames that are zeroed in turn where they shall be in no near cache.
const COLD_PAGES: usize = 16384;
const CALLS: usize = 4096;

/// ns for each unit of `bytes`, going round in the first `within` bytes of the memory.
fn each(memory: &mut [u8], bytes: usize, within: usize, mut zero: impl FnMut(&mut [u8])) -> f64 {
    let mut units = 0;
    let begun = Instant::now();
    while units < CALLS {
        for unit in memory[..within].chunks_exact_mut(bytes).take(CALLS - units) {
            zero(black_box(unit));
            units += 1;
        }
    }
    begun.elapsed().as_nanos() as f64 / units as f64
}

fn fresh(source: Source<'_>) -> PageRange {
    let (pages, options) = (PageCount::new(COLD_PAGES), MapOptions::default());
    // SAFETY: a new mapping at a place of the kernel's choice.
    unsafe { mem::map(pages, Protection::ReadWrite, source, Placement::Anywhere, options) }.expect("memory")
}

/// # Safety
///
/// The range is mapped and nobody else's, here or in another process, until it is unmapped.
unsafe fn bytes_of<'a>(range: PageRange) -> &'a mut [u8] {
    // SAFETY: as promised above; every byte of a new mapping is zero.
    unsafe { std::slice::from_raw_parts_mut(range.start().as_ptr::<u8>(), range.pages().get() * PAGE_SIZE) }
}

pub fn run(report: &mut Report, options: &Options) {
    report.section("zeroing: ns a unit");
    let frames =
        memfd::create(c"bench-zeroing", PageCount::new(COLD_PAGES), memfd::Pages::Base).expect("memfd");
    let ranges = [fresh(Source::Shared(frames.as_fd(), PageCount::new(0))), fresh(Source::Anonymous)];
    // SAFETY: mapped above, in this function's use alone, and unmapped at its end.
    let [alias, private] = ranges.map(|range| unsafe { bytes_of(range) });
    // So that no call below meets a page that has no frame.
    alias.fill(1);
    private.fill(1);
    let mut zero = File::open("/dev/zero").expect("/dev/zero");
    for (size, bytes) in [("4 KiB", PAGE_SIZE), ("64 KiB", 16 * PAGE_SIZE)] {
        for (place, within) in [("the same frames again", bytes), ("64 MiB in turn", COLD_PAGES * PAGE_SIZE)]
        {
            let case = format!("zeroing {size}, {place}");
            let rounds = options.rounds(25);
            let memset = |memory: &mut [u8]| each(memory, bytes, within, |unit| unit.fill(0));
            let pair = versus(rounds, || memset(alias), || memset(private));
            report.pair(
                &format!("{case}: the alias"),
                "time",
                "ns",
                "memset of private memory",
                CALLS,
                &pair,
            );
            let mut kernel = |memory: &mut [u8]| {
                each(memory, bytes, within, |unit| zero.read_exact(unit).expect("/dev/zero is endless"))
            };
            let pair = versus(rounds, || memset(alias), || kernel(private));
            report.pair(
                &format!("{case}: the alias"),
                "time",
                "ns",
                "the kernel's: read(/dev/zero)",
                CALLS,
                &pair,
            );
        }
    }
    // SAFETY: mapped above; the slices are not used any more.
    ranges.iter().for_each(|range| unsafe { mem::unmap(*range) }.expect("munmap"));
}
