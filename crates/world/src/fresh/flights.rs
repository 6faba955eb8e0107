//! A node's side of fresh calls: its connections, the calls under way on them, and their outcomes.

use super::{DONE, FAILED, FULL, FreshCallError, MOST_ARGUMENTS, NO_ROOM, Request};
use crate::arena;
use crate::control::{NONE, node, record, state, wait};
use crate::local::{Action, Local};
use crate::sched;
use peregrine_base::sync::Ordering;
use peregrine_call::{Call, CallError, Client, Pending, PortalId};
use peregrine_sys::signal;
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::preempt::SIG_RESET;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

/// Calls of one connection under way at once; more wait their turn. Below the least that a domain allows by default.
const MOST_FLIGHTS: usize = 24;
/// How often a call without news is looked at for its deadline or its domain's death, in ns.
const LOOK_NS: u64 = 10_000_000;

type Results = [Vec<u8>; MOST_ARGUMENTS];

/// A call under way. The boxes are leaked while it is and taken back when it ends.
struct Flight {
    slot: u32,
    connection: usize,
    /// One for each argument that is a result, in their order.
    results: *mut Results,
    pending: Option<Pending<'static>>,
    look_at: u64,
}

impl Drop for Flight {
    fn drop(&mut self) {
        // The call, which borrows the result, first.
        drop(self.pending.take());
        // SAFETY: made by `Box::into_raw` for this flight alone.
        drop(unsafe { Box::from_raw(self.results) });
    }
}

struct Connection {
    path: PathBuf,
    client: Client,
    portals: Vec<(String, u64, PortalId)>,
    flights: usize,
}

/// The connections and flights of a node; in the process's heap.
#[derive(Default)]
pub struct Flights {
    /// A place stays a connection's; one that died is `None`.
    connections: Vec<Option<Connection>>,
    flights: Vec<Flight>,
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
    /// The number under way.
    pub fn len(&self) -> usize {
        self.flights.len()
    }

    /// Whether one has an outcome: a load for each.
    pub fn any_ready(&self) -> bool {
        self.flights.iter().any(|f| f.pending.as_ref().is_none_or(Pending::is_ready))
    }

    /// When the next one is to be looked at.
    pub fn look_at(&self) -> Option<u64> {
        self.flights.iter().map(|f| f.look_at).min()
    }

