//! A lock between processes: one word in shared memory, a futex to sleep on.
//!
//! States: 0 free, 1 held, 2 held and somebody sleeps (Drepper, "Futexes Are Tricky", the second mutex). A section
//! of the runtime encloses each use, so a holder is never preempted by its own node; if its process is killed the whole
//! World is rolled back to an image, in which every lock is free, for images are taken with every node at a safe point.

use crate::killpoint::{Point, at};
use core::cell::UnsafeCell;
use peregrine_base::sync::{AtomicU32, Ordering, spin_loop};
use peregrine_sys::futex;

/// A value in shared memory that one node at a time may use.
#[repr(C)]
pub struct Lock<T> {
    word: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: `with` gives access to one holder at a time.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    /// A free lock around `value`.
    #[allow(dead_code)]
    pub const fn new(value: T) -> Self {
        Self { word: AtomicU32::new(0), value: UnsafeCell::new(value) }
    }

    /// Where the value lies, for who must look while the holder is dead.
    pub const fn as_ptr(&self) -> *const T {
        self.value.get()
    }

    /// Runs `f` with the value to itself.
    #[inline]
    pub fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        debug_assert!(Self::may_wait(), "a lock is taken inside a runtime section only");
        // Acquire pairs with the release in the swap below: the holder sees what the last one did.
        if self.word.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            self.wait();
        }
        at(Point::LockTaken);
        // SAFETY: the lock is held.
        let r = f(unsafe { &mut *self.value.get() });
        at(Point::LockChanged);
        if self.word.swap(0, Ordering::Release) == 2 {
            at(Point::LockFreed);
            let _ = futex::wake(&self.word, 1);
        }
        r
    }

    /// Whether the caller can't be preempted: in a runtime section, or no thread at all.
    fn may_wait() -> bool {
        // SAFETY: where a thread runs there is a carrier.
        peregrine_thread::carrier::current_slot().is_none()
            || unsafe { peregrine_thread::carrier::carrier() }.depth.load(Ordering::Relaxed) != 0
    }

    #[cold]
    fn wait(&self) {
        for _ in 0..200 {
            if self.word.load(Ordering::Relaxed) == 0
                && self.word.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok()
            {
                return;
            }
            spin_loop();
        }
        while self.word.swap(2, Ordering::Acquire) != 0 {
            futex::wait(&self.word, 2, None);
        }
    }
}
