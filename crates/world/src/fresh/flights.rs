//! A node's side of fresh calls: the calls under way, and their outcomes.
//!
//! ```text
//! begin ──all there──────────────────────────────────▶ sent ──reply, death, deadline──▶ answer
//!   │ no connection, portal, line, pipe or room yet      ▲
//!   ├──▶ arguments copied ──▶ set up, look by look ──────┘ (the domain has 10 s, or until the deadline)
//!   └──▶ too many of this connection: waits its turn ──▶ AGAIN
//! ```
//!
//! **Nothing here waits.** A node has one thread, and a domain may be stopped, or hostile: each question to it is asked, and looked at
//! again later, in growing intervals, while the node runs what it has. A call that can be sent at once lends the thread's own memory to
//! it; what is set up outlasts the moment that this memory is in place, so it has a copy.

use super::connections::{Connections, MOST_FLIGHTS, Waiter};
use super::flight::Flight;
use super::{AGAIN, DONE, FAILED, FreshCallError, MOST_ARGUMENTS, NO_ROOM, Request, What};
use crate::arena;
use crate::control::{NONE, node, record, state, wait};
use crate::local::{Action, Local};
use crate::sched;
use peregrine_base::sync::Ordering;
use peregrine_call::{Buffer, CallError, Deadline, Pending, Refusal};
use peregrine_sys::signal;
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::preempt::SIG_RESET;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

/// How often a call's pipe may tell of an outcome that is not there. Honest domains do it once at most; one that does it more often is looked at
/// every now and then, like one that is silent.
const MOST_IN_VAIN: u8 = 8;

/// Memory that a thread lends.
struct Lent {
    number: u64,
    /// The connection that it is lent by: its place, and its serial number.
    connection: (usize, u64),
    buffer: Arc<Buffer>,
}

/// The connections and flights of a node; in the process's heap.
#[derive(Default)]
pub struct Flights {
    connections: Connections,
    flights: Vec<Flight>,
    loans: Vec<Lent>,
    /// The number of the last loan.
    lent: u64,
    /// What the supervisor was told last.
    published: Vec<i32>,
    /// Whether descriptors may have come or gone since.
    changed: bool,
}

/// Keeps a reset off while the heap of the process is worked on: it would leave that half done.
struct NoReset(u64);

impl NoReset {
    fn new() -> Self {
        Self(signal::set_mask(signal::bit(SIG_RESET)))
    }
}

impl Drop for NoReset {
    fn drop(&mut self) {
        signal::set_mask(self.0);
    }
}

impl Flights {
    /// The number under way, with those that wait their turn.
    pub fn len(&mut self) -> usize {
        self.flights.len() + self.connections.all().map(|c| c.waiters.len()).sum::<usize>()
    }

    /// Whether one has an outcome: a load for each.
    pub fn any_ready(&self) -> bool {
        self.flights.iter().any(|f| f.pending().is_some_and(Pending::is_ready))
    }

    /// When the next one is to be looked at. Those that wait their turn are looked at whenever one is that is not.
    pub fn look_at(&self) -> Option<u64> {
        self.flights.iter().map(|f| f.look_at).min()
    }

