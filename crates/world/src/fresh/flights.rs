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

use super::connections::{Connection, Connections, MOST_FLIGHTS, PATIENCE, Waiter};
use super::{AGAIN, DONE, FAILED, FreshCallError, MOST_ARGUMENTS, NO_ROOM, Piece, Portal, Request};
use crate::arena;
use crate::control::{NONE, node, record, state, wait};
use crate::local::{Action, Local};
use crate::sched;
use peregrine_base::sync::Ordering;
use peregrine_call::chain::Caller;
use peregrine_call::{Call, CallError, Deadline, Finding, Gift, Pending};
use peregrine_sys::signal;
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::preempt::SIG_RESET;
use std::os::fd::{AsFd, AsRawFd};

/// How often a call without news is looked at for its deadline or its domain's death, in ns.
const LOOK_NS: u64 = 10_000_000;
/// How soon a call that is being set up is looked at again, at first.
const SOON_NS: u64 = 50_000;

/// What a call borrows beyond the memory of its thread. The box is leaked while the call is under way and taken back when it ends.
#[derive(Default)]
struct Home {
    /// Copies of what goes in, if the call could not be sent at once.
    inputs: [Vec<u8>; MOST_ARGUMENTS],
    /// One for each argument that is a result, in their order.
    results: [Vec<u8>; MOST_ARGUMENTS],
}

/// A call under way.
struct Flight {
    slot: u32,
    connection: usize,
    home: *mut Home,
    stage: Stage,
    deadline: Option<Deadline>,
    begun: u64,
    look_at: u64,
}

enum Stage {
    /// There is no connection yet, or nobody knows the portal's number.
    Finding {
        name: String,
        version: u64,
        finding: Option<Finding>,
        caller: Caller,
        call: Call<'static>,
    },
    Under(Pending<'static>),
    /// It could not even be begun.
    Failed(CallError),
    Over,
}

impl Drop for Flight {
    fn drop(&mut self) {
        // The call, which borrows the rest, first.
        self.stage = Stage::Over;
        // SAFETY: made by `Box::into_raw` for this flight alone.
        drop(unsafe { Box::from_raw(self.home) });
    }
}

impl Flight {
    /// The call, if it has been sent or is about to be.
    const fn pending(&self) -> Option<&Pending<'static>> {
        match &self.stage {
            Stage::Under(pending) => Some(pending),
            _ => None,
        }
    }

    fn is_sent(&self) -> bool {
        self.pending().is_some_and(Pending::is_sent)
    }

    /// Goes on with it; the outcome, if there is one. Never waits.
    fn advance(&mut self, connections: &mut Connections, now: u64) -> Option<Result<(), CallError>> {
        let outcome = self.step(connections).transpose();
        let since = now.saturating_sub(self.begun);
        if outcome.is_some() || self.is_sent() {
            self.look_at = now + LOOK_NS;
            return outcome;
        }
        if self.deadline.is_some_and(|d| d.left().is_none()) {
            return Some(Err(CallError::Deadline));
        }
        // A call that waits for another's line is waiting for no answer of the domain's.
        if self.pending().is_none_or(Pending::awaits_answer) {
            if since > PATIENCE.as_nanos() as u64 {
                let at = connections.get(self.connection).map(|c| c.path().to_owned()).unwrap_or_default();
                let reason = format!("it has not answered for {PATIENCE:?}; the call was not sent");
                return Some(Err(CallError::Unreachable { at, reason }));
            }
        } else {
            self.begun = now;
        }
        self.look_at = now + (since / 4).clamp(SOON_NS, LOOK_NS);
        None
    }

    fn step(&mut self, connections: &mut Connections) -> Result<Option<()>, CallError> {
        if let Stage::Finding { name, version, finding, .. } = &mut self.stage {
            let Some(connection) = connections.get(self.connection) else {
                return Err(CallError::DomainDied);
            };
            if let Some(found) = finding.as_mut().and_then(Finding::try_finish) {
                connection.learn(name, *version, found?);
                *finding = None;
            }
            let portal = connection.portal(name, *version);
            let Some(client) = connection.client()? else { return Ok(None) };
            let Some(portal) = portal else {
                if finding.is_none() {
                    // It is asked for at the next look.
                    *finding = Some(client.look_for(name, *version)?);
                }
                return match finding.as_mut().and_then(Finding::try_finish) {
                    Some(Err(e)) => Err(e),
                    Some(Ok(id)) => {
                        connection.learn(name, *version, id);
                        *finding = None;
                        Ok(None)
                    }
                    None => Ok(None),
                };
            };
            let client = client.clone();
            if let Stage::Finding { caller, call, .. } = std::mem::replace(&mut self.stage, Stage::Over) {
                self.stage = Stage::Under(client.start_for(caller, portal, call)?);
            }
        }
        match &mut self.stage {
            Stage::Under(pending) => pending.try_finish().transpose(),
            Stage::Failed(e) => Err(e.clone()),
            Stage::Finding { .. } | Stage::Over => Ok(None),
        }
    }

