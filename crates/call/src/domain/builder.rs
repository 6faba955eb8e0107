//! What a domain is made of, before it serves.

use super::keeper::{Door, Keeper};
use super::pool::Pool;
use super::{Activations, Domain, Inner, OnLast, Running, spawn_error};
use crate::error::{DomainError, setup};
use crate::limits::Limits;
use crate::listener::{self, Place};
use crate::portal::{Access, Handler, Portal};
use crate::socket;
use crate::wire::Wire;
use peregrine_base::sync::AtomicUsize;
use peregrine_sys::process::CpuSet;
use peregrine_sys::rustix;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// What a domain is made of; see [`Domain::builder`].
pub struct DomainBuilder {
    name: String,
    activations: usize,
    stack_bytes: usize,
    limits: Limits,
    access: Access,
    portals: Vec<Portal>,
    wire: Option<Box<dyn Wire>>,
    most_urgent: i32,
    on_last: Option<OnLast>,
}

impl DomainBuilder {
    pub(super) fn new() -> Self {
        Self {
            name: "domain".into(),
            activations: 4,
            stack_bytes: 256 * 1024,
            limits: Limits::default(),
            access: Access::default(),
            portals: Vec::new(),
            wire: None,
            most_urgent: 0,
            on_last: None,
        }
    }

    /// A name for messages and accounts.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// How many activations to make before the first call: as many calls are executed at once. The default is 4.
    #[must_use]
    pub const fn activations(mut self, count: usize) -> Self {
        self.activations = count;
        self
    }

    /// Bytes of each activation's stack, mapped with a guard below. The default is 256 KiB. It is the domain's own choice: the
    /// caller's stack has no part in it.
    #[must_use]
    pub const fn stack_bytes(mut self, bytes: usize) -> Self {
        self.stack_bytes = bytes;
        self
    }

    /// What one client may take.
    #[must_use]
    pub const fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Who may connect. The default is [`Access::SameUser`].
    #[must_use]
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// Exports a portal to everybody who may connect.
    #[must_use]
    pub fn portal(self, name: &str, version: u64, handler: impl Handler) -> Self {
        self.portal_for(name, version, Access::Everyone, handler)
    }

    /// Exports a portal to those whom `access` admits, of those who may connect.
    #[must_use]
    pub fn portal_for(mut self, name: &str, version: u64, access: Access, handler: impl Handler) -> Self {
        self.portals.push(Portal { name: name.to_owned(), version, access, handler: Box::new(handler) });
        self
    }

