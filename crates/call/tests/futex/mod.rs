//! A futex as a checker sees it: a lock under which sleepers look at the word once more, as in the kernel.

use loom::sync::atomic::{AtomicU32, Ordering};
use loom::sync::{Condvar, Mutex};

/// What sleepers on one word share.
pub struct Futex {
    bucket: Mutex<()>,
    sleepers: Condvar,
}

impl Default for Futex {
    fn default() -> Self {
        Self::new()
    }
}

impl Futex {
    pub fn new() -> Self {
        Self { bucket: Mutex::new(()), sleepers: Condvar::new() }
    }

    /// Sleeps until somebody wakes, if `word` still is `expected`.
    pub fn wait(&self, word: &AtomicU32, expected: u32) {
        let bucket = self.bucket.lock().unwrap();
        if word.load(Ordering::Relaxed) == expected {
            drop(self.sleepers.wait(bucket).unwrap());
        }
    }

    pub fn wake(&self) {
        let _bucket = self.bucket.lock().unwrap();
        self.sleepers.notify_all();
    }
}
