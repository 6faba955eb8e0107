//! Carried calls: a closure that borrows its caller's locals runs in another process, at the same addresses, and comes back.
//!
//! ```text
//!   node 0                                domain `ledger` (a node that runs nothing else)
//!   let mut sum = 0;
//!   domain.run(|| ─── the thread moves ──▶  sum += rows.iter().sum()      same stack, same heap, same locals
//!   )?            ◀── the thread moves ───  closure returns or panics
//!   sum is right
//! ```
//!
//! This is the first of the two answers to the question what becomes of a migrating thread's stack: all of it comes along.
//! The objection to it, that an address need not mean the same over there, does not hold here, for a slot lies at the same
//! addresses in all processes of a World. The second answer, a fresh stack and declared arguments, is `peregrine-call`.
//!
//! **Trust.** A domain is forked from the World's zygote: same user, same build, all of the World's memory mapped. It is
//! trusted as a node is; nothing is hidden from it or checked. What it has of its own is what a process has: working directory,
//! limits, filters, credentials given up, mappings made by its *set-up*, which each process of the domain runs before anything
//! else. A crash in it is a crash of a node.
//!
//! **Death.** There is no step at which a caller could go on over torn memory, for a domain's death is a node's: every thread
//! goes back to the last image, and the call is made again, or continues from the middle if the image was taken there. A thread
//! that crashes its domain again and again is quarantined, and so is one that was in a domain which can't be set up again.
//!
//! **Belonging.** While on a carried call a thread is the domain's: balance and `migrate` leave it there, `migrate_to` is refused,
//! threads that it spawns start on ordinary nodes. Calls nest; each returns to where it was made.

use crate::context::{go_to, node_count};
use crate::control::{
    DomainEntry, Domains, MAX_DOMAINS, MAX_NODES, imaged, is_domain, node, request, wait, world,
};
use crate::killpoint::{Point, at};
use crate::{sched, thread};
use peregrine_base::sync::Ordering;
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::carrier::carrier;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Set-ups of a domain that may end its process, one after the other, before it is given up.
pub(crate) const MOST_SETUPS: u32 = 3;
/// `NodeShared::setups` of a domain whose set-up panicked or was given up.
pub(crate) const FAILED: u32 = u32::MAX;
/// How often a thread that waits for its domain looks, in ns.
const LOOK_NS: u64 = 500_000;

/// A process of this World that runs carried calls: trusted as the World's own nodes are, and able to do all that they can.
///
/// The value names the domain: it can be copied, kept in an image and sent to other threads.
///
/// # Examples
/// ```no_run
/// # fn drop_rights() {}
/// let domain = peregrine_world::TrustedDomain::open("ledger", drop_rights).unwrap();
/// let mut rows = vec![1, 2, 3];
/// let here = std::process::id();
/// let there = domain.run(|| {
///     rows.push(4); // the caller's own vector
///     std::process::id()
/// }).unwrap();
/// assert_ne!(here, there);
/// assert_eq!(rows, [1, 2, 3, 4]);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
pub struct TrustedDomain {
    place: u32,
}

/// Why a domain can't be used.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum TrustedDomainError {
    /// The call came from outside.
    #[error("carried calls need a Peregrine thread: start the program with #[peregrine::main]")]
    NoThread,
    /// The name is empty or too long.
    #[error("a domain's name has 1 to 32 bytes and no NUL, and this one has {len}")]
    Name {
        /// Its bytes.
        len: usize,
    },
    /// Another set-up was given for the same name.
    #[error("domain '{name}' was opened before with another set-up function; give one of them another name")]
    OtherSetup {
        /// The name.
        name: String,
    },
    /// There are as many as there can be.
    #[error(
        "this World has {domains} domains and {nodes} nodes, and can have {MAX_DOMAINS} and together {MAX_NODES}"
    )]
    TooMany {
        /// Domains.
        domains: u32,
        /// Nodes.
        nodes: u32,
    },
    /// The set-up panicked, or ended its process each time.
    #[error("the set-up of domain '{name}' failed: what it printed says why; no call is made into it")]
    SetupFailed {
        /// The name.
        name: String,
    },
    /// The World has no such domain: the value is another World's.
    #[error("this World has {domains} domains, and no domain number {place}; open it here")]
    Unknown {
        /// The number asked for.
        place: u32,
        /// How many there are.
        domains: u32,
    },
}

