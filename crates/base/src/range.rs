//! Addresses, counts of pages, and ranges of pages.
//!
//! A page here is the base page of the platforms that Peregrine runs on: 4 KiB.

use core::fmt;

/// Binary logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// Bytes in a page.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;

/// An address in some process's address space. It need not be mapped, and is never dereferenced here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct VirtAddr(usize);

impl VirtAddr {
    /// The address `addr`.
    #[inline]
    pub const fn new(addr: usize) -> Self {
        Self(addr)
    }

    /// The address as a number.
    #[inline]
    pub const fn as_usize(self) -> usize {
        self.0
    }

    /// The address as a pointer, without provenance of its own: the caller says why it may be used.
    #[inline]
    pub const fn as_ptr<T>(self) -> *mut T {
        core::ptr::with_exposed_provenance_mut(self.0)
    }

    /// The start of the page that holds this address.
    #[inline]
    pub const fn page_floor(self) -> Self {
        Self(self.0 & !(PAGE_SIZE - 1))
    }

    /// The first page boundary at or above this address.
    ///
    /// # Panics
    /// If there is none below `usize::MAX`.
    #[inline]
    pub const fn page_ceil(self) -> Self {
        Self(self.0.checked_add(PAGE_SIZE - 1).expect("address beyond the last page") & !(PAGE_SIZE - 1))
    }

    /// Whether the address is a multiple of [`PAGE_SIZE`].
    #[inline]
    pub const fn is_page_aligned(self) -> bool {
        self.0 & (PAGE_SIZE - 1) == 0
    }

    /// The address `bytes` further up, or `None` beyond the end of the address space.
    #[inline]
    pub const fn checked_add(self, bytes: usize) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(a) => Some(Self(a)),
            None => None,
        }
    }
}

impl fmt::Debug for VirtAddr {
    #[inline]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for VirtAddr {
    #[inline]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A number of pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
#[repr(transparent)]
pub struct PageCount(usize);

impl PageCount {
    /// `pages` pages.
    #[inline]
    pub const fn new(pages: usize) -> Self {
        Self(pages)
    }

    /// The least number of pages that hold `bytes` bytes.
    #[inline]
    pub const fn for_bytes(bytes: usize) -> Self {
        Self(bytes.div_ceil(PAGE_SIZE))
    }

    /// The count as a number.
    #[inline]
    pub const fn get(self) -> usize {
        self.0
    }

    /// The bytes in this many pages.
    ///
    /// # Panics
    /// If that is more than `usize::MAX`.
    #[inline]
    pub const fn bytes(self) -> usize {
        self.0.checked_mul(PAGE_SIZE).expect("page count beyond the address space")
    }
}

/// The bare number: `{pages} pages`.
impl fmt::Display for PageCount {
    #[inline]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Whole pages from `start` up: the unit that every primitive works on.
///
/// Whoever made one has checked that it ends inside the address space; what is asked of it afterwards checks nothing and is
/// compiled into the caller, for trap code pays for each jump.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    start: VirtAddr,
    pages: PageCount,
}

impl PageRange {
    /// `pages` pages from `start`.
    ///
    /// # Panics
    /// If `start` is not page-aligned or the range ends beyond the address space.
    #[inline]
    pub const fn new(start: VirtAddr, pages: PageCount) -> Self {
        assert!(start.is_page_aligned(), "a page range starts on a page boundary");
        assert!(start.checked_add(pages.bytes()).is_some(), "a page range ends inside the address space");
        Self { start, pages }
    }

    /// The pages that hold any byte of `[addr, addr + len_bytes)`.
    ///
    /// # Panics
    /// If the bytes end beyond the address space.
    #[inline]
    pub const fn covering(addr: VirtAddr, len_bytes: usize) -> Self {
        let start = addr.page_floor();
        let end =
            VirtAddr(addr.0.checked_add(len_bytes).expect("range beyond the address space")).page_ceil();
        Self::new(start, PageCount((end.0 - start.0) >> PAGE_SHIFT))
    }

    /// First address.
    #[inline]
    pub const fn start(self) -> VirtAddr {
        self.start
    }

    /// First address beyond the range.
    #[inline]
    pub const fn end(self) -> VirtAddr {
        VirtAddr(self.start.0.wrapping_add(self.len_bytes()))
    }

    /// Number of pages.
    #[inline]
    pub const fn pages(self) -> PageCount {
        self.pages
    }

    /// Number of bytes.
    #[inline]
    pub const fn len_bytes(self) -> usize {
        // `new` has checked that nothing is lost.
        self.pages.0 << PAGE_SHIFT
    }

    /// Whether the range holds no page.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.pages.0 == 0
    }

    /// Whether `addr` lies in the range.
    #[inline]
    pub const fn contains(self, addr: VirtAddr) -> bool {
        addr.0 >= self.start.0 && addr.0 < self.end().0
    }

    /// Whether the two ranges share a page.
    #[inline]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start.0 < other.end().0 && other.start.0 < self.end().0
    }

    /// The pages in both, if any.
    #[inline]
    pub fn intersect(self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| Self::new(start, PageCount((end.0 - start.0) >> PAGE_SHIFT)))
    }
}

impl fmt::Debug for PageRange {
    #[inline]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start.0, self.end().0)
    }
}

/// What an access to a page may do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Protection {
    /// Every access traps.
    None,
    /// Reads succeed, writes trap.
    Read,
    /// Reads and writes succeed.
    ReadWrite,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_covering_range_holds_every_byte_and_no_page_more() {
        let r = PageRange::covering(VirtAddr::new(0x1fff), 2);
        assert_eq!((r.start().as_usize(), r.end().as_usize()), (0x1000, 0x3000));
        assert!(PageRange::covering(VirtAddr::new(0x2000), 0).is_empty());
    }

    #[test]
    fn a_count_is_printed_as_its_number_and_keeps_to_the_width_asked_for() {
        assert_eq!(std::format!("{}|{:>4}", PageCount::new(7), PageCount::new(12)), "7|  12");
    }

    #[test]
    fn intersections_are_symmetric_and_empty_ones_are_none() {
        let a = PageRange::new(VirtAddr::new(0x1000), PageCount::new(4));
        let b = PageRange::new(VirtAddr::new(0x3000), PageCount::new(4));
        assert_eq!(a.intersect(b), b.intersect(a));
        assert_eq!(a.intersect(b).unwrap().pages().get(), 2);
        assert!(a.intersect(PageRange::new(VirtAddr::new(0x5000), PageCount::new(1))).is_none());
    }
}
