//! The tick: how often the running thread is interrupted, so that others have their turn and posts are looked at.
//!
//! ```text
//!   off ──a thread is run──▶ usual ──a tick finds nobody else──▶ alone
//!    ▲                        │  ▲                                │ │
//!    └──slept until it came───┘  └──────somebody else came────────┘ │
//!    └──────────────────────nobody runs any more────────────────────┘
//! ```
//!
//! A tick costs up to 30 us where the kernel is a guest: a timer told to the processor and an interrupt, both by way of the host, a signal,
//! and what all that evicts. Each 2 ms that is more than one part in a hundred, and a thread that has its node for itself has nothing of it. So it is interrupted
//! less often then, and whoever posts to the node, or changes what is done about a signal, sends it the signal of the tick ([`ALONE`], `post::nudge`).

use super::idle::next_due;
use crate::control::{NONE, node, world};
use crate::local::{Local, Tick};
use peregrine_base::sync::{Ordering, fence};
use peregrine_thread::carrier::Carrier;

/// `NodeShared::idle` of a node that ticks seldom.
pub(super) const ALONE: u32 = 3;

/// How many slices there are between two ticks then. What nobody posts (another node without work) is seen as late as that.
const SLICES: u64 = 8;

fn slice_ns() -> u64 {
    world().slice_ns.load(Ordering::Relaxed)
}

/// Somebody else has something to do here, now or some time.
fn has_company(l: &Local) -> bool {
    l.queued() != 0 || l.in_flight != 0 || next_due(l).is_some()
}

/// A thread is about to run.
#[inline]
pub(super) fn start(c: &Carrier, l: &mut Local) {
    match l.ticking {
        Tick::Usual => {}
        Tick::Alone => look(c, l),
        Tick::Off => {
            // The first slice is twice as long: a deadline beyond the kernel's own next tick need not be told to the
            // processor, and telling it takes 8 us in a virtual machine, which a thread that has just arrived would wait.
            l.arm(2 * slice_ns(), slice_ns());
            l.ticking = Tick::Usual;
        }
    }
}

/// Has a thread that was alone, and is not any more, interrupted as often as others.
#[inline]
pub(super) fn look(c: &Carrier, l: &mut Local) {
    if l.ticking == Tick::Alone && has_company(l) {
        crowd(c, l);
    }
}

/// Has a thread that was alone interrupted as often as others if something came for its node: it was put off to the next tick, which is
/// not to be a seldom one.
pub(super) fn hasten(c: &Carrier, l: &mut Local) {
    let came = || {
        node(c.node).inbox.load(Ordering::Relaxed) != NONE
            || world().pause.load(Ordering::Relaxed) & 1 != 0
            || crate::dispositions::has_changed(l)
    };
    if l.ticking == Tick::Alone && came() {
        crowd(c, l);
    }
}

#[cold]
fn crowd(c: &Carrier, l: &mut Local) {
    node(c.node).idle.store(0, Ordering::Relaxed);
    // In this order: a reset in between must not leave a node that believes it ticks as usual.
    l.arm(slice_ns(), slice_ns());
    l.ticking = Tick::Usual;
}

/// A tick has come to a running thread.
pub(super) fn came(c: &Carrier, l: &mut Local) {
    if l.ticking != Tick::Usual || has_company(l) {
        return look(c, l);
    }
    let me = node(c.node);
    me.idle.store(ALONE, Ordering::Relaxed);
    // Pairs with the fence in `nudge`: either we see what was posted, or whoever did sees `idle`.
    fence(Ordering::SeqCst);
    if me.inbox.load(Ordering::Relaxed) != NONE {
        // The next tick finds it.
        return me.idle.store(0, Ordering::Relaxed);
    }
    // Nor has anybody told us of a signal that is changed since `service` looked.
    crate::dispositions::look(l);
    l.ticking = Tick::Alone;
    l.arm(SLICES * slice_ns(), SLICES * slice_ns());
}

/// Nobody runs. Whoever sleeps for less than a slice is woken without having to start the tick again, so it goes on, unless it is a seldom one.
pub(super) fn nobody_runs(c: &Carrier, l: &mut Local) {
    if l.ticking == Tick::Alone {
        stop(l);
        node(c.node).idle.store(0, Ordering::Relaxed);
    }
}

/// No more ticks, if there were any.
pub(super) fn stop(l: &mut Local) {
    if l.ticking != Tick::Off {
        // In this order: a reset in between must not leave a node that believes it ticks.
        l.ticking = Tick::Off;
        l.arm(0, 0);
    }
}