/// Where a thread was before a call. Numbers of domains change if a World is resumed with another number of nodes.
#[derive(Clone, Copy)]
enum Place {
    Node(u32),
    Domain(u32),
}

impl Place {
    /// Where the running thread is.
    ///
    /// # Safety
    /// In a runtime section.
    unsafe fn here() -> Self {
        // SAFETY: on a node.
        let at = unsafe { carrier() }.node;
        if is_domain(at) { Self::Domain(at - node_count()) } else { Self::Node(at) }
    }

    fn node(self) -> u32 {
        match self {
            Self::Node(n) => n % node_count(),
            Self::Domain(place) => node_count() + place,
        }
    }

    fn serves(self) -> u64 {
        node(self.node()).serves.load(Ordering::Acquire)
    }
}

fn text(entry: &DomainEntry) -> String {
    let n = entry.name.iter().position(|b| *b == 0).unwrap_or(entry.name.len());
    String::from_utf8_lossy(&entry.name[..n]).into_owned()
}

impl TrustedDomain {
    /// The domain `name` of this World; made if there is none. `setup` runs in each of its processes before anything else: in
    /// the first, and in each that replaces one that died.
    ///
    /// The set-up runs outside of any Peregrine thread. It must return, and should keep nothing but what the process as such
    /// keeps (working directory, limits, filters): statics and thread-locals belong to the threads.
    ///
    /// # Errors
    /// [`TrustedDomainError`]; `SetupFailed` if the set-up panicked.
    pub fn open(name: &str, setup: fn()) -> Result<Self, TrustedDomainError> {
        let mut entry = DomainEntry { name: [0; 32], setup: setup as usize };
        if name.is_empty() || name.len() > entry.name.len() || name.contains('\0') {
            return Err(TrustedDomainError::Name { len: name.len() });
        }
        entry.name[..name.len()].copy_from_slice(name.as_bytes());
        sched::in_thread(|_| {
            let place = imaged().domains.with(|d| d.place(&entry))?;
            loop {
                let n = node(node_count() + place);
                // Acquire: pairs with the release in `set_up`.
                if n.serves.load(Ordering::Acquire) == entry.identity() {
                    return match n.setups.load(Ordering::Relaxed) {
                        FAILED => Err(TrustedDomainError::SetupFailed { name: text(&entry) }),
                        _ => Ok(Self { place }),
                    };
                }
                at(Point::DomainAsked);
                thread::notify(request::DOMAINS);
                // SAFETY: in a section.
                unsafe { sched::park(monotonic_ns() + LOOK_NS, wait::DOMAIN, place) };
            }
        })
        .unwrap_or(Err(TrustedDomainError::NoThread))
    }

