//! What can be done to a region's pages. **Every method here may be called in a trap: allocates nothing, locks nothing,
//! panics never (S3)**; each is one system call, or a few where the kernel stops early.

use super::mechanism::Mechanism;
use crate::mapping::{Backing, Mapping, Object};
use crate::process::{Forked, Generation};
use peregrine_base::sync::{AtomicBool, AtomicU8, Ordering};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::mem::{self, Advice};
use peregrine_sys::raw::Errno;
use peregrine_sys::uffd::{FillMode, Partial, Uffd, UffdRef};
use peregrine_sys::{guard, io, memfd};
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

/// Page states where the kernel does not keep them for us (`Mprotect` with absent pages).
const ABSENT: u8 = 0;
/// One thread is filling or evicting it; others come back later.
const CHANGING: u8 = 1;
const PRESENT: u8 = 2;
/// Absent in this view, and the object has its contents: a fill only maps it.
const IN_OBJECT: u8 = 3;

static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// A region's operations; [`Region`](super::Region) and [`Trap::region`](super::Trap::region) give them.
///
/// "Trap-safe" holds for all of them. Two threads may call any of them at once on the same pages: of two fills the first
/// wins and the second leaves the page alone; of two protections the later one stands.
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
    fn check(&self, asked: PageRange) -> Result<(), RegionError> {
        if asked.start() >= self.range.start() && asked.end() <= self.range.end() {
            Ok(())
        } else {
            Err(RegionError::Outside { asked, region: self.range })
        }
    }

    const fn failed(
        &self,
        operation: &'static str,
        range: PageRange,
    ) -> impl FnOnce(Errno) -> RegionError + use<> {
        let mechanism = self.mechanism;
        move |errno| RegionError::Kernel { operation, range, mechanism, errno }
    }

    const fn not_offered(&self, operation: &'static str, instead: &'static str) -> RegionError {
        RegionError::NotOffered { operation, mechanism: self.mechanism, instead }
    }

    /// The descriptor, in the process that made it only: in a child it would act on the parent's memory.
    #[inline]
    fn uffd(&self, operation: &'static str) -> Result<UffdRef<'_>, RegionError> {
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
    #[inline]
    pub fn protect(&self, ranges: &[PageRange], access: Protection) -> Result<(), RegionError> {
        let mut pending: Option<PageRange> = None;
        for &range in ranges {
            pending = Some(match pending {
                Some(p) if p.end() == range.start() => {
                    PageRange::new(p.start(), PageCount::new(p.pages().get() + range.pages().get()))
                }
                Some(p) => {
                    self.protect_one(p, access)?;
                    range
                }
                None => range,
            });
        }
        pending.map_or(Ok(()), |p| self.protect_one(p, access))
    }

    /// As [`Operations::unprotect`], leaving the pager's touchers asleep, so that its books can be closed first.
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
    #[inline]
    pub fn unprotect(&self, page: VirtAddr) -> Result<(), RegionError> {
        self.protect_one(self.mapping.grain_of(page), Protection::ReadWrite)
    }

    #[inline]
    fn protect_one(&self, range: PageRange, access: Protection) -> Result<(), RegionError> {
        self.check(range)?;
        if range.is_empty() {
            return Ok(());
        }
        let failed = self.failed("protect", range);
        match (self.mechanism, access) {
            (Mechanism::Sigbus | Mechanism::Pager, Protection::None) => {
                Err(self.not_offered("protect to None", "use Mechanism::Mprotect, or Guard"))
            }
            (Mechanism::Sigbus | Mechanism::Pager, _) => {
                let uffd = self.uffd("protect")?;
                let protect = access == Protection::Read;
                if protect && self.populate_first {
                    // SAFETY: the range is the region's; populating for reading changes no contents.
                    unsafe { mem::advise(range, Advice::PopulateRead) }
                        .map_err(self.failed("populate before protect", range))?;
                }
                retry(|| uffd.write_protect(range, protect)).map_err(failed)
            }
            (Mechanism::Guard, Protection::Read) => {
                Err(self.not_offered("protect to Read", "use Mechanism::Sigbus or Mprotect"))
            }
            (Mechanism::Guard, Protection::None) => retry(|| {
                // SAFETY: the range is the region's, which `self.mapping` keeps; that contents may be lost was said when it
                // was built; no userfaultfd write-protects it, for the region's claim is exclusive.
                unsafe { guard::install(range) }
            })
            .map_err(failed),
            (Mechanism::Guard, Protection::ReadWrite) => retry(|| {
                // SAFETY: the range is the region's, which `self.mapping` keeps.
                unsafe { guard::remove(range) }
            })
            .map_err(failed),
            (Mechanism::Mprotect, _) if self.states.is_empty() => {
                // SAFETY: the range is the region's, which `self.mapping` keeps, and whose traps are expected.
                unsafe { mem::protect(range, access) }.map_err(failed)
            }
            (Mechanism::Mprotect, _) => self.protect_present(range, access),
        }
    }

    /// As `protect_one`, leaving absent pages without access.
    fn protect_present(&self, range: PageRange, access: Protection) -> Result<(), RegionError> {
        let mut pages = self.state_indices(range);
        while let Some(first) = pages.next() {
            if !self.state_is(first, PRESENT) {
                continue;
            }
            let mut count = 1;
            while pages.start < pages.end && self.state_is(pages.start, PRESENT) {
                pages.next();
                count += 1;
            }
            let run = self.pages_at(first, count);
            // SAFETY: pages of the region, which `self.mapping` keeps.
            unsafe { mem::protect(run, access) }.map_err(self.failed("protect", run))?;
        }
        Ok(())
    }

    /// Fills the absent pages of `range` from `bytes` (`UFFDIO_COPY`), which arrive with `access` (`Read`: write-protected).
    /// Pages that are there already are left alone, and one that the object has already is mapped as it is: a fill never
    /// undoes a write. Returns how many were filled with these bytes. Waiting threads go on.
    ///
    /// # Errors
    /// [`RegionError`]; [`RegionError::Short`]: fewer bytes than pages.
    pub fn fill_copy(
        &self,
        range: PageRange,
        bytes: &[u8],
        access: Protection,
    ) -> Result<PageCount, RegionError> {
        if bytes.len() < range.len_bytes() {
            return Err(RegionError::Short { range, given_bytes: bytes.len() });
        }
        // SAFETY: the slice holds at least the range's bytes.
        unsafe { self.fill_from(range, bytes.as_ptr(), access) }
    }

    /// As [`Operations::fill_copy`], from memory that others may change; the kernel does the copying.
    ///
    /// # Errors
    /// As [`Operations::fill_copy`]; EFAULT: the source traps without a pager.
    pub fn fill_from_mapping(
        &self,
        range: PageRange,
        source: &Mapping,
        source_part: PageRange,
        access: Protection,
    ) -> Result<PageCount, RegionError> {
        let inside =
            source_part.start() >= source.range().start() && source_part.end() <= source.range().end();
        if !inside || source_part.len_bytes() < range.len_bytes() {
            return Err(RegionError::Short { range, given_bytes: source_part.len_bytes() });
        }
        // SAFETY: the part lies in `source`, which is borrowed, and is as long as the range; only the kernel reads it.
        unsafe { self.fill_from(range, source_part.start().as_ptr(), access) }
    }

    /// # Safety
    /// `source` is mapped for the range's length.
    unsafe fn fill_from(
        &self,
        range: PageRange,
        source: *const u8,
        access: Protection,
    ) -> Result<PageCount, RegionError> {
        if !self.states.is_empty() {
            return self.fill_emulated("fill_copy", range, access, |object, at, offset_bytes, run| {
                let from = source.wrapping_add(offset_bytes);
                // SAFETY: `from` and the run beyond it lie in the source (caller); the pages are absent in this view, and
                // claimed by this thread, so nobody relies on their old contents.
                let wrote =
                    unsafe { io::write_at_ptr(object.fd.as_fd(), from, run.len_bytes(), at.bytes() as u64) };
                match wrote {
                    Ok(n) if n == run.len_bytes() => Ok(()),
                    Ok(_) => Err(Errno::ENOSPC),
                    Err(e) => Err(e),
                }
            });
        }
        let mode = self.fill_mode("fill_copy", access)?;
        self.fill_loop("fill_copy", range, Some(mode), |uffd, part| {
            let offset = part.start().as_usize() - range.start().as_usize();
            // SAFETY: the source holds the range's bytes (caller), so the part's from `offset` on; the destination is the
            // region's, whose absent pages nobody relies on.
            unsafe { uffd.copy(part, source.wrapping_add(offset), mode) }
        })
    }

    /// Fills the absent pages of `range` with zeros (`UFFDIO_ZEROPAGE`). Returns how many were filled.
    ///
    /// # Errors
    /// [`RegionError`].
    pub fn fill_zero(&self, range: PageRange, access: Protection) -> Result<PageCount, RegionError> {
        if !self.states.is_empty() {
            return self.fill_emulated("fill_zero", range, access, |object, at, _, run| {
                memfd::punch(&object.fd, at, run.pages())
            });
        }
        let mode = self.fill_mode("fill_zero", access)?;
        if mode.write_protected {
            // The zero page can't arrive write-protected: copies of it can.
            return self.fill_loop("fill_zero", range, Some(mode), |uffd, part| {
                let page = PageRange::new(part.start(), PageCount::new(1));
                // SAFETY: a page of zeros; the destination is the region's.
                unsafe { uffd.copy(page, ZEROS.as_ptr(), mode) }?;
                match part.pages().get() {
                    1 => Ok(()),
                    // One page done: the loop goes on from there.
                    _ => Err(Partial { done_bytes: PAGE_SIZE, errno: Errno::EAGAIN }),
                }
            });
        }
        self.fill_loop("fill_zero", range, Some(mode), |uffd, part| {
            // SAFETY: the destination is the region's, whose absent pages nobody relies on.
            unsafe { uffd.zeropage(part, mode) }
        })
    }

    /// Maps the pages that the object has already into `range` (`UFFDIO_CONTINUE`). Returns how many were mapped.
    ///
    /// A page that was write-protected and evicted has lost its protection: `access` says with which it comes back.
    ///
    /// # Errors
    /// [`RegionError`]; EFAULT: the object has no such page (fill it with `fill_copy` or `fill_zero`).
    pub fn fill_continue(&self, range: PageRange, access: Protection) -> Result<PageCount, RegionError> {
        if !self.states.is_empty() {
            return self.fill_emulated("fill_continue", range, access, |_, _, _, _| Err(Errno::EFAULT));
        }
        let mode = self.fill_mode("fill_continue", access)?;
        self.fill_loop("fill_continue", range, None, |uffd, part| {
            // SAFETY: the destination is the region's, whose absent pages nobody relies on.
            unsafe { uffd.continue_(part, mode) }
        })
    }

    /// Moves page frames from `source_part` of `source` into the absent pages of `range` (`UFFDIO_MOVE`): no copy. Private
    /// anonymous memory only; the source is left absent. Returns how many were moved.
    ///
    /// # Errors
    /// [`RegionError`]; ENOENT: a source page is absent; EBUSY: it is shared with a forked process, or pinned.
    pub fn fill_move(
        &self,
        range: PageRange,
        source: &Mapping,
        source_part: PageRange,
    ) -> Result<PageCount, RegionError> {
        if self.mapping.backing() != Backing::Anonymous || source.backing() != Backing::Anonymous {
            return Err(self.not_offered("fill_move between shared memory", "use fill_continue"));
        }
        let inside =
            source_part.start() >= source.range().start() && source_part.end() <= source.range().end();
        if !inside || source_part.len_bytes() < range.len_bytes() {
            return Err(RegionError::Short { range, given_bytes: source_part.len_bytes() });
        }
        self.fill_loop("fill_move", range, None, |uffd, part| {
            let offset = part.start().as_usize() - range.start().as_usize();
            let from = VirtAddr::new(source_part.start().as_usize() + offset);
            // SAFETY: the source part lies in `source`, a `Mapping`, to whose bytes nothing refers (S1), and is as long as
            // the range; the destination is the region's.
            unsafe { uffd.move_(part, from, false, FillMode::default()) }
        })
    }

    /// Touching the absent pages of `range` raises SIGBUS from now on (`UFFDIO_POISON`).
    ///
    /// # Errors
    /// [`RegionError`]; EEXIST: a page is there: evict it first.
    pub fn poison(&self, range: PageRange) -> Result<(), RegionError> {
        self.check(range)?;
        let uffd = self.uffd("poison")?;
        // SAFETY: the range is the region's.
        unsafe { uffd.poison(range, FillMode::default()) }.map_err(|p| self.failed("poison", range)(p.errno))
    }

    /// Makes the pages of `range` absent in this view, so that they trap again: the frames stay in the object (shared
    /// memory), or are lost (private memory).
    ///
    /// # Errors
    /// [`RegionError`].
    pub fn evict(&self, range: PageRange) -> Result<(), RegionError> {
        self.check(range)?;
        if self.states.is_empty() {
            // SAFETY: the range is the region's; its bytes are behind no reference (S1).
            return retry(|| unsafe { mem::advise(range, Advice::DontNeed) })
                .map_err(self.failed("evict", range));
        }
        for index in self.state_indices(range) {
            if self.claim(index, PRESENT) {
                let page = self.pages_at(index, 1);
                // SAFETY: a page of the region.
                let done = unsafe { mem::protect(page, Protection::None) };
                self.set_state(index, if done.is_ok() { IN_OBJECT } else { PRESENT });
                done.map_err(self.failed("evict", page))?;
            }
        }
        Ok(())
    }

    /// Threads asleep on a fault in `range` try again. Fills and `protect` do this by themselves.
    ///
    /// # Errors
    /// [`RegionError`].
    pub fn wake(&self, range: PageRange) -> Result<(), RegionError> {
        self.uffd("wake")?.wake(range).map_err(self.failed("wake", range))
    }

    fn fill_mode(&self, operation: &'static str, access: Protection) -> Result<FillMode, RegionError> {
        match access {
            Protection::ReadWrite => Ok(FillMode::default()),
            Protection::Read => Ok(FillMode { write_protected: true, leave_asleep: false }),
            Protection::None => Err(self.not_offered(operation, "a page without access is one not filled")),
        }
    }

    /// Calls `fill` until the whole range is served: skips pages that are there (EEXIST), goes on after EAGAIN.
    #[inline]
    fn fill_loop(
        &self,
        operation: &'static str,
        range: PageRange,
        // How to map a page that the object has already.
        or_continue: Option<FillMode>,
        fill: impl Fn(UffdRef<'_>, PageRange) -> Result<(), Partial>,
    ) -> Result<PageCount, RegionError> {
        self.check(range)?;
        let uffd = self.uffd(operation)?;
        let end = range.end().as_usize();
        let (mut at, mut filled) = (range.start().as_usize(), 0);
        while at < end {
            let rest = PageRange::new(VirtAddr::new(at), PageCount::new((end - at) / PAGE_SIZE));
            match fill(uffd, rest) {
                Ok(()) => return Ok(PageCount::new(filled + rest.pages().get())),
                Err(Partial { done_bytes, errno: Errno::EAGAIN }) if done_bytes > 0 => {
                    at += done_bytes;
                    filled += done_bytes / PAGE_SIZE;
                }
                // The address space is changing (a fork, a remap): the other side will finish.
                Err(Partial { errno: Errno::EAGAIN, .. }) => io::yield_now(),
                Err(Partial { errno: Errno::EEXIST, .. }) => {
                    let page = self.mapping.grain_of(rest.start());
                    if let (Some(mode), true) = (or_continue, self.minor) {
                        // In the object, though perhaps not in this page table.
                        // SAFETY: the page is the region's.
                        let _ = unsafe { uffd.continue_(page, mode) };
                    }
                    // There now in any case: whoever waits for it may go on.
                    let _ = uffd.wake(page);
                    at += page.len_bytes();
                }
                Err(Partial { errno, .. }) => return Err(self.failed(operation, rest)(errno)),
            }
        }
        Ok(PageCount::new(filled))
    }

    /// Fills without a userfaultfd: the page stays without access while its contents are put into the object behind it.
    fn fill_emulated(
        &self,
        operation: &'static str,
        range: PageRange,
        access: Protection,
        contents: impl Fn(&Object, PageCount, usize, PageRange) -> Result<(), Errno>,
    ) -> Result<PageCount, RegionError> {
        self.check(range)?;
        let Some(object) = self.mapping.object() else {
            return Err(self.not_offered(operation, "use a memfd, or a userfaultfd"));
        };
        let mut filled = 0;
        let mut pages = self.state_indices(range);
        while let Some(first) = pages.next() {
            if self.claim(first, IN_OBJECT) {
                let page = self.pages_at(first, 1);
                // SAFETY: a page of the region, claimed by this thread.
                let done = unsafe { mem::protect(page, access) };
                self.set_state(first, if done.is_ok() { PRESENT } else { IN_OBJECT });
                done.map_err(self.failed(operation, page))?;
                continue;
            }
            if !self.claim(first, ABSENT) {
                continue;
            }
            let mut count = 1;
            while pages.start < pages.end && self.claim(pages.start, ABSENT) {
                pages.next();
                count += 1;
            }
            let run = self.pages_at(first, count);
            let in_mapping = (run.start().as_usize() - self.mapping.range().start().as_usize()) / PAGE_SIZE;
            let at = PageCount::new(self.mapping.object_offset().get() + in_mapping);
            let offset_bytes = run.start().as_usize() - range.start().as_usize();
            let done = contents(object, at, offset_bytes, run)
                // SAFETY: pages of the region, claimed by this thread.
                .and_then(|()| unsafe { mem::protect(run, access) });
            for index in first..first + count {
                self.set_state(index, if done.is_ok() { PRESENT } else { ABSENT });
            }
            done.map_err(self.failed(operation, run))?;
            filled += count;
        }
        Ok(PageCount::new(filled))
    }

    /// At the start: which pages the object has already.
    pub(super) fn note_object_pages(&self) {
        let Some(object) = self.mapping.object() else { return };
        let start = self.mapping.object_offset().get()
            + (self.range.start().as_usize() - self.mapping.range().start().as_usize()) / PAGE_SIZE;
        memfd::for_each_data(&object.fd, PageCount::new(start), self.range.pages(), |page| {
            self.set_state(page.get() - start, IN_OBJECT);
        });
    }

    fn state_indices(&self, range: PageRange) -> core::ops::Range<usize> {
        let first = (range.start().as_usize() - self.range.start().as_usize()) / PAGE_SIZE;
        first..first + range.pages().get()
    }

    fn pages_at(&self, index: usize, count: usize) -> PageRange {
        PageRange::new(
            VirtAddr::new(self.range.start().as_usize() + index * PAGE_SIZE),
            PageCount::new(count),
        )
    }

    fn state_is(&self, index: usize, state: u8) -> bool {
        // Acquire pairs with `set_state`: what was done to the page lies before.
        self.states.get(index).is_some_and(|s| s.load(Ordering::Acquire) == state)
    }

    fn claim(&self, index: usize, from: u8) -> bool {
        // AcqRel: after the last owner's `set_state`, before this owner's work.
        self.states
            .get(index)
            .is_some_and(|s| s.compare_exchange(from, CHANGING, Ordering::AcqRel, Ordering::Acquire).is_ok())
    }

    fn set_state(&self, index: usize, state: u8) {
        if let Some(s) = self.states.get(index) {
            // Release pairs with the Acquire of `claim` and `state_is`.
            s.store(state, Ordering::Release);
        }
    }
}

/// Repeats a call that the kernel broke off for a signal or a changing address space.
#[inline]
fn retry(mut call: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    loop {
        match call() {
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            other => return other,
        }
    }
}
