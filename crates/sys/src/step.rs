//! One instruction at a time: the processor's trap flag, for tests that end a process between any two instructions.
//!
//! ```text
//!   begin(last): set TF ── an instruction ── SIGTRAP ── an instruction ── SIGTRAP … ── end: clear TF
//!                                               │ count; at the last: SIGKILL to this very process
//! ```
//! About 2 µs an instruction, where a debugger needs 20 (`PTRACE_SINGLESTEP`: two switches of process).

use crate::raw::Errno;
use crate::signal::{self, HandlerFlags, SigInfo, Signo, UContext, number};
use core::arch::asm;
use peregrine_base::sync::{AtomicU64, Ordering};

static STEPS: AtomicU64 = AtomicU64::new(0);
static LAST: AtomicU64 = AtomicU64::new(u64::MAX);

extern "C" fn on_step(_: Signo, _: *mut SigInfo, _: *mut UContext) {
    let n = STEPS.load(Ordering::Relaxed) + 1;
    STEPS.store(n, Ordering::Relaxed);
    if n >= LAST.load(Ordering::Relaxed) {
        let _ = signal::kill(crate::process::pid(), number::KILL);
    }
}

/// From here on this process runs an instruction at a time, and is killed (SIGKILL) after the `last`-th, if it comes so far
/// before [`end`]. SIGTRAP must not be blocked. A handler that interrupts is not stepped.
///
/// # Errors
/// EINVAL: SIGTRAP can't be caught here.
#[inline]
pub fn begin(last: u64) -> Result<(), Errno> {
    // SAFETY: the handler touches two atomics and makes system calls: sound at every instruction.
    unsafe { signal::install(number::TRAP, on_step, HandlerFlags::ON_ALTSTACK)? };
    STEPS.store(0, Ordering::Relaxed);
    LAST.store(last, Ordering::Relaxed);
    // SAFETY: sets the trap flag; each trap it causes is answered by the handler above.
    unsafe { asm!("pushfq", "or qword ptr [rsp], 0x100", "popfq") };
    Ok(())
}

/// Ends what [`begin`] began; tells how many instructions there were.
#[inline]
pub fn end() -> u64 {
    // SAFETY: clears the trap flag.
    unsafe { asm!("pushfq", "and qword ptr [rsp], ~0x100", "popfq") };
    STEPS.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_function_takes_more_steps() {
        let run = |n: u64| {
            begin(u64::MAX).expect("SIGTRAP");
            for i in 0..n {
                core::hint::black_box(i);
            }
            end()
        };
        assert!(run(1000) >= run(10) + 990);
    }
}
