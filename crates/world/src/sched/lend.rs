//! A processor that goes along: who moves itself to a node that sleeps, and leaves nothing to do behind, has it wake on the processor
//! that it runs on itself.
//!
//! ```text
//!   processor 0   node 0: bind node 1 to me │ suspend, hand over, wake │ sleep ─▶ node 1: bind me as before │ run the thread
//!   processor 1   halted                                                                  (and may be taken there any time)
//! ```
//!
//! To wake a process on another processor takes 25 to 45 us where processors are virtual, nearly all of it an interrupt to one that
//! is halted; to switch to one on this processor takes three. The node that the thread leaves is about to sleep, so its processor is
//! free, and warm. Nodes are not pinned, so it need not be said where a node runs, and nothing remains of it: before the woken node does
//! anything else it may run again wherever it might before. One that is pinned to other processors is woken there (`post::announce`).
//!
//! A node that has been idle for less than it may look around is woken as usual too: the next thread finds it looking, and to be
//! there at once is worth two processors while threads come and go that fast.
//!
//! The sleeper's affinity is its own again in all cases: `lent` is a lock that it waits for, and what it is set to is known to it.
//! A lender that dies leaves it to the pause of the rollback.

use super::post::ASLEEP;
use crate::control::{NONE, node, world};
use crate::killpoint::{Point, at};
use crate::local::Local;
use peregrine_base::sync::{Ordering, fence};
use peregrine_sys::io::yield_now;
use peregrine_sys::process::{CpuSet, cpu_by_call};
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::carrier::Carrier;

/// `NodeShared::lent`: its affinity is its own.
const NOT: u32 = 0;
/// Somebody is about to bind it.
const CLAIMED: u32 = 1;
/// It is bound to the processor of whoever wakes it.
const BOUND: u32 = 2;

/// Has node `to` wake on this processor, if it sleeps, may run here, and nothing else is to be done on this node. It is not woken yet:
/// who is sent there does that.
pub fn lend(c: &Carrier, l: &mut Local, to: u32) -> bool {
    let (me, other) = (node(c.node), node(to));
    let sleeps = || other.idle.load(Ordering::Relaxed) == ASLEEP;
    let leaves_nothing = l.queued() == 0 && l.in_flight == 0 && me.inbox.load(Ordering::Relaxed) == NONE;
    if !sleeps() || !leaves_nothing {
        return false;
    }
    let slept = monotonic_ns().saturating_sub(other.idle_since_ns.load(Ordering::Relaxed));
    if slept <= world().spin_ns.load(Ordering::Relaxed) {
        return false;
    }
    if other.lent.compare_exchange(NOT, CLAIMED, Ordering::AcqRel, Ordering::Relaxed).is_err() {
        return false;
    }
    at(Point::LendClaimed);
    // Pairs with the fence in `take_back`: either it is seen there, or we see that the node is awake.
    fence(Ordering::SeqCst);
    l.gave_processor = sleeps() && bind(other.pid.load(Ordering::Relaxed) as i32);
    at(Point::LendBound);
    other.lent.store(if l.gave_processor { BOUND } else { NOT }, Ordering::Release);
    l.gave_processor
}

/// Binds the process to this processor if it is one of its own.
fn bind(pid: i32) -> bool {
    let (Ok(cpu), Ok(own)) = (cpu_by_call(), CpuSet::of(pid)) else { return false };
    own.contains(cpu) && CpuSet::one(cpu).is_ok_and(|one| one.bind_other(pid).is_ok())
}

/// This node is awake, and may run again wherever it might before it slept.
pub(super) fn take_back(me: u32, l: &Local) {
    // Pairs with the fence in `lend`.
    fence(Ordering::SeqCst);
    if node(me).lent.load(Ordering::Relaxed) != NOT {
        widen(me, l, false);
    }
}

/// As [`take_back`], at the end of a pause: after one for a rollback (`is_reset`) no lender is left that could release what it claimed.
pub(super) fn take_back_after_pause(me: u32, l: &Local, is_reset: bool) {
    if node(me).lent.load(Ordering::Acquire) != NOT {
        widen(me, l, is_reset);
    }
}

#[cold]
fn widen(me: u32, l: &Local, lender_is_gone: bool) {
    let lent = &node(me).lent;
    // The lender's next step is to bind us: what we do must not come before it.
    while !lender_is_gone && lent.load(Ordering::Acquire) == CLAIMED {
        if world().pause.load(Ordering::Relaxed) & 1 != 0 {
            // It may have died. The end of the pause is soon enough.
            return;
        }
        yield_now();
    }
    if let Some(own) = &l.affinity {
        let _ = own.bind();
    }
    at(Point::LendTakenBack);
    lent.store(NOT, Ordering::Release);
}
