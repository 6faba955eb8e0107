//! What follows the thread into the domain, and what it costs to ask for it.
//!
//! The deadline and the identity of the chain always travel. The rest is per call: where the activation runs, at what
//! priority, and whether its processor time is measured call by call. Each costs system calls in the callee, and a default
//! call makes none of them but for the first after the caller changed cores.

use crate::chain::Deadline;

/// Where the activation runs, seen from the caller.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Affinity {
    /// On the caller's core: the activation pins itself there. Nobody spins, for the other would wait for the core: who waits gives the core
    /// away, for a moment (8 µs for a reply, 12 µs for the next call, unless others run), and sleeps then; where that does not pay it sleeps at once.
    /// Right for calls that come now and then, and wherever cores are fewer than threads.
    #[default]
    Together,
    /// On another core, where it spins for a moment (18 µs at most) for the next call while the caller spins for the
    /// reply (20 µs). A call of few arguments, without other attributes and deadline, then goes the shortest way. Right for calls that come thick and fast on a machine with a core to spare.
    ///
    /// A copied argument crosses between the cores' caches line by line, which is most of what a large one costs: 64 KiB take about 10 µs
    /// where a null call takes 0.2, as much as the least copying between two spinning processes does. Lent in a
    /// [`Buffer`](crate::Buffer) it costs what the callee reads of it.
    Apart,
    /// Wherever the kernel puts it, of the cores that the domain was given: what earlier calls asked for is undone. Nobody spins.
    Anywhere,
}

/// The attributes of one call.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Attributes {
    /// Where the activation runs.
    pub affinity: Affinity,
    /// When the call must be done; the earlier of this and the chain's.
    pub deadline: Option<Deadline>,
    /// Lend the activation the caller's nice value if that is more urgent, where domain and kernel permit it.
    pub priority: bool,
    /// Measure the processor time of the callee, and of all that it calls, and add it to the calling thread's
    /// [`charges`](crate::usage::charges).
    pub charge: bool,
}

impl Attributes {
    /// The default, for where it must be known to the compiler.
    pub(crate) const NONE: Self =
        Self { affinity: Affinity::Together, deadline: None, priority: false, charge: false };

    /// Whether there is none that costs something.
    #[inline]
    pub(crate) const fn are_free(&self) -> bool {
        self.deadline.is_none() && !self.priority && !self.charge
    }
}
