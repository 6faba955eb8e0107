//! DIRTY: which pages were written since the last time.
//!
//! ```text
//!   Tracker ── take_dirty ──▶ ViewDirty      pages written through ONE view (one mapping of one process)
//!      │  several, over aliases, or sets sent by other processes
//!   UnionTracker ── take_dirty ──▶ ObjectDirty   pages of the memfd or file, written through any of them
//! ```
//!
//! The promise: a write that happened before a `take_dirty` is reported by it, or was by an earlier one. A write that goes
//! on meanwhile is reported by it or by the next. Pages may be reported that were not written since; never the other way.

mod compare;
mod raw;
mod scan;
mod set;
mod trapping;
mod union;
mod words;

use crate::claims::{Claim, Claimed};
use crate::mapping::{Mapping, PrivateMemory};
use crate::process::{self, Forked, Generation};
use crate::region::{BuildError, Choice, Mechanism, Region, RegionError, Wishes, objection};
use peregrine_base::{PageCount, PageRange, Protection};
use peregrine_sys::capabilities::{Capabilities, Capability};
use peregrine_sys::raw::Errno;
use peregrine_sys::uffd::OpenError;
pub use raw::{DirtyRun, RawTracker, RawTrackerRef, Taken};
pub use set::{ObjectDirty, ObjectRun, ViewDirty};
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
pub use union::{UnionError, UnionTracker};

/// How a [`Tracker`] sees writes.
///
/// | | cost of a first write | sees | a system call that writes | beyond memory |
/// |---|---|---|---|---|
/// | `AsyncWriteProtect` | about 1 µs, in the kernel | this view | is tracked | nothing |
/// | `SyncWriteProtect` | a SIGBUS | this view | fails with EFAULT | 2 bytes a page |
/// | `SyncWriteProtectPager` | a thread switch | this view | is tracked; EFAULT under `USER_MODE_ONLY` | 2 bytes a page |
/// | `Mprotect` | a SIGSEGV | this view | fails with EFAULT | 2 bytes a page; splits mappings |
/// | `Compare` | none | every view, all processes | is seen | a copy of everything; a write that changes nothing, or is undone, is not seen |
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DirtyMechanism {
    /// `UFFD_FEATURE_WP_ASYNC` and `PAGEMAP_SCAN`: the kernel does it all.
    AsyncWriteProtect,
    /// userfaultfd write-protect, trapped in the writing thread.
    SyncWriteProtect,
    /// userfaultfd write-protect, answered by a thread.
    SyncWriteProtectPager,
    /// `mprotect` and SIGSEGV.
    Mprotect,
    /// A full copy, compared.
    Compare,
}

impl DirtyMechanism {
    /// Every mechanism, best first.
    pub const ALL: [Self; 5] = [
        Self::AsyncWriteProtect,
        Self::SyncWriteProtect,
        Self::SyncWriteProtectPager,
        Self::Mprotect,
        Self::Compare,
    ];

    /// The region mechanism that carries it, if one does.
    const fn region_mechanism(self) -> Option<Mechanism> {
        match self {
            Self::SyncWriteProtect => Some(Mechanism::Sigbus),
            Self::SyncWriteProtectPager => Some(Mechanism::Pager),
            Self::Mprotect => Some(Mechanism::Mprotect),
            Self::AsyncWriteProtect | Self::Compare => None,
        }
    }
}

impl fmt::Display for DirtyMechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::AsyncWriteProtect => "PAGEMAP_SCAN+WP_ASYNC",
            Self::SyncWriteProtect => "userfaultfd WP+SIGBUS",
            Self::SyncWriteProtectPager => "userfaultfd WP+pager",
            Self::Mprotect => "mprotect+SIGSEGV",
            Self::Compare => "compare",
        })
    }
}

