//! `PAGEMAP_SCAN` (`ioctl` on `/proc/PID/pagemap`): which pages of a range are in which state, and, in the same
//! step, write-protect those that matched.
//!
//! With a range registered for [`WP_ASYNC`](crate::uffd::Features::WP_ASYNC) write-protect, [`Categories::WRITTEN`]
//! means "written since it was last protected": get and reset in one call is Appel and Li's DIRTY.

use crate::raw::{self, Errno};
use crate::uffd::flag_set;
use core::fmt;
use core::ops::{BitOr, BitOrAssign, Sub};
use linux_raw_sys::general as g;
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, VirtAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

flag_set! {
    /// The states of a page (`PAGE_IS_*`).
    Categories:
    (WP_ALLOWED, g::PAGE_IS_WPALLOWED, "The mapping is registered for write-protect."),
    (WRITTEN, g::PAGE_IS_WRITTEN, "Not write-protected: written since it last was, or never was."),
    (FILE, g::PAGE_IS_FILE, "Backed by a file or shared memory."),
    (PRESENT, g::PAGE_IS_PRESENT, "In memory."),
    (SWAPPED, g::PAGE_IS_SWAPPED, "Swapped out."),
    (PFN_ZERO, g::PAGE_IS_PFNZERO, "The zero page."),
    (HUGE, g::PAGE_IS_HUGE, "Mapped by a huge entry."),
    (SOFT_DIRTY, g::PAGE_IS_SOFT_DIRTY, "Soft-dirty."),
    (GUARD, g::PAGE_IS_GUARD, "A guard marker."),
}

/// `PAGEMAP_SCAN`: `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u32 = raw::iowr(b'f', 16, size_of::<g::pm_scan_arg>());

/// A run of pages in one state, as the kernel writes it (`struct page_region`).
#[derive(Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

impl PageRegion {
    /// The pages.
    pub const fn range(&self) -> PageRange {
        let pages = (self.end - self.start) as usize / PAGE_SIZE;
        PageRange::new(VirtAddr::new(self.start as usize), PageCount::new(pages))
    }

    /// The states that were asked for and hold.
    pub const fn categories(&self) -> Categories {
        Categories::from_bits(self.categories)
    }
}

impl fmt::Debug for PageRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x} {:?}", self.start, self.end, self.categories())
    }
}

/// What to look for and what to do with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ScanArgs {
    /// Where to look.
    pub range: PageRange,
    /// A page matches if it is in all of these states …
    pub all_of: Categories,
    /// … and, if this is not empty, in one of these.
    pub any_of: Categories,
    /// States to test inverted.
    pub inverted: Categories,
    /// States to report.
    pub report: Categories,
    /// Write-protect the pages that match, in the same step (`PM_SCAN_WP_MATCHING`).
    pub write_protect: bool,
    /// Fail with EPERM on a mapping that is not registered for asynchronous write-protect, rather than skip it or
    /// protect it for somebody else (`PM_SCAN_CHECK_WPASYNC`).
    pub check_wp_async: bool,
    /// Stop after this many matching pages; 0 for no limit.
    pub max_pages: PageCount,
}

impl ScanArgs {
    /// DIRTY: the pages written since the last such call, which protects them again; fails where writes are not
    /// tracked rather than find nothing.
    pub const fn take_written(range: PageRange) -> Self {
        Self {
            range,
            all_of: Categories::WRITTEN,
            any_of: Categories::empty(),
            inverted: Categories::empty(),
            report: Categories::WRITTEN,
            write_protect: true,
            check_wp_async: true,
            max_pages: PageCount::new(0),
        }
    }

    /// As [`ScanArgs::take_written`], and the pages that are nowhere in the page table as well: of memory from the huge page
    /// pool the kernel forgets on `MADV_DONTNEED` that they were written. Those in [`Categories::SWAPPED`] carry a mark that
    /// they were not; the caller sorts them out.
    pub const fn take_written_or_absent(range: PageRange) -> Self {
        Self {
            all_of: Categories::empty(),
            any_of: Categories::WRITTEN.union(Categories::PRESENT),
            inverted: Categories::PRESENT,
            report: Categories::WRITTEN.union(Categories::PRESENT).union(Categories::SWAPPED),
            ..Self::take_written(range)
        }
    }

