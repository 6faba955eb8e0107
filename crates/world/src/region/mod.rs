//! Shared regions: World memory that threads find by name, on whatever node they run.
//!
//! ```text
//!   Imaged.regions:  │ name │ address │ bytes │ handles │ generation │ × MAX_REGIONS          (control memory, under its lock)
//!                              └──▶ whole pages in the arena, mapped in the World's address space (`address_space`)
//! ```
//!
//! **The World's rules hold.** A region lies in the arena, so its pages are part of what every node reports as written, of every
//! image, of every rollback and of the store; its entry is part of the imaged tables. All nodes are at safe points when an image
//! is taken, so no access is half in it. After a node's death, regions and threads go back together: an addition that a
//! thread made since the image is undone with the thread that will make it again.
//!
//! **Accesses are volatile** (S1): any thread may write at any time, so no reference to a region's bytes exists. [`Cells`] are typed
//! words, each read and written at once, with the ordering of a lock's acquire and release; [`Region::read`] and
//! [`Region::write`] copy bytes and may see others' writes in part.
//!
//! **What can go wrong.** A region lives until it is [`remove`]d, which is refused while handles are open; a thread that was
//! quarantined never closed its own. Removing zeroes the memory for the next owner (S2) by writing it, not by giving frames
//! back: a rollback must be able to tell.

mod cells;
mod error;
mod table;

pub use cells::{Cells, Word};
pub use error::RegionError;
pub(crate) use table::{Table, all};

use crate::arena;
use crate::sched::{in_thread, with_room};
use core::alloc::Layout;
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, VirtAddr};
use peregrine_vm::{OutOfBounds, Volatile};
use std::fmt;
use table::{Refused, padded, with_table};

/// Regions that a World can have.
pub const MAX_REGIONS: usize = 128;
/// Bytes of a region's name.
pub const NAME_BYTES: usize = 48;

/// Whole pages.
fn layout(len_bytes: usize) -> Option<Layout> {
    Layout::from_size_align(len_bytes.checked_next_multiple_of(PAGE_SIZE)?, PAGE_SIZE).ok()
}

/// Makes a region of `len_bytes` zeros.
///
/// # Errors
/// [`RegionError`]; of two threads that create one name, one gets [`RegionError::Exists`].
///
/// # Examples
/// ```no_run
/// use peregrine_world::region;
/// let totals = region::create("totals", 8 * 100)?;
/// totals.cells::<u64>().add(7, 1)?;
/// // Another thread, perhaps on another node:
/// assert_eq!(region::open("totals")?.cells::<u64>().get(7)?, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn create(name: &str, len_bytes: usize) -> Result<Region, RegionError> {
    let key = padded(name)?;
    let bad = || RegionError::Empty { name: name.to_owned(), len_bytes };
    let layout = layout(len_bytes).filter(|_| len_bytes > 0).ok_or_else(bad)?;
    let at = with_room(|_| arena::allocate(layout)).ok_or(RegionError::NoThread)??;
    // Outside the section and unknown to anybody: a preemption, an image or a death in between does no harm.
    zero(at, layout.size());
    let made = with_table(|table| table.make(&key, at, len_bytes))?;
    if made.is_err() {
        // SAFETY: allocated above with this layout; nobody knows of it.
        in_thread(|_| unsafe { arena::give_back(at, layout) });
    }
    made.map(Region::at).map_err(|refused| match refused {
        Refused::Full => RegionError::TooMany,
        Refused::Exists(len_bytes) => RegionError::Exists { name: name.to_owned(), len_bytes },
        Refused::NoRecord => RegionError::NoRecord { name: name.to_owned() },
    })
}

/// Opens the region called `name`.
///
/// # Errors
/// [`RegionError::NotFound`], [`RegionError::NoThread`], [`RegionError::Name`].
pub fn open(name: &str) -> Result<Region, RegionError> {
    let key = padded(name)?;
    let found = with_table(|table| table.open(&key))?.map(Region::at);
    found.ok_or_else(|| RegionError::NotFound { name: name.to_owned() })
}

