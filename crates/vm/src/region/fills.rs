//! Filling, evicting and poisoning a region's pages. **Trap code: allocates nothing, locks nothing, panics never (S3).**
//!
//! Blocks of any size, one system call each where the kernel does not stop early; a fill never undoes a write: of two at once
//! the first wins, and the second leaves the page alone.

use super::operations::{Operations, RegionError, retry};
use super::raw::{self, Present};
use super::states::Counted;
use crate::mapping::{Backing, Mapping, Object};
use crate::process::Forked;
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::io;
use peregrine_sys::mem::{self, Advice};
use peregrine_sys::raw::Errno;
use peregrine_sys::uffd::{FillMode, Partial, UffdRef};
use std::os::fd::AsFd;

static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

impl Operations {
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
            let counted = Counted::Filled;
            return self.fill_emulated(
                "fill_copy",
                range,
                access,
                counted,
                |object, at, offset_bytes, run| {
                    let from = source.wrapping_add(offset_bytes);
                    // SAFETY: `from` and the run beyond it lie in the source (caller); the object has no such pages, and in this
                    // view they are claimed by this thread.
                    let wrote = unsafe {
                        io::write_at_ptr(object.fd.as_fd(), from, run.len_bytes(), at.bytes() as u64)
                    };
                    match wrote {
                        Ok(n) if n == run.len_bytes() => Ok(()),
                        Ok(_) => Err(Errno::ENOSPC),
                        Err(e) => Err(e),
                    }
                },
            );
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
    #[inline]
    pub fn fill_zero(&self, range: PageRange, access: Protection) -> Result<PageCount, RegionError> {
        if !self.states.is_empty() {
            // What the object has not is zeros.
            return self.fill_emulated("fill_zero", range, access, Counted::Filled, |_, _, _, _| Ok(()));
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
    #[inline]
    pub fn fill_continue(&self, range: PageRange, access: Protection) -> Result<PageCount, RegionError> {
        if !self.states.is_empty() {
            let absent = |_: &Object, _, _, _| Err(Errno::EFAULT);
            return self.fill_emulated("fill_continue", range, access, Counted::Mapped, absent);
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
        if self.mechanism.uses_userfaultfd() {
            // In a child nothing would trap afterwards, and private contents would be lost for good.
            Forked::check(self.generation, self.range)?;
        }
        if self.states.is_empty() {
            // SAFETY: the range is the region's; its bytes are behind no reference (S1).
            return retry(|| unsafe { mem::advise(range, Advice::DontNeed) })
                .map_err(self.failed("evict", range));
        }
        self.evict_emulated(range)
    }

    /// Threads asleep on a fault in `range` try again. Fills and `protect` do this by themselves.
    ///
    /// # Errors
    /// [`RegionError`].
    #[inline]
    pub fn wake(&self, range: PageRange) -> Result<(), RegionError> {
        self.uffd("wake")?.wake(range).map_err(self.failed("wake", range))
    }

    #[inline]
    fn fill_mode(&self, operation: &'static str, access: Protection) -> Result<FillMode, RegionError> {
        match access {
            Protection::ReadWrite => Ok(FillMode::default()),
            Protection::Read => Ok(FillMode { write_protected: true, leave_asleep: false }),
            Protection::None => Err(self.not_offered(operation, "a page without access is one not filled")),
        }
    }

    /// Calls `fill` until the whole range is served; pages that are there stay as they are.
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
        let or_continue = if self.minor { or_continue } else { None };
        let present = Present { or_continue, lift: false, grain: self.mapping.grain() };
        raw::fill_loop(uffd, range, present, |part| fill(uffd, part))
            .map_err(|(part, errno)| self.failed(operation, part)(errno))
    }
}
