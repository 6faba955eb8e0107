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
use peregrine_thread::{arch, statics};

/// Switches away from the running thread, which has set its own state.
///
/// # Safety
/// In a runtime section of the running thread. `action` tells what becomes of it.
#[inline]
pub unsafe fn reschedule(action: Action) {
    // SAFETY: on a node, in a runtime section.
    unsafe {
        let (c, l) = (carrier(), local());
        let me = c.current.load(Ordering::Relaxed);
        let shared = node(c.node);
        if matches!(action, Action::Requeue | Action::Parked) && quiet(c, shared) && l.in_flight == 0 {
            match l.first() {
                None if action == Action::Requeue => return,
                Some(next) if ready_here(c, l, next) => {
                    l.pop();
                    if action == Action::Requeue {
                        record(me).state.store(state::RUNNABLE, Ordering::Relaxed);
                        at(Point::Requeued);
                        l.push(me);
                    }
                    if next == me {
                        record(me).state.store(state::RUNNING, Ordering::Relaxed);
                        return;
                    }
                    look_ahead(l);
                    enter(c, next);
                    arch::switch(&raw mut (*SlotHeader::of(me)).saved_sp, (*SlotHeader::of(next)).saved_sp);
                    return;
                }
                _ => {}
            }
        }
        (l.action, l.previous) = (action, me);
        arch::switch(&raw mut (*SlotHeader::of(me)).saved_sp, c.scheduler_sp);
    }
}

/// Has the processor fetch what the next switches will touch: with many threads nothing of theirs is in its caches.
#[inline(always)]
fn look_ahead(l: &Local) {
    const FEW: usize = 16;
    let (soon, later) = (l.peek(0), l.peek(2));
    // Of a windowed thread nothing may be there to fetch.
    if l.queued() > FEW && !is_windowed(soon | later) {
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

/// Whether nothing but the queue needs a look.
#[inline(always)]
fn quiet(c: &Carrier, shared: &NodeShared) -> bool {
    shared.inbox.load(Ordering::Relaxed) == NONE
        && c.pending.load(Ordering::Relaxed) == 0
        && world().pause.load(Ordering::Relaxed) & 1 == 0
}

/// Whether `slot` can be entered at once: its guards are up, or it is in its window, and nobody wants it elsewhere.
#[inline(always)]
fn ready_here(c: &Carrier, l: &mut Local, slot: u32) -> bool {
    // SAFETY: only plain words of a header are read, and only if the thread is ours and suspended.
    if is_windowed(slot) {
        return may_run(c, slot) && l.windows.is_in(slot);
    }
    // SAFETY: as above.
    may_run(c, slot) && *l.guards_of(slot) == unsafe { (*SlotHeader::of(slot)).stack_pages() }
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
/// The thread is runnable, ours, and its context is about to be switched to.
#[inline]
pub(super) unsafe fn enter(c: &mut Carrier, slot: u32) {
    let shared = node(c.node);
    shared.note_ran(slot);
    record(slot).state.store(state::RUNNING, Ordering::Relaxed);
    shared.current.store(slot, Ordering::Relaxed);
    c.current.store(slot, Ordering::Relaxed);
    at(Point::SwitchEntered);
    shared.switches.store(shared.switches.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    // SAFETY: on this node, between two threads.
    unsafe {
        statics::bring(c, template(), slot);
        at(Point::WindowBrought);
        peregrine_sys::cpu::set_fs_base((*SlotHeader::of(slot)).fs_base, c.fast_fs);
    }
}
