//! Reading, writing and waiting, as single system calls that a signal handler may make.

use crate::raw::{self, Errno, syscall6};
use core::mem::MaybeUninit;
use linux_raw_sys::general as g;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

/// `pread(2)`.
///
/// # Errors
/// As the call; EFAULT: `into` lies in memory that traps without a pager.
pub fn read_at(fd: BorrowedFd<'_>, into: &mut [MaybeUninit<u8>], offset: u64) -> Result<usize, Errno> {
    // SAFETY: the kernel writes at most the slice.
    unsafe { read_at_ptr(fd, into.as_mut_ptr().cast(), into.len(), offset) }
}

/// `pread(2)` into memory that may be shared.
///
/// # Errors
/// As the call.
///
/// # Safety
/// Nothing refers to the bytes, and the caller owns them.
pub unsafe fn read_at_ptr(
    fd: BorrowedFd<'_>,
    into: *mut u8,
    len_bytes: usize,
    offset: u64,
) -> Result<usize, Errno> {
    // SAFETY: the caller's promise.
    unsafe {
        raw::check(syscall6(
            g::__NR_pread64,
            fd.as_raw_fd() as usize,
            into as usize,
            len_bytes,
            offset as usize,
            0,
            0,
        ))
    }
}

/// `pwrite(2)` from memory that may be shared.
///
/// # Errors
/// As the call; EFAULT: `from` can't be read.
///
/// # Safety
/// What is written may be observed through mappings of the file; nothing relies on its old contents.
pub unsafe fn write_at_ptr(
    fd: BorrowedFd<'_>,
    from: *const u8,
    len_bytes: usize,
    offset: u64,
) -> Result<usize, Errno> {
    // SAFETY: the kernel only reads the bytes, and answers EFAULT where it can't.
    unsafe {
        raw::check(syscall6(
            g::__NR_pwrite64,
            fd.as_raw_fd() as usize,
            from as usize,
            len_bytes,
            offset as usize,
            0,
            0,
        ))
    }
}

/// Waits until one of `fds` can be read; sets the bit of each that can.
///
/// # Errors
/// EINTR: a signal came first.
#[inline]
pub fn wait_readable(fds: &[BorrowedFd<'_>; 2], timeout_ms: Option<i32>) -> Result<u32, Errno> {
    let mut polls = fds.map(|fd| g::pollfd { fd: fd.as_raw_fd(), events: g::POLLIN as i16, revents: 0 });
    let timeout = timeout_ms.map(|ms| g::__kernel_timespec {
        tv_sec: (ms / 1000) as i64,
        tv_nsec: (ms % 1000) as i64 * 1_000_000,
    });
    let timeout = timeout.as_ref().map_or(core::ptr::null(), core::ptr::from_ref);
    // SAFETY: the array and the timeout live across the call; no mask is given.
    unsafe {
        raw::check(syscall6(
            g::__NR_ppoll,
            polls.as_mut_ptr() as usize,
            polls.len(),
            timeout as usize,
            0,
            0,
            0,
        ))?;
    }
    Ok(polls.iter().enumerate().map(|(i, p)| u32::from(p.revents != 0) << i).sum())
}

/// Gives the processor up (`sched_yield(2)`).
pub fn yield_now() {
    // SAFETY: takes nothing.
    unsafe { syscall6(g::__NR_sched_yield, 0, 0, 0, 0, 0, 0) };
}

/// Writes to standard error and forgets about errors; for the last words of trap code.
pub fn complain(text: &[u8]) {
    // SAFETY: the kernel reads the slice.
    unsafe { syscall6(g::__NR_write, 2, text.as_ptr() as usize, text.len(), 0, 0, 0) };
}

/// Waits until one of `fds` can be read or has hung up, a signal that `mask` lets through is handled, or the time is over. Descriptors
/// beyond the first 256 are not looked at. Whether it was a descriptor that ended it.
///
/// The mask is in force for the length of the call: a signal that was held off until then and came in between ends it at once.
pub fn wait_for_any(fds: impl Iterator<Item = RawFd>, timeout_ns: u64, mask: u64) -> bool {
    let mut polls = [const { g::pollfd { fd: -1, events: g::POLLIN as i16, revents: 0 } }; 256];
    let mut count = 0;
    for (place, fd) in polls.iter_mut().zip(fds) {
        place.fd = fd;
        count += 1;
    }
    let timeout = g::__kernel_timespec {
        tv_sec: (timeout_ns / 1_000_000_000) as i64,
        tv_nsec: (timeout_ns % 1_000_000_000) as i64,
    };
    // SAFETY: array, timeout and mask live across the call.
    let ready = unsafe {
        syscall6(
            g::__NR_ppoll,
            polls.as_mut_ptr() as usize,
            count,
            (&raw const timeout) as usize,
            (&raw const mask) as usize,
            8,
            0,
        )
    };
    ready > 0
}
