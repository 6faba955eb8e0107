//! What can be done to a region's pages. **Every method here may be called in a trap: allocates nothing, locks nothing,
//! panics never (S3)**; each is one system call, or a few where the kernel stops early.

use super::mechanism::Mechanism;
use crate::mapping::Mapping;
use crate::process::{Forked, Generation};
use peregrine_base::sync::{AtomicBool, AtomicU8, Ordering};
use peregrine_base::{PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::guard;
use peregrine_sys::mem::{self, Advice};
use peregrine_sys::raw::Errno;
use peregrine_sys::uffd::{Uffd, UffdRef};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// An operation on a region's pages failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// The kernel refused; ranges of the batch before this one are done.
    #[error("{operation} of {range:?} over {mechanism}: {errno}; {remedy}", remedy = crate::mapping::remedy_for(*errno))]
    Kernel {
        /// What was to be done.
        operation: &'static str,
        /// To which pages.
        range: PageRange,
        /// Over which mechanism.
        mechanism: Mechanism,
        /// What the kernel answered.
        errno: Errno,
    },
    /// The mechanism can't do that.
    #[error("{operation} is not offered by {mechanism}: {instead}")]
    NotOffered {
        /// What was asked for.
        operation: &'static str,
        /// Of which mechanism.
        mechanism: Mechanism,
        /// What to use.
        instead: &'static str,
    },
    /// Pages beyond the region.
    #[error("{asked:?} does not lie in the region {region:?}")]
    Outside {
        /// What was asked for.
        asked: PageRange,
        /// The region.
        region: PageRange,
    },
    /// The bytes given are fewer than the pages to fill.
    #[error("{given_bytes} bytes can't fill {range:?}")]
    Short {
        /// What was to be filled.
        range: PageRange,
        /// How much was given.
        given_bytes: usize,
    },
    /// Used in a child of the process that made the region.
    #[error(transparent)]
    Forked(#[from] Forked),
}

/// A region's operations; [`Region`](super::Region) and [`Trap::region`](super::Trap::region) give them.
///
/// "Trap-safe" holds for all of them. Two threads may call any of them at once on the same pages: of two fills the first
/// wins and the second leaves the page alone; of two protections the later one stands.
///
/// ```
/// use peregrine_vm::{Capabilities, Inline, Mapping, PageCount, Protection, Region, Trap};
/// use std::sync::Arc;
///
/// let memory = Arc::new(Mapping::memfd(PageCount::new(100))?);
/// // SAFETY: makes one system call, and nothing else.
/// let handler = unsafe { Inline::new(|trap: &Trap<'_>| trap.unprotect()) };
/// let region = Region::builder(memory.clone()).inline(handler).build(&Capabilities::probe())?;
/// // Rights fall in batches, one call a run of neighbours, …
/// region.protect(&[memory.pages(0, 10)?, memory.pages(10, 10)?, memory.pages(50, 1)?], Protection::Read)?;
/// // … and rise a page at a time: here at once, in the handler when the page is written.
/// region.unprotect(memory.bytes().address(50 * 4096)?)?;
/// memory.bytes().store_u64(50 * 4096, 1)?;
/// memory.bytes().store_u64(5 * 4096, 1)?; // traps
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Operations {
    pub(super) mechanism: Mechanism,
    pub(super) range: PageRange,
    pub(super) mapping: Arc<Mapping>,
    pub(super) uffd: Option<Uffd>,
    pub(super) generation: Generation,
    /// Set once the region is made, cleared before it is undone: a trap outside that time was under way since before, and
    /// finds the memory plain, or about to be.
    pub(super) live: AtomicBool,
    /// One a page where absent pages are emulated; else empty.
    pub(super) states: Box<[AtomicU8]>,
    /// Registered for minor faults: a page may be in the object and not here.
    pub(super) minor: bool,
    /// Protecting absent anonymous pages needs them populated first.
    pub(super) populate_first: bool,
}

impl Operations {
    /// The region's pages.
    pub const fn range(&self) -> PageRange {
        self.range
    }

    /// What carries it.
    pub const fn mechanism(&self) -> Mechanism {
        self.mechanism
    }

    /// The memory.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    #[inline]
    pub(super) fn check(&self, asked: PageRange) -> Result<(), RegionError> {
        if asked.start() >= self.range.start() && asked.end() <= self.range.end() {
            Ok(())
        } else {
            Err(RegionError::Outside { asked, region: self.range })
        }
    }

    pub(super) const fn failed(
        &self,
        operation: &'static str,
        range: PageRange,
    ) -> impl FnOnce(Errno) -> RegionError + use<> {
        let mechanism = self.mechanism;
        move |errno| RegionError::Kernel { operation, range, mechanism, errno }
    }

    pub(super) const fn not_offered(&self, operation: &'static str, instead: &'static str) -> RegionError {
        RegionError::NotOffered { operation, mechanism: self.mechanism, instead }
    }

    /// The descriptor, in the process that made it only: in a child it would act on the parent's memory.
    #[inline]
    pub(super) fn uffd(&self, operation: &'static str) -> Result<UffdRef<'_>, RegionError> {
        Forked::check(self.generation, self.range)?;
        match &self.uffd {
            Some(uffd) => Ok(uffd.by_ref()),
            None => Err(self.not_offered(operation, "use Mechanism::Sigbus or Pager (userfaultfd)")),
        }
    }

    /// The userfaultfd underneath, if there is one: for calls that this crate does not offer, and for measuring it. What is
    /// done through it is between the caller and the kernel.
    pub fn userfaultfd(&self) -> Option<BorrowedFd<'_>> {
        self.uffd.as_ref().map(AsFd::as_fd)
    }

    /// Whether the region is wholly made and not being undone. Trap-safe.
    pub(crate) fn is_live(&self) -> bool {
        // Acquire pairs with the Release stores in `Builder::build` and `Region::drop`: whoever met a range that is not
        // registered sees why.
        self.live.load(Ordering::Acquire)
    }

    pub(crate) fn uffd_for_pager(&self) -> Option<UffdRef<'_>> {
        self.uffd.as_ref().map(Uffd::by_ref)
    }

    /// PROT1, PROTN, UNPROT: sets the access of each range. Neighbours in the list become one call.
    ///
    /// Appel and Li's lesson: lower rights in batches, raise them a page at a time ([`Operations::unprotect`]).
    ///
    /// # Errors
    /// [`RegionError`]; ranges before the one that failed are done.
    // Into the handler itself, as all that it calls: where the kernel returns by way of "safe RET", it leaves nothing in the
    // processor's return stack that a caller from before a system call could be predicted by, and half a microsecond goes by.
    #[inline(always)]
    pub fn protect(&self, ranges: &[PageRange], access: Protection) -> Result<(), RegionError> {
        let mut rest = ranges;
        while let [first, after @ ..] = rest {
            let mut range = *first;
            rest = after;
            while let [next, after @ ..] = rest
                && next.start() == range.end()
            {
                let pages = range.pages().get() + next.pages().get();
                range = PageRange::new(range.start(), PageCount::new(pages));
                rest = after;
            }
            self.protect_one(range, access)?;
        }
        Ok(())
    }

    /// As [`Operations::unprotect`], leaving the pager's touchers asleep, so that its books can be closed first.
    #[inline(always)]
    pub(crate) fn unprotect_quietly(&self, page: VirtAddr) -> Result<(), RegionError> {
        if self.mechanism != Mechanism::Pager {
            return self.unprotect(page);
        }
        let (range, uffd) = (self.mapping.grain_of(page), self.uffd("protect")?);
        retry(|| uffd.lift_without_waking(range)).map_err(self.failed("protect", range))
    }

    /// UNPROT: opens one page (of the pool: one huge page) for reading and writing.
    ///
    /// # Errors
    /// [`RegionError`].
    #[inline(always)]
    pub fn unprotect(&self, page: VirtAddr) -> Result<(), RegionError> {
        self.protect_one(self.mapping.grain_of(page), Protection::ReadWrite)
    }

    #[inline(always)]
    fn protect_one(&self, range: PageRange, access: Protection) -> Result<(), RegionError> {
        self.check(range)?;
        if range.is_empty() {
            return Ok(());
        }
        let done = match (self.mechanism, access) {
            (Mechanism::Sigbus | Mechanism::Pager, Protection::None) => {
                return Err(self.not_offered("protect to None", "use Mechanism::Mprotect, or Guard"));
            }
            (Mechanism::Sigbus | Mechanism::Pager, _) => {
                let uffd = self.uffd("protect")?;
                let protect = access == Protection::Read;
                if protect && self.populate_first {
                    // SAFETY: the range is the region's; populating for reading changes no contents.
                    unsafe { mem::advise(range, Advice::PopulateRead) }
                        .map_err(self.failed("populate before protect", range))?;
                }
                retry(|| uffd.write_protect(range, protect))
            }
            (Mechanism::Guard, Protection::Read) => {
                return Err(self.not_offered("protect to Read", "use Mechanism::Sigbus or Mprotect"));
            }
            (Mechanism::Guard, Protection::None) => retry(|| {
                // SAFETY: the range is the region's, which `self.mapping` keeps; that contents may be lost was said when it
                // was built; no userfaultfd write-protects it, for the region's claim is exclusive.
                unsafe { guard::install(range) }
            }),
            (Mechanism::Guard, Protection::ReadWrite) => retry(|| {
                // SAFETY: the range is the region's, which `self.mapping` keeps.
                unsafe { guard::remove(range) }
            }),
            (Mechanism::Mprotect, _) if self.states.is_empty() => {
                // SAFETY: the range is the region's, which `self.mapping` keeps, and whose traps are expected.
                unsafe { mem::protect(range, access) }
            }
            (Mechanism::Mprotect, _) => return self.protect_present(range, access),
        };
        done.map_err(|errno| self.refused("protect", range, errno))
    }

    #[cold]
    #[inline(never)]
    fn refused(&self, operation: &'static str, range: PageRange, errno: Errno) -> RegionError {
        self.failed(operation, range)(errno)
    }
}

/// Repeats a call that the kernel broke off for a signal or a changing address space.
#[inline]
pub(crate) fn retry(mut call: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    loop {
        match call() {
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            other => return other,
        }
    }
}