    /// What becomes readable with an outcome, of the domains that don't let it be so without one.
    pub fn tellers(&self) -> impl Iterator<Item = i32> + '_ {
        let honest = self.flights.iter().filter(|f| f.is_sent() && f.in_vain < MOST_IN_VAIN);
        honest.filter_map(Flight::pending).map(|p| p.as_fd().as_raw_fd())
    }

    /// The node was woken, and there is no outcome: a byte that was left of an earlier call, a death, or a domain that wants the node to run for
    /// nothing. Those it was are looked at now, and are not listened to any more if it was they too often.
    pub fn told_in_vain(&mut self, now: u64) {
        for flight in self.flights.iter_mut().filter(|f| f.is_sent() && f.in_vain < MOST_IN_VAIN) {
            let Some(fd) = flight.pending().map(|p| p.as_fd().as_raw_fd()) else { continue };
            if peregrine_sys::io::wait_for_any(core::iter::once(fd), 0, u64::MAX) {
                flight.in_vain += 1;
                flight.look_at = now;
            }
        }
    }

    /// What calls under way have open.
    fn descriptors(&self) -> impl Iterator<Item = i32> + '_ {
        self.flights.iter().flat_map(Flight::descriptors)
    }

    /// Begins the call that `request` of the thread in `slot` asks for.
    ///
    /// # Safety
    /// The thread has just switched away for it: its memory is in place until this returns.
    unsafe fn start(&mut self, slot: u32, request: *const Request) -> Result<(), FreshCallError> {
        // SAFETY: as promised.
        let (portal, request) = unsafe { (&*(*request).portal, &*request) };
        let mut loans = [const { None }; MOST_ARGUMENTS];
        for (index, place) in loans.iter_mut().enumerate() {
            let Some(number) = request.loan(index) else { continue };
            *place = Some(self.loan(number).ok_or(FreshCallError::LoanLost)?.clone());
        }
        let at = self.connections.to(&portal.path, self.published.len())?;
        let connection = self.connections.get(at).expect("just found");
        let deadline = Deadline::earlier(request.attributes.deadline, request.caller.link.deadline);
        if connection.flights >= MOST_FLIGHTS {
            connection.waiters.push_back(Waiter { slot, deadline });
            return Ok(());
        }
        connection.flights += 1;
        // SAFETY: as promised.
        let flight = unsafe { Flight::begin(slot, at, connection, request, loans, deadline) };
        self.flights.push(flight);
        Ok(())
    }

    fn loan(&self, number: u64) -> Option<&Arc<Buffer>> {
        self.loans.iter().find(|lent| lent.number == number).map(|lent| &lent.buffer)
    }

    /// Keeps memory that the domain of the connection at `at` now knows of; its number.
    fn keep(&mut self, at: usize, buffer: Buffer) -> u64 {
        self.lent += 1;
        let serial = self.connections.get(at).map_or(0, |connection| {
            connection.loans += 1;
            connection.serial
        });
        self.loans.push(Lent { number: self.lent, connection: (at, serial), buffer: Arc::new(buffer) });
        self.lent
    }

    /// Lets go of a loan.
    fn give_back(&mut self, number: u64) {
        if let Some(index) = self.loans.iter().position(|lent| lent.number == number) {
            let (at, serial) = self.loans.swap_remove(index).connection;
            self.connections.return_loan(at, serial);
        }
    }

    /// Takes out one flight that has an outcome. `from` is where the search goes on.
    fn next_over(&mut self, from: &mut usize, now: u64) -> Option<(Flight, Result<(), CallError>)> {
        while let Some(flight) = self.flights.get_mut(*from) {
            let is_ready = flight.pending().is_some_and(Pending::is_ready);
            if is_ready || flight.look_at <= now {
                // Whoever is not sent yet may open something.
                self.changed |= !flight.is_sent();
                if let Some(outcome) = flight.advance(&mut self.connections, now) {
                    return Some((self.flights.swap_remove(*from), outcome));
                }
            }
            *from += 1;
        }
        None
    }

    /// Takes out a thread that waits for its turn, and whose time is over.
    fn next_late(&mut self) -> Option<u32> {
        self.connections.all().find_map(|connection| {
            let is_late = |w: &Waiter| w.deadline.is_some_and(|d| d.left().is_none());
            let at = connection.waiters.iter().position(is_late)?;
            connection.waiters.remove(at).map(|w| w.slot)
        })
    }

    /// Tells the supervisor of all descriptors.
    fn publish(&mut self, index: u32) {
        if !std::mem::take(&mut self.changed) {
            return;
        }
        let all: Vec<i32> = self.connections.descriptors().chain(self.descriptors()).collect();
        let places = &node(index).call_fds;
        for (i, place) in places.iter().enumerate().take(all.len().max(self.published.len())) {
            let fd = all.get(i).map_or(0, |&fd| fd as u32 + 1);
            if place.load(Ordering::Relaxed) != fd {
                place.store(fd, Ordering::Relaxed);
            }
        }
        self.published = all;
    }
}

/// This node's flights, made when they are first needed.
fn flights(l: &mut Local) -> &mut Flights {
    if l.flights.is_null() {
        l.flights = Box::into_raw(Box::default());
    }
    // SAFETY: made here for the life of the process; only the scheduler's stack gets here, one at a time.
    unsafe { &mut *l.flights }
}

/// The memory that is loan `number` of this node. For the running thread, in a section: it is changed on the scheduler's stack only.
pub fn lent(l: &Local, number: u64) -> Option<&Buffer> {
    // SAFETY: null, or made for the life of the process.
    unsafe { l.flights.as_ref() }?.loan(number).map(|buffer| &**buffer)
}

/// Begins the call of the thread in `slot`, which is parked for it. On the scheduler's stack.
pub fn begin(l: &mut Local, index: u32, slot: u32, at: usize) {
    let _whole = NoReset::new();
    // SAFETY: called when the thread has just switched to the scheduler: its memory is in place.
    if let What::Return(number) = unsafe { (*(at as *const Request)).what } {
        flights(l).give_back(number);
        return answer(l, index, slot, DONE, &done(&[], &[]));
    }
    // SAFETY: called when the thread has just switched to the scheduler.
    if let Err(e) = unsafe { flights(l).start(slot, at as *const Request) } {
        fail(l, index, slot, e);
    }
    l.in_flight = flights(l).len() as u32;
    finish(l, index);
}

