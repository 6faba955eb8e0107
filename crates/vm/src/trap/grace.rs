//! A table that signal handlers read and ordinary code replaces: when may the old one be freed?
//!
//! ```text
//!  reader (in a trap)                          writer (one at a time)
//!    c := inside[epoch's parity][stripe]         current := the new table               (swap)
//!    c += 1                                      twice: flip the epoch;
//!    table := current                                   each count of the old parity: wait until c + 0 = 0
//!    … reads the table …                         free the old table
//!    c -= 1
//! ```
//!
//! **Why it is safe.** The writer looks at every count once after its swap, and looks by adding zero: so its look and the
//! reader's two steps on that count are in one order. A reader that counted itself in before the look is waited for. One
//! that came after takes over, with the count, everything the writer did before, the swap too: it finds the new table. Which
//! parity a reader chose does not matter to this.
//!
//! **Why it ends.** Were there one set of counts, a stream of traps could keep it above zero for ever. After a flip new
//! readers use the other set, so the old one drains but for readers that had read the epoch and not yet counted. (For
//! those both sets are looked at, not only the old one.)
//!
//! **What can go wrong.** A reader that never comes to its last line (a handler left by a jump) stops every writer. A fork
//! while readers are inside: those of other threads don't exist in the child, so the counts lie in a page that the kernel
//! zeroes there (`process`); the reader that forked finds [`Counts::life`] zeroed too, and does not count itself out of what
//! it is not counted in, or a later reader would make the count zero while inside.
//!
//! **The readers' half is trap code: allocates nothing, locks nothing, panics never (S3).**

use peregrine_base::sync::{AtomicI64, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

/// Threads on different (alternate) stacks mostly use different cache lines.
#[cfg(not(peregrine_loom))]
pub const STRIPES: usize = 16;
/// A model checker tries every order of looking at them.
#[cfg(peregrine_loom)]
pub const STRIPES: usize = 2;

/// Readers inside, one count a cache line.
#[repr(C, align(64))]
struct Count(AtomicI64);

/// Readers inside one process. All zero bytes is a valid value: nobody.
#[repr(C)]
pub struct Counts {
    /// Names this life of the process: not zero while there is a reader, zeroed by a fork together with the counts.
    pub life: AtomicU64,
    /// By the parity of the epoch they came in, and by stripe.
    inside: [[Count; STRIPES]; 2],
}

impl Counts {
    /// Nobody is inside.
    pub fn new() -> Self {
        let none = || core::array::from_fn(|_| Count(AtomicI64::new(0)));
        Self { life: AtomicU64::new(0), inside: [none(), none()] }
    }
}

impl Default for Counts {
    fn default() -> Self {
        Self::new()
    }
}

/// What readers find, and the epoch they come in.
pub struct Published<T> {
    current: AtomicPtr<T>,
    epoch: AtomicUsize,
}

/// A reader inside: the table it sees stays until this is dropped.
pub struct Inside<'a, T> {
    counts: &'a Counts,
    life: u64,
    count: &'a Count,
    table: *const T,
}

impl<T> Published<T> {
    /// No table yet.
    #[cfg(not(peregrine_loom))]
    pub const fn new() -> Self {
        Self { current: AtomicPtr::new(core::ptr::null_mut()), epoch: AtomicUsize::new(0) }
    }

    /// No table yet.
    #[cfg(peregrine_loom)]
    pub fn new() -> Self {
        Self { current: AtomicPtr::new(core::ptr::null_mut()), epoch: AtomicUsize::new(0) }
    }

    /// Counts the reader in. Any `stripe` will do.
    #[inline]
    pub fn enter<'a>(&self, counts: &'a Counts, stripe: usize) -> Inside<'a, T> {
        // Relaxed: a stale epoch costs the writer a longer wait and nothing else.
        let parity = self.epoch.load(Ordering::Relaxed) & 1;
        let count = &counts.inside[parity][stripe % STRIPES];
        // Relaxed: only this thread can fork while it is here.
        let life = counts.life.load(Ordering::Relaxed);
        // Acquire: after a writer's look at this count in `replace`, its swap is seen by the load below. Release: before such a
        // look, the load below can't come first, for the writer then waits for `drop`.
        count.0.fetch_add(1, Ordering::AcqRel);
        // Acquire pairs with the swap's Release in `replace`: the table's contents.
        Inside { counts, life, count, table: self.current.load(Ordering::Acquire) }
    }

    /// Puts `fresh` in place of what is there, and gives that back when no reader is inside it any more; `pause` is called
    /// while one is.
    ///
    /// # Safety
    /// One call at a time, and every [`Published::enter`] of this value is given these `counts`.
    pub unsafe fn replace(&self, fresh: Box<T>, counts: &Counts, mut pause: impl FnMut()) -> Option<Box<T>> {
        // Release publishes the contents; Acquire: the old table was somebody's Box::into_raw.
        let old = self.current.swap(Box::into_raw(fresh), Ordering::AcqRel);
        for _ in 0..2 {
            // Relaxed: see `enter`.
            let parity = self.epoch.fetch_add(1, Ordering::Relaxed) & 1;
            for count in &counts.inside[parity] {
                // Adding zero, not loading: see the head of this file. Release: to readers that count in later. Acquire: from
                // those that counted out, whose reads come before the free.
                while count.0.fetch_add(0, Ordering::AcqRel) > 0 {
                    pause();
                }
            }
        }
        // SAFETY: null, or made by `into_raw` in an earlier call and swapped out by this one alone; no reader has it (above).
        (!old.is_null()).then(|| unsafe { Box::from_raw(old) })
    }
}

impl<T> Default for Published<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Inside<'_, T> {
    /// The table, if there is one.
    #[inline]
    pub fn table(&self) -> Option<&T> {
        // SAFETY: null, or a table that `replace` gives back only after `self.count` was seen without this reader.
        unsafe { self.table.as_ref() }
    }
}

impl<T> Drop for Inside<'_, T> {
    #[inline]
    fn drop(&mut self) {
        if self.counts.life.load(Ordering::Relaxed) == self.life {
            // Release pairs with the Acquire of the look in `replace`: what was read lies before.
            self.count.0.fetch_sub(1, Ordering::Release);
        }
    }
}