    /// The pages in all of the states `all_of`, left as they are.
    pub const fn find(range: PageRange, all_of: Categories) -> Self {
        Self {
            range,
            all_of,
            any_of: Categories::empty(),
            inverted: Categories::empty(),
            report: all_of,
            write_protect: false,
            check_wp_async: false,
            max_pages: PageCount::new(0),
        }
    }
}

/// How far a scan came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Scanned {
    /// Entries of the vector that were written.
    pub regions: usize,
    /// Where the walk ended: the range's end, or where to go on when the vector was full.
    pub walk_end: VirtAddr,
}

/// An open `/proc/self/pagemap`. It stays bound to the process that opened it: after a fork, open it anew.
#[derive(Debug)]
pub struct Pagemap(OwnedFd);

impl Pagemap {
    /// Opens `/proc/self/pagemap`.
    ///
    /// # Errors
    /// EACCES: the process is not dumpable (it changed its user without exec: `prctl(PR_SET_DUMPABLE, 1)`
    /// first). ENOENT: no /proc.
    pub fn open() -> Result<Self, Errno> {
        use crate::rustix::fs::{Mode, OFlags, open};
        open(c"/proc/self/pagemap", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map(Self)
            .map_err(|e| Errno(e.raw_os_error()))
    }

    /// A copyable view for use where nothing may be allocated.
    pub fn by_ref(&self) -> PagemapRef<'_> {
        PagemapRef(self.0.as_fd())
    }
}

impl From<Pagemap> for OwnedFd {
    fn from(pagemap: Pagemap) -> Self {
        pagemap.0
    }
}

impl AsFd for Pagemap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A borrowed pagemap. Its call touches no `errno`, thread-local, static or allocator.
#[derive(Clone, Copy, Debug)]
pub struct PagemapRef<'a>(BorrowedFd<'a>);

impl<'a> PagemapRef<'a> {
    /// A view of `fd`, which must be a pagemap for the call to succeed.
    pub const fn new(fd: BorrowedFd<'a>) -> Self {
        Self(fd)
    }

    /// `PAGEMAP_SCAN`: one call, which stops when `into` is full; go on from [`Scanned::walk_end`]. An empty `into`
    /// reports nothing and does all the rest.
    ///
    /// # Errors
    /// ENOTTY: a kernel before 6.7. EPERM: with `check_wp_async`, a mapping in the range that is not so registered.
    /// EINVAL: arguments. EFAULT: `into` cannot be written. EINTR: a signal; nothing is lost, call again.
    #[inline]
    pub fn scan(self, args: ScanArgs, into: &mut [PageRegion]) -> Result<Scanned, Errno> {
        let mut flags = 0;
        if args.write_protect {
            flags |= g::PM_SCAN_WP_MATCHING as u64;
        }
        if args.check_wp_async {
            flags |= g::PM_SCAN_CHECK_WPASYNC as u64;
        }
        let start = args.range.start().as_usize() as u64;
        let mut arg = g::pm_scan_arg {
            size: size_of::<g::pm_scan_arg>() as u64,
            flags,
            start,
            end: args.range.end().as_usize() as u64,
            walk_end: start,
            vec: if into.is_empty() { 0 } else { into.as_mut_ptr() as u64 },
            vec_len: into.len() as u64,
            max_pages: args.max_pages.get() as u64,
            category_inverted: args.inverted.bits(),
            category_mask: args.all_of.bits(),
            category_anyof_mask: args.any_of.bits(),
            return_mask: args.report.bits(),
        };
        // SAFETY: the kernel reads and writes the struct and at most `vec_len` regions of the slice; page contents
        // don't change, and a write to a page it protects goes on by itself (asynchronous write-protect).
        let regions = unsafe { raw::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, (&raw mut arg) as usize)? };
        Ok(Scanned { regions, walk_end: VirtAddr::new(arg.walk_end as usize) })
    }
}