    /// Called on the last activation when a call takes it, before the call is executed: the place to add more. The call is executed even if
    /// it panics.
    #[must_use]
    pub fn on_last_activation(mut self, tell: impl Fn(&Activations<'_>) + Send + Sync + 'static) -> Self {
        self.on_last = Some(Box::new(tell));
        self
    }

    /// Has each call run on a user-level thread of the domain's own.
    #[must_use]
    pub fn wire(mut self, wire: impl Wire) -> Self {
        self.wire = Some(Box::new(wire));
        self
    }

    /// The most urgent nice value that callers may lend to activations. The default, 0, permits none that is more urgent than
    /// usual. The kernel has the last word (`RLIMIT_NICE`).
    #[must_use]
    pub const fn most_urgent_nice(mut self, nice: i32) -> Self {
        self.most_urgent = nice;
        self
    }

    /// Serves clients that connect to the Unix socket at `path`, which is made, or taken over from a domain that died.
    ///
    /// # Errors
    /// [`DomainError::Place`] (its directory is missing, for instance), [`DomainError::PathInUse`], [`DomainError::PathTooLong`],
    /// [`DomainError::Config`], [`DomainError::System`].
    pub fn serve(self, path: impl AsRef<Path>) -> Result<Domain, DomainError> {
        self.check()?;
        let (socket, place) = listener::listen(path.as_ref())?;
        self.start(Door::Listener(socket), Some(place))
    }

    /// Serves clients that connect to a bound `SOCK_SEQPACKET` socket that was inherited, from a supervisor for instance.
    ///
    /// # Errors
    /// [`DomainError::Config`], [`DomainError::System`].
    pub fn serve_on(self, socket: OwnedFd) -> Result<Domain, DomainError> {
        self.check()?;
        self.start(Door::Listener(socket), None)
    }

    /// Serves one client, at the other end of a connected socket ([`socket_pair`](crate::socket_pair)) that was inherited.
    ///
    /// # Errors
    /// [`DomainError::Config`], [`DomainError::System`].
    pub fn serve_pair(self, socket: OwnedFd) -> Result<Domain, DomainError> {
        self.check()?;
        self.start(Door::Pair(socket), None)
    }

    fn check(&self) -> Result<(), DomainError> {
        let config = |what: String| Err(DomainError::Config(what));
        if self.activations == 0 {
            return config("a domain needs an activation to execute anything".into());
        }
        let limits = &self.limits;
        for (what, value) in [
            ("argument_bytes", limits.argument_bytes),
            ("argument_stack_bytes", limits.argument_stack_bytes),
            ("calls_in_flight", limits.calls_in_flight),
        ] {
            if value > u32::MAX as usize {
                return config(format!("Limits::{what} {value} is beyond {}", u32::MAX));
            }
        }
        // A client waits for one of its calls to end, and there would be none.
        if limits.calls_in_flight == 0 {
            return config("Limits::calls_in_flight is 0: nobody could call; give one at least".into());
        }
        for (i, portal) in self.portals.iter().enumerate() {
            if portal.name.len() > socket::MAX_NAME {
                return config(format!(
                    "portal name of {} bytes, at most {}",
                    portal.name.len(),
                    socket::MAX_NAME
                ));
            }
            if self.portals[..i].iter().any(|p| p.name == portal.name) {
                return config(format!("two portals are called {}", portal.name));
            }
        }
        Ok(())
    }

    fn start(self, door: Door, place: Option<Place>) -> Result<Domain, DomainError> {
        let cpus =
            CpuSet::current().map_err(|errno| DomainError::System { what: "sched_getaffinity", errno })?;
        let bell = rustix::event::eventfd(
            0,
            rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK,
        )
        .map_err(setup("eventfd"))?;
        let mut id = [0; 8];
        peregrine_sys::random::fill(&mut id);
        let inner = Arc::new(Inner {
            id: u64::from_ne_bytes(id).max(1),
            name: self.name,
            uid: rustix::process::geteuid().as_raw(),
            limits: self.limits,
            access: self.access,
            portals: self.portals,
            wire: self.wire,
            most_urgent: self.most_urgent,
            cpus,
            pool: Pool::new(self.limits.activations_per_client),
            bell,
            clients: AtomicUsize::new(0),
            lines: AtomicUsize::new(0),
            stack_bytes: self.stack_bytes,
            on_last: self.on_last,
            threads: Mutex::default(),
        });
        let keeper = Keeper::new(inner.clone(), door).map_err(setup("epoll"))?;
        let running = Running { inner: inner.clone(), place: Mutex::new(place), keeper: Mutex::new(None) };
        inner.add_activations(self.activations)?;
        let thread = std::thread::Builder::new()
            .name(format!("{}-keeper", inner.name))
            .spawn(move || keeper.run())
            .map_err(spawn_error)?;
        *running.keeper.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(Domain(Arc::new(running)))
    }
}

impl fmt::Debug for DomainBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let portals: Vec<_> = self.portals.iter().map(|p| &p.name).collect();
        f.debug_struct("DomainBuilder")
            .field("name", &self.name)
            .field("activations", &self.activations)
            .field("stack_bytes", &self.stack_bytes)
            .field("limits", &self.limits)
            .field("access", &self.access)
            .field("portals", &portals)
            .finish_non_exhaustive()
    }
}
