//! Preemption: a signal whose frame lies on the thread's own stack.
//!
//! ```text
//!  thread's stack   │ interrupted frames │ red zone │ signal frame (registers, vector state) │ handler │ saved switch │
//!                                                                                                     ▲ slot.saved_sp
//! ```
//!
//! The handler switches away in the middle, like any other call into the scheduler. When the thread is resumed, on
//! this node or another, the handler returns and `sigreturn` restores every register from the frame. All that makes
//! up the suspended thread is thus in its slot (S9).
//!
//! It acts only if nothing else owns the moment: not inside the runtime (`depth`), not on a stack outside the
//! running thread's slot (the scheduler's, or the gap between choosing a thread and being on it), not inside the
//! vDSO (its address differs between processes). Otherwise it notes the reason and returns.
//!
//! In the middle of a shared library it is put off for a few signals: the library's data are the process's, and a thread that
//! is carried away between, say, `posix_spawn`'s mapping of a stack and its use would find no stack on the other node, or
//! leave a lock behind. (`dl_iterate_phdr`, which calls back with a lock held, is interposed.) A system call that waits may be suspended at once; code that stays in a library for long, such as one
//! large copy, is suspended after all. (In a static executable libc's data are the thread's, and nothing is put off.)
//!
//! *Trap code*: allocates nothing, takes no lock, panics never (S3).

use crate::carrier::{Carrier, NONE, Pending, carrier};
use crate::window::holds;
use peregrine_base::sync::{Ordering, compiler_fence};
use peregrine_sys::linux_raw_sys::general as k;
use peregrine_sys::raw::Errno;
use peregrine_sys::signal::{self, Handler, HandlerFlags, SYSCALL, SigInfo, Signo, UContext};

/// The time slice is over.
pub const SIG_TICK: Signo = signal::number::RT_BASE;
/// Every node is asked to pause.
pub const SIG_STOP: Signo = signal::number::RT_BASE + 1;
/// Drop what runs and start over in the scheduler: the World is being rolled back.
pub const SIG_RESET: Signo = signal::number::RT_BASE + 2;
/// Write down where you are.
pub const SIG_TRACE: Signo = signal::number::RT_BASE + 3;

extern "C" fn on_tick(_: Signo, _: *mut SigInfo, context: *mut UContext) {
    // SAFETY: installed in node processes only; the context is the kernel's.
    unsafe { interrupt(Pending::TICK, &*context) }
}

extern "C" fn on_stop(_: Signo, _: *mut SigInfo, context: *mut UContext) {
    // SAFETY: as above.
    unsafe { interrupt(Pending::STOP, &*context) }
}

/// Whether thread code that was interrupted at `ip` with stack pointer `sp` may be suspended there.
#[inline]
fn suspendable(c: &Carrier, sp: usize, ip: usize) -> bool {
    let current = c.current.load(Ordering::Relaxed);
    c.depth.load(Ordering::Relaxed) == 0
        && current != NONE
        && holds(current, sp)
        && !(c.vdso.0..c.vdso.1).contains(&ip)
}

/// Shared libraries whose code is looked after; programs have three to ten.
pub const MOST_LIBRARIES: usize = 24;
/// Interruptions in a row that are put off.
const MOST_PUT_OFF: u32 = 40;

/// Whether the interrupted code is a shared library's, other than a system call that waits.
fn inside_library(c: &Carrier, context: &UContext) -> bool {
    const EINTR: i64 = 4;
    let ip = context.ip();
    if !c.libraries.iter().any(|(start, end)| (*start..*end).contains(&ip)) {
        return false;
    }
    // SAFETY: code of a loaded library is readable; its first page holds more than code.
    let (before, at) = unsafe {
        let code = |from: usize| core::slice::from_raw_parts(from as *const u8, SYSCALL.len());
        (code(ip - SYSCALL.len()), code(ip))
    };
    // A call to be restarted looks like one not yet made: those that never wait are told apart by their number.
    let nr = context.call_number() as u32;
    let never_waits =
        [k::__NR_mmap, k::__NR_mprotect, k::__NR_munmap, k::__NR_rt_sigaction, k::__NR_rt_sigprocmask]
            .into_iter()
            .chain([
                k::__NR_clone,
                k::__NR_clone3,
                #[cfg(target_arch = "x86_64")]
                k::__NR_vfork,
                k::__NR_madvise,
                k::__NR_brk,
                k::__NR_close,
            ])
            .any(|n| n == nr);
    let waits = (at == SYSCALL && !never_waits) || (before == SYSCALL && context.call_result() == -EINTR);
    !waits
}

/// The code of the shared libraries in this process.
pub fn libraries() -> [(usize, usize); MOST_LIBRARIES] {
    let mut list = [(0, 0); MOST_LIBRARIES];
    let mut n = 0;
    crate::template::each_library_code(|range| {
        if n < MOST_LIBRARIES {
            list[n] = range;
            n += 1;
        }
    });
    list
}

unsafe fn interrupt(why: u32, context: &UContext) {
    // SAFETY: handlers are installed after the carrier.
    let c = unsafe { carrier() };
    if !suspendable(c, context.sp(), context.ip()) {
        c.pending.store(c.pending.load(Ordering::Relaxed) | why, Ordering::Relaxed);
        return;
    }
    if c.put_off < MOST_PUT_OFF && inside_library(c, context) {
        // The next tick, the supervisor's next signal, or the end of a runtime section comes back to it.
        c.put_off += 1;
        c.pending.store(c.pending.load(Ordering::Relaxed) | why, Ordering::Relaxed);
        // SAFETY (of what runs there): the thread is suspendable, so it is outside of the runtime.
        return (c.hooks.put_off)();
    }
    c.put_off = 0;
    c.depth.store(1, Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
    // SAFETY: the running thread's, in the section that was just opened. `sigreturn` gives it the very mask that it had.
    unsafe { crate::mask::adopt(c, context.blocked()) };
    let why = why | c.pending.load(Ordering::Relaxed);
    c.pending.store(0, Ordering::Relaxed);
    // SAFETY (of what runs there): the thread is suspendable, so the scheduler may switch away from here.
    (c.on_preempt)(why);
    compiler_fence(Ordering::SeqCst);
    // SAFETY: perhaps another node's carrier by now; read anew.
    unsafe { carrier() }.depth.store(0, Ordering::Relaxed);
    // A signal from here to the end of sigreturn nests one more frame and is as harmless as this one.
}

/// Installs the tick and stop handlers in this node.
///
/// # Safety
/// The carrier is initialised and nothing but this node's scheduler and threads runs in the process.
pub unsafe fn install() -> Result<(), Errno> {
    // SAFETY: `interrupt` checks at each signal whether it may act.
    unsafe {
        // Blocked until the handler has decided: a second signal would else find it, not what it interrupted.
        let mask = signal::bit(SIG_TICK) | signal::bit(SIG_STOP);
        signal::install_masked(SIG_TICK, on_tick, HandlerFlags::RESTART_NODEFER, mask)?;
        signal::install_masked(SIG_STOP, on_stop, HandlerFlags::RESTART_NODEFER, mask)
    }
}

/// Installs a handler that runs on the node's alternate stack (resets, traces, faults).
///
/// # Safety
/// As [`signal::install`].
pub unsafe fn install_on_altstack(signo: Signo, handler: Handler) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    unsafe { signal::install(signo, handler, HandlerFlags::ON_ALTSTACK) }
}