/// Answers all flights that have an outcome. On the scheduler's stack.
pub fn finish(l: &mut Local, index: u32) {
    if l.in_flight == 0 {
        return;
    }
    let now = monotonic_ns();
    let all = flights(l);
    if !all.any_ready() && all.look_at().is_some_and(|at| at > now) {
        return;
    }
    let _whole = NoReset::new();
    let (mut from, mut turns) = (0, Vec::new());
    while let Some((mut flight, outcome)) = flights(l).next_over(&mut from, now) {
        let all = flights(l);
        if let Some(buffer) = flight.take_lent() {
            let number = all.keep(flight.connection, buffer);
            all.connections.leave(flight.connection, false, |slot| turns.push(slot));
            answer(l, index, flight.slot, DONE, &done(&[], &[number.to_ne_bytes().to_vec()]));
            continue;
        }
        let failed =
            matches!(&outcome, Err(e) if !matches!(e, CallError::Callee(_) | CallError::Panicked(_)));
        all.changed |= failed;
        all.connections.leave(flight.connection, failed, |slot| turns.push(slot));
        let charges = flight.pending().map_or(&[][..], Pending::charges);
        match outcome {
            Ok(()) => {
                answer(l, index, flight.slot, DONE, &done(charges, flight.results()));
            }
            // The memory is of a connection to the domain that was there before.
            Err(CallError::Refused(Refusal::NoBuffer(_))) if flight.has_loans() => {
                fail(l, index, flight.slot, FreshCallError::LoanLost);
            }
            Err(e) => fail(l, index, flight.slot, e.into()),
        }
    }
    while let Some(slot) = flights(l).next_late() {
        fail(l, index, slot, FreshCallError::Deadline);
    }
    for slot in turns {
        answer(l, index, slot, AGAIN, &[]);
    }
    let all = flights(l);
    all.publish(index);
    l.in_flight = all.len() as u32;
}

/// What the call cost, by domain, and its results: each behind its length.
fn done(charges: &[(u64, u64)], results: &[Vec<u8>]) -> Vec<u8> {
    let of_results = results.iter().map(|r| r.len() + 8).sum::<usize>();
    let mut bytes = Vec::with_capacity(8 + charges.len() * 16 + of_results);
    bytes.extend_from_slice(&(charges.len() as u64).to_ne_bytes());
    for (domain, ns) in charges {
        bytes.extend_from_slice(&domain.to_ne_bytes());
        bytes.extend_from_slice(&ns.to_ne_bytes());
    }
    for result in results {
        bytes.extend_from_slice(&(result.len() as u64).to_ne_bytes());
        bytes.extend_from_slice(result);
    }
    bytes
}

fn fail(l: &mut Local, index: u32, slot: u32, error: FreshCallError) {
    let bytes = postcard::to_allocvec(&error).unwrap_or_default();
    answer(l, index, slot, FAILED, &bytes);
}

/// Gives the thread its outcome and lets it run.
fn answer(l: &mut Local, index: u32, slot: u32, kind: u8, bytes: &[u8]) {
    let mut all = Vec::with_capacity(bytes.len() + 1);
    all.push(kind);
    all.extend_from_slice(bytes);
    let reply = arena::write(&all, &[]).unwrap_or(NO_ROOM);
    // Release: pairs with the acquire in `ask`.
    record(slot).reply.store(reply, Ordering::Release);
    let r = record(slot);
    if r.node.load(Ordering::Acquire) == index && r.state.load(Ordering::Relaxed) == state::PARKED {
        r.state.store(state::RUNNABLE, Ordering::Relaxed);
        l.push(slot);
    } else {
        // It was moved while it waited.
        sched::post(slot, crate::control::mail::WAKE);
    }
}

/// Gives every flight up: the threads that began them go back to an image. On the scheduler's stack.
pub fn drop_all(l: &mut Local) {
    if !l.flights.is_null() {
        let _whole = NoReset::new();
        let all = flights(l);
        all.flights.clear();
        all.loans.clear();
        all.connections.abandon();
        all.changed = true;
    }
    l.in_flight = 0;
}

/// Tells the supervisor of all descriptors, before it looks at the table. On the scheduler's stack.
pub fn tell_all(l: &mut Local, index: u32) {
    if l.flights.is_null() {
        return;
    }
    let _whole = NoReset::new();
    let all = flights(l);
    // What answers bring comes without anything having begun or ended.
    all.changed = true;
    all.publish(index);
}

/// Parks a thread for its call; see [`sched::call`].
pub fn parked(slot: u32, at: usize) -> Action {
    let r = record(slot);
    r.waiting.store(wait::CALL, Ordering::Relaxed);
    r.waiting_on.store(NONE, Ordering::Relaxed);
    r.state.store(state::PARKED, Ordering::Relaxed);
    Action::Call(at)
}