    /// Runs `f` in the domain's process, with everything that it borrows, and comes back with what it returned. A panic comes back
    /// too and goes on here.
    ///
    /// # Errors
    /// [`TrustedDomainError::NoThread`], [`TrustedDomainError::Unknown`], and [`TrustedDomainError::SetupFailed`] if that happened since, in
    /// a process that replaced another; `f` did not run then. (A thread that was on a call when its domain died, and whose domain can't be
    /// set up again, is taken away: [`JoinError::Quarantined`](crate::JoinError::Quarantined).)
    pub fn run<R>(&self, f: impl FnOnce() -> R) -> Result<R, TrustedDomainError> {
        let home = sched::in_thread(|_| {
            let place = self.place as usize;
            let (domains, entry) = imaged().domains.with(|d| (d.count, d.used().get(place).copied()));
            // A number that nobody here got from `open` may have no process, or that of another domain which a rollback took back, and a
            // thread sent there would be lost.
            let serves = |entry: &DomainEntry| Place::Domain(self.place).serves() == entry.identity();
            let Some(entry) = entry.filter(serves) else {
                return Err(TrustedDomainError::Unknown { place: self.place, domains });
            };
            // It was opened, and its process was replaced since.
            if is_unusable(node_count() + self.place) {
                return Err(TrustedDomainError::SetupFailed { name: text(&entry) });
            }
            // SAFETY: in a section; the table has the domain, so it has a process or is about to get one.
            unsafe {
                let home = Place::here();
                at(Point::CallLeaves);
                go_to(Place::Domain(self.place).node());
                Ok(home)
            }
        })
        .unwrap_or(Err(TrustedDomainError::NoThread))?;
        let done = catch_unwind(AssertUnwindSafe(f));
        // SAFETY: in a section; the node was there, or one of its number is.
        sched::in_thread(|_| unsafe {
            at(Point::CallReturns);
            go_to(home.node())
        });
        match done {
            Ok(value) => Ok(value),
            Err(panic) => resume_unwind(panic),
        }
    }

    /// The process that runs the domain's calls now; 0 while it is being replaced.
    pub fn pid(&self) -> u32 {
        let n = node(node_count() + self.place);
        if n.ready.load(Ordering::Acquire) == 0 { 0 } else { n.pid.load(Ordering::Relaxed) }
    }
}

impl Domains {
    /// The place of `entry`, which is added if it is new.
    fn place(&mut self, entry: &DomainEntry) -> Result<u32, TrustedDomainError> {
        if let Some(place) = self.used().iter().position(|e| e.name == entry.name) {
            if self.entries[place] != *entry {
                return Err(TrustedDomainError::OtherSetup { name: text(entry) });
            }
            return Ok(place as u32);
        }
        let nodes = world().node_count.load(Ordering::Relaxed);
        if self.count as usize >= MAX_DOMAINS || (nodes + self.count) as usize >= MAX_NODES {
            return Err(TrustedDomainError::TooMany { domains: self.count, nodes });
        }
        // The entry before the count: the supervisor looks without the lock.
        self.entries[self.count as usize] = *entry;
        at(Point::DomainEntered);
        peregrine_base::sync::fence(Ordering::Release);
        self.count += 1;
        at(Point::DomainListed);
        Ok(self.count - 1)
    }
}

/// Whether node `index` is a domain whose set-up failed: no thread runs in it.
pub(crate) fn is_unusable(index: u32) -> bool {
    is_domain(index) && node(index).setups.load(Ordering::Relaxed) == FAILED
}

/// In a new process that is to be node `index`: if that is a domain, runs its set-up.
pub(crate) fn set_up(index: u32) {
    if !is_domain(index) {
        return;
    }
    let place = (index - node_count()) as usize;
    // The nodes are paused at safe points, where nobody holds the lock.
    let Some(entry) = imaged().domains.with(|d| d.used().get(place).copied()) else { return };
    let me = node(index);
    let begun = me.setups.load(Ordering::Relaxed);
    if begun >= MOST_SETUPS {
        if begun != FAILED {
            let line = format!(
                "peregrine: the set-up of domain '{}' ended its process {begun} times; it is given up\n",
                text(&entry)
            );
            peregrine_sys::process::write_all(2, line.as_bytes());
        }
        me.setups.store(FAILED, Ordering::Relaxed);
    } else {
        me.setups.store(begun + 1, Ordering::Relaxed);
        // SAFETY: the address of a `fn()` of this build, which the image's contract checked.
        let setup = unsafe { core::mem::transmute::<usize, fn()>(entry.setup) };
        let outcome = if catch_unwind(setup).is_ok() { 0 } else { FAILED };
        me.setups.store(outcome, Ordering::Relaxed);
    }
    // Release: pairs with the acquire in `open`.
    me.serves.store(entry.identity(), Ordering::Release);
}
