//! Fresh calls of Peregrine threads: the thread parks, its node runs others, and nothing of the call can be rolled back into.
//!
//! ```text
//!   thread                                node (process heap, scheduler's stack)              domain (any process)
//!   Request on its stack ──switch──▶ begin: connection and portal, start the call ──line──▶ activation
//!   PARKED, waits for CALL            others run; idle: poll the pipes of the flights          │
//!   ◀── record.reply, a blob ──────── finish: outcome written to the arena  ◀─────────────────┘
//! ```
//!
//! **Whose the connection is.** A connection is mappings and descriptors of one process, and a thread belongs to none: so connections are
//! the node's. All that `peregrine-call` allocates is allocated on the scheduler's stack, where allocation goes to the process's heap. The
//! thread's memory is read once, when it has just switched away and is still in place; its outcome comes like a message, through the
//! arena. So it may be moved while it waits, and others may run in its window.
//!
//! **Rollback.** A caller notes the life that it calls in. If the World is rolled back while the call is under way, every flight is
//! dropped, and a caller that an image held in mid-call is told [`FreshCallError::RolledBack`]: the domain, which is no part of the
//! World, may have executed the call. **Death of a node** closes its side by the domain's own watch on the process; the
//! descriptors, which its siblings share, are closed by the supervisor (`NodeShared::call_fds`).
//!
//! **When it is worth it.** A call that returns while nobody else wants the node costs no more than a switch to the scheduler and back;
//! the node spins as it does for work, then sleeps in `poll`. If others are runnable they run at once.

use crate::arena;
use crate::control::{NONE, node, record, state, wait, world};
use crate::local::{Action, Local};
use crate::sched;
use peregrine_base::sync::Ordering;
use peregrine_call::chain::Caller;
use peregrine_call::{Call, CallError, Client, Deadline, Pending, PortalId};
use peregrine_sys::signal;
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::preempt::SIG_RESET;
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Calls of one connection under way at once; more wait their turn. Below the least that a domain allows by default.
const MOST_FLIGHTS: usize = 24;
/// How often a call without news is looked at for its deadline or its domain's death, in ns.
const LOOK_NS: u64 = 10_000_000;

/// Why a fresh call of a Peregrine thread did not return its result.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FreshCallError {
    /// The call came from outside.
    #[error("not in a Peregrine thread: use peregrine_call::Client there")]
    NoThread,
    /// The caller was rolled back, or resumed from disk, while its call was under way.
    #[error(
        "the caller went back to an image while its call was under way; the call may or may not have been executed"
    )]
    RolledBack,
    /// Nobody serves the path. Nothing was executed.
    #[error("{0}")]
    Unreachable(String),
    /// The domain said no. Nothing was executed.
    #[error("{0}")]
    Refused(String),
    /// The portal speaks another version. Nothing was executed.
    #[error(
        "portal {portal}: this client speaks version {ours:#x}, the domain {theirs:#x}; build both from one interface"
    )]
    Version {
        /// The portal.
        portal: String,
        /// Asked for.
        ours: u64,
        /// Exported.
        theirs: u64,
    },
    /// The domain's process ended before the reply; the call may have been executed.
    #[error("the domain died before it replied; the call may or may not have been executed")]
    DomainDied,
    /// The domain gave the call up.
    #[error("the call was terminated by its domain")]
    Terminated,
    /// The deadline passed first.
    #[error("the deadline passed before the reply; the callee may still run")]
    Deadline,
    /// The callee's own error.
    #[error("the callee failed with code {code}, {} bytes of detail", .detail.len())]
    Callee {
        /// What kind.
        code: u32,
        /// The rest of it.
        detail: Vec<u8>,
    },
    /// The handler panicked. Its domain lives.
    #[error("the handler panicked: {0}")]
    Panicked(String),
    /// Anything else that `peregrine-call` reports.
    #[error("{0}")]
    Other(String),
}

impl From<CallError> for FreshCallError {
    fn from(e: CallError) -> Self {
        match e {
            CallError::Unreachable { .. } => Self::Unreachable(e.to_string()),
            CallError::Refused(_) => Self::Refused(e.to_string()),
            CallError::Version { portal, ours, theirs } => Self::Version { portal, ours, theirs },
            CallError::DomainDied => Self::DomainDied,
            CallError::Terminated => Self::Terminated,
            CallError::Deadline => Self::Deadline,
            CallError::Callee(f) => Self::Callee { code: f.code, detail: f.detail },
            CallError::Panicked(text) => Self::Panicked(text),
            other => Self::Other(other.to_string()),
        }
    }
}

/// A portal of a domain at a socket's path, as a Peregrine thread calls it: a name, and so valid on every node and in every image.
///
/// # Examples
/// ```no_run
/// let upper = peregrine_world::Portal::new("/run/text.sock", "text.upper", 1);
/// assert_eq!(upper.call(b"peregrine", 64).unwrap(), b"PEREGRINE");
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Portal {
    path: PathBuf,
    name: String,
    version: u64,
    within: Option<Duration>,
}

