//! Waiting and waking: what a thread asks of the scheduler.

use super::post::post;
use super::switch::reschedule;
use super::tick;
use crate::control::{mail, record, state};
use crate::killpoint::{Point, at};
use crate::local::{Action, local};
use peregrine_base::sync::Ordering;
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::arch;
use peregrine_thread::carrier::{RuntimeSection, carrier};

/// Parks the running thread until it is woken, or until `deadline` (ns; 0: none). A wake-up that came before counts.
/// Returns whether it was woken.
///
/// # Safety
/// In a runtime section of the running thread.
pub unsafe fn park(deadline: u64, reason: u32, on: u32) -> bool {
    // SAFETY: as promised.
    unsafe {
        let c = carrier();
        let me = c.current.load(Ordering::Relaxed);
        let r = record(me);
        if take_wake(r) {
            return true;
        }
        r.waiting.store(reason, Ordering::Relaxed);
        r.waiting_on.store(on, Ordering::Relaxed);
        let wait = r.waits.load(Ordering::Relaxed).wrapping_add(1);
        r.waits.store(wait, Ordering::Relaxed);
        if deadline != 0 {
            r.wake_at.store(deadline, Ordering::Relaxed);
            r.state.store(state::SLEEPING, Ordering::Relaxed);
            at(Point::TimerSet);
            local().add_timer(deadline, me, wait);
        } else {
            r.state.store(state::PARKED, Ordering::Relaxed);
        }
        // A wait is long beside this; a bare yield trusts its caller to run with the defaults.
        let words = arch::ControlWords::aside();
        reschedule(Action::Parked);
        drop(words);
        r.waiting.store(0, Ordering::Relaxed);
        deadline == 0 || monotonic_ns() < deadline
    }
}

/// Parks the running thread for the fresh call whose request lies at `at`, and has this node make it.
///
/// # Safety
/// As [`park`]; the request stays where it is until it is answered.
pub unsafe fn call(at: usize) {
    // SAFETY: as promised.
    unsafe {
        let me = carrier().current.load(Ordering::Relaxed);
        let words = arch::ControlWords::aside();
        reschedule(crate::fresh::parked(me, at));
        drop(words);
        record(me).waiting.store(0, Ordering::Relaxed);
    }
}

/// Takes a wake-up that was kept for later.
fn take_wake(r: &crate::control::ThreadRecord) -> bool {
    r.mail.load(Ordering::Relaxed) & mail::WAKE != 0
        && r.mail.fetch_and(!mail::WAKE, Ordering::AcqRel) & mail::WAKE != 0
}

/// Wakes the thread in `slot`, wherever it is.
///
/// # Safety
/// In a runtime section, or in the supervisor while the nodes are paused or running.
pub unsafe fn wake(slot: u32) {
    let r = record(slot);
    // SAFETY: on a node or in the supervisor; only a node has a thread pointer in a slot or runs a scheduler.
    if peregrine_thread::carrier::current_slot().is_some() {
        // SAFETY: a thread runs, so this is a node.
        let (c, l) = unsafe { (carrier(), local()) };
        if r.node.load(Ordering::Acquire) == c.node && r.mail.load(Ordering::Acquire) & mail::ARRIVE == 0 {
            // Ours: no detour through the inbox. One that is still arriving would be queued a second time when it is
            // taken up, and later run here while it runs elsewhere.
            let now = r.state.load(Ordering::Relaxed);
            if now == state::PARKED || now == state::SLEEPING {
                r.state.store(state::RUNNABLE, Ordering::Relaxed);
                at(Point::WokenQueued);
                l.push(slot);
                tick::look(c, l);
                return;
            }
        }
    }
    post(slot, mail::WAKE);
}

/// Runs `f` in a runtime section, if a Peregrine thread runs; tells its slot.
#[inline]
pub fn in_thread<R>(f: impl FnOnce(u32) -> R) -> Option<R> {
    let slot = peregrine_thread::carrier::current_slot()?;
    // SAFETY: a thread runs.
    let _section = unsafe { RuntimeSection::enter() };
    Some(f(slot))
}
