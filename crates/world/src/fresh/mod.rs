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
//! **Every call is a switch**, however short: the call is made on the scheduler's stack, and nobody guesses how long it will take. Threads that can
//! run do so at once, before the caller even if its reply is there by then, for it takes its place behind them. If there is none the node spins as it
//! does for work, then sleeps in `poll`. So a call costs at least a switch to the scheduler and back, a byte through a pipe, and the record of the
//! flight; one that is too short for that is for a thread of the process's own, which blocks (`peregrine_call::Client::call`).
//!
//! **A domain that does not answer** keeps its callers waiting, each at most until its deadline, or for ten seconds if its call could not
//! even be sent, and nobody else: see `flights.rs`.

mod connections;
mod error;
mod flight;
mod flights;
mod loan;

pub use error::FreshCallError;
pub use flights::{Flights, begin, drop_all, finish, parked, tell_all};
pub use loan::Loan;

use crate::arena;
use crate::control::{NONE, record, wait, world};
use crate::sched;
use peregrine_base::sync::Ordering;
use peregrine_call::chain::Caller;
use peregrine_call::interface::Carrier;
use peregrine_call::{Argument, Attributes, Call, Deadline, Failure};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A portal of a domain at a socket's path, as a Peregrine thread calls it: a name, and so valid on every node and in every image.
///
/// # Examples
/// ```no_run
/// let upper = peregrine_world::Portal::new("/run/text.sock", "text.upper", 1);
/// assert_eq!(upper.call(b"peregrine", 64).unwrap(), b"PEREGRINE");
/// ```
/// The client that `#[peregrine_call::interface]` makes of a trait calls through it as well:
/// ```no_run
/// #[peregrine_call::interface]
/// trait Text {
///     fn upper(&self, text: &str) -> String;
/// }
/// let text = TextClient::by(|name, version| peregrine_world::Portal::new("/run/text.sock", name, version));
/// assert_eq!(text.upper("peregrine").unwrap(), "PEREGRINE");
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
/// As many calls of the connection were under way as may be, and now it is this thread's turn.
const AGAIN: u8 = 3;
/// In place of a blob's address: there was no World memory for it.
const NO_ROOM: usize = 1;

/// Where bytes of a thread lie, on its stack or heap, and how many.
type Bytes = (*const u8, usize);

/// One argument.
#[derive(Clone, Copy)]
enum Piece {
    Input(Bytes),
    Lent(Bytes),
    Given(Bytes),
    /// The most bytes of the result.
    Output(usize),
    InOut(Bytes, usize),
    /// A loan's number, and the part of it that is lent.
    Loan(u64, usize, usize),
}

/// What is wanted of the node.
#[derive(Clone, Copy)]
enum What {
    Call,
    /// Memory to lend, so many bytes.
    Lend(usize),
    /// The loan of this number is not needed any more.
    Return(u64),
}

/// What a thread asks of its node: on the thread's stack, and read there before anybody else runs.
struct Request {
    what: What,
    portal: *const Portal,
    caller: Caller,
    attributes: Attributes,
    pieces: [Piece; MOST_ARGUMENTS],
    count: usize,
}

impl Request {
    /// One that is not a call.
    fn of(portal: &Portal, what: What) -> Self {
        let (attributes, pieces) = (Attributes::default(), [Piece::Output(0); MOST_ARGUMENTS]);
        Self { what, portal, caller: Caller::fresh(), attributes, pieces, count: 0 }
    }

    /// The loan that is argument `index`, if it is one.
    fn loan(&self, index: usize) -> Option<u64> {
        match self.pieces[..self.count].get(index) {
            Some(Piece::Loan(number, ..)) => Some(*number),
            _ => None,
        }
    }

    fn gives(&self) -> bool {
        self.pieces[..self.count].iter().any(|piece| matches!(piece, Piece::Given(_)))
    }
}

