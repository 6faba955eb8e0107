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

use crate::control::{NONE, NodeShared, PauseKind, World, is_domain, mail, node, record, state, wait, world};
use crate::killpoint::{Point, at};
use crate::local::{Action, Local, local};
use crate::windows;
use peregrine_base::sync::{Ordering, fence, spin_loop};
use peregrine_sys::{futex, timer::monotonic_ns};
use peregrine_thread::carrier::{Carrier, Pending, RuntimeSection, carrier};
use peregrine_thread::slot::SlotHeader;
use peregrine_thread::stack_kind::is_windowed;
use peregrine_thread::template::template;
use peregrine_thread::{arch, preempt, statics};

/// `NodeShared::idle` of a node that sleeps on its futex.
const ASLEEP: u32 = 1;
/// And of one that sleeps in a poll.
const POLLS: u32 = 2;

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

/// Wakes node `to` if it sleeps.
pub fn nudge(to: u32) {
    let n = node(to);
    // Pairs with the fence in `idle`: either we see `idle`, or it sees what we posted.
    fence(Ordering::SeqCst);
    match n.idle.load(Ordering::Relaxed) {
        0 => {}
        POLLS => {
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

/// Takes what is in the inbox and acts on it. Oldest first.
fn drain(c: &mut Carrier, l: &mut Local) {
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

/// Gives a suspended thread of this node to node `to`.
fn send(c: &mut Carrier, l: &mut Local, slot: u32, to: u32) {
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
}

#[cold]
fn donate(c: &mut Carrier, l: &mut Local, to: u32) {
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
    if is_windowed(slot) {
        return may_run(c, slot) && l.windows.is_in(slot);
    }
    may_run(c, slot) && l.is_admitted(slot, record(slot).generation.load(Ordering::Relaxed))
}

/// Whether an entry of the queue still stands: its thread is ours and may run. Whatever put it there, a thread that runs, waits,
/// has ended or belongs to another node is never entered.
#[inline(always)]
fn may_run(c: &Carrier, slot: u32) -> bool {
    let r = record(slot);
    r.state.load(Ordering::Relaxed) == state::RUNNABLE && r.node.load(Ordering::Relaxed) == c.node
}

/// Makes `slot` the running thread in all respects but the registers.
///
/// # Safety
/// The thread is runnable, ours, and its context is about to be switched to.
#[inline]
unsafe fn enter(c: &mut Carrier, slot: u32) {
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

/// Where somebody wants the thread of this node, if that is to be obeyed now.
fn wanted_elsewhere(c: &Carrier, slot: u32) -> Option<u32> {
    let to = record(slot).move_to.load(Ordering::Acquire);
    (to != NONE && to != c.node && !is_domain(c.node)).then_some(to)
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
            return reschedule(Action::Move(to));
        }
        if l.windows.next_due().is_some_and(|due| due <= monotonic_ns()) {
            // Packing takes the scheduler's stack.
            return reschedule(Action::RequeueFront);
        }
        if why & Pending::TICK != 0 && l.queued() != 0 {
            let n = node(c.node);
            n.preemptions.store(n.preemptions.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            reschedule(Action::Requeue);
        } else if l.in_flight != 0 {
            // Outcomes are taken up by the scheduler, on its own stack.
            reschedule(Action::RequeueFront);
        }
    }
}

/// Entry of the scheduler, on its own stack: at the start of a node, and after a reset.
pub extern "C" fn scheduler() -> ! {
    // SAFETY: on a node; whatever ran before has been dropped.
    unsafe {
        let c = carrier();
        c.depth.store(1, Ordering::Relaxed);
        // A reset may have come in the middle of a handler that held others off.
        peregrine_sys::signal::set_mask(0);
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

/// Fills queue and timers from the records. Only in a pause: a thread that another node already runs could arrive here
/// meanwhile and be queued twice.
fn rebuild(c: &mut Carrier, l: &mut Local) {
    l.clear();
    at(Point::RebuildBegins);
    for (i, slot) in crate::control::numbers().enumerate() {
        let r = record(slot);
        if i == 3 {
            at(Point::RebuildHalf);
        }
        if r.node.load(Ordering::Relaxed) != c.node {
            continue;
        }
        match r.state.load(Ordering::Relaxed) {
            state::RUNNABLE => l.push(slot),
            state::SLEEPING => {
                l.add_timer(r.wake_at.load(Ordering::Relaxed), slot, r.waits.load(Ordering::Relaxed));
            }
            state::PARKED if r.waiting.load(Ordering::Relaxed) == wait::CALL => {
                // Its call was another life's: it is to see that.
                r.state.store(state::RUNNABLE, Ordering::Relaxed);
                l.push(slot);
            }
            _ => {}
        }
        if is_windowed(slot) {
            l.windows.note_idle(slot);
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
    if let Some(to) = wanted_elsewhere(c, next) {
        return send(c, l, next, to);
    }
    // SAFETY: `next` is runnable and ours; its slot is mapped.
    unsafe {
        if is_windowed(next) {
            windows::bring(c, l, next);
        } else if !raise_guards(l, next) {
            peregrine_sys::process::write_all(
                2,
                b"peregrine: cannot install guard pages: too many mappings\n",
            );
            peregrine_sys::process::exit_now(70);
        }
        start_ticking(c, l);
        enter(c, next);
        arch::switch(&raw mut c.scheduler_sp, (*SlotHeader::of(next)).saved_sp);
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
    unsafe { crate::records::enter_slot(slot) };
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
    let r = record(slot);
    at(Point::SettleLeft);
    match action {
        Action::None | Action::Parked => {}
        Action::Requeue | Action::RequeueFront => {
            r.state.store(state::RUNNABLE, Ordering::Relaxed);
            at(Point::SettleRequeued);
            if action == Action::Requeue { l.push(slot) } else { l.push_front(slot) }
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
            crate::thread::bury(slot);
        }
    }
}

fn start_ticking(_: &mut Carrier, l: &mut Local) {
    if !l.ticking
        && let Some(t) = l.tick
    {
        let slice = world().slice_ns.load(Ordering::Relaxed);
        // The first slice is twice as long: a deadline beyond the kernel's own next tick need not be told to the
        // processor, and telling it takes 8 us in a virtual machine, which a thread that has just arrived would wait.
        t.arm(2 * slice, slice);
        l.ticking = true;
    }
}

fn idle(c: &mut Carrier, l: &mut Local, w: &World) {
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
    wait_for_work(c, l, w, me, seen, something);
    w.hungry.fetch_and(!(1 << c.node), Ordering::Relaxed);
}

/// When there is something to do though nothing comes from outside.
fn next_due(l: &Local) -> Option<u64> {
    match (l.next_deadline(), l.windows.next_due()) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

fn wait_for_work(
    c: &Carrier,
    l: &mut Local,
    w: &World,
    me: &NodeShared,
    seen: u32,
    something: impl Fn() -> bool,
) {
    let spin_until = monotonic_ns() + w.spin_ns.load(Ordering::Relaxed);
    loop {
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
        if now >= spin_until {
            break;
        }
    }
    if l.in_flight != 0 {
        // Each tick would end the poll.
        if l.ticking
            && let Some(t) = l.tick
        {
            l.ticking = false;
            t.arm(0, 0);
        }
        return sleep_with_calls(l, me, something);
    }
    me.idle.store(ASLEEP, Ordering::Relaxed);
    at(Point::IdleSleeps);
    // Pairs with the fence in `nudge`.
    fence(Ordering::SeqCst);
    if !something() {
        let timeout = next_due(l).map(|d| d.saturating_sub(monotonic_ns()).max(1));
        futex::wait(&me.wake, seen, timeout);
    }
    me.idle.store(0, Ordering::Relaxed);
    stop_ticking(c, l);
}

/// Stops the tick of a node that has slept until one came. Not before: whoever sleeps for less than a slice is woken
/// without having to start it again.
fn stop_ticking(c: &Carrier, l: &mut Local) {
    if c.pending.load(Ordering::Relaxed) & Pending::TICK != 0
        && l.ticking
        && let Some(t) = l.tick
    {
        // In this order: a reset in between must not leave a node that believes it ticks.
        l.ticking = false;
        t.arm(0, 0);
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
        // SAFETY: calls are under way, so it was made.
        let flights = unsafe { &*l.flights };
        let until = [next_due(l), flights.look_at()].into_iter().flatten().min().unwrap_or(now);
        // A signal that came since it is held off ends the poll at once.
        peregrine_sys::io::wait_for_any(flights.descriptors(), until.saturating_sub(now), mask & !tick);
    }
    me.idle.store(0, Ordering::Relaxed);
    peregrine_sys::signal::set_mask(mask);
}

/// Obeys a pause: saves the window, reports what was written, and waits.
///
/// # Safety
/// No thread runs on this node.
unsafe fn pause(c: &mut Carrier, l: &mut Local, w: &World, word: u32) {
    let me = node(c.node);
    at(Point::PauseSeen);
    let rolling_back = w.pause_kind.load(Ordering::Acquire) == PauseKind::Rollback as u32;
    // SAFETY: as promised.
    unsafe {
        statics::save(c, template());
        if !rolling_back {
            windows::store_all(c, l);
        }
    }
    at(Point::PauseSaved);
    let life = w.life.load(Ordering::Acquire);
    if l.life != life && !rolling_back {
        statics::forget(c);
        rebuild(c, l);
        at(Point::RebuildDone);
        l.life = life;
    }
    // Whoever holds anything of the life that ends waits for its reset (which empties `life`) before it answers.
    let answer = !rolling_back || l.life == 0;
    if answer && me.paused.load(Ordering::Relaxed) != word {
        crate::dirty::report(c.node, &mut l.scanned);
        at(Point::PauseReported);
        // Release: the supervisor, which acquires, sees statics and the report.
        me.paused.store(word, Ordering::Release);
        at(Point::PauseAnswered);
        w.acks.fetch_add(1, Ordering::Release);
        let _ = futex::wake(&w.acks, 1);
        at(Point::PauseAcked);
    }
    while w.pause.load(Ordering::Acquire) == word {
        futex::wait(&w.pause, word, None);
    }
    at(Point::PauseOver);
}

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
                return;
            }
        }
    }
    post(slot, mail::WAKE);
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
    } else {
        record(slot).node.store(on, Ordering::Release);
        at(Point::LaunchedElsewhere);
        post(slot, mail::ARRIVE);
    }
}

/// Runs `f` in a runtime section, if a Peregrine thread runs; tells its slot.
#[inline]
pub fn in_thread<R>(f: impl FnOnce(u32) -> R) -> Option<R> {
    let slot = peregrine_thread::carrier::current_slot()?;
    // SAFETY: a thread runs.
    let _section = unsafe { RuntimeSection::enter() };
    Some(f(slot))
}
