//! The scheduler of a node: who runs next, and what happens to who ran.
//!
//! ```text
//!   thread A ──park, yield──▶ direct switch ──▶ thread B        nothing special is pending (the fast path)
//!       │
//!       └──move, end, pause, or nobody runnable──▶ scheduler's own stack ──▶ thread B, or idle
//! ```
//!
//! **One owner.** A thread belongs to one node at a time: the one in `record.node`. Only the owner touches its queue
//! entry, its timers and its state; everybody else *posts*: sets bits in `record.mail` and, if it was not posted yet, pushes
//! it on the owner's inbox. The owner drains the inbox when it schedules and at each tick. A post that finds the thread
//! gone is forwarded. So no run queue is shared and no context is resumed before it was saved: the owner that drains is
//! the very node that saved it.
//!
//! **A move** hands over ownership: the old owner saves the context and the statics, writes `record.node`, and posts
//! ARRIVE to the new one. A thread on a carried call is its domain's (`carried`): nobody may move it, nor give it away, nor
//! take it there, but itself; a move asked for meanwhile is made when it is back.
//!
//! *Between two threads*: no static, no thread-local, no allocation, no panic.

mod idle;
mod lend;
mod moves;
mod park;
mod pause;
mod post;
mod shortage;
pub(crate) mod spin;
mod switch;
mod tick;

pub use lend::lend;
pub use moves::launch;
pub use park::{call, in_thread, park, wake};
pub use post::{announce, nudge, nudge_lone, post};
pub use shortage::{LacksMemory, want_room, with_room};
pub use switch::{reschedule, yield_to_next};

use crate::control::{Lack, NONE, is_domain, node, record, state, world};
use crate::killpoint::{Point, at};
use crate::local::{Action, Local, local};
use crate::windows;
use idle::idle;
use moves::{donate, send, wanted_elsewhere};
use pause::pause;
use peregrine_base::sync::Ordering;
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::carrier::{Carrier, Pending, carrier};
use peregrine_thread::slot::SlotHeader;
use peregrine_thread::stack_kind::is_windowed;
use peregrine_thread::{arch, mask, statics};
use post::drain;
use switch::{enter, may_run, through_scheduler};

/// Inbox, timers, and a look at who is out of work. Called in a runtime section or by the scheduler, which keeps the
/// first `own` threads of the queue: one that is about to run here anyway is not sent away.
fn service(c: &mut Carrier, l: &mut Local, own: usize) {
    drain(c, l);
    if let Some(first) = l.next_deadline() {
        let now = monotonic_ns();
        if first <= now {
            while let Some(due) = l.due(now) {
                at(Point::TimerDue);
                if let Some(slot) = due {
                    record(slot).state.store(state::RUNNABLE, Ordering::Relaxed);
                    at(Point::TimerQueued);
                    l.push(slot);
                }
            }
        }
    }
    let hungry = world().hungry.load(Ordering::Relaxed) & !(1 << c.node);
    if hungry != 0 && l.queued() > own && !is_domain(c.node) {
        donate(c, l, hungry.trailing_zeros());
    }
    node(c.node).queued.store(l.queued() as u32, Ordering::Relaxed);
    // A thread that has just come may rely on a handler.
    crate::dispositions::look(l);
}

/// Whether there is something to do that takes the scheduler's stack: packing, taking a thread out of its window, or taking up the
/// outcomes of calls.
fn needs_scheduler(c: &Carrier, l: &Local) -> bool {
    l.in_flight != 0
        || node(c.node).inbox.load(Ordering::Relaxed) != NONE
        || world().lacking.load(Ordering::Relaxed) & !(1 << c.node) != 0
        || l.windows.next_due().is_some_and(|due| due <= monotonic_ns())
}

