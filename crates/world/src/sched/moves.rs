//! How a thread changes its owner.

use super::post::post;
use super::switch::may_run;
use super::tick;
use crate::control::{NONE, is_domain, mail, record, world};
use crate::killpoint::{Point, at};
use crate::local::{Local, local};
use crate::windows;
use peregrine_base::sync::Ordering;
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::carrier::{Carrier, carrier};
use peregrine_thread::stack_kind::is_windowed;
use peregrine_thread::statics;
use peregrine_thread::template::template;

/// Gives a suspended thread of this node to node `to`.
pub(super) fn send(c: &mut Carrier, l: &mut Local, slot: u32, to: u32) {
    let r = record(slot);
    // SAFETY: the thread is suspended and ours.
    unsafe {
        if is_windowed(slot) {
            windows::leave(c, l, slot);
        } else {
            statics::evict(c, template(), slot);
        }
    }
    at(Point::SendEvicted);
    if !is_domain(to) && !is_domain(c.node) {
        r.move_to.store(NONE, Ordering::Relaxed);
    }
    r.moves.fetch_add(1, Ordering::Relaxed);
    r.sent_at.store(monotonic_ns(), Ordering::Relaxed);
    at(Point::SendCounted);
    // Before the node: whoever sees that the thread is its own sees too that it has not been taken up yet (`wake`).
    r.mail.fetch_or(mail::ARRIVE, Ordering::AcqRel);
    at(Point::SendMarked);
    // Release: the new owner, which acquires through the inbox, sees context and statics.
    r.node.store(to, Ordering::Release);
    at(Point::SendHanded);
    post(slot, mail::ARRIVE);
}

/// Whether a suspended thread of this node can be sent here and now. One that has to leave its window may need room, and the
/// scheduler alone makes room, on its own stack.
pub(super) fn can_send(c: &Carrier, l: &Local, slot: u32) -> bool {
    c.current.load(Ordering::Relaxed) == NONE || !is_windowed(slot) || !l.windows.is_in(slot)
}

#[cold]
pub(super) fn donate(c: &mut Carrier, l: &mut Local, to: u32) {
    if !can_send(c, l, l.peek(l.queued() - 1)) {
        return;
    }
    // Whoever resets the bit gives.
    let bit = 1 << to;
    if world().hungry.fetch_and(!bit, Ordering::AcqRel) & bit != 0
        && let Some(slot) = l.pop_last()
        && may_run(c, slot)
    {
        at(Point::DonateTaken);
        send(c, l, slot, to);
    }
}

/// Where somebody wants the thread of this node, if that is to be obeyed now.
pub(super) fn wanted_elsewhere(c: &Carrier, slot: u32) -> Option<u32> {
    let to = record(slot).move_to.load(Ordering::Acquire);
    (to != NONE && to != c.node && !is_domain(c.node)).then_some(to)
}

/// Lets a new thread of this node run, on node `on`; one made during a carried call starts on an ordinary node.
///
/// # Safety
/// In a section; the thread was just created here.
pub unsafe fn launch(slot: u32, on: u32) {
    // SAFETY: on a node.
    let (c, l) = unsafe { (carrier(), local()) };
    let on = if is_domain(on) { slot % world().node_count.load(Ordering::Relaxed) } else { on };
    if on == c.node {
        l.push(slot);
        tick::look(c, l);
    } else {
        record(slot).node.store(on, Ordering::Release);
        at(Point::LaunchedElsewhere);
        post(slot, mail::ARRIVE);
    }
}
