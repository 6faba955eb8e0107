//! A region: memory whose absence, protection and traps are in the program's hands.
//!
//! ```text
//!   Mapping ──▶ Region::builder(mapping).inline(handler) / .pager(handler) ──build(&caps)──▶ Region
//!                                                                                       │ drop: plain memory again
//!    touch of an absent or protected page ─▶ handler.on_trap(&Trap)
//!                                               │ trap.unprotect(), trap.region().fill_copy(…)
//!                                               ▼ Filled | Retry | Deny
//! ```

mod mechanism;
mod operations;

use crate::claims::{Claim, Claimed};
use crate::mapping::Mapping;
use crate::process;
use crate::trap::pager::PagerThread;
use crate::trap::{Access, Cause, Decision, Fault, Registration, SignalHandler};
pub(crate) use mechanism::Wishes;
pub(crate) use mechanism::objection;
pub use mechanism::{Choice, Mechanism};
pub use operations::{Operations, RegionError};
use peregrine_base::sync::{AtomicBool, AtomicU8, Ordering};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::capabilities::{Capabilities, Capability};
use peregrine_sys::raw::Errno;
use peregrine_sys::uffd::{Features, OpenError, RegisterMode};
use peregrine_sys::{guard, mem};
use std::cell::Cell;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// A trap, as a handler sees it.
pub struct Trap<'a> {
    fault: Fault,
    region: &'a Operations,
    /// Whether the toucher was woken by what the handler did.
    woken: Cell<bool>,
}

impl<'a> Trap<'a> {
    pub(crate) fn new(fault: Fault, region: &'a Operations) -> Self {
        Self { fault, region, woken: Cell::new(false) }
    }

    pub(crate) fn was_woken(&self) -> bool {
        self.woken.get()
    }

    /// The address that was touched (its page's start, from a pager on a kernel without `EXACT_ADDRESS`).
    pub const fn address(&self) -> VirtAddr {
        self.fault.address
    }

    /// The page that was touched; of the pool, the huge page.
    pub fn page(&self) -> PageRange {
        self.region.mapping.grain_of(self.fault.address)
    }

    /// Which page of the region that is.
    pub const fn page_index(&self) -> usize {
        (self.fault.page().start().as_usize() - self.region.range.start().as_usize()) / PAGE_SIZE
    }

    /// What was attempted.
    pub const fn access(&self) -> Access {
        self.fault.access
    }

    /// How the trap came.
    pub const fn cause(&self) -> Cause {
        self.fault.cause
    }

    /// The region's operations.
    pub const fn region(&self) -> &'a Operations {
        self.region
    }

    /// The aligned block of `pages` pages that holds the page, cut at the region's ends: fill in blocks, for a trap costs
    /// far more than a page.
    pub fn block(&self, pages: PageCount) -> PageRange {
        let size = pages.get().max(self.region.mapping.grain().get());
        let first = self.page_index() / size * size;
        let count = size.min(self.region.range.pages().get() - first);
        let start = self.region.range.start().as_usize() + first * PAGE_SIZE;
        PageRange::new(VirtAddr::new(start), PageCount::new(count))
    }

    /// UNPROT of the page: `Filled`, or `Deny` if the kernel refuses.
    pub fn unprotect(&self) -> Decision {
        self.decide(self.region.unprotect(self.fault.address))
    }

    /// `Filled` if the operation succeeded, else `Deny`: the last line of most handlers.
    pub fn decide<T>(&self, result: Result<T, RegionError>) -> Decision {
        match result {
            Ok(_) => {
                // Every operation that makes a page accessible wakes those who wait for it.
                self.woken.set(true);
                Decision::Filled
            }
            Err(_) => Decision::Deny,
        }
    }
}

impl fmt::Debug for Trap<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fault.fmt(f)
    }
}

/// A handler that runs inside a signal handler on the thread that touched the page.
///
/// # Safety
/// `on_trap` runs at an arbitrary instruction of arbitrary code, on several threads at once. The implementor promises that
/// it allocates nothing, takes no lock that interrupted code may hold, does not panic, does not unwind or jump out,
/// preserves `errno` if it calls libc, and neither makes nor drops regions, trackers or registrations (S3). The
/// operations of [`Trap::region`] keep all that.
pub unsafe trait InlineHandler: Send + Sync + 'static {
    /// Serves one trap.
    fn on_trap(&self, trap: &Trap<'_>) -> Decision;
}

/// A closure that its maker promises to be an [`InlineHandler`].
pub struct Inline<F>(F);

