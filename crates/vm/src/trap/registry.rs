//! Which handler serves which address: read in signal handlers, changed in ordinary code.
//!
//! ```text
//!  TABLE ──▶ Table { segments: sorted, disjoint; each names its chain, innermost registration first }
//!              │ replaced as a whole by a registration (under WRITER)
//!              ▼ the old one is freed after a grace period: every thread that was inside a trap has left it
//! ```
//!
//! **Protocol.** A trap increments `inside[epoch & 1][stripe]`, then loads `TABLE`, serves the fault, and decrements the
//! *same* count. A writer stores the new table, then twice: flips the epoch and waits until every count of the old
//! parity is zero. Twice, because a trap may read the epoch, be delayed, and count itself in after the first flip: it is
//! then still found by the second wait, or it has loaded the new table. All of it is sequentially consistent: the trap's
//! "count, then load" against the writer's "store, then read counts" is a store-load race on both sides.
//!
//! **What can go wrong.** A handler that registers or unregisters waits for itself (refused by `WRITER`'s documentation,
//! not by code: it can't know). A handler left by a jump never counts itself out, and the next unregistration hangs. A
//! fork while other threads are inside a trap: their counts live in a page that is zero in the child (`process`).

use super::SignalHandler;
use crate::process;
use peregrine_base::sync::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use peregrine_base::{PageRange, VirtAddr};
use std::sync::{Arc, Mutex, PoisonError};

static TABLE: AtomicPtr<Table> = AtomicPtr::new(core::ptr::null_mut());
static EPOCH: AtomicUsize = AtomicUsize::new(0);
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
        let after = self.segments.partition_point(|s| s.start <= addr);
        match after.checked_sub(1).and_then(|i| self.segments.get(i)) {
            Some(s) if addr < s.end => {
                let (first, count) = (s.chain.0 as usize, s.chain.1 as usize);
                self.chains.get(first..first + count).unwrap_or(&[])
            }
            _ => &[],
        }
    }
}

/// A thread inside a trap: the table it sees stays until this is dropped.
pub(super) struct Inside {
    count: &'static process::Count,
    table: *const Table,
}

impl Inside {
    /// Trap code. `stack_hint` spreads threads over cache lines. `None` before the first registration of this process.
    #[inline]
    pub(super) fn enter(stack_hint: usize) -> Option<Self> {
        let page = process::page_if_made()?;
        let parity = EPOCH.load(Ordering::SeqCst) & 1;
        let count = &page.inside[parity][(stack_hint >> 14) % process::STRIPES];
        // SeqCst: before the load of TABLE below, against `replace`'s store of TABLE before its reads of the counts.
        count.0.fetch_add(1, Ordering::SeqCst);
        Some(Self { count, table: TABLE.load(Ordering::SeqCst) })
    }

    #[inline]
    pub(super) fn find(&self, addr: VirtAddr) -> &[Arc<Entry>] {
        // SAFETY: null or a table that `replace` frees only after `self.count` came back to zero.
        unsafe { self.table.as_ref() }.map_or(&[], |t| t.find(addr))
    }

    /// Whether a fault that nobody wants may be one that was under way when a registration went. Trap code.
    #[cold]
    pub(super) fn may_be_late(&self, addr: VirtAddr) -> bool {
        // SAFETY: as in `find`.
        let Some(table) = (unsafe { self.table.as_ref() }) else { return false };
        table.ghosts.iter().filter(|g| g.range.contains(addr)).any(|ghost| {
            let spend = |left: u32| left.checked_sub(1);
            // Relaxed: a count of its own, which orders nothing.
            ghost.budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).is_ok()
        })
    }
}

impl Drop for Inside {
    #[inline]
    fn drop(&mut self) {
        // SeqCst pairs with the writer's reads in `replace`: what the trap read lies before its going out.
        self.count.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn replace(writer: &Writer) {
    let fresh = Box::into_raw(Box::new(Table::build(&writer.entries, &writer.ghosts)));
    let old = TABLE.swap(fresh, Ordering::SeqCst);
    for _ in 0..2 {
        let parity = EPOCH.fetch_add(1, Ordering::SeqCst) & 1;
        for count in &process::page().inside[parity] {
            // Negative only in a child that forked inside a handler: its count began anew.
            while count.0.load(Ordering::SeqCst) > 0 {
                peregrine_sys::io::yield_now();
            }
        }
    }
    if !old.is_null() {
        // SAFETY: made by `Box::into_raw` in an earlier call; no longer in TABLE, and every trap that had loaded it has left
        // (the two waits above).
        drop(unsafe { Box::from_raw(old) });
    }
}

/// Adds `entry` as the innermost registration of its range.
pub(super) fn add(entry: Arc<Entry>) {
    // A panic while the lock is held can only be our own allocation failing, which leaves the lists as they were.
    let mut writer = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
    process::page();
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
