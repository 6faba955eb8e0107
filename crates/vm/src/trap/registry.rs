//! Which handler serves which address: read in signal handlers, changed in ordinary code.
//!
//! ```text
//!  TABLE ──▶ Table { segments: sorted, disjoint; each names its chain, innermost registration first }
//!              │ replaced as a whole by a registration (under WRITER)
//!              ▼ the old one is freed after a grace period: every thread that was inside a trap has left it
//! ```
//!
//! Who may free which table and when is the protocol of [`grace`](super::grace). A handler that registers or unregisters
//! waits for itself: the documentation of [`Registration`](super::Registration) forbids it, for code can't tell.

use super::SignalHandler;
use super::grace::{self, Published};
use crate::process;
use peregrine_base::sync::{AtomicU32, Ordering};
use peregrine_base::{PageRange, VirtAddr};
use std::sync::{Arc, Mutex, PoisonError};

static TABLE: Published<Table> = Published::new();
static WRITER: Mutex<Writer> = Mutex::new(Writer { entries: Vec::new(), ghosts: Vec::new() });

struct Writer {
    entries: Vec<Arc<Entry>>,
    ghosts: Vec<Arc<Ghost>>,
}

/// A range whose registration went. A thread may have faulted there before that, and its signal may arrive now: it is in
/// no count yet, so no grace period can wait for it. It repeats its access, which is right if the memory is plain by now;
/// if it is not, the access faults again, and after so many times the signal goes where it would have gone.
struct Ghost {
    range: PageRange,
    /// Faults that may still be forgiven: at most one a thread was under way.
    budget: AtomicU32,
}

/// Ghosts that are kept; of more, the oldest goes.
const GHOSTS: usize = 64;
/// Threads that may have a fault under way in one range when its registration goes.
const FORGIVEN: u32 = 256;

/// One registration.
pub(super) struct Entry {
    pub(super) range: PageRange,
    pub(super) handler: Arc<dyn SignalHandler>,
}

/// Consecutive pages with the same registrations.
struct Segment {
    start: usize,
    end: usize,
    /// Where in `Table::chains` its registrations begin, innermost (latest) first, and how many there are.
    chain: (u32, u32),
}

pub(super) struct Table {
    segments: Vec<Segment>,
    chains: Vec<Arc<Entry>>,
    ghosts: Vec<Arc<Ghost>>,
}

impl Table {
    fn build(entries: &[Arc<Entry>], ghosts: &[Arc<Ghost>]) -> Self {
        let mut bounds: Vec<usize> =
            entries.iter().flat_map(|e| [e.range.start().as_usize(), e.range.end().as_usize()]).collect();
        bounds.sort_unstable();
        bounds.dedup();
        let mut table = Self { segments: Vec::new(), chains: Vec::new(), ghosts: ghosts.to_vec() };
        for pair in bounds.windows(2) {
            let first = table.chains.len();
            let covering = entries.iter().rev().filter(|e| e.range.contains(VirtAddr::new(pair[0])));
            table.chains.extend(covering.cloned());
            let count = table.chains.len() - first;
            if count > 0 {
                table.segments.push(Segment {
                    start: pair[0],
                    end: pair[1],
                    chain: (first as u32, count as u32),
                });
            }
        }
        table
    }

    /// The registrations that hold `addr`, innermost first. Trap code: allocates nothing, locks nothing, panics never.
    #[inline]
    pub(super) fn find(&self, addr: VirtAddr) -> &[Arc<Entry>] {
        let addr = addr.as_usize();
        // `partition_point` by hand, for the compiler makes a call of that.
        let (mut at, mut left) = (0, self.segments.len());
        while left > 1 {
            let half = left / 2;
            if self.segments.get(at + half).is_some_and(|s| s.start <= addr) {
                at += half;
            }
            left -= half;
        }
        match self.segments.get(at) {
            Some(s) if s.start <= addr && addr < s.end => {
                let (first, count) = (s.chain.0 as usize, s.chain.1 as usize);
                self.chains.get(first..first + count).unwrap_or(&[])
            }
            _ => &[],
        }
    }
}

