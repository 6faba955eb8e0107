//! What mappings are made of, and how much of it.

use super::{MapError, map_error};
use peregrine_base::{PAGE_SIZE, PageCount};
use peregrine_sys::raw::Errno;

/// Base pages in a huge one.
pub(super) const HUGE_PAGES: usize = (2 << 20) / PAGE_SIZE;

/// What is behind a mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Backing {
    /// Private zero pages.
    Anonymous,
    /// A memfd, shared.
    Memfd,
    /// A file, shared: writes reach it.
    File,
    /// A file, private: writes stay in this process.
    PrivateFile,
}

impl Backing {
    /// Whether others may see and make changes: through an alias, another process or the file.
    pub const fn is_shared(self) -> bool {
        matches!(self, Self::Memfd | Self::File)
    }
}

/// The size of the pages a mapping is to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum PageKind {
    /// 4 KiB.
    #[default]
    Base,
    /// Huge where the kernel finds one (`MADV_HUGEPAGE`, aligned to 2 MiB); otherwise 4 KiB.
    TransparentHuge,
    /// 2 MiB from the pool (`MAP_HUGETLB`), or an error.
    Huge2M,
}

impl PageKind {
    /// No more than half of all addresses, in the object and in memory; of the pool whole pages only, for the kernel would round
    /// up what it maps, and then not unmap what was asked for.
    pub(super) fn check_size(self, pages: PageCount, offset: PageCount) -> Result<(), MapError> {
        const MOST: usize = isize::MAX as usize / PAGE_SIZE;
        if pages.get() > MOST || offset.get() > MOST - pages.get() {
            return Err(map_error("mmap", pages)(Errno::ENOMEM));
        }
        let whole = |count: PageCount| count.get().is_multiple_of(HUGE_PAGES);
        if self == Self::Huge2M && !(whole(pages) && whole(offset)) {
            return Err(MapError::Pool { pages });
        }
        Ok(())
    }
}
