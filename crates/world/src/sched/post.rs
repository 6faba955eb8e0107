//! Posts: how anybody tells a thread's owner about it.
//!
//! ```text
//!   anybody ──bits──▶ record.mail ──if not posted yet──▶ owner's inbox (a stack of slots) ──drain, oldest first──▶ take_mail
//! ```
//!
//! A post that finds the thread gone is forwarded to its new owner.

use super::moves::{can_send, send};
use super::tick::ALONE;
use crate::control::{MAX_NODES, NONE, is_domain, mail, node, record, state, world};
use crate::killpoint::{Point, at};
use crate::local::Local;
use peregrine_base::sync::{Ordering, fence};
use peregrine_sys::{futex, timer::monotonic_ns};
use peregrine_thread::carrier::Carrier;
use peregrine_thread::preempt;
use peregrine_thread::stack_kind::is_windowed;

/// `NodeShared::idle` of a node that sleeps on its futex.
pub(super) const ASLEEP: u32 = 1;

/// And of one that sleeps in a poll.
pub(super) const POLLS: u32 = 2;

/// Posts `bits` to the thread in `slot`.
pub fn post(slot: u32, bits: u32) {
    let r = record(slot);
    // AcqRel: pairs with the swap in `take_mail`; who drains sees what we did before we posted.
    let before = r.mail.fetch_or(bits | mail::POSTED, Ordering::AcqRel);
    at(Point::PostMarked);
    if before & mail::POSTED == 0 {
        push_inbox(r.node.load(Ordering::Acquire), slot);
    }
}

fn push_inbox(to: u32, slot: u32) {
    let n = node(to);
    let r = record(slot);
    let mut head = n.inbox.load(Ordering::Relaxed);
    loop {
        r.inbox_next.store(head, Ordering::Relaxed);
        at(Point::PostLinked);
        // Release: pairs with the acquire swap in `drain`.
        match n.inbox.compare_exchange_weak(head, slot, Ordering::Release, Ordering::Relaxed) {
            Ok(_) => break,
            Err(now) => head = now,
        }
    }
    at(Point::PostPushed);
    nudge(to);
}

/// Wakes node `to` if it sleeps, and interrupts it if it would not look for long.
pub fn nudge(to: u32) {
    let n = node(to);
    // Pairs with the fence in `idle`: either we see `idle`, or it sees what we posted.
    fence(Ordering::SeqCst);
    match n.idle.load(Ordering::Relaxed) {
        0 => {}
        POLLS | ALONE => {
            let pid = n.pid.load(Ordering::Relaxed) as i32;
            let _ = peregrine_sys::signal::kill(pid, preempt::SIG_TICK);
        }
        _ => {
            n.wake.fetch_add(1, Ordering::Relaxed);
            at(Point::NudgeBumped);
            let _ = futex::wake(&n.wake, 1);
        }
    }
}

/// Interrupts the nodes but `me` that tick seldom: there is something to see that is posted to nobody.
pub fn nudge_lone(me: u32) {
    // Pairs with the fence in `tick::came`, as in `nudge`.
    fence(Ordering::SeqCst);
    for other in (0..MAX_NODES as u32).filter(|i| *i != me) {
        if node(other).idle.load(Ordering::Relaxed) == ALONE {
            nudge(other);
        }
    }
}

/// Tells node `to`, if it sleeps, that the thread in `slot` is about to be sent there: it wakes, which is the dearest part of a
/// move, while the thread is still being suspended, and looks for it for a moment (`idle::expect`). A sender that dies before it has
/// sent costs that moment.
pub fn announce(slot: u32, to: u32) {
    let n = node(to);
    // Where there are more nodes than processors, who looks around may keep the sender from going on.
    if n.idle.load(Ordering::Relaxed) == ASLEEP && world().spin_ns.load(Ordering::Relaxed) != 0 {
        n.expected.store(slot + 1, Ordering::Relaxed);
        // A wake-up too many does no harm: whoever sleeps on `wake` looks whether there is anything.
        n.wake.fetch_add(1, Ordering::Release);
        let _ = futex::wake(&n.wake, 1);
    }
}

/// Takes what is in the inbox and acts on it. Oldest first.
pub(super) fn drain(c: &mut Carrier, l: &mut Local) {
    let me = node(c.node);
    if me.inbox.load(Ordering::Relaxed) == NONE {
        return;
    }
    let mut stack = me.inbox.swap(NONE, Ordering::Acquire);
    at(Point::DrainTaken);
    let mut ordered = NONE;
    while stack != NONE {
        let next = record(stack).inbox_next.load(Ordering::Relaxed);
        record(stack).inbox_next.store(ordered, Ordering::Relaxed);
        ordered = stack;
        stack = next;
        at(Point::DrainTurned);
    }
    while ordered != NONE {
        let slot = ordered;
        ordered = record(slot).inbox_next.load(Ordering::Relaxed);
        take_mail(c, l, slot);
    }
}

fn take_mail(c: &mut Carrier, l: &mut Local, slot: u32) {
    let r = record(slot);
    let bits = r.mail.swap(0, Ordering::AcqRel);
    at(Point::MailTaken);
    if r.node.load(Ordering::Acquire) != c.node {
        at(Point::MailForwarded);
        return post(slot, bits & !mail::POSTED);
    }
    let mut now = r.state.load(Ordering::Relaxed);
    if bits & mail::ARRIVE != 0 {
        count_arrival(c, r.sent_at.swap(0, Ordering::Relaxed));
        at(Point::ArriveCounted);
        match now {
            state::RUNNABLE => l.push(slot),
            state::SLEEPING => {
                l.add_timer(r.wake_at.load(Ordering::Relaxed), slot, r.waits.load(Ordering::Relaxed));
            }
            _ => {}
        }
        if is_windowed(slot) {
            l.windows.note_idle(slot);
        }
    }
    if bits & mail::WAKE != 0 {
        if now == state::PARKED || now == state::SLEEPING {
            r.state.store(state::RUNNABLE, Ordering::Relaxed);
            at(Point::Woken);
            l.push(slot);
            now = state::RUNNABLE;
        } else {
            // It is awake: the wake-up is kept for its next wait.
            r.mail.fetch_or(mail::WAKE, Ordering::AcqRel);
            at(Point::MailKept);
        }
    }
    if bits & mail::MOVE != 0 && !is_domain(c.node) {
        let to = r.move_to.load(Ordering::Acquire);
        at(Point::MailMoves);
        if to == NONE || to == c.node {
            r.move_to.store(NONE, Ordering::Release);
        } else if !can_send(c, l, slot) {
            // The scheduler finds it in its inbox.
            at(Point::MailKept);
            post(slot, mail::MOVE);
        } else if now == state::PARKED || now == state::SLEEPING || (now == state::RUNNABLE && l.remove(slot))
        {
            send(c, l, slot, to);
        }
        // A running one is sent when it next comes through `reschedule`.
    }
}

/// Counts a move that ended here; a new thread's first arrival (`sent` is 0) is none.
fn count_arrival(c: &Carrier, sent: u64) {
    if sent != 0 {
        let me = node(c.node);
        me.arrivals.fetch_add(1, Ordering::Relaxed);
        me.arrival_ns.fetch_add(monotonic_ns().saturating_sub(sent), Ordering::Relaxed);
    }
}
