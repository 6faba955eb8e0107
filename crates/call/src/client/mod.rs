//! A client's connection to one domain.

mod connection;
mod line;
mod lines;
mod pending;
mod results;
mod transfer;
mod wait;
mod watch;

pub use pending::Pending;

use crate::args::Call;
use crate::chain::{Caller, Deadline};
use crate::credentials::Credentials;
use crate::error::CallError;
use crate::memory::Buffer;
use crate::portal::PortalId;
use crate::usage::{DomainId, Usage};
use connection::Connection;
use std::fmt;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

/// A connection to a domain. Clones share it; threads call through it at the same time, each on a line of its own.
///
/// A connection does not survive its domain: after [`CallError::DomainDied`] connect again, and look up portals again.
#[derive(Clone)]
pub struct Client(Arc<Connection>);

impl Client {
    /// Connects to the domain that serves the socket at `path`.
    ///
    /// # Errors
    /// [`CallError::Unreachable`]: nobody serves it. [`CallError::Refused`]: not for this user, or full, or another protocol.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, CallError> {
        let socket = crate::socket::connect(path.as_ref())?;
        Connection::greet(socket, path.as_ref(), true).map(Self)
    }

    /// Takes a connected socket: one end of a [`socket_pair`](crate::socket_pair), or an inherited descriptor.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn over(socket: OwnedFd) -> Result<Self, CallError> {
        Connection::greet(socket, Path::new("descriptor"), false).map(Self)
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
    /// In terms of the kernel: fills a line, wakes the activation that waits on it, sleeps until the reply.
    ///
    /// # Errors
    /// See [`CallError`], which says for each kind whether anything was executed. Results are replaced on success only.
    pub fn call(&self, portal: PortalId, mut call: Call<'_>) -> Result<(), CallError> {
        let caller = Caller::current();
        let deadline = Deadline::earlier(call.attributes.deadline, caller.link.deadline);
        let mut line = self.0.acquire(deadline)?;
        let sent = line.send(&self.0, portal, &mut call, caller, false)?;
        wait::for_reply(&self.0, &line, &sent)?;
        let outcome = line.take_results(&self.0, &sent, &mut call);
        line.release();
        outcome
    }

    /// Begins a call and returns at once; what it returns can be polled, waited for, or dropped, which gives the call up.
    ///
    /// # Errors
    /// As [`Client::call`], for what can be said before the callee runs.
    pub fn start<'a>(&self, portal: PortalId, call: Call<'a>) -> Result<Pending<'a>, CallError> {
        Pending::start(self.0.clone(), portal, call, Caller::current())
    }

    /// As [`start`](Self::start), on behalf of a thread that is not the running OS thread: for runtimes whose threads are
    /// their own. Touches no thread-local, unless the call is charged.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_for<'a>(
        &self,
        caller: Caller,
        portal: PortalId,
        call: Call<'a>,
    ) -> Result<Pending<'a>, CallError> {
        Pending::start(self.0.clone(), portal, call, caller)
    }

    /// The descriptors of this connection: its socket, and the pipes of lines that nobody uses right now. For a process that shares its
    /// descriptor table with others and must close what one that was killed had open.
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
