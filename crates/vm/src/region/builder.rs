//! From what a region is to do, to the region: which mechanism does it, and in which order it is set up.

use super::handler::Adapter;
use super::mechanism::{Choice, Mechanism, Wishes, objection};
use super::operations::{Operations, RegionError};
use super::{InlineHandler, PagerHandler, Region};
use crate::claims::{Claim, Claimed};
use crate::mapping::Mapping;
use crate::process;
use crate::trap::Registration;
use crate::trap::pager::PagerThread;
use peregrine_base::sync::{AtomicBool, AtomicU8, Ordering};
use peregrine_base::{PageRange, Protection};
use peregrine_sys::capabilities::{Capabilities, Capability};
use peregrine_sys::mem;
use peregrine_sys::raw::Errno;
use peregrine_sys::uffd::{Features, OpenError, RegisterMode};
use std::fmt;
use std::sync::Arc;

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

/// What is done with the handler once its region is there: in trap code nobody asks which handler it is.
enum Handler {
    None,
    Inline(Box<dyn FnOnce(PageRange, Arc<Operations>) -> Result<Registration, Errno> + Send>),
    Pager(Box<dyn FnOnce(Arc<Operations>) -> Result<PagerThread, std::io::Error> + Send>),
}

/// Says what a region is to do; [`Builder::build`] finds the mechanism that does it.
///
/// A pager that makes up each page when it is first touched, sixteen at a time:
///
/// ```
/// use peregrine_vm::{Capabilities, Capability, Mapping, PAGE_SIZE, PageCount, Protection, Region, Trap};
/// use std::sync::Arc;
///
/// let caps = Capabilities::probe();
/// if !caps.has(Capability::Userfaultfd) {
///     return Ok(()); // `build` would say why, and what to do
/// }
/// let memory = Arc::new(Mapping::anonymous(PageCount::new(64))?);
/// let mut buffer = vec![0; 16 * PAGE_SIZE];
/// let region = Region::builder(memory.clone())
///     .traps_absent(true)
///     .traps_writes(false)
///     .pager(move |trap: &Trap<'_>| {
///         let block = trap.block(PageCount::new(16));
///         let number = trap.page_index() / 16;
///         buffer.fill(number as u8);
///         trap.decide(trap.region().fill_copy(block, &buffer, Protection::ReadWrite))
///     })
///     .build(&caps)?;
/// println!("{}", region.choice()); // which mechanism, and why not a better one
/// assert_eq!(memory.bytes().load_u8(40 * PAGE_SIZE)?, 2);
/// region.evict(memory.pages(32, 16)?)?; // absent again: the next touch asks once more
/// assert_eq!(memory.bytes().load_u8(40 * PAGE_SIZE + 1)?, 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Builder {
    mapping: Arc<Mapping>,
    part: PageRange,
    handler: Handler,
    wishes: Wishes,
    forced: Option<Mechanism>,
    claimed_by: &'static str,
}

impl Builder {
    pub(super) fn over(mapping: Arc<Mapping>, wishes: Wishes) -> Self {
        Self {
            part: mapping.range(),
            mapping,
            handler: Handler::None,
            wishes,
            forced: None,
            claimed_by: "region",
        }
    }

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
        self.handler = Handler::Inline(Box::new(move |part, operations| {
            Registration::shared(part, Arc::new(Adapter { operations, handler }))
        }));
        self
    }

    /// Handles traps on a thread of its own, which also serves system calls (not under `USER_MODE_ONLY`).
    #[must_use]
    pub fn pager(mut self, handler: impl PagerHandler) -> Self {
        self.handler = Handler::Pager(Box::new(move |operations| PagerThread::start(operations, handler)));
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
            match objection(mechanism, wishes, &self.mapping, caps) {
                None => return Ok(Choice { chosen: mechanism, passed_over }),
                Some(why) => passed_over.push((mechanism, why)),
            }
        }
        let free = |m: &Mechanism| objection(*m, wishes, &self.mapping, caps).is_none();
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
            Handler::Inline(register) => {
                let registered = register(self.part, region.operations.clone());
                region.registration = Some(registered.map_err(BuildError::Signal)?);
            }
            Handler::Pager(start) => region.pager = Some(start(region.operations.clone())?),
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
