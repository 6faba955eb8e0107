//! The chain: one logical thread, and its activations in the domains that it has called into.
//!
//! ```text
//! thread T ── home ▸ activation in A ▸ activation in B ▸ activation in A again      depth 0, 1, 2, 3
//! ```
//!
//! A chain has no central record: each domain that it passes knows its own link, its caller's connection below it, and the
//! connection of the call that it is waiting in above it. A call carries the chain's identity, its depth, its deadline and
//! its attributes; while a handler runs they are the OS thread's, so that a nested call inherits them without being told.
//!
//! Operations on a chain walk it link by link along those connections. Each line has a word for what they tell the link
//! above (`alerts`, in the caller's half), and the reply's status tells the link below.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// The identity of a logical thread: random, the same on every link.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ChainId(pub(crate) [u64; 2]);

/// One link: where the running code stands in its chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChainLink {
    /// Whose thread this is.
    pub chain: ChainId,
    /// How many calls deep: 0 at home.
    pub depth: u32,
    /// When the whole of it must be done.
    pub deadline: Option<Deadline>,
}

/// A moment on the clock that all processes of this host share (`CLOCK_MONOTONIC`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Deadline(u64);

impl Deadline {
    /// `after` from now.
    pub fn after(after: Duration) -> Self {
        let after_ns = u64::try_from(after.as_nanos()).unwrap_or(u64::MAX);
        Self(now_ns().saturating_add(after_ns).max(1))
    }

    /// The moment `at`.
    pub fn at(at: Instant) -> Self {
        Self::after(at.saturating_duration_since(Instant::now()))
    }

    /// Time left; `None` if it has passed.
    pub fn left(self) -> Option<Duration> {
        match self.0.saturating_sub(now_ns()) {
            0 => None,
            ns => Some(Duration::from_nanos(ns)),
        }
    }

    /// The earlier one, where `None` is never.
    #[inline]
    pub fn earlier(a: Option<Self>, b: Option<Self>) -> Option<Self> {
        match (a, b) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// As it travels: nanoseconds, 0 for never.
    #[inline]
    pub(crate) fn to_wire(this: Option<Self>) -> u64 {
        this.map_or(0, |d| d.0)
    }

    pub(crate) const fn from_wire(ns: u64) -> Option<Self> {
        if ns == 0 { None } else { Some(Self(ns)) }
    }
}

/// `CLOCK_MONOTONIC` through the vDSO.
#[inline]
pub(crate) fn now_ns() -> u64 {
    let t = peregrine_sys::rustix::time::clock_gettime(peregrine_sys::rustix::time::ClockId::Monotonic);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// What calls of the running code are made with: one thread-local, for each call asks for all of it.
struct Here {
    /// The link that this OS thread runs: an activation's in a call, or its own as the home of a chain, made when it is first needed.
    link: Cell<Option<ChainLink>>,
    /// Whether its calls are charged though they don't ask for it.
    charge: Cell<bool>,
}

thread_local! {
    static HERE: Here = const { Here { link: Cell::new(None), charge: Cell::new(false) } };
}

/// The link that the calling thread runs: its activation's, or its own as the home of a chain.
#[inline]
pub fn current() -> ChainLink {
    HERE.with(|here| here.link.get()).unwrap_or_else(new_home)
}

/// Whether nested calls of the running handler are charged because it is.
#[cfg(test)]
pub(crate) fn is_charged() -> bool {
    HERE.with(|here| here.charge.get())
}

/// Says whether they are; what was said before.
pub(crate) fn set_charged(charged: bool) -> bool {
    HERE.with(|here| here.charge.replace(charged))
}

#[cold]
fn new_home() -> ChainLink {
    let home = ChainLink { chain: ChainId(random_words()), depth: 0, deadline: None };
    HERE.with(|here| here.link.set(Some(home)));
    home
}

/// Sixteen bytes of the kernel's (`getrandom(2)`): an identity that strangers can't guess.
fn random_words() -> [u64; 2] {
    let mut bytes = [0; 16];
    peregrine_sys::random::fill(&mut bytes);
    let (a, b) = bytes.split_at(8);
    [a, b].map(|half| u64::from_ne_bytes(half.try_into().expect("eight bytes")))
}

/// On whose behalf a call is made: asked of the thread that calls, or told by a runtime that calls for one of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caller {
    /// Where the calling thread stands.
    pub link: ChainLink,
    /// Whether its calls are charged though they don't ask for it.
    pub charge: bool,
}

impl Caller {
    /// The running OS thread.
    #[inline]
    pub fn current() -> Self {
        let (link, charge) = HERE.with(|here| (here.link.get(), here.charge.get()));
        Self { link: link.unwrap_or_else(new_home), charge }
    }

    /// A logical thread that has made no call yet, with an identity of its own.
    pub fn fresh() -> Self {
        Self { link: ChainLink { chain: ChainId(random_words()), depth: 0, deadline: None }, charge: false }
    }
}

/// Makes `link` the running thread's until the value is dropped.
pub(crate) struct Entered(Option<ChainLink>);

impl Entered {
    #[inline]
    pub fn new(link: ChainLink) -> Self {
        Self(HERE.with(|here| here.link.replace(Some(link))))
    }
}

impl Drop for Entered {
    #[inline]
    fn drop(&mut self) {
        HERE.with(|here| here.link.set(self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earlier_deadline_wins_and_none_is_never() {
        let (soon, late) = (Deadline(5), Deadline(9));
        assert_eq!(Deadline::earlier(Some(late), Some(soon)), Some(soon));
        assert_eq!(Deadline::earlier(None, Some(late)), Some(late));
        assert_eq!(Deadline::earlier(None, None), None);
        assert_eq!(Deadline::from_wire(Deadline::to_wire(Some(soon))), Some(soon));
    }

    #[test]
    fn a_link_ends_with_its_activation() {
        let home = current();
        let inner = ChainLink { chain: ChainId([1, 2]), depth: 3, deadline: None };
        let entered = Entered::new(inner);
        assert_eq!(current(), inner);
        drop(entered);
        assert_eq!(current(), home);
        assert_eq!(home.depth, 0);
    }
}