/// Arguments of a call: as many as `peregrine-call` has.
const MOST_ARGUMENTS: usize = 8;

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
        let mut result = Vec::new();
        self.invoke(Call::new().input(input).output(&mut result, most_bytes))?;
        Ok(result)
    }

    /// Makes `call`, of any arguments but a [`Buffer`](peregrine_call::Buffer) and a [`Gift`](peregrine_call::Gift) made by hand: those are
    /// memory of one process, which the thread may leave. It lends a [`Loan`] in place, and bytes of its own copied once, to where the
    /// callee reads them; it gives bytes copied once, into memory that becomes the domain's. The thread waits; its node runs others meanwhile.
    ///
    /// The thread's identity as a chain and the call's attributes go along; what a [charged](Attributes::charge) call cost is the thread's
    /// ([`charges`](peregrine_call::usage::charges)), unless it failed.
    ///
    /// # Errors
    /// As [`call`](Self::call). No result has changed then.
    pub fn invoke(&self, mut call: Call<'_>) -> Result<(), FreshCallError> {
        let mut attributes = call.get_attributes();
        attributes.deadline = Deadline::earlier(attributes.deadline, self.within.map(Deadline::after));
        let (mut pieces, count) = ([Piece::Output(0); MOST_ARGUMENTS], call.len());
        let mut home = None;
        for (index, piece) in pieces[..count].iter_mut().enumerate() {
            let at = |bytes: &[u8]| (bytes.as_ptr(), bytes.len());
            *piece = match call.argument(index) {
                Argument::Input(bytes) => Piece::Input(at(bytes)),
                Argument::Lent(bytes) => Piece::Lent(at(bytes)),
                Argument::Given(bytes) => Piece::Given(at(bytes)),
                Argument::Output(_, most) => Piece::Output(most),
                Argument::InOut(bytes, most) => Piece::InOut(at(bytes), most),
                Argument::Elsewhere(of, offset, len) => {
                    let loan =
                        of.downcast_ref::<Loan>().ok_or_else(|| another("another runtime's memory"))?;
                    if loan.path() != self.path {
                        return Err(another("a loan to another domain"));
                    }
                    let one = loan.home();
                    match home.replace(one) {
                        Some(other) if other.life != one.life => return Err(FreshCallError::LoanLost),
                        Some(other) if other.node != one.node => {
                            return Err(another("a call with loans of several threads"));
                        }
                        _ => {}
                    }
                    Piece::Loan(loan.number(), offset, len)
                }
                _ => return Err(another("a Buffer or a Gift, which is one process's memory,")),
            };
        }
        // The identity is a thread-local, so the thread's own, wherever it runs.
        let request =
            Request { what: What::Call, portal: self, caller: Caller::current(), attributes, pieces, count };
        let (outcome, _) = loan::ask_at(home, &request)?;
        // Our own node wrote it: what it cost, and each result behind its length, in the order of the arguments.
        let mut rest = &outcome[1..];
        let mut number = || {
            let (number, after) = rest.split_first_chunk().expect("the node wrote a number");
            rest = after;
            u64::from_ne_bytes(*number)
        };
        let rows: Vec<(u64, u64)> = (0..number()).map(|_| (number(), number())).collect();
        peregrine_call::usage::settle(&rows);
        for index in 0..count {
            if let Argument::Output(into, _) | Argument::InOut(into, _) = call.argument(index) {
                let (len, from) = rest.split_first_chunk().expect("the node wrote a length");
                let (result, after) = from.split_at(u64::from_ne_bytes(*len) as usize);
                into.clear();
                into.extend_from_slice(result);
                rest = after;
            }
        }
        Ok(())
    }
}

/// What can't go through a portal.
fn another(what: &str) -> FreshCallError {
    FreshCallError::Other(format!(
        "{what} can't go through this Portal: lend or give a slice, or make a Loan"
    ))
}

impl Carrier for Portal {
    type Error = FreshCallError;

    fn carry(&self, call: Call<'_>) -> Result<(), FreshCallError> {
        self.invoke(call)
    }

    fn own(error: FreshCallError) -> Result<Failure, FreshCallError> {
        error.own()
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
