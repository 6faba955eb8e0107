//! Memory whose type proves that nobody else writes it.

use super::{MapError, Mapping, PageKind};
use peregrine_base::{PageCount, PageRange};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// Private memory that this value alone can change, so that plain slices of it are sound.
///
/// It is anonymous, has no alias, and is never given to a pager. It can be write-tracked
/// ([`Tracker::of_private`](crate::Tracker::of_private)): that changes when the kernel traps, not what the bytes are.
///
/// ```
/// use peregrine_vm::{PageCount, PrivateMemory};
/// let mut memory = PrivateMemory::new(PageCount::new(2))?;
/// memory[..5].copy_from_slice(b"plain");
/// assert_eq!(&memory[..5], b"plain");
/// # Ok::<(), peregrine_vm::MapError>(())
/// ```
#[derive(Debug)]
pub struct PrivateMemory {
    mapping: Arc<Mapping>,
}

impl PrivateMemory {
    /// `pages` pages of zeros.
    ///
    /// # Errors
    /// [`MapError::Kernel`].
    pub fn new(pages: PageCount) -> Result<Self, MapError> {
        Ok(Self { mapping: Arc::new(Mapping::anonymous(pages)?) })
    }

    /// As [`PrivateMemory::new`], with pages of a given kind.
    ///
    /// # Errors
    /// [`MapError::Kernel`].
    pub fn of_kind(pages: PageCount, kind: PageKind) -> Result<Self, MapError> {
        Ok(Self { mapping: Arc::new(Mapping::anonymous_of(pages, kind)?) })
    }

    /// Where it is.
    pub fn range(&self) -> PageRange {
        self.mapping.range()
    }

    /// `count` pages from page `first` of it on.
    ///
    /// # Errors
    /// [`MapError::Outside`].
    pub fn pages(&self, first: usize, count: usize) -> Result<PageRange, MapError> {
        self.mapping.pages(first, count)
    }

    /// Makes `part` zeros again and gives its frames back.
    ///
    /// # Errors
    /// [`MapError::Outside`], [`MapError::Kernel`].
    pub fn discard(&mut self, part: PageRange) -> Result<(), MapError> {
        self.mapping.discard(part)
    }

    /// Gives up the right to plain slices, for use with pagers and regions.
    ///
    /// # Errors
    /// Gives `self` back if a tracker still watches it.
    pub fn into_mapping(self) -> Result<Mapping, Self> {
        Arc::try_unwrap(self.mapping).map_err(|mapping| Self { mapping })
    }

    /// For trackers, which watch the memory and never hand the mapping out.
    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }
}

impl Deref for PrivateMemory {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let range = self.range();
        // SAFETY: mapped readable while `self` lives; nobody but `self` can write it (no alias, no pager: the mapping behind
        // the `Arc` is seen only by trackers, which don't write), and `&self` excludes `&mut self`.
        unsafe { core::slice::from_raw_parts(range.start().as_ptr(), range.len_bytes()) }
    }
}

impl DerefMut for PrivateMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        let range = self.range();
        // SAFETY: as in `deref`; `&mut self` is exclusive.
        unsafe { core::slice::from_raw_parts_mut(range.start().as_ptr(), range.len_bytes()) }
    }
}
