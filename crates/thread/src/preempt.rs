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
//! *Trap code*: allocates nothing, takes no lock, panics never (S3).

use crate::carrier::{Carrier, NONE, Pending, carrier};
use crate::layout::slot_index_of;
use peregrine_base::sync::{Ordering, compiler_fence};
use peregrine_sys::raw::Errno;
use peregrine_sys::signal::{self, Handler, HandlerFlags, SigInfo, Signo, UContext};

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
        && slot_index_of(sp) == Some(current)
        && !(c.vdso.0..c.vdso.1).contains(&ip)
}

unsafe fn interrupt(why: u32, context: &UContext) {
    // SAFETY: handlers are installed after the carrier.
    let c = unsafe { carrier() };
    if !suspendable(c, context.sp(), context.ip()) {
        c.pending.store(c.pending.load(Ordering::Relaxed) | why, Ordering::Relaxed);
        return;
    }
    c.depth.store(1, Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
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
        signal::install(SIG_TICK, on_tick, HandlerFlags::RESTART_NODEFER)?;
        signal::install(SIG_STOP, on_stop, HandlerFlags::RESTART_NODEFER)
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
