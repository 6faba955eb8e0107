//! Blocking signals: for the thread, wherever it goes ([`crate::mask`]).
//!
//! A mask that is in force for one call only (`sigsuspend`, `ppoll`, …) goes to the kernel without the runtime's signals: the thread
//! is still preempted, and the call then ends with `EINTR`, as for any signal with a handler.

use super::errno::EINVAL;
use super::{fail, hooks, libc_result};
use crate::carrier::{RuntimeSection, carrier};
use crate::mask::{self, RUNTIME};
use core::ffi::c_void;
use peregrine_sys::linux_raw_sys::general as k;
use peregrine_sys::raw::syscall6;

/// Bytes of a set, as the kernel has it: the first of C's `sigset_t`, which has room for more.
const SET_BYTES: usize = 8;
/// Signals 32 and 33 are libc's own, which it lets nobody block.
const LIBC: u64 = 3 << 31;

/// The errno, or 0.
unsafe fn change(how: i32, new: *const u64, old: *mut u64) -> i32 {
    // SAFETY: C's contract: null or readable.
    let new = unsafe { new.as_ref() }.map(|set| *set & !LIBC);
    if hooks().is_none() {
        let set = new.as_ref().map_or(core::ptr::null(), core::ptr::from_ref);
        // SAFETY: a word of this frame, and C's contract.
        let r = unsafe {
            syscall6(k::__NR_rt_sigprocmask, how as usize, set as usize, old as usize, SET_BYTES, 0, 0)
        };
        return -r as i32;
    }
    // SAFETY: a thread runs; `old` is null or writable.
    unsafe {
        let _section = RuntimeSection::enter();
        let c = carrier();
        let was = mask::of_running(c);
        if let Some(set) = new {
            let asked = match how as u32 {
                k::SIG_BLOCK => was | set,
                k::SIG_UNBLOCK => was & !set,
                k::SIG_SETMASK => set,
                _ => return EINVAL,
            };
            mask::set(c, asked);
        }
        if let Some(old) = old.as_mut() {
            *old = was;
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_sigmask(how: i32, new: *const u64, old: *mut u64) -> i32 {
    // SAFETY: passed on.
    unsafe { change(how, new, old) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sigprocmask(how: i32, new: *const u64, old: *mut u64) -> i32 {
    // SAFETY: passed on.
    match unsafe { change(how, new, old) } {
        0 => 0,
        e => fail(e) as i32,
    }
}

/// A mask for one call.
unsafe fn for_a_call(set: *const u64) -> Option<u64> {
    let ours = if hooks().is_some() { RUNTIME } else { 0 };
    // SAFETY: C's contract: null or readable.
    unsafe { set.as_ref() }.map(|set| *set & !LIBC & !ours)
}

fn address_of<T>(value: &Option<T>) -> usize {
    value.as_ref().map_or(0, |v| core::ptr::from_ref(v) as usize)
}

/// The same, of what the kernel writes to.
fn written<T>(value: &mut Option<T>) -> usize {
    value.as_mut().map_or(0, |v| core::ptr::from_mut(v) as usize)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sigsuspend(set: *const u64) -> i32 {
    // SAFETY: C's contract; the set is of this frame.
    libc_result(unsafe {
        let set = for_a_call(set);
        syscall6(k::__NR_rt_sigsuspend, address_of(&set), SET_BYTES, 0, 0, 0, 0)
    }) as i32
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ppoll(
    fds: *mut c_void,
    count: usize,
    timeout: *const k::timespec,
    set: *const u64,
) -> i32 {
    // SAFETY: C's contract. The kernel writes what is left of the time, C does not: a copy.
    libc_result(unsafe {
        let (set, mut left) = (for_a_call(set), timeout.as_ref().map(|t| k::timespec { ..*t }));
        syscall6(k::__NR_ppoll, fds as usize, count, written(&mut left), address_of(&set), SET_BYTES, 0)
    }) as i32
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pselect(
    count: i32,
    read: *mut c_void,
    write: *mut c_void,
    except: *mut c_void,
    timeout: *const k::timespec,
    set: *const u64,
) -> i32 {
    // SAFETY: as in `ppoll`; the kernel takes the set's address and size as a pair.
    libc_result(unsafe {
        let (set, mut left) = (for_a_call(set), timeout.as_ref().map(|t| k::timespec { ..*t }));
        let pair = [address_of(&set), SET_BYTES];
        let fds = [read as usize, write as usize, except as usize];
        let pair = pair.as_ptr() as usize;
        syscall6(k::__NR_pselect6, count as usize, fds[0], fds[1], fds[2], written(&mut left), pair)
    }) as i32
}

#[unsafe(no_mangle)]
unsafe extern "C" fn epoll_pwait(
    epoll: i32,
    events: *mut c_void,
    most: i32,
    timeout_ms: i32,
    set: *const u64,
) -> i32 {
    // SAFETY: C's contract.
    libc_result(unsafe {
        let set = for_a_call(set);
        let (epoll, most, timeout) = (epoll as usize, most as usize, timeout_ms as isize as usize);
        syscall6(k::__NR_epoll_pwait, epoll, events as usize, most, timeout, address_of(&set), SET_BYTES)
    }) as i32
}
