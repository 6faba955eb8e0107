//! What the threads of these tests own.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a thread has in all four places, and a check that it is still there.
pub struct Own {
    seed: u64,
    pub stack: [u64; 40],
    pub heap: BTreeMap<u64, String>,
}

pub static STATIC: AtomicU64 = AtomicU64::new(0);
static LOCKED: Mutex<Vec<u64>> = Mutex::new(Vec::new());
thread_local! {
    static LOCAL: Cell<u64> = const { Cell::new(0) };
    static NAMES: std::cell::RefCell<Vec<String>> = const { std::cell::RefCell::new(Vec::new()) };
}

impl Own {
    pub fn new(seed: u64) -> Self {
        assert_eq!(STATIC.load(Ordering::Relaxed), 0, "a new thread starts with pristine statics");
        assert_eq!(LOCAL.get(), 0, "and pristine thread-locals");
        STATIC.store(seed * 3, Ordering::Relaxed);
        LOCAL.set(seed * 5);
        LOCKED.lock().unwrap().push(seed * 7);
        NAMES.with_borrow_mut(|n| n.push(format!("name {seed}")));
        let heap = (0..20).map(|i| (i, format!("{seed}/{i}"))).collect();
        Self { seed, stack: std::array::from_fn(|i| seed * 1000 + i as u64), heap }
    }

    pub fn check(&self) {
        let seed = self.seed;
        assert_eq!(STATIC.load(Ordering::Relaxed), seed * 3);
        assert_eq!(LOCAL.get(), seed * 5);
        assert_eq!(*LOCKED.lock().unwrap(), [seed * 7]);
        NAMES.with_borrow(|n| assert_eq!(*n, [format!("name {seed}")]));
        assert!(self.stack.iter().enumerate().all(|(i, v)| *v == seed * 1000 + i as u64));
        assert!(self.heap.iter().all(|(i, v)| *v == format!("{seed}/{i}")));
    }
}