impl<F: Fn(&Trap<'_>) -> Decision + Send + Sync + 'static> Inline<F> {
    /// Makes a handler of a closure.
    ///
    /// # Safety
    /// The closure keeps the promise of [`InlineHandler`].
    pub const unsafe fn new(f: F) -> Self {
        Self(f)
    }
}

// SAFETY: promised in `Inline::new`.
unsafe impl<F: Fn(&Trap<'_>) -> Decision + Send + Sync + 'static> InlineHandler for Inline<F> {
    #[inline]
    fn on_trap(&self, trap: &Trap<'_>) -> Decision {
        (self.0)(trap)
    }
}

/// A handler that runs on a thread of its own while the toucher sleeps. Ordinary code, with two duties: it must not touch
/// absent or protected pages of its own region (nobody would answer), and not wait for a thread that may be asleep on one;
/// if an allocator's own memory lies in the region, that includes allocating.
pub trait PagerHandler: Send + 'static {
    /// Serves one trap.
    fn on_trap(&mut self, trap: &Trap<'_>) -> Decision;
}

impl<F: FnMut(&Trap<'_>) -> Decision + Send + 'static> PagerHandler for F {
    fn on_trap(&mut self, trap: &Trap<'_>) -> Decision {
        self(trap)
    }
}

/// A region could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// No mechanism does what was asked for, or the forced one does not; each with its reason.
    #[error("no mechanism will do: {}{}", list(tried), unforced(*fallback))]
    NoMechanism {
        /// Each that was tried, with its reason.
        tried: Vec<(Mechanism, String)>,
        /// What would be used if none were forced.
        fallback: Option<Mechanism>,
    },
    /// The descriptor was refused.
    #[error("{0} (fall back to Mechanism::Mprotect, which needs none)")]
    Open(#[from] OpenError),
    /// The range was refused.
    #[error("userfaultfd registration of {range:?} for {mode:?}: {errno}; {remedy}", remedy = crate::mapping::remedy_for(*errno))]
    Register {
        /// The range.
        range: PageRange,
        /// What it was registered for.
        mode: RegisterMode,
        /// What the kernel answered.
        errno: Errno,
    },
    /// A part outside the mapping.
    #[error(transparent)]
    Map(#[from] crate::MapError),
    /// Another region or tracker changes the range's protection.
    #[error(transparent)]
    Claimed(#[from] Claimed),
    /// The signal handlers were refused.
    #[error("no signal handler: {0}; a seccomp filter forbids rt_sigaction")]
    Signal(Errno),
    /// Preparing the memory failed.
    #[error("preparing the memory: {0}")]
    Prepare(#[source] RegionError),
    /// The pager's thread could not be started.
    #[error("no thread for the pager: {0}")]
    Thread(#[from] std::io::Error),
}

fn list<M: fmt::Display>(reasons: &[(M, String)]) -> String {
    reasons.iter().map(|(m, why)| format!("{m}: {why}")).collect::<Vec<_>>().join("; ")
}

pub(crate) fn unforced<M: fmt::Display>(fallback: Option<M>) -> String {
    fallback.map_or(String::new(), |m| format!("; unforced, {m} would be used"))
}

enum Handler {
    None,
    Inline(Arc<dyn InlineHandler>),
    Pager(Box<dyn PagerHandler>),
}

/// Says what a region is to do; [`Builder::build`] finds the mechanism that does it.
pub struct Builder {
    mapping: Arc<Mapping>,
    part: PageRange,
    handler: Handler,
    wishes: Wishes,
    forced: Option<Mechanism>,
    claimed_by: &'static str,
}

impl Builder {
    pub(crate) const fn for_tracker(mut self) -> Self {
        self.claimed_by = "tracker";
        self
    }

    /// Serves only `part` of the mapping.
    #[must_use]
    pub fn part(mut self, part: PageRange) -> Self {
        self.part = part;
        self
    }

    /// Handles traps on the thread that touched the page.
    #[must_use]
    pub fn inline(mut self, handler: impl InlineHandler) -> Self {
        self.handler = Handler::Inline(Arc::new(handler));
        self
    }

    /// Handles traps on a thread of its own, which also serves system calls (not under `USER_MODE_ONLY`).
    #[must_use]
    pub fn pager(mut self, handler: impl PagerHandler) -> Self {
        self.handler = Handler::Pager(Box::new(handler));
        self
    }

    /// `protect(…, Read)` will be used: writes trap, reads don't. On by default; off makes guards eligible.
    #[must_use]
    pub const fn traps_writes(mut self, on: bool) -> Self {
        self.wishes.write_traps = on;
        self
    }

    /// `protect(…, None)` will be used: reads trap too.
    #[must_use]
    pub const fn traps_reads(mut self, on: bool) -> Self {
        self.wishes.read_traps = on;
        self
    }

    /// Absent pages trap and are filled by the handler; otherwise the kernel fills them.
    #[must_use]
    pub const fn traps_absent(mut self, on: bool) -> Self {
        self.wishes.absent_traps = on;
        self
    }

    /// Contents of protected pages may be lost, which makes guards eligible on private memory.
    #[must_use]
    pub const fn may_lose_contents(mut self, on: bool) -> Self {
        self.wishes.may_lose = on;
        self
    }

    /// Uses this mechanism or fails.
    #[must_use]
    pub const fn force(mut self, mechanism: Mechanism) -> Self {
        self.forced = Some(mechanism);
        self
    }

    fn choose(&self, wishes: Wishes, caps: &Capabilities) -> Result<Choice<Mechanism>, BuildError> {
        let candidates: &[Mechanism] = match &self.forced {
            Some(m) => core::slice::from_ref(m),
            None => &Mechanism::ALL,
        };
        let mut passed_over = Vec::new();
        for &mechanism in candidates {
            match mechanism::objection(mechanism, wishes, &self.mapping, caps) {
                None => return Ok(Choice { chosen: mechanism, passed_over }),
                Some(why) => passed_over.push((mechanism, why)),
            }
        }
        let free = |m: &Mechanism| mechanism::objection(*m, wishes, &self.mapping, caps).is_none();
        Err(BuildError::NoMechanism { tried: passed_over, fallback: Mechanism::ALL.into_iter().find(free) })
    }

    /// Makes the region; from now on its pages trap.
    ///
    /// With [`Builder::traps_absent`] on private or fresh memory, pages that are there already stay.
    ///
    /// # Errors
    /// [`BuildError`], with each mechanism's reason.
    pub fn build(self, caps: &Capabilities) -> Result<Region, BuildError> {
        self.mapping.check_inside(self.part)?;
        let mut wishes = self.wishes;
        wishes.inline = match self.handler {
            Handler::None => None,
            Handler::Inline(_) => Some(true),
            Handler::Pager(_) => Some(false),
        };
        let choice = self.choose(wishes, caps)?;
        let mechanism = choice.chosen;
        let claim = Claim::take(self.part, self.claimed_by)?;
        let shared = self.mapping.backing().is_shared();
        let mut mode = RegisterMode::empty();
        let uffd = if mechanism.uses_userfaultfd() {
            Some(caps.open_userfaultfd(features(mechanism, wishes, shared, caps))?)
        } else {
            None
        };
        let emulate = mechanism == Mechanism::Mprotect && wishes.absent_traps;
        let state_count = if emulate { self.part.pages().get() } else { 0 };
        let operations = Arc::new(Operations {
            mechanism,
            range: self.part,
            uffd,
            generation: process::current(),
            live: AtomicBool::new(false),
            minor: wishes.absent_traps && shared && caps.has(Capability::MinorShared),
            states: (0..state_count).map(|_| AtomicU8::new(0)).collect(),
            populate_first: !shared && !caps.has(Capability::WriteProtectUnpopulated),
            mapping: self.mapping,
        });
        if emulate {
            operations.note_object_pages();
        }
        // From here on `region`'s drop undoes whatever was done.
        let mut region = Region { registration: None, pager: None, operations, choice, claim: Some(claim) };
        match self.handler {
            Handler::Inline(handler) => {
                let adapter = Adapter { operations: region.operations.clone(), handler };
                let registration =
                    Registration::shared(self.part, Arc::new(adapter)).map_err(BuildError::Signal)?;
                region.registration = Some(registration);
            }
            Handler::Pager(handler) => {
                region.pager = Some(PagerThread::start(region.operations.clone(), handler)?);
            }
            Handler::None => {}
        }
        if let Some(uffd) = &region.operations.uffd {
            if wishes.write_traps {
                mode |= RegisterMode::WP;
            }
            if wishes.absent_traps {
                mode |= RegisterMode::MISSING;
                if region.operations.minor {
                    mode |= RegisterMode::MINOR;
                }
            }
            // SAFETY: the region holds the mapping and the claim on this part: it owns the range.
            unsafe { uffd.by_ref().register(self.part, mode) }.map_err(|errno| BuildError::Register {
                range: self.part,
                mode,
                errno,
            })?;
        } else if emulate {
            // SAFETY: as above.
            unsafe { mem::protect(self.part, Protection::None) }.map_err(|errno| {
                let operation = "protect absent pages";
                BuildError::Prepare(RegionError::Kernel { operation, range: self.part, mechanism, errno })
            })?;
        }
        // Release pairs with the Acquire in `is_live`.
        region.operations.live.store(true, Ordering::Release);
        Ok(region)
    }
}

fn features(mechanism: Mechanism, wishes: Wishes, shared: bool, caps: &Capabilities) -> Features {
    let mut features = Features::empty();
    if mechanism == Mechanism::Sigbus {
        features |= Features::SIGBUS;
    } else {
        features |= Features::EXACT_ADDRESS;
        if caps.has(Capability::ThreadId) {
            features |= Features::THREAD_ID;
        }
    }
    let mut want = |on: bool, capability: Capability, feature: Features| {
        if on && caps.has(capability) {
            features |= feature;
        }
    };
    want(wishes.write_traps, Capability::WriteProtect, Features::PAGEFAULT_FLAG_WP);
    want(wishes.write_traps && shared, Capability::WriteProtectShared, Features::WP_HUGETLBFS_SHMEM);
    want(wishes.write_traps, Capability::WriteProtectUnpopulated, Features::WP_UNPOPULATED);
    want(wishes.absent_traps && shared, Capability::MissingShared, Features::MISSING_SHMEM);
    want(wishes.absent_traps && shared, Capability::MinorShared, Features::MINOR_SHMEM);
    want(wishes.absent_traps, Capability::Poison, Features::POISON);
    want(!shared, Capability::Move, Features::MOVE);
    features
}

/// Joins a region's handler to the registry. Trap code.
struct Adapter {
    operations: Arc<Operations>,
    handler: Arc<dyn InlineHandler>,
}

// SAFETY: it adds nothing to what the handler promised in `InlineHandler`.
unsafe impl SignalHandler for Adapter {
    #[inline]
    fn on_fault(&self, fault: &Fault) -> Decision {
        match self.handler.on_trap(&Trap::new(*fault, &self.operations)) {
            // The region was not there yet when this thread faulted, or goes while it is on its way here, so the handler could
            // do nothing: the access repeats on plain memory.
            Decision::Deny if !self.operations.is_live() => Decision::Retry,
            decision => decision,
        }
    }
}

/// Memory whose absence, protection and traps are in the program's hands; dropping it makes the memory plain again.
///
/// Must not be dropped inside one of its handlers.
///
/// ```
/// use peregrine_vm::{Capabilities, Decision, Inline, Mapping, PageCount, Protection, Region, Trap};
/// use std::sync::Arc;
///
/// let memory = Arc::new(Mapping::memfd(PageCount::new(8))?);
/// // SAFETY: makes one system call, and nothing else.
/// let handler = unsafe { Inline::new(|trap: &Trap<'_>| trap.unprotect()) };
/// let region = Region::builder(memory.clone()).inline(handler).build(&Capabilities::probe())?;
/// region.protect(&[region.range()], Protection::Read)?;
/// memory.bytes().write(100, b"traps, is unprotected, and goes on")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Region {
    // In this order they are undone: first no handler runs, then the memory is made plain, then it may be claimed anew.
    registration: Option<Registration>,
    pager: Option<PagerThread>,
    operations: Arc<Operations>,
    choice: Choice<Mechanism>,
    claim: Option<Claim>,
}

impl Region {
    /// A region over the whole of `mapping`, unless the builder is told otherwise.
    pub fn builder(mapping: Arc<Mapping>) -> Builder {
        let wishes = Wishes {
            inline: None,
            write_traps: true,
            read_traps: false,
            absent_traps: false,
            may_lose: false,
        };
        Builder {
            part: mapping.range(),
            mapping,
            handler: Handler::None,
            wishes,
            forced: None,
            claimed_by: "region",
        }
    }

    /// What carries it, and why nothing better does.
    pub const fn choice(&self) -> &Choice<Mechanism> {
        &self.choice
    }

    /// Whether a system call that touches a trapping page is served (by the pager) rather than failing with EFAULT.
    pub fn serves_system_calls(&self) -> bool {
        self.pager.is_some()
            && self.operations.uffd.as_ref().is_some_and(|u| u.access().serves_kernel_faults())
    }
}

impl Deref for Region {
    type Target = Operations;
    fn deref(&self) -> &Operations {
        &self.operations
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({:?} over {})", self.operations.range, self.choice)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let ops = &self.operations;
        let here = ops.generation.is_current();
        // Release pairs with the Acquire in `is_live`; the calls below come after it.
        ops.live.store(false, Ordering::Release);
        match ops.mechanism {
            // In a child the descriptor is the parent's: unregistering there would strip the parent's memory.
            Mechanism::Sigbus | Mechanism::Pager if here => {
                if let Some(uffd) = &ops.uffd {
                    let _ = uffd.by_ref().unregister(ops.range);
                }
            }
            Mechanism::Sigbus | Mechanism::Pager => {}
            Mechanism::Mprotect => {
                // SAFETY: the region's own range, given back the access it was mapped with.
                let _ = unsafe { mem::protect(ops.range, ops.mapping.access()) };
            }
            Mechanism::Guard => {
                // SAFETY: the region's own range.
                let _ = unsafe { guard::remove(ops.range) };
            }
        }
        // After the memory is plain, so that a thread trapping meanwhile still finds its handler.
        self.registration = None;
        if let Some(pager) = self.pager.take() {
            pager.stop(here);
        }
        self.claim = None;
    }
}
