//! The floor of DIRTY: the same first writes and the same takes by bare system calls, on the same pages.

use super::raw::{self, Bare};
use super::{Way, dirty};
use crate::measure::time_ns;
use peregrine_base::sync::Ordering;
use peregrine_sys::pagemap::{PageRegion, Pagemap, ScanArgs};
use peregrine_vm::{DirtyMechanism, Mapping, PAGE_SIZE, PageCount, PageRange, Tracker};
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
    /// A handler that opens the page, and no books: the runs to be protected again are known beforehand. Inline it stands in for
    /// the tracker's own handler, on the tracker's pages, which are all protected again before that one runs again; a pager has
    /// an alias and a descriptor of its own.
    Trapping {
        bare: Bare,
        runs: Vec<PageRange>,
    },
    Compare {
        now: Vec<u8>,
        shadow: Vec<u8>,
    },
}

impl Floor {
    /// For the pages `dirty` of `memory`, which `tracker` tracks.
    pub fn new(mechanism: DirtyMechanism, memory: &Arc<Mapping>, tracker: &Tracker, dirty: &[usize]) -> Self {
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
        let mut sorted = dirty.to_vec();
        sorted.sort_unstable();
        let mut runs: Vec<PageRange> = Vec::new();
        for page in sorted {
            let page = bare.memory.pages(page, 1).expect("in bounds");
            match runs.last_mut() {
                Some(last) if last.end() == page.start() => {
                    *last = PageRange::new(last.start(), PageCount::new(last.pages().get() + 1));
                }
                _ => runs.push(page),
            }
        }
        Self::Trapping { bare, runs }
    }

    /// Writes the pages, which are clean; ns a page.
    pub fn write(&mut self, memory: &Mapping, pages: &[usize]) -> f64 {
        let ns = match self {
            Self::Scan(_) => time_ns(|| dirty::write_pages(memory, pages, 1)),
            Self::Trapping { bare, .. } => {
                bare.aim();
                raw::IDLE.store(0, Ordering::Relaxed);
                raw::with_handler(|| time_ns(|| dirty::write_pages(&bare.memory, pages, 1)))
            }
            Self::Compare { now, .. } => time_ns(|| pages.iter().for_each(|page| now[page * PAGE_SIZE] = 1)),
        };
        ns / pages.len() as f64
    }

    /// Makes the pages clean; ns in all.
    pub fn take(&mut self) -> f64 {
        match self {
            Self::Scan(scan) => time_ns(|| {
                std::hint::black_box(scan.take());
            }),
            Self::Trapping { bare, runs } => time_ns(|| runs.iter().for_each(|run| bare.close(*run))),
            Self::Compare { now, shadow } => time_ns(|| {
                let same =
                    now.chunks_exact(PAGE_SIZE).zip(shadow.chunks_exact(PAGE_SIZE)).filter(|(a, b)| a == b);
                std::hint::black_box(same.count());
            }),
        }
    }
}
