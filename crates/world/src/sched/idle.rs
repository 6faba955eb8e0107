//! A node without work: it looks around for a while, then sleeps.

use super::post::{ASLEEP, POLLS};
use super::{lend, tick};
use crate::control::{NONE, NodeShared, World, is_domain, node, record};
use crate::killpoint::{Point, at};
use crate::local::Local;
use peregrine_base::sync::{Ordering, fence, spin_loop};
use peregrine_sys::process::CpuSet;
use peregrine_sys::{futex, timer::monotonic_ns};
use peregrine_thread::carrier::{Carrier, Pending};
use peregrine_thread::slot::SlotHeader;
use peregrine_thread::stack_kind::is_windowed;
use peregrine_thread::{arch, preempt};

pub(super) fn idle(c: &mut Carrier, l: &mut Local, w: &World) {
    tick::nobody_runs(c, l);
    let me = node(c.node);
    let seen = me.wake.load(Ordering::Relaxed);
    let flights = l.flights;
    let something = || {
        me.inbox.load(Ordering::Relaxed) != NONE
            || w.pause.load(Ordering::Relaxed) & 1 != 0
            || c.pending.load(Ordering::Relaxed) != 0
            // SAFETY: null, or made for the life of the process; the scheduler alone uses it.
            || unsafe { flights.as_ref() }.is_some_and(crate::fresh::Flights::any_ready)
    };
    if !is_domain(c.node) {
        w.hungry.fetch_or(1 << c.node, Ordering::Relaxed);
    }
    at(Point::IdleBegins);
    let (begun, most) = (monotonic_ns(), w.spin_ns.load(Ordering::Relaxed));
    me.idle_since_ns.store(begun, Ordering::Relaxed);
    // Who looked around now would keep off the very thread that it made way for.
    let makes_way = core::mem::take(&mut l.gave_processor);
    let spin_until = (!makes_way).then(|| begun + l.spin.budget(most));
    wait_for_work(c, l, spin_until, me, seen, something);
    l.spin.note(monotonic_ns() - begun, most);
    w.hungry.fetch_and(!(1 << c.node), Ordering::Relaxed);
}

/// When there is something to do though nothing comes from outside.
pub(super) fn next_due(l: &Local) -> Option<u64> {
    match (l.next_deadline(), l.windows.next_due()) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

fn wait_for_work(
    c: &Carrier,
    l: &mut Local,
    spin_until: Option<u64>,
    me: &NodeShared,
    seen: u32,
    something: impl Fn() -> bool,
) {
    while let Some(until) = spin_until {
        for _ in 0..50 {
            if something() {
                return;
            }
            spin_loop();
        }
        let now = monotonic_ns();
        if next_due(l).is_some_and(|d| d <= now) {
            return;
        }
        if now >= until {
            break;
        }
    }
    if l.in_flight != 0 {
        // Each tick would end the poll.
        tick::stop(l);
        return sleep_with_calls(l, me, something);
    }
    l.affinity = CpuSet::current().ok();
    me.idle.store(ASLEEP, Ordering::Relaxed);
    at(Point::IdleSleeps);
    // Pairs with the fence in `nudge`.
    fence(Ordering::SeqCst);
    if !something() {
        let timeout = next_due(l).map(|d| d.saturating_sub(monotonic_ns()).max(1));
        futex::wait(&me.wake, seen, timeout);
    }
    me.idle.store(0, Ordering::Relaxed);
    lend::take_back(c.node, l);
    stop_ticking(c, l);
    expect(me, something);
}

/// Looks for the thread that is about to come, if that is why this node was woken; in vain if the sender died.
fn expect(me: &NodeShared, something: impl Fn() -> bool) {
    const PATIENCE_NS: u64 = 50_000;
    // Pairs with the release in `announce`, which the wake-up was.
    let Some(slot) = me.expected.swap(0, Ordering::Acquire).checked_sub(1) else { return };
    if !is_windowed(slot) {
        // What it will be entered by. Nothing is read: it is another node's still.
        arch::prefetch(SlotHeader::of(slot) as usize);
        arch::prefetch(core::ptr::from_ref(record(slot)) as usize);
    }
    let until = monotonic_ns() + PATIENCE_NS;
    while !something() && monotonic_ns() < until {
        spin_loop();
    }
}

/// Stops the tick of a node that has slept until one came. Not before: whoever sleeps for less than a slice is woken
/// without having to start it again.
fn stop_ticking(c: &Carrier, l: &mut Local) {
    if c.pending.load(Ordering::Relaxed) & Pending::TICK != 0 {
        tick::stop(l);
    }
}

/// Sleeps until a call has an outcome, or somebody nudges: by a signal, for a poll can't wait on a futex.
fn sleep_with_calls(l: &mut Local, me: &NodeShared, something: impl Fn() -> bool) {
    let tick = peregrine_sys::signal::bit(preempt::SIG_TICK);
    let mask = peregrine_sys::signal::set_mask(tick);
    me.idle.store(POLLS, Ordering::Relaxed);
    // Pairs with the fence in `nudge`.
    fence(Ordering::SeqCst);
    if !something() {
        let now = monotonic_ns();
        // SAFETY: calls are under way, so it was made; the scheduler alone uses it.
        let flights = unsafe { &mut *l.flights };
        let until = [next_due(l), flights.look_at()].into_iter().flatten().min().unwrap_or(now);
        // A signal that came since it is held off ends the poll at once.
        let told =
            peregrine_sys::io::wait_for_any(flights.tellers(), until.saturating_sub(now), mask & !tick);
        if told && !flights.any_ready() {
            flights.told_in_vain(monotonic_ns());
        }
    }
    me.idle.store(0, Ordering::Relaxed);
    peregrine_sys::signal::set_mask(mask);
}