/// Opens the region called `name`, or makes it of `len_bytes` zeros.
///
/// # Errors
/// [`RegionError::Size`] if it exists with another size; as [`create`].
pub fn open_or_create(name: &str, len_bytes: usize) -> Result<Region, RegionError> {
    loop {
        let region = match open(name) {
            Err(RegionError::NotFound { .. }) => match create(name, len_bytes) {
                // Another thread was faster.
                Err(RegionError::Exists { .. }) => continue,
                made => made?,
            },
            opened => opened?,
        };
        if region.len_bytes == len_bytes {
            return Ok(region);
        }
        let (name, has) = (name.to_owned(), region.len_bytes);
        return Err(RegionError::Size { name, len_bytes: has, asked_bytes: len_bytes });
    }
}

/// Takes the region called `name` out of the World; its memory is used again, zeroed.
///
/// # Errors
/// [`RegionError::InUse`] while handles are open; [`RegionError::NotFound`].
pub fn remove(name: &str) -> Result<(), RegionError> {
    let key = padded(name)?;
    let taken = with_table(|table| table.take(&key))?;
    let (at, len) = taken.map_err(|handles| match handles {
        None => RegionError::NotFound { name: name.to_owned() },
        Some(handles) => RegionError::InUse { name: name.to_owned(), handles },
    })?;
    if let Some(layout) = layout(len) {
        zero(at, layout.size());
        // SAFETY: allocated in `create` with this layout; the entry was taken out by this thread, so nobody else frees it.
        in_thread(|_| unsafe { arena::give_back(at, layout) });
    }
    Ok(())
}

/// Writes zeros to pages of the arena that belong to the caller alone.
fn zero(at: usize, len: usize) {
    let range = PageRange::covering(VirtAddr::new(at), len);
    // SAFETY: allocated pages of the arena, which is mapped as long as the World; nobody refers to them (S1).
    let bytes = unsafe { Volatile::new(range) };
    for page in (0..len).step_by(PAGE_SIZE) {
        let written = bytes.write(page, &[0; PAGE_SIZE]);
        debug_assert!(written.is_ok(), "whole pages");
    }
}

/// A shared region. Cloning it, or opening it again, makes another handle; dropping the last one leaves the region in place.
pub struct Region {
    entry: usize,
    at: usize,
    len_bytes: usize,
}

impl Region {
    const fn at((entry, at, len_bytes): table::Place) -> Self {
        Self { entry, at, len_bytes }
    }

    /// Its size.
    pub const fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// All of it, to be copied in and out. (Whole pages: the last one may be longer than what was asked for.)
    const fn bytes(&self) -> Volatile<'_> {
        let range = PageRange::new(VirtAddr::new(self.at), PageCount::for_bytes(self.len_bytes));
        // SAFETY: the arena is mapped as long as the World, the region stays as long as its handles, and no reference to its
        // bytes is ever made (S1).
        unsafe { Volatile::new(range) }
    }

    fn check(&self, offset_bytes: usize, len_bytes: usize) -> Result<(), OutOfBounds> {
        if offset_bytes <= self.len_bytes && len_bytes <= self.len_bytes - offset_bytes {
            return Ok(());
        }
        Err(OutOfBounds { offset_bytes, len_bytes, memory_bytes: self.len_bytes })
    }

    /// Copies bytes out; others may be writing them.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    pub fn read(&self, offset_bytes: usize, into: &mut [u8]) -> Result<(), OutOfBounds> {
        self.check(offset_bytes, into.len())?;
        self.bytes().read(offset_bytes, into)
    }

    /// Copies bytes in; others may be reading them.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    pub fn write(&self, offset_bytes: usize, from: &[u8]) -> Result<(), OutOfBounds> {
        self.check(offset_bytes, from.len())?;
        self.bytes().write(offset_bytes, from)
    }

    /// The region as words of type `T`.
    pub const fn cells<T: Word>(&self) -> Cells<'_, T> {
        Cells::new(self.at, self.len_bytes)
    }
}

impl Clone for Region {
    fn clone(&self) -> Self {
        let _ = with_table(|table| table.count(self.entry, true));
        Self { entry: self.entry, at: self.at, len_bytes: self.len_bytes }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let _ = with_table(|table| table.count(self.entry, false));
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({} bytes at {:#x})", self.len_bytes, self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outside_a_thread_there_are_no_regions() {
        assert_eq!(open("x").err(), Some(RegionError::NoThread));
        assert_eq!(create("x", 10).err(), Some(RegionError::NoThread));
        assert_eq!(remove("x").err(), Some(RegionError::NoThread));
    }
}
