//! Every order of first writes against takes: no write is missed.
//!
//! The kernel's part is a page that is protected or not, changed and written under one lock, as a page-table entry is. A
//! writer whose page is protected traps, runs the handler and tries again; it logs its write when that is done. The taker
//! notes the log, takes the dirty pages and copies them, as a checkpoint would: what was logged before must be in the copy.

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;
use vm_loom::words::{Lifted, Words};

struct Page {
    protected: bool,
    /// What each writer wrote last.
    values: [u64; 2],
}

struct Memory {
    pages: Vec<Mutex<Page>>,
    words: Words,
    log: [AtomicU64; 2],
    /// Lifting one page fails: `vm.max_map_count`.
    one_by_one_fails: bool,
}

impl Memory {
    fn new(pages: usize, one_by_one_fails: bool) -> Arc<Self> {
        let protected = || Mutex::new(Page { protected: true, values: [0; 2] });
        Arc::new(Self {
            pages: (0..pages).map(|_| protected()).collect(),
            words: Words::clean(pages),
            log: [AtomicU64::new(0), AtomicU64::new(0)],
            one_by_one_fails,
        })
    }

    fn set(&self, page: usize, protected: bool) {
        self.pages[page].lock().unwrap().protected = protected;
    }

    fn trap(&self, page: usize) {
        let lift = || {
            if !self.one_by_one_fails {
                self.set(page, false);
            }
            !self.one_by_one_fails
        };
        let lift_all = || {
            (0..self.pages.len()).for_each(|p| self.set(p, false));
            true
        };
        assert!(matches!(self.words.on_write(page, lift, lift_all), Lifted::Page | Lifted::All));
    }

    fn write(&self, writer: usize, page: usize, value: u64) {
        loop {
            {
                let mut entry = self.pages[page].lock().unwrap();
                if !entry.protected {
                    entry.values[writer] = value;
                    break;
                }
            }
            self.trap(page);
        }
        self.log[writer].store(value, Ordering::Release);
    }

    /// Takes, and copies what was taken into `image`; checks it against what was logged before.
    fn take(&self, image: &mut [[u64; 2]]) {
        let before = [0, 1].map(|w| self.log[w].load(Ordering::Acquire));
        let mut runs = Vec::new();
        let protect = |pages: core::ops::Range<usize>| {
            pages.for_each(|p| self.set(p, true));
            true
        };
        assert_eq!(self.words.take(0..self.pages.len(), protect, |run| runs.push(run)), 0);
        for page in runs.into_iter().flatten() {
            image[page] = self.pages[page].lock().unwrap().values;
        }
        for writer in [0, 1] {
            // Each writer writes growing values, the newest somewhere.
            let seen = image.iter().map(|page| page[writer]).max().unwrap();
            assert!(
                seen >= before[writer],
                "writer {writer} had logged {} and the copy has {seen}",
                before[writer]
            );
        }
    }
}

fn never_missed(memory: fn() -> Arc<Memory>, writes: [&'static [(usize, u64)]; 2], takes: usize) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let memory = memory();
        let writers: Vec<_> = [0, 1]
            .into_iter()
            .filter(|w| !writes[*w].is_empty())
            .map(|writer| {
                let memory = memory.clone();
                thread::spawn(move || {
                    writes[writer].iter().for_each(|&(page, value)| memory.write(writer, page, value));
                })
            })
            .collect();
        let mut image = vec![[0; 2]; memory.pages.len()];
        (0..takes).for_each(|_| memory.take(&mut image));
        writers.into_iter().for_each(|w| w.join().unwrap());
        memory.take(&mut image);
        for (page, entry) in memory.pages.iter().enumerate() {
            assert_eq!(entry.lock().unwrap().values, image[page], "page {page} after the last take");
        }
        // And then everything is clean: a second take finds nothing that was not written.
        let mut again = 0;
        memory.words.take(0..memory.pages.len(), |_| true, |run| again += run.len());
        assert_eq!(again, 0);
    });
}

#[test]
fn two_first_writes_to_one_page_are_both_in_the_copy() {
    never_missed(|| Memory::new(1, false), [&[(0, 1)], &[(0, 1)]], 1);
}

#[test]
fn a_writer_that_goes_on_while_pages_are_taken_is_never_missed() {
    never_missed(|| Memory::new(1, false), [&[(0, 1), (0, 2)], &[]], 2);
}

#[test]
fn neighbours_taken_as_one_run_are_both_in_the_copy() {
    never_missed(|| Memory::new(2, false), [&[(0, 1)], &[(1, 1)]], 1);
}

#[test]
fn lifting_everything_because_one_page_cannot_be_lifted_misses_nothing() {
    never_missed(|| Memory::new(2, true), [&[(0, 1)], &[(1, 1)]], 1);
}
