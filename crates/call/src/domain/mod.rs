//! A domain: a process, or a part of one, that exports portals.

mod activation;
mod adopted;
mod answers;
mod arguments;
mod arrival;
mod builder;
mod ended;
mod execute;
mod invocation;
mod keeper;
mod known;
pub(crate) mod outcome;
mod peer;
mod pool;
mod rest;

pub use builder::DomainBuilder;
pub use invocation::Invocation;

use crate::error::DomainError;
use crate::limits::Limits;
use crate::listener::Place;
use crate::portal::{Access, Portal};
use crate::usage::DomainId;
use crate::wire::Wire;
use peregrine_base::sync::{AtomicUsize, Ordering};
use peregrine_sys::process::CpuSet;
use peregrine_sys::rustix;
use pool::Pool;
use std::fmt;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// What is called when the last activation is taken.
type OnLast = Box<dyn Fn(&Activations<'_>) + Send + Sync>;

/// What the threads of a domain share.
pub(crate) struct Inner {
    pub id: u64,
    pub name: String,
    pub uid: u32,
    pub limits: Limits,
    pub access: Access,
    pub portals: Vec<Portal>,
    pub wire: Option<Box<dyn Wire>>,
    /// The most urgent nice value that a caller may lend an activation.
    pub most_urgent: i32,
    pub cpus: CpuSet,
    pub pool: Pool,
    /// Wakes the keeper, when the domain closes.
    pub bell: OwnedFd,
    pub clients: AtomicUsize,
    pub lines: AtomicUsize,
    stack_bytes: usize,
    on_last: Option<OnLast>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Inner {
    /// Notes that an activation was taken by a call, and if it is the last, tells the domain before it serves it. Nothing is counted if
    /// nobody wants to know. `first` comes before the domain's own code, if that is run.
    #[inline]
    pub(crate) fn is_the_last_taken(&self, first: impl FnOnce()) -> Option<Taken<'_>> {
        let on_last = self.on_last.as_ref()?;
        let running = self.pool.running.fetch_add(1, Ordering::Relaxed) + 1;
        if running >= self.pool.total.load(Ordering::Relaxed) {
            first();
            // A panic, which has been reported by then, must not cost the activation: the caller would wait for ever.
            let _ = catch_unwind(AssertUnwindSafe(|| on_last(&Activations(self))));
        }
        Some(Taken(self))
    }
}

/// An activation that executes a call, in the count of those.
pub(crate) struct Taken<'a>(&'a Inner);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.pool.running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A domain's activations, as its [`on_last_activation`](DomainBuilder::on_last_activation) sees them.
pub struct Activations<'a>(&'a Inner);

impl Activations<'_> {
    /// How many there are, with those that were asked for already.
    pub fn total(&self) -> usize {
        self.0.pool.total.load(Ordering::Relaxed) + self.0.pool.asked.load(Ordering::Relaxed)
    }

    /// Asks for `count` more. They are started by the domain's keeper, so that the call that took the last one goes on at once.
    pub fn add(&self, count: usize) {
        self.0.pool.ask_for(count);
        let _ = rustix::io::write(&self.0.bell, &1u64.to_ne_bytes());
    }
}

impl fmt::Debug for Activations<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Activations").field(&self.total()).finish()
    }
}

fn spawn_error(e: std::io::Error) -> DomainError {
    let errno = peregrine_sys::raw::Errno(e.raw_os_error().unwrap_or(0));
    DomainError::System { what: "starting a thread", errno }
}

impl Inner {
    pub(crate) fn add_activations(self: &Arc<Self>, count: usize) -> Result<(), DomainError> {
        for _ in 0..count {
            let Some(activation) = self.pool.enlist() else { return Ok(()) };
            let inner = self.clone();
            let thread = std::thread::Builder::new()
                .name(format!("{}-{}", self.name, activation.index))
                .stack_size(self.stack_bytes)
                .spawn(move || activation::run(&inner, &activation))
                .map_err(spawn_error)?;
            self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        }
        Ok(())
    }

    /// Waits until every activation has ended; the pool is closed.
    pub(crate) fn join_activations(&self) {
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            while !thread.is_finished() {
                self.pool.repeat_recalls();
                std::thread::sleep(Duration::from_millis(1));
            }
            let _ = thread.join();
        }
    }
}

struct Running {
    inner: Arc<Inner>,
    /// Its path, as long as it listens there.
    place: Mutex<Option<Place>>,
    keeper: Mutex<Option<JoinHandle<()>>>,
}

impl Running {
    fn close(&self) {
        // Before anybody hangs up: who finds nobody listening at the path takes it over.
        drop(self.place.lock().unwrap_or_else(PoisonError::into_inner).take());
        let keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.inner.pool.close();
        let _ = rustix::io::write(&self.inner.bell, &1u64.to_ne_bytes());
        if let Some(keeper) = keeper {
            let _ = keeper.join();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.close();
    }
}

/// A domain that serves, until this and all its clones are dropped or [`shutdown`](Self::shutdown) is called.
///
/// ```
/// use peregrine_call::{Call, Client, Domain};
/// let dir = std::env::temp_dir().join(format!("peregrine-doc-{}", std::process::id()));
/// let domain = Domain::builder()
///     .portal("upper", 1, |call: &mut peregrine_call::Invocation<'_>| {
///         let text = call.input(0)?.to_ascii_uppercase();
///         *call.output(1)? = text;
///         Ok(())
///     })
///     .serve(&dir)?;
///
/// let client = Client::connect(&dir)?;
/// let upper = client.portal("upper", 1)?;
/// let mut reply = Vec::new();
/// client.call(upper, Call::new().input(b"peregrine").output(&mut reply, 64))?;
/// assert_eq!(reply, b"PEREGRINE");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
#[must_use = "a domain serves until the last of its handles is dropped: keep it"]
pub struct Domain(Arc<Running>);

impl Domain {
    /// A domain with no portals yet.
    pub fn builder() -> DomainBuilder {
        DomainBuilder::new()
    }

    /// Makes `count` more activations.
    ///
    /// # Errors
    /// [`DomainError::System`]: no memory or threads left; some may have been made.
    pub fn add_activations(&self, count: usize) -> Result<(), DomainError> {
        self.0.inner.add_activations(count)
    }

    /// The identity by which accounts name this domain.
    pub fn id(&self) -> DomainId {
        DomainId(self.0.inner.id)
    }

    /// What the domain is doing.
    pub fn stats(&self) -> DomainStats {
        let inner = &self.0.inner;
        let pool::Counts { activations, idle, parked, running } = inner.pool.count();
        DomainStats {
            activations,
            idle,
            parked,
            running,
            waiting: inner.pool.wanted.load(Ordering::Relaxed),
            clients: inner.clients.load(Ordering::Relaxed),
            lines: inner.lines.load(Ordering::Relaxed),
        }
    }

    /// Lets calls that are being executed end, answers those that wait with
    /// [`CallError::Terminated`](crate::CallError::Terminated), hangs up, and waits for all threads of the domain.
    pub fn shutdown(self) {
        self.0.close();
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Domain").field("name", &self.0.inner.name).field("stats", &self.stats()).finish()
    }
}

/// Counts of a domain, each true at some moment of the asking.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DomainStats {
    /// Activations there are.
    pub activations: usize,
    /// In the pool.
    pub idle: usize,
    /// Asleep on the line of the client that they served last.
    pub parked: usize,
    /// Executing a call.
    pub running: usize,
    /// Calls that wait for an activation.
    pub waiting: usize,
    /// Clients connected.
    pub clients: usize,
    /// Lines open.
    pub lines: usize,
}
