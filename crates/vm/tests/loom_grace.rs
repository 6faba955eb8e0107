//! Every order of traps against a registration: no table is freed while a trap reads it, and what was registered is found.
//!
//! A table is a cell that loom watches: readers read it, and whoever frees it writes to it first, so that a free that does not
//! come after every read is found. What loom can't see: that a trap interrupts its own thread (it is a thread here), and
//! fork (`a_handler_that_forks_…` in `traps.rs`).

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;
use vm_loom::grace::{Counts, Published};

struct Table {
    number: UnsafeCell<usize>,
}

impl Table {
    fn numbered(number: usize) -> Box<Self> {
        Box::new(Self { number: UnsafeCell::new(number) })
    }

    fn read(&self) -> usize {
        // SAFETY: what is tested: loom fails if a free may come at the same time.
        self.number.with(|n| unsafe { *n })
    }

    fn free(self) -> usize {
        // SAFETY: as in `read`.
        self.number.with_mut(|n| unsafe { std::mem::replace(&mut *n, usize::MAX) })
    }
}

struct Registry {
    published: Published<Table>,
    counts: Counts,
}

fn registry() -> Arc<Registry> {
    let registry = Registry { published: Published::new(), counts: Counts::new() };
    // SAFETY: nobody else has it yet.
    let none = unsafe { registry.published.replace(Table::numbered(0), &registry.counts, thread::yield_now) };
    assert!(none.is_none());
    Arc::new(registry)
}

fn trap(registry: &Registry, stripe: usize) -> usize {
    registry.published.enter(&registry.counts, stripe).table().expect("there is one").read()
}

/// # Safety
/// One call at a time.
unsafe fn register(registry: &Registry, number: usize) {
    // SAFETY: the caller's promise.
    let old =
        unsafe { registry.published.replace(Table::numbered(number), &registry.counts, thread::yield_now) };
    assert_eq!(old.map(|table| table.free()), Some(number - 1), "tables go in the order in which they came");
}

#[test]
fn no_table_is_freed_while_a_trap_reads_it() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let registry = registry();
        let traps: Vec<_> = (0..2)
            .map(|stripe| {
                let registry = registry.clone();
                thread::spawn(move || assert!(trap(&registry, stripe) <= 1))
            })
            .collect();
        // SAFETY: one thread registers.
        unsafe { register(&registry, 1) };
        traps.into_iter().for_each(|t| t.join().unwrap());
        assert_eq!(trap(&registry, 1), 1);
    });
}

#[test]
fn a_trap_delayed_across_two_registrations_is_still_waited_for() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let registry = registry();
        let other = registry.clone();
        let late = thread::spawn(move || (trap(&other, 1), trap(&other, 0)));
        // SAFETY: one thread registers.
        unsafe { register(&registry, 1) };
        // SAFETY: as above.
        unsafe { register(&registry, 2) };
        let (first, second) = late.join().unwrap();
        assert!(first <= second && second <= 2, "{first} then {second}");
        assert_eq!(trap(&registry, 1), 2);
    });
}

#[test]
fn what_was_registered_before_is_found() {
    loom::model(|| {
        let registry = registry();
        let told = Arc::new(loom::sync::atomic::AtomicBool::new(false));
        let (other, says) = (registry.clone(), told.clone());
        let writer = thread::spawn(move || {
            // SAFETY: one thread registers.
            unsafe { register(&other, 1) };
            says.store(true, loom::sync::atomic::Ordering::Release);
        });
        if told.load(loom::sync::atomic::Ordering::Acquire) {
            assert_eq!(trap(&registry, 1), 1);
        }
        writer.join().unwrap();
    });
}
