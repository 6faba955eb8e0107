//! The floor of DIRTY: the same first writes and the same takes by bare system calls, on the same pages.

use super::raw::{self, Bare};
use super::{ONE, Way, write_units};
use crate::measure::time_ns;
use peregrine_base::sync::Ordering;
use peregrine_sys::pagemap::{PageRegion, Pagemap, ScanArgs};
use peregrine_vm::{DirtyMechanism, Mapping, PAGE_SIZE, PageCount, PageRange, Tracker, VirtAddr};
use std::cell::Cell;
use std::sync::Arc;

/// `PAGEMAP_SCAN` in a loop.
pub struct Scan {
    range: PageRange,
    pagemap: Pagemap,
    found: Vec<PageRegion>,
}

impl Scan {
    pub fn of(memory: &Mapping) -> Self {
        Self {
            range: memory.range(),
            pagemap: Pagemap::open().expect("pagemap"),
            found: vec![PageRegion::default(); 256],
        }
    }

    /// Makes every page clean, and says how many were not.
    pub fn take(&mut self) -> usize {
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

/// What a tracker comes down to.
pub enum Floor {
    Scan(Scan),
    /// A handler that notes the page in a byte of its own and opens it; a take looks for the bytes that are set. Inline it stands
    /// in for the tracker's own handler, on the tracker's pages, which are all protected again before that one runs again; a
    /// pager has an alias and a descriptor of its own, and lifts and wakes in two calls, as one that keeps books has to.
    Trapping {
        bare: Bare,
        /// A byte a page, eight to a word.
        books: Box<[Cell<u64>]>,
    },
    Compare {
        now: Vec<u8>,
        shadow: Vec<u8>,
    },
}

impl Floor {
    /// For `memory`, which `tracker` tracks.
    pub fn new(mechanism: DirtyMechanism, memory: &Arc<Mapping>, tracker: &Tracker) -> Self {
        let unit = PageCount::new(1);
        let way = match mechanism {
            DirtyMechanism::AsyncWriteProtect => return Self::Scan(Scan::of(memory)),
            DirtyMechanism::Compare => {
                let bytes = memory.range().len_bytes();
                return Self::Compare { now: vec![1; bytes], shadow: vec![1; bytes] };
            }
            DirtyMechanism::SyncWriteProtectPager => Way::Pager,
            DirtyMechanism::Mprotect => Way::MprotectRead,
            DirtyMechanism::SyncWriteProtect => Way::WriteProtect,
        };
        let bare = if way == Way::Pager {
            let bare = Bare::behind(way, memory, unit);
            bare.memory.populate(bare.memory.range(), true).expect("populate");
            bare.close(bare.memory.range());
            bare
        } else {
            Bare::beside(way, tracker.userfaultfd(), memory, unit)
        };
        let books = (0..memory.range().pages().get().div_ceil(8)).map(|_| Cell::new(0)).collect();
        Self::Trapping { bare, books }
    }

    /// Writes the pages, which are clean; ns a page.
    pub fn write(&mut self, memory: &Mapping, pages: &[usize]) -> f64 {
        let ns = match self {
            Self::Scan(_) => time_ns(|| write_units(memory, ONE, pages, 1)),
            Self::Trapping { bare, books } => {
                bare.aim();
                raw::BOOKS.store(books.as_ptr().expose_provenance(), Ordering::Relaxed);
                raw::IDLE.store(0, Ordering::Relaxed);
                raw::LIFT_QUIETLY.store(true, Ordering::Relaxed);
                let ns = raw::with_handler(|| time_ns(|| write_units(&bare.memory, ONE, pages, 1)));
                raw::LIFT_QUIETLY.store(false, Ordering::Relaxed);
                raw::BOOKS.store(0, Ordering::Relaxed);
                ns
            }
            Self::Compare { now, .. } => time_ns(|| pages.iter().for_each(|page| now[page * PAGE_SIZE] = 1)),
        };
        ns / pages.len().max(1) as f64
    }

    /// Makes the pages clean; ns in all.
    pub fn take(&mut self) -> f64 {
        match self {
            Self::Scan(scan) => time_ns(|| {
                std::hint::black_box(scan.take());
            }),
            Self::Trapping { bare, books } => time_ns(|| take_noted(bare, books)),
            Self::Compare { now, shadow } => time_ns(|| {
                let same =
                    now.chunks_exact(PAGE_SIZE).zip(shadow.chunks_exact(PAGE_SIZE)).filter(|(a, b)| a == b);
                std::hint::black_box(same.count());
            }),
        }
    }
}

/// Clears each run of bytes that are set, and protects its pages.
fn take_noted(bare: &Bare, books: &[Cell<u64>]) {
    let first = bare.memory.range().start().as_usize();
    // No handler runs now; what it wrote the compiler can't know.
    let books = std::hint::black_box(books);
    let pages = books.len() * 8;
    let is_noted = |page: usize| books[page / 8].get() >> (page % 8 * 8) & 0xff != 0;
    let mut at = 0;
    while at < pages {
        if at % 8 == 0 && books[at / 8].get() == 0 {
            at += 8;
            continue;
        }
        if !is_noted(at) {
            at += 1;
            continue;
        }
        let from = at;
        while at < pages && is_noted(at) {
            at += 1;
        }
        // The one call of it here, so that the system call is compiled in, as a C program would have it.
        bare.close(PageRange::new(VirtAddr::new(first + from * PAGE_SIZE), PageCount::new(at - from)));
    }
    books.iter().for_each(|word| word.set(0));
}
