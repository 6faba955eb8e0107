//! A client's connection to one domain.

mod asking;
mod connection;
mod hot;
mod line;
mod lines;
mod opening;
mod pending;
mod questions;
mod results;
mod setup;
mod stopped;
mod transfer;
mod wait;
mod warm;
mod watch;

pub use asking::{Finding, Offering};
pub use opening::Opening;
pub use pending::Pending;

use crate::args::Call;
use crate::chain::Caller;
use crate::credentials::Credentials;
use crate::error::CallError;
use crate::memory::Buffer;
use crate::portal::PortalId;
use crate::strays::Strays;
use crate::usage::{DomainId, Usage};
use connection::Connection;
use peregrine_sys::elsewhere::Table;
use questions::PATIENCE;
use std::fmt;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// A connection to a domain. Clones share it; threads call through it at the same time, each on a line of its own.
///
/// A connection does not survive its domain: after [`CallError::DomainDied`] connect again, and look up portals again.
#[derive(Clone)]
pub struct Client(Arc<Connection>);

impl Client {
    /// Connects to the domain that serves the socket at `path`. Waits for its greeting for ten seconds at most.
    ///
    /// # Errors
    /// [`CallError::Unreachable`]: nobody serves it, or it did not answer in time. [`CallError::Refused`]: not for this user, or full, or
    /// another protocol.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, CallError> {
        Self::connect_within(path, PATIENCE)
    }

    /// As [`connect`](Self::connect), with another time to wait for the greeting.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn connect_within(path: impl AsRef<Path>, time: Duration) -> Result<Self, CallError> {
        Opening::to(path.as_ref(), time, Strays::Thread)?.wait()
    }

    /// Begins to connect, and waits for nothing: for runtimes whose threads must not. `time` is how long to wait for the greeting.
    ///
    /// The connection starts no thread in this process, neither now nor later.
    ///
    /// # Errors
    /// [`CallError::Unreachable`]: the path is too long, or there are no descriptors left.
    pub fn open(path: impl AsRef<Path>, time: Duration) -> Result<Opening, CallError> {
        Opening::to(path.as_ref(), time, Strays::Process(Table::EndsSometime))
    }

    /// Takes a connected socket: one end of a [`socket_pair`](crate::socket_pair), or an inherited descriptor. Waits for the greeting for a
    /// minute at most: who is at the other end may have to be started first.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn over(socket: OwnedFd) -> Result<Self, CallError> {
        Opening::over(socket, Path::new("descriptor"), 6 * PATIENCE, Strays::Thread).wait()
    }

    /// Who serves, by the kernel's word: whoever listens at the path, or made the pair of sockets.
    pub fn domain_credentials(&self) -> Credentials {
        self.0.domain
    }

    /// The name that the domain gives itself.
    pub fn domain_name(&self) -> &str {
        &self.0.name
    }

    /// The identity by which accounts name the domain.
    pub fn domain_id(&self) -> DomainId {
        DomainId(self.0.id)
    }

    /// Finds the portal `name` and checks that it speaks `version`.
    ///
    /// # Errors
    /// [`CallError::Version`]; [`CallError::Refused`]: no such portal, or not for this user.
    pub fn portal(&self, name: &str, version: u64) -> Result<PortalId, CallError> {
        self.0.resolve(name, version)
    }

    /// Calls: this thread goes on in the domain, on an activation's stack, and comes back with the results.
    ///
    /// In terms of the kernel: fills a line, wakes the activation that waits on it, sleeps until the reply. That is as long as the callee
    /// works, unless the call, or the chain that it belongs to, has a [deadline](Call::deadline), or the domain is [stopped](Self::set_patience).
    ///
    /// # Errors
    /// See [`CallError`], which says for each kind whether anything was executed. Results are replaced on success only.
    #[inline]
    pub fn call(&self, portal: PortalId, mut call: Call<'_>) -> Result<(), CallError> {
        self.0.has(portal)?;
        self.0.call(portal, &mut call)
    }

    /// Looks for a portal, and waits for nothing.
    ///
    /// # Errors
    /// [`CallError::Refused`]: the name is longer than any portal's.
    pub fn look_for(&self, name: &str, version: u64) -> Result<Finding, CallError> {
        Finding::begin(self.0.clone(), name, version)
    }

    /// Begins a call and returns when it is sent; what it returns can be polled, waited for, or dropped, which gives the call up.
    ///
    /// # Errors
    /// As [`Client::call`], for what can be said before the callee runs.
    pub fn start<'a>(&self, portal: PortalId, call: Call<'a>) -> Result<Pending<'a>, CallError> {
        self.begin(portal, call)?.sent()
    }

    /// As [`start`](Self::start), and waits for nothing: a call that needs something of the domain first is not
    /// [sent](Pending::is_sent) yet.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn begin<'a>(&self, portal: PortalId, call: Call<'a>) -> Result<Pending<'a>, CallError> {
        self.0.has(portal)?;
        Pending::begin(self.0.clone(), portal, call, Caller::current())
    }

    /// As [`begin`](Self::begin), on behalf of a thread that is not the running OS thread: for runtimes whose threads are
    /// their own. Touches no thread-local; what a charged call cost is kept ([`Pending::charges`]).
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_for<'a>(
        &self,
        caller: Caller,
        portal: PortalId,
        call: Call<'a>,
    ) -> Result<Pending<'a>, CallError> {
        self.0.has(portal)?;
        Pending::begin(self.0.clone(), portal, call, caller).map(Pending::keeping_charges)
    }

    /// As [`start_for`](Self::start_for), if the call can be sent at once: then its arguments are not looked at again. Otherwise gives the
    /// call back.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_at_once<'a>(
        &self,
        caller: Caller,
        portal: PortalId,
        call: Call<'a>,
    ) -> Result<Result<Pending<'a>, Call<'a>>, CallError> {
        self.0.has(portal)?;
        Pending::at_once(&self.0, portal, call, caller)
    }

    /// For how long a domain may be *stopped* (by SIGSTOP, a terminal or a debugger) before calls that have no deadline end with
    /// [`CallError::Stopped`]; ten seconds if nothing is said, and never for `Duration::MAX`. It holds for all clones of this client. A domain that
    /// runs is waited for as long as it works.
    ///
    /// Looked at about once a second, and known only of a domain that was found by its path, in a process namespace of ours.
    pub fn set_patience(&self, patience: Duration) {
        self.0.stopped.set_patience(patience);
    }

    /// Whether the domain is there: its process lives, and has kept to the protocol. Once it is not, it never is again.
    pub fn is_alive(&self) -> bool {
        self.0.is_alive()
    }

    /// The descriptors of this connection: its socket, the pipes of lines that nobody uses right now, and what the domain has sent for calls that
    /// have yet to look. For a process that shares its descriptor table with others and must close what one that was killed had open. Those
    /// of a call under way are the call's ([`Pending::descriptors`]).
    pub fn descriptors(&self) -> Vec<RawFd> {
        self.0.descriptors()
    }

    /// Memory to lend, `len_bytes` of zeros, shared with this domain and nobody else.
    ///
    /// # Errors
    /// [`CallError::TooLarge`]: beyond the domain's limits. [`CallError::DomainDied`], [`CallError::System`].
    pub fn buffer(&self, len_bytes: usize) -> Result<Buffer, CallError> {
        self.0.buffer(len_bytes)
    }

    /// As [`buffer`](Self::buffer), and waits for nothing: the domain is told of it, and answers in its own time.
    ///
    /// # Errors
    /// [`CallError::System`]: no memory or descriptors.
    pub fn offer(&self, len_bytes: usize) -> Result<Offering, CallError> {
        Offering::begin(self.0.clone(), len_bytes)
    }

    /// What this connection has used of the domain, as the domain counts it.
    ///
    /// # Errors
    /// [`CallError::DomainDied`].
    pub fn usage(&self) -> Result<Usage, CallError> {
        self.0.usage()
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("domain", &self.0.name).field("credentials", &self.0.domain).finish()
    }
}