    /// What becomes readable with an outcome.
    pub fn descriptors(&self) -> impl Iterator<Item = i32> + '_ {
        self.flights.iter().filter_map(|f| f.pending.as_ref()).map(|p| p.as_fd().as_raw_fd())
    }

    fn connection(&mut self, path: &Path) -> Result<usize, CallError> {
        let known = self.connections.iter().position(|c| c.as_ref().is_some_and(|c| c.path == path));
        if let Some(at) = known {
            return Ok(at);
        }
        let made = Connection {
            path: path.to_owned(),
            client: Client::connect(path)?,
            portals: Vec::new(),
            flights: 0,
        };
        let free = self.connections.iter().position(Option::is_none);
        let at = free.unwrap_or(self.connections.len());
        if free.is_none() {
            self.connections.push(None);
        }
        self.connections[at] = Some(made);
        Ok(at)
    }

    /// Begins the call that `request` of the thread in `slot` asks for.
    ///
    /// # Safety
    /// The thread has just switched away for it: its memory is in place until this returns.
    unsafe fn start(&mut self, slot: u32, request: *const Request) -> Result<Option<Flight>, CallError> {
        // SAFETY: as promised.
        let (portal, request) = unsafe { (&*(*request).portal, &*request) };
        let at = self.connection(&portal.path)?;
        let connection = self.connections[at].as_mut().expect("just found");
        if connection.flights >= MOST_FLIGHTS {
            return Ok(None);
        }
        let known = connection.portals.iter().find(|p| p.0 == portal.name && p.1 == portal.version);
        let id = match known {
            Some(p) => p.2,
            None => {
                let id = connection.client.portal(&portal.name, portal.version)?;
                connection.portals.push((portal.name.clone(), portal.version, id));
                id
            }
        };
        let results = Box::into_raw(Box::<Results>::default());
        let mut flight =
            Flight { slot, connection: at, results, pending: None, look_at: monotonic_ns() + LOOK_NS };
        // SAFETY: taken back by the flight's drop, after the call that borrows it.
        let mut homes = unsafe { (*results).iter_mut() };
        let mut call = Call::new().attributes(request.attributes);
        for piece in &request.pieces[..request.count] {
            // SAFETY: the thread's memory, in place as promised. Its lifetime is that of this function: what `start_for` returns does not
            // look at it again.
            let input = piece.input.map(|(at, len)| unsafe { core::slice::from_raw_parts(at, len) });
            call = match (input, piece.most) {
                (Some(bytes), None) if piece.lent => call.lend(bytes),
                (Some(bytes), None) => call.input(bytes),
                (None, Some(most)) => call.output(homes.next().expect("one an argument"), most),
                (Some(bytes), Some(most)) => {
                    let home = homes.next().expect("one an argument");
                    home.extend_from_slice(bytes);
                    call.inout(home, most)
                }
                (None, None) => unreachable!("an argument goes in, comes out, or both"),
            };
        }
        flight.pending = Some(connection.client.start_for(request.caller, id, call)?);
        connection.flights += 1;
        Ok(Some(flight))
    }

    /// Forgets a connection whose domain died, once nobody uses it.
    fn settle_connection(&mut self, at: usize, died: bool) {
        if let Some(Some(c)) = self.connections.get_mut(at) {
            c.flights = c.flights.saturating_sub(1);
            if died {
                // Found by nobody any more: the next call connects anew.
                c.path = PathBuf::new();
            }
            if c.flights == 0 && c.path.as_os_str().is_empty() {
                self.connections[at] = None;
            }
        }
    }

    /// The descriptors of all connections, for the supervisor.
    fn publish(&self, index: u32) {
        let connections = self.connections.iter().flatten().flat_map(|c| c.client.descriptors());
        let mut all = connections.chain(self.descriptors());
        for place in &node(index).call_fds {
            let fd = all.next().map_or(0, |fd| fd as u32 + 1);
            if place.load(Ordering::Relaxed) != fd {
                place.store(fd, Ordering::Relaxed);
            }
        }
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
    let request = at as *const Request;
    let all = flights(l);
    // SAFETY: called when the thread has just switched to the scheduler.
    match unsafe { all.start(slot, request) } {
        Ok(Some(flight)) => all.flights.push(flight),
        Ok(None) => answer(l, index, slot, FULL, &[]),
        Err(e) => {
            if matches!(e, CallError::DomainDied) {
                // The connection that was at hand is dead: the next call connects anew.
                // SAFETY: as above.
                let path = unsafe { &(*(*request).portal).path };
                if let Some(at) =
                    all.connections.iter().position(|c| c.as_ref().is_some_and(|c| c.path == *path))
                {
                    all.connections[at].as_mut().expect("just found").flights += 1;
                    all.settle_connection(at, true);
                }
            }
            fail(l, index, slot, e.into());
        }
    }
    let all = flights(l);
    all.publish(index);
    l.in_flight = all.len() as u32;
    finish(l, index);
}

/// Answers all flights that have an outcome. On the scheduler's stack.
pub fn finish(l: &mut Local, index: u32) {
    if l.in_flight == 0 {
        return;
    }
    let now = monotonic_ns();
    let all = flights(l);
    if !all.any_ready() && all.look_at().is_none_or(|at| at > now) {
        return;
    }
    let _whole = NoReset::new();
    let mut i = 0;
    while let Some(flight) = flights(l).flights.get_mut(i) {
        let ready = flight.pending.as_ref().is_none_or(Pending::is_ready);
        if !ready && flight.look_at > now {
            i += 1;
            continue;
        }
        flight.look_at = now + LOOK_NS;
        let Some(outcome) = flight.pending.as_mut().and_then(Pending::try_finish) else {
            i += 1;
            continue;
        };
        let all = flights(l);
        let flight = all.flights.swap_remove(i);
        all.settle_connection(flight.connection, matches!(outcome, Err(CallError::DomainDied)));
        match outcome {
            Ok(()) => {
                // SAFETY: the call has ended: nobody else has the results.
                let results = unsafe { &*flight.results };
                let mut bytes = Vec::with_capacity(results.iter().map(|r| r.len() + 8).sum());
                for result in results {
                    bytes.extend_from_slice(&(result.len() as u64).to_ne_bytes());
                    bytes.extend_from_slice(result);
                }
                answer(l, index, flight.slot, DONE, &bytes);
            }
            Err(e) => fail(l, index, flight.slot, e.into()),
        }
    }
    let all = flights(l);
    all.publish(index);
    l.in_flight = all.len() as u32;
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
        for place in &mut all.connections {
            match place {
                Some(c) if c.path.as_os_str().is_empty() => *place = None,
                Some(c) => c.flights = 0,
                None => {}
            }
        }
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
