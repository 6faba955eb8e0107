//! Sleeping and yielding: the thread parks, its node runs others.

use super::errno::EINVAL;
use super::{hooks, libc_result};
use core::ptr::null_mut;
use peregrine_sys::linux_raw_sys::general as k;
use peregrine_sys::raw::syscall6;
use peregrine_sys::timer::monotonic_ns;

const TIMER_ABSTIME: i32 = k::TIMER_ABSTIME as i32;

fn to_ns(t: &k::timespec) -> Option<u64> {
    let s = u64::try_from(t.tv_sec).ok()?;
    (0..1_000_000_000)
        .contains(&t.tv_nsec)
        .then(|| s.saturating_mul(1_000_000_000).saturating_add(t.tv_nsec as u64))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nanosleep(request: *const k::timespec, remaining: *mut k::timespec) -> i32 {
    // SAFETY: C's contract on both pointers.
    unsafe { clock_nanosleep_errno(k::CLOCK_MONOTONIC as i32, 0, request, remaining) as i32 }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn clock_nanosleep(
    clock: i32,
    flags: i32,
    request: *const k::timespec,
    remaining: *mut k::timespec,
) -> i32 {
    if let Some((_, hooks)) = hooks()
        && clock == k::CLOCK_MONOTONIC as i32
    {
        // SAFETY: C's contract.
        let Some(ns) = to_ns(unsafe { &*request }) else { return EINVAL };
        let deadline = if flags & TIMER_ABSTIME != 0 { ns } else { monotonic_ns().saturating_add(ns) };
        // C code may have set others.
        let _words = crate::arch::ControlWords::aside();
        (hooks.sleep_until)(deadline);
        return 0;
    }
    // SAFETY: C's contract. This call returns the error instead of setting errno.
    let r = unsafe {
        syscall6(
            k::__NR_clock_nanosleep,
            clock as usize,
            flags as usize,
            request as usize,
            remaining as usize,
            0,
            0,
        )
    };
    -r as i32
}

unsafe fn clock_nanosleep_errno(
    clock: i32,
    flags: i32,
    request: *const k::timespec,
    rest: *mut k::timespec,
) -> isize {
    // SAFETY: passed on.
    match unsafe { clock_nanosleep(clock, flags, request, rest) } {
        0 => 0,
        e => super::fail(e),
    }
}

#[unsafe(no_mangle)]
extern "C" fn usleep(us: u32) -> i32 {
    let t = k::timespec { tv_sec: (us / 1_000_000) as i64, tv_nsec: (us % 1_000_000) as i64 * 1000 };
    // SAFETY: `t` is live.
    unsafe { nanosleep(&t, null_mut()) }
}

#[unsafe(no_mangle)]
extern "C" fn sched_yield() -> i32 {
    if let Some((_, hooks)) = hooks() {
        // C code may have set others.
        let _words = crate::arch::ControlWords::aside();
        (hooks.yield_now)();
        return 0;
    }
    // SAFETY: takes nothing.
    libc_result(unsafe { syscall6(k::__NR_sched_yield, 0, 0, 0, 0, 0, 0) }) as i32
}
