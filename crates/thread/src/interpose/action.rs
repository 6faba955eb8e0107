//! What is done about a signal: for the program, on whichever node it is delivered.
//!
//! The kernel has a table of dispositions for each process, and a program here is many. So what a thread asks for is told to
//! whoever schedules ([`Hooks::disposition`](crate::carrier::Hooks)), which keeps it for all nodes. A handler runs on the thread that
//! the signal interrupts, with its statics and thread-locals.
//!
//! The runtime's own signals are refused, as libc refuses its own.

use super::errno::EINVAL;
use super::{fail, hooks};
use crate::carrier::RuntimeSection;
use crate::preempt::{SIG_RESET, SIG_STOP, SIG_TICK, SIG_TRACE};
use peregrine_sys::linux_raw_sys::general as k;
use peregrine_sys::raw::Errno;
use peregrine_sys::signal::{self, Disposition};

/// C's `struct sigaction`.
#[repr(C)]
struct Action {
    handler: usize,
    mask: [u64; 16],
    flags: i32,
    restorer: usize,
}

/// Signals 32 and 33 are libc's own.
const LIBC: u64 = 3 << 31;

fn change(signo: i32, new: Option<Disposition>) -> Result<Disposition, Errno> {
    let runtime = || hooks().is_some() && [SIG_TICK, SIG_STOP, SIG_RESET, SIG_TRACE].contains(&signo);
    if !(1..=64).contains(&signo) || LIBC & signal::bit(signo) != 0 || runtime() {
        return Err(Errno(EINVAL));
    }
    match hooks() {
        Some((_, hooks)) => {
            // SAFETY: a thread runs.
            let _section = unsafe { RuntimeSection::enter() };
            (hooks.disposition)(signo, new)
        }
        // SAFETY: C's contract with who installs a handler.
        None => unsafe { signal::change(signo, new.as_ref()) },
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sigaction(signo: i32, new: *const Action, old: *mut Action) -> i32 {
    // SAFETY: C's contract: null or readable.
    let new = unsafe { new.as_ref() };
    let new = new.map(|a| Disposition::new(a.handler, u64::from(a.flags as u32), a.mask[0] & !LIBC));
    match change(signo, new) {
        Ok(was) => {
            // SAFETY: C's contract: null or writable.
            if let Some(old) = unsafe { old.as_mut() } {
                let mut mask = [0; 16];
                mask[0] = was.mask;
                *old = Action { handler: was.handler, mask, flags: was.flags as u32 as i32, restorer: 0 };
            }
            0
        }
        Err(e) => fail(e.0) as i32,
    }
}

/// The old way to say it: calls that are interrupted restart, and the signal is blocked while its handler runs.
#[unsafe(no_mangle)]
unsafe extern "C" fn signal(signo: i32, handler: usize) -> usize {
    let mask = if (1..=64).contains(&signo) { signal::bit(signo) } else { 0 };
    match change(signo, Some(Disposition::new(handler, k::SA_RESTART.into(), mask))) {
        Ok(was) => was.handler,
        // SIG_ERR.
        Err(e) => fail(e.0) as usize,
    }
}
