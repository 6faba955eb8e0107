//! Which signals a thread blocks: its own, as all that it writes.
//!
//! ```text
//!   header.blocked   what the thread asked for      travels with it
//!   c.blocked        the same of the thread whose mask is in force on this node
//!   the kernel's     c.blocked, less RUNTIME
//! ```
//!
//! Almost no thread blocks anything, so a switch compares two words and makes the system call only where they differ; the scheduler
//! runs with everything open.
//!
//! The kernel is asked by more than the functions that we define (`interpose::mask`): `siglongjmp` restores a mask by itself. So a
//! switch away from a thread that has one takes down what the kernel says was in force, and a preemption what the signal's
//! frame says. A mask changed by a bare system call is not seen until then.
//!
//! **The runtime's own signals stay open**, or a thread that blocks all would never be preempted, and no image taken: what a
//! thread asks about them is remembered and told, but not passed on. Faults neither, for a blocked one would end the node
//! without a word of whose stack overflowed.
//!
//! *Between two threads, and in a signal handler*: no static, no thread-local, no allocation, no panic (S3).

use crate::carrier::Carrier;
use crate::preempt::{SIG_RESET, SIG_STOP, SIG_TICK, SIG_TRACE};
use crate::slot::SlotHeader;
use peregrine_sys::signal::{self, bit, number};

/// Signals that are never blocked while a thread runs.
pub const RUNTIME: u64 =
    bit(SIG_TICK) | bit(SIG_STOP) | bit(SIG_RESET) | bit(SIG_TRACE) | bit(number::SEGV) | bit(number::BUS);

/// What the running thread blocks, as far as it can tell.
///
/// # Safety
/// In a runtime section of a thread.
pub unsafe fn of_running(c: &Carrier) -> u64 {
    signal::block(0) & !RUNTIME | c.blocked & RUNTIME
}

/// Has the running thread block `asked`.
///
/// # Safety
/// As [`of_running`].
pub unsafe fn set(c: &mut Carrier, asked: u64) {
    c.blocked = asked;
    // SAFETY: the running thread's header.
    unsafe { (*c.header).blocked = asked };
    signal::set_mask(asked & !RUNTIME);
}

/// Notes that the running thread, which a signal interrupted, had `in_force`, and puts that in force again.
///
/// # Safety
/// In the handler, in a section of its own.
pub(crate) unsafe fn adopt(c: &mut Carrier, in_force: u64) {
    let asked = in_force & !RUNTIME | c.blocked & RUNTIME;
    // SAFETY: as the caller promised.
    unsafe { set(c, asked) };
}

/// Puts `asked` in force in place of the mask of the thread that ran, and notes in `left`, its header, what that was.
///
/// # Safety
/// Between two threads; the header is still this node's to write.
#[cold]
#[inline(never)]
pub unsafe fn change(c: &mut Carrier, left: Option<*mut SlotHeader>, asked: u64) {
    let was = signal::set_mask(asked & !RUNTIME);
    if let Some(left) = left {
        // SAFETY: the caller's promise.
        unsafe { (*left).blocked = was & !RUNTIME | c.blocked & RUNTIME };
    }
    c.blocked = asked;
}
