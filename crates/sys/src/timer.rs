//! A periodic timer that interrupts this process, and the monotonic clock by system call.

use crate::raw::{Errno, check, syscall6};
use crate::signal::Signo;
use linux_raw_sys::general as k;

/// A timer of this process (`timer_create`); it goes with the process and is not inherited by `fork`.
#[derive(Clone, Copy, Debug)]
pub struct Timer(i32);

#[repr(C)]
struct SigEvent {
    value: usize,
    signo: i32,
    notify: i32,
    tid: i32,
    pad: [i32; 11],
}

impl Timer {
    /// A stopped timer on `CLOCK_MONOTONIC` that raises `signo` in this process.
    ///
    /// # Errors
    /// EAGAIN: no room for another timer. EINVAL: no such signal.
    pub fn new(signo: Signo) -> Result<Self, Errno> {
        let ev = SigEvent { value: 0, signo, notify: k::SIGEV_SIGNAL as i32, tid: 0, pad: [0; 11] };
        let mut id = 0i32;
        // SAFETY: both pointers are live; the layout is the kernel's sigevent (64 bytes).
        check(unsafe {
            syscall6(
                k::__NR_timer_create,
                k::CLOCK_MONOTONIC as usize,
                &raw const ev as usize,
                &raw mut id as usize,
                0,
                0,
                0,
            )
        })?;
        Ok(Self(id))
    }

    /// First in `first_ns`, then every `every_ns` (0: once). `first_ns` 0 stops it.
    pub fn arm(self, first_ns: u64, every_ns: u64) {
        let ts = |ns: u64| k::timespec {
            tv_sec: (ns / 1_000_000_000) as i64,
            tv_nsec: (ns % 1_000_000_000) as i64,
        };
        let spec = [ts(every_ns), ts(first_ns)];
        // SAFETY: itimerspec is interval, then value.
        unsafe { syscall6(k::__NR_timer_settime, self.0 as usize, 0, spec.as_ptr() as usize, 0, 0, 0) };
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds, by system call (about 100 ns; the vDSO would need a static).
#[inline]
pub fn monotonic_ns() -> u64 {
    clock_ns(k::CLOCK_MONOTONIC)
}

/// CPU time of the calling OS thread in nanoseconds.
pub fn thread_cpu_ns() -> u64 {
    clock_ns(k::CLOCK_THREAD_CPUTIME_ID)
}

/// CPU time of the calling process, all its threads together, in nanoseconds.
pub fn process_cpu_ns() -> u64 {
    clock_ns(k::CLOCK_PROCESS_CPUTIME_ID)
}

fn clock_ns(clock: u32) -> u64 {
    let mut ts = k::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `ts` is live for the call.
    unsafe { syscall6(k::__NR_clock_gettime, clock as usize, &raw mut ts as usize, 0, 0, 0, 0) };
    ts.tv_sec as u64 * 1_000_000_000 + ts.tv_nsec as u64
}

/// CPU time of another OS thread of this process in nanoseconds; `None` when it has ended.
pub fn cpu_ns_of_thread(tid: i32) -> Option<u64> {
    // As the kernel encodes it (`MAKE_THREAD_CPUCLOCK`): scheduler's clock (2), one thread (4).
    let clock = (!tid << 3) | 2 | 4;
    let mut ts = k::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `ts` is live for the call.
    let result = check(unsafe {
        syscall6(k::__NR_clock_gettime, clock as isize as usize, &raw mut ts as usize, 0, 0, 0, 0)
    });
    result.ok().map(|_| ts.tv_sec as u64 * 1_000_000_000 + ts.tv_nsec as u64)
}
