//! The switch from one thread to the next.
//!
//! The fast path goes straight from stack to stack. It is taken if nothing but the queue needs a look; everything else goes through
//! the scheduler's own stack.

use crate::control::{NONE, NodeShared, node, record, state, world};
use crate::killpoint::{Point, at};
use crate::local::{Action, Local, local};
use peregrine_base::sync::Ordering;
use peregrine_thread::carrier::{Carrier, carrier};
use peregrine_thread::slot::SlotHeader;
use peregrine_thread::stack_kind::is_windowed;
use peregrine_thread::template::template;
use peregrine_thread::{arch, mask, statics};

/// Lets the next thread of the queue run, and the running one again when its turn comes.
///
/// # Safety
/// In a runtime section of the running thread.
#[inline(always)]
pub unsafe fn yield_to_next() {
    // SAFETY: on a node, in a runtime section.
    unsafe {
        if !switch_directly(true) {
            through_scheduler(Action::Requeue);
        }
    }
}

/// Switches away from the running thread, which has set its own state.
///
/// # Safety
/// In a runtime section of the running thread. `action` tells what becomes of it.
#[inline]
pub unsafe fn reschedule(action: Action) {
    // SAFETY: on a node, in a runtime section.
    unsafe {
        let done = match action {
            Action::Requeue => switch_directly(true),
            Action::Parked => switch_directly(false),
            _ => false,
        };
        if !done {
            through_scheduler(action);
        }
    }
}

/// Leaves the running thread to the scheduler, which does `action` with it.
///
/// # Safety
/// As [`reschedule`].
#[cold]
#[inline(never)]
pub(super) unsafe fn through_scheduler(action: Action) {
    // SAFETY: on a node, in a runtime section.
    unsafe {
        let (c, l) = (carrier(), local());
        let me = c.current.load(Ordering::Relaxed);
        (l.action, l.previous) = (action, me);
        arch::switch(&raw mut (*SlotHeader::of(me)).saved_sp, c.scheduler_sp);
    }
}

/// Switches to the first thread of the queue, unless anything but the queue needs a look; `false`: it does, and nothing has happened.
/// The running thread goes to the end of the queue, or stays out of it.
///
/// # Safety
/// As [`reschedule`].
#[inline(always)]
unsafe fn switch_directly(requeue: bool) -> bool {
    // SAFETY: on a node, in a runtime section.
    unsafe {
        let (c, l) = (carrier(), local());
        let shared = node(c.node);
        if !quiet(c, l, shared) {
            return false;
        }
        let Some(next) = l.first() else { return requeue };
        let to = SlotHeader::of(next);
        if !ready_here(c, l, next) {
            return false;
        }
        let (me, from) = (c.current.load(Ordering::Relaxed), c.header);
        if requeue {
            record(me).state.store(state::RUNNABLE, Ordering::Relaxed);
            at(Point::Requeued);
            l.rotate(me);
        } else {
            l.pop();
        }
        look_ahead(l);
        if (*to).blocked != c.blocked {
            mask::change(c, Some(from), (*to).blocked);
        }
        enter(c, shared, next, to);
        arch::switch(&raw mut (*from).saved_sp, (*to).saved_sp);
        true
    }
}

/// Has the processor fetch what the next switches will touch: with many threads nothing of theirs is in its first cache.
#[inline(always)]
fn look_ahead(l: &Local) {
    // With fewer it costs more than it brings.
    const FEW: usize = 64;
    if l.queued() > FEW {
        let (soon, later) = (l.peek(0), l.peek(1));
        // Of a windowed thread nothing may be there to fetch.
        if !is_windowed(soon | later) {
            // SAFETY: both are runnable threads, whose headers are mapped and intact; fetching has no effect but speed.
            unsafe {
                arch::prefetch(SlotHeader::of(later) as usize);
                arch::prefetch(core::ptr::from_ref(record(later)) as usize);
                let header = SlotHeader::of(soon);
                arch::prefetch((*header).saved_sp);
                arch::prefetch((*header).saved_sp + 64);
                arch::prefetch((*header).fs_base);
            }
        }
    }
}

/// Whether nothing but the queue needs a look.
#[inline(always)]
fn quiet(c: &Carrier, l: &Local, shared: &NodeShared) -> bool {
    shared.inbox.load(Ordering::Relaxed) == NONE
        && c.pending.load(Ordering::Relaxed) == 0
        && l.in_flight == 0
        && world().pause.load(Ordering::Relaxed) & 1 == 0
}

/// Whether `slot` can be entered at once: this node has it in view with its guards up, or it is in its window.
#[inline(always)]
fn ready_here(c: &Carrier, l: &mut Local, slot: u32) -> bool {
    if is_windowed(slot) {
        return may_run(c, slot) && l.windows.is_in(slot);
    }
    may_run(c, slot) && l.is_admitted(slot, record(slot).generation.load(Ordering::Relaxed))
}

/// Whether an entry of the queue still stands: its thread is ours and may run. Whatever put it there, a thread that runs, waits,
/// has ended or belongs to another node is never entered.
#[inline(always)]
pub(super) fn may_run(c: &Carrier, slot: u32) -> bool {
    let r = record(slot);
    r.state.load(Ordering::Relaxed) == state::RUNNABLE && r.node.load(Ordering::Relaxed) == c.node
}

/// Makes `slot` the running thread in all respects but the registers.
///
/// # Safety
/// The thread is runnable, ours, and its context is about to be switched to; `shared` is this node's record, `header` the thread's.
#[inline(always)]
pub(super) unsafe fn enter(c: &mut Carrier, shared: &NodeShared, slot: u32, header: *mut SlotHeader) {
    shared.note_ran(slot);
    record(slot).state.store(state::RUNNING, Ordering::Relaxed);
    shared.current.store(slot, Ordering::Relaxed);
    c.current.store(slot, Ordering::Relaxed);
    c.header = header;
    at(Point::SwitchEntered);
    shared.switches.store(shared.switches.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    // SAFETY: on this node, between two threads.
    unsafe {
        statics::bring(c, template(), slot, header);
        at(Point::WindowBrought);
        peregrine_sys::cpu::set_fs_base((*header).fs_base, c.fast_fs);
    }
}