/// First byte of an outcome: the result follows.
const DONE: u8 = 1;
/// An error follows.
const FAILED: u8 = 2;
/// All calls that the connection may have under way are.
const FULL: u8 = 3;
/// In place of a blob's address: there was no World memory for it.
const NO_ROOM: usize = 1;

/// What a thread asks of its node: on the thread's stack, and read there before anybody else runs.
struct Request {
    portal: *const Portal,
    input: (*const u8, usize),
    /// Most bytes of the result.
    most: usize,
}

/// What tells this life of this World from every other.
fn life() -> u64 {
    let w = world();
    u64::from(w.supervisor.load(Ordering::Relaxed)) << 32 | u64::from(w.life.load(Ordering::Acquire))
}

impl Portal {
    /// The portal `name`, of this version, of the domain that serves the socket at `path`. Nothing is connected yet.
    pub fn new(path: impl AsRef<Path>, name: &str, version: u64) -> Self {
        Self { path: path.as_ref().to_owned(), name: name.to_owned(), version, within: None }
    }

    /// The same, with each call to be done within `time`.
    #[must_use]
    pub const fn within(mut self, time: Duration) -> Self {
        self.within = Some(time);
        self
    }

    /// Calls with one argument, and returns one result of at most `most_bytes` bytes. The thread waits; its node runs others meanwhile.
    ///
    /// # Errors
    /// [`FreshCallError`], which says for each kind whether the call may have been executed.
    pub fn call(&self, input: &[u8], most_bytes: usize) -> Result<Vec<u8>, FreshCallError> {
        let request = Request { portal: self, input: (input.as_ptr(), input.len()), most: most_bytes };
        loop {
            let outcome = sched::in_thread(|slot| {
                // SAFETY: in a section of the running thread, which stays here until it is answered.
                unsafe { ask(slot, &request) }
            })
            .ok_or(FreshCallError::NoThread)?;
            let mut bytes = outcome?;
            match bytes.first() {
                Some(&DONE) => {
                    bytes.remove(0);
                    return Ok(bytes);
                }
                Some(&FULL) => crate::yield_now(),
                Some(&FAILED) => {
                    return Err(postcard::from_bytes(&bytes[1..])
                        .unwrap_or_else(|e| FreshCallError::Other(format!("an unreadable error: {e}"))));
                }
                _ => return Err(FreshCallError::Other("an outcome of no kind".to_owned())),
            }
        }
    }
}

/// Has the node make the call, and waits for the outcome.
///
/// # Safety
/// In a runtime section of the running thread, whose number is `slot`.
unsafe fn ask(slot: u32, request: &Request) -> Result<Vec<u8>, FreshCallError> {
    let begun = life();
    let r = record(slot);
    r.reply.store(0, Ordering::Relaxed);
    // SAFETY: as promised.
    unsafe {
        sched::call(core::ptr::from_ref(request) as usize);
        loop {
            // Acquire: pairs with the release in `answer`, which may have been on another node.
            match r.reply.swap(0, Ordering::Acquire) {
                // A wake-up meant for an earlier wait may come between.
                0 if life() == begun => sched::park(0, wait::CALL, NONE),
                0 => return Err(FreshCallError::RolledBack),
                NO_ROOM => {
                    let why = "the call was executed, and there is no World memory for its result: see Config::memory_bytes";
                    return Err(FreshCallError::Other(why.to_owned()));
                }
                blob => return Ok(arena::take(blob).0),
            };
        }
    }
}

/// A call under way. The boxes are leaked while it is and taken back when it ends.
struct Flight {
    slot: u32,
    connection: usize,
    result: *mut Vec<u8>,
    pending: Option<Pending<'static>>,
    look_at: u64,
}

impl Drop for Flight {
    fn drop(&mut self) {
        // The call, which borrows the result, first.
        drop(self.pending.take());
        // SAFETY: made by `Box::into_raw` for this flight alone.
        drop(unsafe { Box::from_raw(self.result) });
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
        // SAFETY: as promised. The input's lifetime is that of this call: what `start_for` returns does not look at it again.
        let (portal, input, most) = unsafe {
            let r = &*request;
            (&*r.portal, core::slice::from_raw_parts(r.input.0, r.input.1), r.most)
        };
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
        let result = Box::into_raw(Box::<Vec<u8>>::default());
        let mut flight =
            Flight { slot, connection: at, result, pending: None, look_at: monotonic_ns() + LOOK_NS };
        // SAFETY: taken back by the flight's drop, after the call that borrows it.
        let mut call = Call::new().input(input).output(unsafe { &mut *result }, most);
        if let Some(time) = portal.within {
            call = call.deadline(Deadline::after(time));
        }
        flight.pending = Some(connection.client.start_for(Caller::fresh(), id, call)?);
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
                // SAFETY: the call has ended: nobody else has the result.
                let bytes = unsafe { core::mem::take(&mut *flight.result) };
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