/// A thread inside a trap: the table it sees stays until this is dropped.
pub(super) struct Inside(grace::Inside<'static, Table>);

impl Inside {
    /// Trap code. `stack_hint` spreads threads over cache lines. `None` before the first registration of this process.
    #[inline]
    pub(super) fn enter(stack_hint: usize) -> Option<Self> {
        let page = process::page_if_made()?;
        // A child may trap before it does anything else with this crate, and fork again in the handler.
        process::name(page);
        Some(Self(TABLE.enter(&page.counts, stack_hint >> 14)))
    }

    #[inline]
    pub(super) fn find(&self, addr: VirtAddr) -> &[Arc<Entry>] {
        self.0.table().map_or(&[], |t| t.find(addr))
    }

    /// Whether a fault that nobody wants may be one that was under way when a registration went. Trap code.
    #[cold]
    pub(super) fn may_be_late(&self, addr: VirtAddr) -> bool {
        let Some(table) = self.0.table() else { return false };
        table.ghosts.iter().filter(|g| g.range.contains(addr)).any(|ghost| {
            let spend = |left: u32| left.checked_sub(1);
            // Relaxed: a count of its own, which orders nothing.
            ghost.budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).is_ok()
        })
    }
}

fn replace(writer: &Writer) {
    let fresh = Box::new(Table::build(&writer.entries, &writer.ghosts));
    // SAFETY: one at a time, for `writer` lies behind WRITER's lock; `Inside::enter` uses the same counts.
    drop(unsafe { TABLE.replace(fresh, &process::page().counts, peregrine_sys::io::yield_now) });
}

/// Adds `entry` as the innermost registration of its range.
pub(super) fn add(entry: Arc<Entry>) {
    // A panic while the lock is held can only be our own allocation failing, which leaves the lists as they were.
    let mut writer = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
    writer.entries.push(entry);
    replace(&writer);
}

/// Takes `entry` out; when it returns, no trap is inside its handler.
pub(super) fn remove(entry: &Arc<Entry>) {
    let mut writer = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
    writer.entries.retain(|e| !Arc::ptr_eq(e, entry));
    writer.ghosts.retain(|g| g.range != entry.range);
    if writer.ghosts.len() == GHOSTS {
        writer.ghosts.remove(0);
    }
    writer.ghosts.push(Arc::new(Ghost { range: entry.range, budget: AtomicU32::new(FORGIVEN) }));
    replace(&writer);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trap::{Decision, Fault};
    use peregrine_base::PageCount;

    struct Nothing;
    // SAFETY: does nothing at all (S3).
    unsafe impl SignalHandler for Nothing {
        fn on_fault(&self, _: &Fault) -> Decision {
            Decision::Deny
        }
    }

    fn entry(start: usize, pages: usize) -> Arc<Entry> {
        let range = PageRange::new(VirtAddr::new(start * 4096), PageCount::new(pages));
        Arc::new(Entry { range, handler: Arc::new(Nothing) })
    }

    #[test]
    fn the_innermost_registration_comes_first_and_the_outer_ones_follow() {
        let all = [entry(10, 10), entry(12, 2), entry(13, 4), entry(40, 1)];
        let table = Table::build(&all, &[]);
        for page in 0..50 {
            let naive: Vec<_> =
                all.iter().rev().filter(|e| e.range.contains(VirtAddr::new(page * 4096 + 7))).collect();
            let found: Vec<_> = table.find(VirtAddr::new(page * 4096 + 7)).iter().collect();
            assert_eq!(naive.len(), found.len(), "page {page}");
            assert!(naive.iter().zip(&found).all(|(a, b)| Arc::ptr_eq(a, b)), "page {page}");
        }
    }
}
