//! `ptrace(2)` as far as counting instructions needs it: a thread of another process is stopped and runs one instruction at a time.
//!
//! A tracee is a thread, not a process. A step that enters a system call returns when that has returned, so a thread that sleeps in the
//! kernel has no step to report meanwhile: waiting is by [`next_stop`], for whichever tracee stops first.

use crate::raw::{Errno, check, syscall6};
use linux_raw_sys::general as k;

const PTRACE_CONT: usize = 7;
const PTRACE_SINGLESTEP: usize = 9;
const PTRACE_GETREGS: usize = 12;
const PTRACE_PEEKTEXT: usize = 1;
const PTRACE_SEIZE: usize = 0x4206;
const PTRACE_INTERRUPT: usize = 0x4207;
const PTRACE_DETACH: usize = 17;
const WAIT_ALL: usize = 0x4000_0000;
const WAIT_NO_HANG: usize = 1;
/// Words of `struct user_regs_struct`, and which of them is the instruction pointer.
const REGISTERS: usize = 27;
const RIP: usize = 16;

unsafe fn ptrace(request: usize, tid: i32, addr: usize, data: usize) -> Result<usize, Errno> {
    // SAFETY: passed on to the caller.
    unsafe { check(syscall6(k::__NR_ptrace, request, tid as usize, addr, data, 0, 0)) }
}

/// A thread that this one traces. Dropped, it is let go if it is stopped.
#[derive(Debug)]
pub struct Tracee {
    tid: i32,
}

/// What a tracee did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// It stopped: a step, an interruption, or a signal, whose number it is (SIGTRAP for the first two).
    Signal(i32),
    /// It ended.
    Ended,
}

impl Tracee {
    /// Begins to trace thread `tid` of another process, and asks it to stop.
    ///
    /// # Errors
    /// EPERM: not allowed (Yama, another tracer). ESRCH: no such thread.
    pub fn seize(tid: i32) -> Result<Self, Errno> {
        // SAFETY: no memory of this process is involved.
        unsafe {
            ptrace(PTRACE_SEIZE, tid, 0, 0)?;
            let tracee = Self { tid };
            ptrace(PTRACE_INTERRUPT, tid, 0, 0)?;
            Ok(tracee)
        }
    }

    /// Its thread id.
    pub const fn tid(&self) -> i32 {
        self.tid
    }

    /// Lets it run one instruction, after handing it `signal` (0: none). It is stopped now.
    ///
    /// # Errors
    /// ESRCH: it is not stopped, or gone.
    pub fn step(&self, signal: i32) -> Result<(), Errno> {
        // SAFETY: as in `seize`.
        unsafe { ptrace(PTRACE_SINGLESTEP, self.tid, 0, signal as usize) }.map(drop)
    }

    /// Lets it run. It is stopped now.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn go(&self) -> Result<(), Errno> {
        // SAFETY: as in `seize`.
        unsafe { ptrace(PTRACE_CONT, self.tid, 0, 0) }.map(drop)
    }

    /// Asks it to stop.
    ///
    /// # Errors
    /// ESRCH: gone.
    pub fn interrupt(&self) -> Result<(), Errno> {
        // SAFETY: as in `seize`.
        unsafe { ptrace(PTRACE_INTERRUPT, self.tid, 0, 0) }.map(drop)
    }

    /// The address and the first sixteen bytes of the instruction that it will run next. It is stopped now.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn next_instruction(&self) -> Result<(usize, [u8; 16]), Errno> {
        let mut registers = [0usize; REGISTERS];
        // SAFETY: the kernel writes one `user_regs_struct`, which is as long as the array.
        unsafe { ptrace(PTRACE_GETREGS, self.tid, 0, registers.as_mut_ptr() as usize)? };
        let at = registers[RIP];
        let mut bytes = [0; 16];
        for (i, chunk) in bytes.chunks_exact_mut(8).enumerate() {
            let mut word = 0usize;
            // SAFETY: the kernel writes one word.
            let read = unsafe { ptrace(PTRACE_PEEKTEXT, self.tid, at + i * 8, (&raw mut word) as usize) };
            if read.is_ok() {
                chunk.copy_from_slice(&word.to_ne_bytes());
            }
        }
        Ok((at, bytes))
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        // SAFETY: as in `seize`; refused if the tracee is not stopped.
        let _ = unsafe { ptrace(PTRACE_DETACH, self.tid, 0, 0) };
    }
}

/// The next tracee of this thread that stops, and how; `None` if `wait` is false and none has. Children that merely ended are reported
/// as well.
///
/// # Errors
/// ECHILD: there is none.
pub fn next_stop(wait: bool) -> Result<Option<(i32, Stop)>, Errno> {
    let mut status = 0i32;
    let flags = WAIT_ALL | if wait { 0 } else { WAIT_NO_HANG };
    // SAFETY: the kernel writes one status word.
    let tid =
        unsafe { check(syscall6(k::__NR_wait4, usize::MAX, (&raw mut status) as usize, flags, 0, 0, 0))? };
    if tid == 0 {
        return Ok(None);
    }
    let stopped = status & 0xff == 0x7f;
    Ok(Some((tid as i32, if stopped { Stop::Signal(status >> 8 & 0xff) } else { Stop::Ended })))
}
