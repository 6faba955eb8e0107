//! Shared futexes: waits that work between processes (a private futex of process A never wakes process B).

use crate::raw::{Errno, check, syscall6};
use linux_raw_sys::general::{__NR_futex, FUTEX_WAIT, FUTEX_WAKE, timespec};
use peregrine_base::sync::AtomicU32;

/// Sleeps while `*word == expected`, until woken, interrupted, or `timeout_ns` have passed (`None`: for ever).
///
/// `futex(2)` `FUTEX_WAIT` without `FUTEX_PRIVATE_FLAG`. Returns for any reason; callers re-check their condition.
#[inline]
pub fn wait(word: &AtomicU32, expected: u32, timeout_ns: Option<u64>) {
    let ts = timeout_ns
        .map(|ns| timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 });
    let ts_ptr = ts.as_ref().map_or(core::ptr::null(), core::ptr::from_ref);
    // SAFETY: `word` and `ts` are live for the call; the kernel only reads them.
    unsafe {
        syscall6(
            __NR_futex,
            word.as_ptr() as usize,
            FUTEX_WAIT as usize,
            expected as usize,
            ts_ptr as usize,
            0,
            0,
        );
    }
}

/// As [`wait`], and whether it was the timeout that ended it.
#[inline]
pub fn wait_timed(word: &AtomicU32, expected: u32, timeout_ns: u64) -> bool {
    let ts = timespec {
        tv_sec: (timeout_ns / 1_000_000_000) as i64,
        tv_nsec: (timeout_ns % 1_000_000_000) as i64,
    };
    // SAFETY: `word` and `ts` are live for the call; the kernel only reads them.
    let ended = check(unsafe {
        syscall6(
            __NR_futex,
            word.as_ptr() as usize,
            FUTEX_WAIT as usize,
            expected as usize,
            &raw const ts as usize,
            0,
            0,
        )
    });
    ended == Err(Errno::ETIMEDOUT)
}

/// Wakes up to `n` waiters on `word`; returns how many there were.
///
/// # Errors
/// EFAULT: the word is not mapped.
#[inline]
pub fn wake(word: &AtomicU32, n: u32) -> Result<usize, Errno> {
    // SAFETY: FUTEX_WAKE reads nothing through the pointer but the page it names.
    check(unsafe {
        syscall6(
            __NR_futex,
            word.as_ptr() as usize,
            FUTEX_WAKE as usize,
            n.min(i32::MAX as u32) as usize,
            0,
            0,
            0,
        )
    })
}

/// Moves up to `n` waiters from `word` to `other`, without waking them (`FUTEX_REQUEUE`). Any process that maps a shared futex can do
/// this to the waiters of all others: a waiter on memory that a stranger maps may never be woken.
///
/// # Errors
/// EFAULT: a word that is not mapped.
pub fn requeue(word: &AtomicU32, other: &AtomicU32, n: u32) -> Result<usize, Errno> {
    const FUTEX_REQUEUE: usize = 3;
    // SAFETY: the kernel reads nothing through the pointers but the pages that they name.
    check(unsafe {
        syscall6(
            __NR_futex,
            word.as_ptr() as usize,
            FUTEX_REQUEUE,
            0,
            n.min(i32::MAX as u32) as usize,
            other.as_ptr() as usize,
            0,
        )
    })
}
