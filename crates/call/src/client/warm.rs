//! The place of the line that was used last: taken and put back without a lock.
//!
//! ```text
//!            ┌──── take ────▶ empty ────put back────┐
//!   a line ──┤                  ▲                   ├──▶ a line
//!            └── reserve ──▶ reserved ──put back────┘
//!                               └── unreserve ──▶ empty
//! ```
//!
//! A hot call *reserves*: nobody else puts anything there meanwhile, so its line comes back by a plain store. A locked instruction waits
//! for all that was stored before, and what comes after waits for it, which costs as much as a cache line's journey (`docs/costs.md`).
//!
//! Model-checked: `tests/loom_warm.rs`.

use core::ptr::{null_mut, without_provenance_mut};
use peregrine_base::sync::{AtomicPtr, Ordering};

/// A place for one `T` that many want; what is in it nobody uses.
#[derive(Debug)]
pub struct Warm<T> {
    place: AtomicPtr<T>,
}

/// What was in the place is in use and comes back there.
fn reserved<T>() -> *mut T {
    without_provenance_mut(1)
}

fn is_something<T>(place: *mut T) -> bool {
    !place.is_null() && place != reserved()
}

impl<T> Warm<T> {
    /// An empty one.
    pub fn new() -> Self {
        Self { place: AtomicPtr::new(null_mut()) }
    }

    /// Whether something is there to be taken. SeqCst: of two of whom one looks here after it has said that it waits, and the other asks who
    /// waits after [`put_back`](Self::put_back), one sees the other.
    pub fn has_one(&self) -> bool {
        is_something(self.place.load(Ordering::SeqCst))
    }

    /// Takes what is there, and leaves the place empty.
    #[inline]
    pub fn take(&self) -> Option<Box<T>> {
        self.take_for(null_mut())
    }

    /// Takes what is there, and keeps the place for it: [`put_back_reserved`](Self::put_back_reserved) or [`unreserve`](Self::unreserve)
    /// follows, soon, for meanwhile nobody finds anything here.
    #[inline(always)]
    pub fn reserve(&self) -> Option<Box<T>> {
        self.take_for(reserved())
    }

    #[inline(always)]
    fn take_for(&self, instead: *mut T) -> Option<Box<T>> {
        let there = self.place.load(Ordering::Relaxed);
        if !is_something(there) {
            return None;
        }
        // Acquire pairs with the stores of those who put it back.
        self.place.compare_exchange(there, instead, Ordering::Acquire, Ordering::Relaxed).ok()?;
        // SAFETY: from `Box::into_raw` in one of the `put_back`s, and the exchange gave it to us alone. (Has it been taken and put back since
        // it was looked at, it is what was put back that we get.)
        Some(unsafe { Box::from_raw(there) })
    }

    /// What the place was kept for goes another way.
    pub fn unreserve(&self) {
        // Nobody but who reserved it changes it.
        self.place.store(null_mut(), Ordering::Release);
    }

    /// Puts back what the place was reserved for. Who waits is not told, and may not have been seen: `has_one` of it and this store are in no
    /// order.
    #[inline(always)]
    pub fn put_back_reserved(&self, what: Box<T>) {
        // Release pairs with the exchange of who takes it.
        self.place.store(Box::into_raw(what), Ordering::Release);
    }

    /// The same, in one order with [`has_one`](Self::has_one).
    pub fn put_back_reserved_in_order(&self, what: Box<T>) {
        self.place.swap(Box::into_raw(what), Ordering::SeqCst);
    }

    /// Puts something there, in one order with [`has_one`](Self::has_one).
    ///
    /// # Errors
    /// Gives it back if there is something already, or the place is reserved.
    #[inline(always)]
    pub fn put_back(&self, what: Box<T>) -> Result<(), Box<T>> {
        let what = Box::into_raw(what);
        match self.place.compare_exchange(null_mut(), what, Ordering::SeqCst, Ordering::Relaxed) {
            Ok(_) => Ok(()),
            // SAFETY: made above, and nobody else got it.
            Err(_) => Err(unsafe { Box::from_raw(what) }),
        }
    }
}

impl<T> Default for Warm<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Drop for Warm<T> {
    fn drop(&mut self) {
        drop(self.take());
    }
}