    /// Sends the call that `request` asks for, if nothing is missing; otherwise copies what it needs.
    ///
    /// # Safety
    /// The memory that `request` names is in place.
    unsafe fn prepare(
        &mut self,
        connection: &mut Connection,
        request: &Request,
        portal: &Portal,
    ) -> Result<(), CallError> {
        let known = connection.portal(&portal.name, portal.version);
        if let (Some(client), Some(id)) = (connection.client()?, known)
            && !request.gives()
        {
            // SAFETY: as promised. What is sent does not look at the arguments again.
            let call = unsafe { self.call(request, false) }?;
            if let Ok(pending) = client.start_at_once(request.caller, id, call)? {
                self.stage = Stage::Under(pending);
                self.look_at = self.begun + LOOK_NS;
                return Ok(());
            }
        }
        // SAFETY: as promised, for the moment in which it is copied.
        let call = unsafe { self.call(request, true) }?;
        let (name, version) = (portal.name.clone(), portal.version);
        self.stage = Stage::Finding { name, version, finding: None, caller: request.caller, call };
        Ok(())
    }

    /// The call that `request` asks for, of the thread's memory or of copies of it.
    ///
    /// # Safety
    /// That memory is in place; and without `copied` the call is not looked at when it is not any more. The last one that this returned is
    /// gone.
    unsafe fn call(&mut self, request: &Request, copied: bool) -> Result<Call<'static>, CallError> {
        // SAFETY: taken back by the flight's drop, after the call that borrows it.
        let Home { inputs, results } = unsafe { &mut *self.home };
        let (mut inputs, mut results) = (inputs.iter_mut(), results.iter_mut());
        let mut call = Call::new().attributes(request.attributes);
        for piece in &request.pieces[..request.count] {
            let mut result = || {
                let result = results.next().expect("one an argument");
                result.clear();
                result
            };
            // SAFETY: the thread's memory, in place as promised.
            let bytes = |(at, len): (*const u8, usize)| unsafe { core::slice::from_raw_parts(at, len) };
            let mut input = |piece| -> &'static [u8] {
                if !copied {
                    return bytes(piece);
                }
                let copy = inputs.next().expect("one an argument");
                copy.clear();
                copy.extend_from_slice(bytes(piece));
                copy
            };
            call = match *piece {
                Piece::Input(at) => call.input(input(at)),
                Piece::Lent(at) => call.lend(input(at)),
                Piece::Output(most) => call.output(result(), most),
                Piece::InOut(at, most) => {
                    let home = result();
                    home.extend_from_slice(bytes(at));
                    call.inout(home, most)
                }
                Piece::Given(at) => {
                    let mut gift = Gift::new(at.1)?;
                    gift.copy_from_slice(bytes(at));
                    call.give(gift)
                }
            };
        }
        Ok(call)
    }
}

/// The connections and flights of a node; in the process's heap.
#[derive(Default)]
pub struct Flights {
    connections: Connections,
    flights: Vec<Flight>,
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

    /// What becomes readable with an outcome.
    pub fn descriptors(&self) -> impl Iterator<Item = i32> + '_ {
        let sent = self.flights.iter().filter(|f| f.is_sent()).filter_map(Flight::pending);
        sent.map(|p| p.as_fd().as_raw_fd())
    }

    /// Begins the call that `request` of the thread in `slot` asks for.
    ///
    /// # Safety
    /// The thread has just switched away for it: its memory is in place until this returns.
    unsafe fn start(&mut self, slot: u32, request: *const Request) -> Result<(), FreshCallError> {
        // SAFETY: as promised.
        let (portal, request) = unsafe { (&*(*request).portal, &*request) };
        let at = self.connections.to(&portal.path, self.published.len())?;
        let connection = self.connections.get(at).expect("just found");
        let deadline = Deadline::earlier(request.attributes.deadline, request.caller.link.deadline);
        if connection.flights >= MOST_FLIGHTS {
            connection.waiters.push_back(Waiter { slot, deadline });
            return Ok(());
        }
        connection.flights += 1;
        let home = Box::into_raw(Box::<Home>::default());
        let (begun, stage) = (monotonic_ns(), Stage::Over);
        // Looked at once more at once, unless it was sent.
        let mut flight = Flight { slot, connection: at, home, stage, deadline, begun, look_at: 0 };
        // SAFETY: as promised.
        if let Err(e) = unsafe { flight.prepare(connection, request, portal) } {
            flight.stage = Stage::Failed(e);
        }
        self.flights.push(flight);
        Ok(())
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

/// Begins the call of the thread in `slot`, which is parked for it. On the scheduler's stack.
pub fn begin(l: &mut Local, index: u32, slot: u32, at: usize) {
    let _whole = NoReset::new();
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
    while let Some((flight, outcome)) = flights(l).next_over(&mut from, now) {
        let all = flights(l);
        let failed =
            matches!(&outcome, Err(e) if !matches!(e, CallError::Callee(_) | CallError::Panicked(_)));
        all.changed |= failed;
        all.connections.leave(flight.connection, failed, |slot| turns.push(slot));
        let charges = flight.pending().map_or(&[][..], Pending::charges);
        match outcome {
            Ok(()) => {
                // SAFETY: the call has ended: nobody else has the results.
                let results = unsafe { &(*flight.home).results };
                answer(l, index, flight.slot, DONE, &done(charges, results));
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
        all.connections.abandon();
        all.changed = true;
    }
    l.in_flight = 0;
}

/// Parks a thread for its call; see [`sched::call`].
pub fn parked(slot: u32, at: usize) -> Action {
    let r = record(slot);
    r.waiting.store(wait::CALL, Ordering::Relaxed);
    r.waiting_on.store(NONE, Ordering::Relaxed);
    r.state.store(state::PARKED, Ordering::Relaxed);
    Action::Call(at)
}
