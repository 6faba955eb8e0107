//! One instruction at a time: the processor's trap flag, for tests that end a process between any two instructions.
//!
//! ```text
//!   step(budget, f):   set TF ── f's instruction ── SIGTRAP ── f's instruction ── SIGTRAP … ── clear TF
//!                                                    │ count; at the budget's end: SIGKILL to this very process
//! ```
//! About 2 µs an instruction, where a debugger needs 20 (`PTRACE_SINGLESTEP`: two switches of process).

use crate::raw::{Errno, check, syscall6};
use crate::signal::{self, HandlerFlags, SigInfo, Signo, UContext, number};
use core::arch::asm;
use linux_raw_sys::general as k;
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

/// Runs `f` an instruction at a time and returns how many there were; this process is killed (SIGKILL) after the
/// `last`-th, if there are that many. `f` must not block SIGTRAP. A handler that interrupts `f` is not stepped.
///
/// # Errors
/// EINVAL: SIGTRAP can't be caught here.
#[cfg(target_arch = "x86_64")]
pub fn stepped(last: u64, f: impl FnOnce()) -> Result<u64, Errno> {
    // SAFETY: the handler touches two atomics and makes system calls: sound at every instruction.
    unsafe { signal::install(number::TRAP, on_step, HandlerFlags::ON_ALTSTACK)? };
    STEPS.store(0, Ordering::Relaxed);
    LAST.store(last, Ordering::Relaxed);
    // SAFETY: sets the trap flag; each trap it causes is answered by the handler above.
    unsafe { asm!("pushfq", "or qword ptr [rsp], 0x100", "popfq") };
    f();
    // SAFETY: clears the trap flag.
    unsafe { asm!("pushfq", "and qword ptr [rsp], ~0x100", "popfq") };
    Ok(STEPS.load(Ordering::Relaxed))
}

/// Ends this process at once by SIGKILL, as the machine would.
pub fn kill_self() -> ! {
    loop {
        // SAFETY: takes numbers.
        let _ = check(unsafe {
            syscall6(k::__NR_kill, crate::process::pid() as usize, number::KILL as usize, 0, 0, 0, 0)
        });
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn a_longer_function_takes_more_steps() {
        let run = |n: u64| {
            stepped(u64::MAX, || {
                for i in 0..n {
                    core::hint::black_box(i);
                }
            })
            .expect("SIGTRAP")
        };
        assert!(run(1000) >= run(10) + 990);
    }
}