/// Acts on a tick, a pause or a post, on the running thread's stack.
pub fn on_preempt(why: u32) {
    // SAFETY: called in a section that `preempt` opened.
    unsafe {
        let (c, l) = (carrier(), local());
        if world().pause.load(Ordering::Acquire) & 1 != 0 {
            return reschedule(Action::RequeueFront);
        }
        let me = c.current.load(Ordering::Relaxed);
        service(c, l, 0);
        if let Some(to) = wanted_elsewhere(c, me) {
            let n = node(c.node);
            n.preempted_moves.store(n.preempted_moves.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            return reschedule(Action::Move(to));
        }
        if why & Pending::TICK != 0 {
            tick::came(c, l);
        }
        let others_turn = why & Pending::TICK != 0 && l.queued() != 0;
        if others_turn {
            let n = node(c.node);
            n.preemptions.store(n.preemptions.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        let action = if others_turn { Action::Requeue } else { Action::RequeueFront };
        if needs_scheduler(c, l) {
            through_scheduler(action);
        } else if others_turn {
            reschedule(action);
        }
    }
}

/// A signal has interrupted the running thread in the middle of a library, and is put off to the next tick.
pub fn on_put_off() {
    // SAFETY: on a node, outside of the runtime, with ticks and pauses held off.
    unsafe { tick::hasten(carrier(), local()) }
}

/// Entry of the scheduler, on its own stack: at the start of a node, and after a reset.
pub extern "C" fn scheduler() -> ! {
    // SAFETY: on a node; whatever ran before has been dropped.
    unsafe {
        let c = carrier();
        c.depth.store(1, Ordering::Relaxed);
        // A reset may have come in the middle of a handler that held others off.
        peregrine_sys::signal::set_mask(0);
        c.blocked = 0;
        c.current.store(NONE, Ordering::Relaxed);
        statics::forget(c);
        node(c.node).current.store(NONE, Ordering::Relaxed);
        peregrine_sys::cpu::set_fs_base(c.process_fs, c.fast_fs);
        local().clear();
        crate::fresh::drop_all(local());
        at(Point::ResetCleared);
        loop {
            step(carrier(), local());
        }
    }
}

unsafe fn step(c: &mut Carrier, l: &mut Local) {
    settle(c, l);
    c.pending.store(0, Ordering::Relaxed);
    let w = world();
    let word = w.pause.load(Ordering::Acquire);
    if word & 1 != 0 {
        // SAFETY: no thread runs here.
        return unsafe { pause(c, l, w, word) };
    }
    crate::fresh::finish(l, c.node);
    service(c, l, 1);
    // SAFETY: on the scheduler's stack.
    unsafe { windows::pack_idle(c, l) };
    let Some(next) = l.pop() else { return idle(c, l, w) };
    if !may_run(c, next) {
        at(Point::QueueStale);
        return;
    }
    at(Point::Stepped);
    // SAFETY: on the scheduler's stack; `next` was just taken from the queue.
    if unsafe { crate::thread::end_doomed(next) } {
        return;
    }
    if crate::carried::is_unusable(c.node) {
        crate::node::give_up(next, Lack::SetUp);
    }
    if let Some(to) = wanted_elsewhere(c, next) {
        return send(c, l, next, to);
    }
    // SAFETY: `next` is runnable and ours; its slot is mapped.
    unsafe {
        if is_windowed(next) {
            windows::bring(c, l, next);
            // What was copied meanwhile is not the thread's time: a slice shorter than that would be over before it began.
            if c.pending.load(Ordering::Relaxed) & Pending::TICK != 0 {
                c.pending.fetch_and(!Pending::TICK, Ordering::Relaxed);
            }
        } else if !raise_guards(l, next) {
            crate::node::give_up(next, Lack::Guards);
        }
        tick::start(c, l);
        let header = SlotHeader::of(next);
        if (*header).blocked != 0 {
            mask::change(c, None, (*header).blocked);
        }
        enter(c, node(c.node), next, header);
        arch::switch(&raw mut c.scheduler_sp, (*header).saved_sp);
    }
}

/// Enters this node among those that have the slot in view, once for each thread, and puts up the slot's guards in this
/// process's page table, once for each geometry.
///
/// # Safety
/// The slot is prepared and suspended.
unsafe fn raise_guards(l: &mut Local, slot: u32) -> bool {
    let generation = record(slot).generation.load(Ordering::Relaxed);
    if l.is_admitted(slot, generation) {
        return true;
    }
    // SAFETY: between two threads.
    unsafe { crate::address_space::enter_slot(slot) };
    // SAFETY: a prepared slot's header is intact.
    let header = unsafe { &*SlotHeader::of(slot) };
    let pages = header.stack_pages();
    let known = *l.guards_of(slot);
    if known == pages {
        l.set_admitted(slot, generation);
        return true;
    }
    // SAFETY: guard ranges hold nothing; those of another geometry are taken away first, and write protection before: a guard
    // over a write-protected page, be it one that is not there, would hang in the kernel. This node may have looked at the
    // slot's pages without ever running its threads: it makes threads for others.
    unsafe {
        if known != 0 || l.take_scanned(slot) {
            crate::dirty::unprotect_slot(slot);
        }
        if known != 0 && header.remove_guards().is_err() {
            return false;
        }
        if header.install_guards().is_err() {
            return false;
        }
    }
    *l.guards_of(slot) = pages;
    l.set_admitted(slot, generation);
    true
}

/// Deals with the thread that has just switched to the scheduler.
fn settle(c: &mut Carrier, l: &mut Local) {
    let (action, slot) = (l.action, l.previous);
    (l.action, l.previous) = (Action::None, NONE);
    if action == Action::None {
        return;
    }
    // The FS base still points into a slot that may run elsewhere in a moment, or be gone.
    // SAFETY: the scheduler runs on the process's own thread-locals.
    unsafe { peregrine_sys::cpu::set_fs_base(c.process_fs, c.fast_fs) };
    c.current.store(NONE, Ordering::Relaxed);
    node(c.node).current.store(NONE, Ordering::Relaxed);
    if c.blocked != 0 {
        let left = (action != Action::Ended).then(|| SlotHeader::of(slot));
        // SAFETY: the thread is still this node's, and in its window if it has one.
        unsafe { mask::change(c, left, 0) };
    }
    let r = record(slot);
    at(Point::SettleLeft);
    match action {
        Action::None | Action::Parked => {}
        Action::Requeue | Action::RequeueFront | Action::Room => {
            r.state.store(state::RUNNABLE, Ordering::Relaxed);
            at(Point::SettleRequeued);
            if action == Action::Requeue {
                l.push(slot)
            } else {
                l.push_front(slot)
            }
            if action == Action::Room {
                // SAFETY: on the scheduler's stack.
                unsafe { windows::pack_early(c.node, l, slot) };
            }
        }
        Action::Move(to) => {
            r.state.store(state::RUNNABLE, Ordering::Relaxed);
            send(c, l, slot, to);
        }
        Action::Call(at) => crate::fresh::begin(l, c.node, slot, at),
        Action::Ended => {
            statics::forget(c);
            if is_windowed(slot) {
                windows::forget(l, slot);
            }
            crate::join::bury(slot);
        }
    }
}