/// Tracking could not begin or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackError {
    /// No mechanism will do, or the forced one will not.
    #[error("no mechanism will do: {}{}", list(tried), crate::region::unforced(*fallback))]
    NoMechanism {
        /// Each that was tried, with its reason.
        tried: Vec<(DirtyMechanism, String)>,
        /// What would be used if none were forced.
        fallback: Option<DirtyMechanism>,
    },
    /// The region that carries it could not be made.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The descriptor was refused.
    #[error("{0} (fall back to DirtyMechanism::Mprotect or Compare, which need none)")]
    Open(#[from] OpenError),
    /// The kernel's books can't be read.
    #[error(
        "open of /proc/self/pagemap: {0}; mount /proc, or prctl(PR_SET_DUMPABLE, 1) after a change of user"
    )]
    Pagemap(Errno),
    /// Another region or tracker changes the range's protection.
    #[error(transparent)]
    Claimed(#[from] Claimed),
    /// A part outside the mapping.
    #[error(transparent)]
    Map(#[from] crate::MapError),
    /// A part outside what is tracked.
    #[error("{asked:?} does not lie in the tracked {tracked:?}")]
    Outside {
        /// What was asked for.
        asked: PageRange,
        /// What is tracked.
        tracked: PageRange,
    },
    /// The kernel refused.
    #[error("{operation} of {range:?}: {errno}; {remedy}")]
    Kernel {
        /// What was to be done.
        operation: &'static str,
        /// To which pages.
        range: PageRange,
        /// What the kernel answered.
        errno: Errno,
        /// What to do.
        remedy: &'static str,
    },
    /// An operation of the region underneath failed.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// Used in a child of the process that began it: the child's writes are not tracked.
    #[error(transparent)]
    Forked(#[from] Forked),
}

fn list(reasons: &[(DirtyMechanism, String)]) -> String {
    reasons.iter().map(|(m, why)| format!("{m}: {why}")).collect::<Vec<_>>().join("; ")
}

/// Says what a tracker must see; [`Builder::start`] finds the mechanism.
pub struct Builder {
    mapping: Arc<Mapping>,
    part: PageRange,
    forced: Option<DirtyMechanism>,
    kernel_writes: bool,
}

impl Builder {
    /// Tracks only `part`.
    #[must_use]
    pub const fn part(mut self, part: PageRange) -> Self {
        self.part = part;
        self
    }

    /// Uses this mechanism or fails.
    #[must_use]
    pub const fn force(mut self, mechanism: DirtyMechanism) -> Self {
        self.forced = Some(mechanism);
        self
    }

    /// System calls write into the memory (`read`, `recv`): only mechanisms under which they succeed will do.
    #[must_use]
    pub const fn kernel_writes(mut self, on: bool) -> Self {
        self.kernel_writes = on;
        self
    }

    fn objection(&self, mechanism: DirtyMechanism, caps: &Capabilities) -> Option<String> {
        let lack = |c: Capability| caps.lack(c).map(|l| l.to_string());
        let breaks_calls = matches!(mechanism, DirtyMechanism::SyncWriteProtect | DirtyMechanism::Mprotect);
        if self.kernel_writes && breaks_calls {
            return Some("a system call that writes into a clean page would fail with EFAULT".into());
        }
        match mechanism {
            DirtyMechanism::AsyncWriteProtect => lack(Capability::Userfaultfd)
                .or_else(|| lack(Capability::WriteProtectAsync))
                .or_else(|| lack(Capability::PagemapScan)),
            DirtyMechanism::Compare => (self.mapping.access() == Protection::None)
                .then(|| "a view without access can't be compared: track one that may be read".into()),
            DirtyMechanism::Mprotect if self.mapping.access() != Protection::ReadWrite => {
                Some("the view may not be written, and mprotect would open it".into())
            }
            _ => {
                if self.mapping.grain().get() > 1 {
                    return Some(
                        "pages of the pool are tracked by the kernel (AsyncWriteProtect) or by Compare"
                            .into(),
                    );
                }
                let pager = mechanism == DirtyMechanism::SyncWriteProtectPager;
                if let (true, Some(why)) =
                    (self.kernel_writes && pager, lack(Capability::UserfaultfdKernelFaults))
                {
                    return Some(why);
                }
                let wishes = Wishes {
                    inline: Some(!pager),
                    write_traps: true,
                    read_traps: false,
                    absent_traps: false,
                    may_lose: false,
                };
                mechanism.region_mechanism().and_then(|m| objection(m, wishes, &self.mapping, caps))
            }
        }
    }

    /// Begins to track: every page is clean now.
    ///
    /// # Errors
    /// [`TrackError`], with each mechanism's reason.
    pub fn start(self, caps: &Capabilities) -> Result<Tracker, TrackError> {
        self.mapping.check_inside(self.part)?;
        let candidates: &[DirtyMechanism] = match &self.forced {
            Some(m) => core::slice::from_ref(m),
            None => &DirtyMechanism::ALL,
        };
        let mut passed_over = Vec::new();
        let mut chosen = None;
        for &mechanism in candidates {
            match self.objection(mechanism, caps) {
                None => {
                    chosen = Some(mechanism);
                    break;
                }
                Some(why) => passed_over.push((mechanism, why)),
            }
        }
        let Some(chosen) = chosen else {
            let fallback = DirtyMechanism::ALL.into_iter().find(|m| self.objection(*m, caps).is_none());
            return Err(TrackError::NoMechanism { tried: passed_over, fallback });
        };
        let discards_seen = self.mapping.discards().finished();
        let mut claim = None;
        let inner = match chosen {
            DirtyMechanism::AsyncWriteProtect => {
                claim = Some(Claim::take(self.part, "tracker")?);
                Inner::Scan(scan::Scan::start(self.part, &self.mapping, caps)?)
            }
            DirtyMechanism::Compare => Inner::Compare(compare::Compare::start(self.part, &self.mapping)),
            _ => {
                let builder = Region::builder(self.mapping.clone()).part(self.part);
                let mechanism = chosen.region_mechanism().unwrap_or(Mechanism::Mprotect);
                Inner::Trapping(trapping::Trapping::start(builder.for_tracker(), mechanism, self.part, caps)?)
            }
        };
        Ok(Tracker {
            inner,
            _claim: claim,
            part: self.part,
            mapping: self.mapping,
            generation: process::current(),
            choice: Choice { chosen, passed_over },
            discards_seen,
        })
    }
}

enum Inner {
    Scan(scan::Scan),
    Trapping(trapping::Trapping),
    Compare(compare::Compare),
}

/// Watches the writes made through one view: one mapping, in the process that made the tracker.
///
/// Writes through an alias, by another process, or by the kernel into another mapping are **not** seen (except by
/// [`DirtyMechanism::Compare`]); whoever needs the dirty pages of shared memory takes a [`UnionTracker`] over all views
/// that may write.
///
/// ```
/// use peregrine_vm::{Capabilities, PageCount, PrivateMemory, Tracker};
/// let mut memory = PrivateMemory::new(PageCount::new(16))?;
/// let mut tracker = Tracker::of_private(&memory).start(&Capabilities::probe())?;
/// memory[3 * 4096] = 7;
/// let dirty = tracker.take_dirty()?;
/// assert_eq!(dirty.page_count().get(), 1);
/// assert!(tracker.take_dirty()?.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Tracker {
    // First, so that it is undone before the mapping may go.
    inner: Inner,
    _claim: Option<Claim>,
    part: PageRange,
    mapping: Arc<Mapping>,
    generation: Generation,
    choice: Choice<DirtyMechanism>,
    /// Discards of the mapping that have been reported.
    discards_seen: u64,
}

impl Tracker {
    /// Tracks the whole of `mapping`, unless the builder is told otherwise.
    pub fn of(mapping: Arc<Mapping>) -> Builder {
        Builder { part: mapping.range(), mapping, forced: None, kernel_writes: false }
    }

    /// Tracks private memory, which stays usable as a plain slice: tracking changes when the kernel traps, never a byte.
    pub fn of_private(memory: &PrivateMemory) -> Builder {
        Self::of(memory.mapping().clone())
    }

    /// What is tracked.
    pub const fn range(&self) -> PageRange {
        self.part
    }

    /// What sees the writes, and why nothing better does.
    pub const fn choice(&self) -> &Choice<DirtyMechanism> {
        &self.choice
    }

    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// The userfaultfd that stops the writers, of the mechanisms that do so by one: for measuring them. What is done through it
    /// is between the caller and the kernel, and may make the tracker miss writes.
    pub fn userfaultfd(&self) -> Option<BorrowedFd<'_>> {
        match &self.inner {
            Inner::Trapping(trapping) => trapping.userfaultfd(),
            Inner::Scan(_) | Inner::Compare(_) => None,
        }
    }

    /// DIRTY: the pages written since the last call, which makes them clean.
    ///
    /// # Errors
    /// [`TrackError`]. What had been taken before the error is dirty again.
    pub fn take_dirty(&mut self) -> Result<ViewDirty, TrackError> {
        self.take_dirty_in(self.part)
    }

    /// As [`Tracker::take_dirty`], of part of what is tracked; the rest stays as it is.
    ///
    /// # Errors
    /// As [`Tracker::take_dirty`].
    pub fn take_dirty_in(&mut self, part: PageRange) -> Result<ViewDirty, TrackError> {
        let mut set = ViewDirty::new();
        match self.take_dirty_each(part, |run| set.push(run)) {
            Ok(always) => {
                set.set_always_dirty(always);
                Ok(set)
            }
            Err(e) => {
                self.give_back(&set);
                Err(e)
            }
        }
    }

    /// As [`Tracker::take_dirty`], by offset in the memfd or file: what a process sends to whoever unites the views.
    ///
    /// # Errors
    /// As [`Tracker::take_dirty`].
    pub fn take_object_dirty(&mut self) -> Result<ObjectDirty, TrackError> {
        let set = self.take_dirty()?;
        Ok(union::in_object(self, &set))
    }

    /// As [`Tracker::take_dirty_in`], without allocating: calls `found` with each run of pages, lowest first. Returns how many
    /// of them will be reported every time, because the kernel can't protect them again (`vm.max_map_count`).
    ///
    /// `found` must not write into what is tracked by a mechanism that traps inline while it holds locks of its own.
    ///
    /// # Errors
    /// As [`Tracker::take_dirty`], but what `found` was called with stays taken.
    pub fn take_dirty_each(
        &mut self,
        part: PageRange,
        mut found: impl FnMut(PageRange),
    ) -> Result<PageCount, TrackError> {
        if part.start() < self.part.start() || part.end() > self.part.end() {
            return Err(TrackError::Outside { asked: part, tracked: self.part });
        }
        Forked::check(self.generation, self.part)?;
        if self.mapping.discards().since(&mut self.discards_seen) {
            match &mut self.inner {
                Inner::Scan(scan) => scan.mark_all()?,
                Inner::Trapping(trapping) => trapping.mark_all(),
                // It sees that the contents have changed, if they have.
                Inner::Compare(_) => {}
            }
        }
        match &mut self.inner {
            Inner::Scan(scan) => scan.take(part, &mut found).map(|()| PageCount::new(0)),
            Inner::Trapping(trapping) => Ok(trapping.take(part, &mut found)),
            Inner::Compare(compare) => {
                compare.take(part, &self.mapping, &mut found);
                Ok(PageCount::new(0))
            }
        }
    }

    /// Pages of `set` count as written again: for a consumer that could not use what it took.
    /// In a child of the process that began to track it does nothing.
    pub fn give_back(&mut self, set: &ViewDirty) {
        if !self.generation.is_current() {
            return;
        }
        match &mut self.inner {
            Inner::Scan(scan) => scan.give_back(set),
            Inner::Trapping(trapping) => trapping.give_back(set),
            Inner::Compare(compare) => compare.give_back(set),
        }
    }

    /// Takes the last dirty set and stops tracking; the memory is plain again. A write that races with this may be lost, so
    /// stop the writers first.
    ///
    /// # Errors
    /// As [`Tracker::take_dirty`]; tracking has then ended too.
    pub fn finish(mut self) -> Result<ViewDirty, TrackError> {
        self.take_dirty()
    }
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tracker({:?} over {})", self.part, self.choice)
    }
}
