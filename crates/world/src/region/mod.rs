//! Shared regions: World memory that threads find by name, on whatever node they run.
//!
//! ```text
//!   Imaged.regions:  │ name │ address │ bytes │ handles │ × MAX_REGIONS          (control memory, under its lock)
//!                              └──▶ whole pages in the arena
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

use crate::arena::{self, OutOfMemory};
use crate::control::imaged;
use crate::sched::in_thread;
use core::alloc::Layout;
use peregrine_base::sync::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, VirtAddr};
use peregrine_vm::{OutOfBounds, Volatile};
use std::fmt;
use std::marker::PhantomData;

/// Regions that a World can have.
pub const MAX_REGIONS: usize = 128;
/// Bytes of a region's name.
pub const NAME_BYTES: usize = 48;

/// Why there is no region to be had.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum RegionError {
    /// The call came from outside.
    #[error("not in a Peregrine thread: start the program with #[peregrine::main]")]
    NoThread,
    /// A region of that name exists.
    #[error("a region '{name}' of {len_bytes} bytes exists: open it, or choose another name")]
    Exists {
        /// The name.
        name: String,
        /// Its size.
        len_bytes: usize,
    },
    /// There is none.
    #[error("there is no region '{name}': create it first")]
    NotFound {
        /// The name.
        name: String,
    },
    /// It has another size.
    #[error("region '{name}' has {len_bytes} bytes, not {asked_bytes}: remove it first, or ask for its size")]
    Size {
        /// The name.
        name: String,
        /// Its size.
        len_bytes: usize,
        /// The size asked for.
        asked_bytes: usize,
    },
    /// The table is full.
    #[error("all {MAX_REGIONS} regions of the World exist: remove one")]
    TooMany,
    /// Not a name.
    #[error("a region's name has 1 to {NAME_BYTES} bytes, none of them 0; '{name}' does not")]
    Name {
        /// What was given.
        name: String,
    },
    /// No bytes.
    #[error(
        "region '{name}' would have {len_bytes} bytes: it needs at least 1, and at most what an address holds"
    )]
    Empty {
        /// The name.
        name: String,
        /// What was asked for.
        len_bytes: usize,
    },
    /// Somebody uses it.
    #[error("region '{name}' is in use by {handles} handles: drop them first")]
    InUse {
        /// The name.
        name: String,
        /// Handles open.
        handles: u32,
    },
    /// No memory.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
}

/// One region in the World's tables.
#[repr(C)]
pub struct Entry {
    name: [u8; NAME_BYTES],
    /// First address, 0 if the entry is free.
    at: usize,
    /// Bytes asked for.
    len: usize,
    handles: u32,
}

/// All regions.
#[repr(C)]
pub struct Table {
    entries: [Entry; MAX_REGIONS],
}

impl Table {
    /// No region.
    pub const EMPTY: Self =
        Self { entries: [const { Entry { name: [0; NAME_BYTES], at: 0, len: 0, handles: 0 } }; MAX_REGIONS] };

    fn find(&mut self, name: &[u8; NAME_BYTES]) -> Option<(usize, &mut Entry)> {
        self.entries.iter_mut().enumerate().find(|(_, e)| e.at != 0 && e.name == *name)
    }
}

/// Whole pages.
fn layout(len_bytes: usize) -> Option<Layout> {
    Layout::from_size_align(len_bytes.checked_next_multiple_of(PAGE_SIZE)?, PAGE_SIZE).ok()
}

/// A name as the table holds it.
fn padded(name: &str) -> Result<[u8; NAME_BYTES], RegionError> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.len() > NAME_BYTES || bytes.contains(&0) {
        return Err(RegionError::Name { name: name.to_owned() });
    }
    let mut padded = [0; NAME_BYTES];
    padded[..bytes.len()].copy_from_slice(bytes);
    Ok(padded)
}

/// Runs `f` on the table, in a runtime section: it allocates nothing and does not panic.
fn with_table<R>(f: impl FnOnce(&mut Table) -> R) -> Result<R, RegionError> {
    in_thread(|_| imaged().regions.with(f)).ok_or(RegionError::NoThread)
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
    let at = in_thread(|_| arena::allocate(layout)).ok_or(RegionError::NoThread)??;
    // Outside the section and unknown to anybody: a preemption, an image or a death in between does no harm.
    zero(at, layout.size());
    enum Found {
        Made(usize),
        Full,
        Exists(usize),
    }
    let found = with_table(|table| {
        if let Some((_, entry)) = table.find(&key) {
            return Found::Exists(entry.len);
        }
        match table.entries.iter().position(|e| e.at == 0) {
            None => Found::Full,
            Some(i) => {
                table.entries[i] = Entry { name: key, at, len: len_bytes, handles: 1 };
                Found::Made(i)
            }
        }
    })?;
    let give_back = || {
        // SAFETY: allocated above with this layout; nobody knows of it.
        in_thread(|_| unsafe { arena::give_back(at, layout) });
    };
    match found {
        Found::Made(entry) => Ok(Region { entry, at, len_bytes }),
        Found::Full => {
            give_back();
            Err(RegionError::TooMany)
        }
        Found::Exists(len_bytes) => {
            give_back();
            Err(RegionError::Exists { name: name.to_owned(), len_bytes })
        }
    }
}

/// Opens the region called `name`.
///
/// # Errors
/// [`RegionError::NotFound`], [`RegionError::NoThread`], [`RegionError::Name`].
pub fn open(name: &str) -> Result<Region, RegionError> {
    let key = padded(name)?;
    let found = with_table(|table| {
        table.find(&key).map(|(entry, e)| {
            e.handles += 1;
            Region { entry, at: e.at, len_bytes: e.len }
        })
    })?;
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
    let taken = with_table(|table| match table.find(&key) {
        None => Err(None),
        Some((_, entry)) if entry.handles != 0 => Err(Some(entry.handles)),
        Some((_, entry)) => {
            let was = (entry.at, entry.len);
            entry.at = 0;
            Ok(was)
        }
    })?;
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
        Cells { start: self.at, count: self.len_bytes / size_of::<T>(), region: PhantomData }
    }
}

impl Clone for Region {
    fn clone(&self) -> Self {
        let _ = with_table(|table| table.entries[self.entry].handles += 1);
        Self { entry: self.entry, at: self.at, len_bytes: self.len_bytes }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let _ = with_table(|table| {
            let handles = &mut table.entries[self.entry].handles;
            *handles = handles.saturating_sub(1);
        });
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({} bytes at {:#x})", self.len_bytes, self.at)
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A word that is read and written at once: integers and floats of up to eight bytes.
pub trait Word: Copy + sealed::Sealed + 'static {
    #[doc(hidden)]
    type Bits: Copy + PartialEq;
    #[doc(hidden)]
    fn to_bits(self) -> Self::Bits;
    #[doc(hidden)]
    fn from_bits(bits: Self::Bits) -> Self;
    #[doc(hidden)]
    fn plus(self, other: Self) -> Self;
    /// # Safety
    /// `at` is aligned, mapped, and reached by atomics and volatile copies only.
    #[doc(hidden)]
    unsafe fn load(at: *mut u8) -> Self::Bits;
    /// # Safety
    /// As `load`.
    #[doc(hidden)]
    unsafe fn store(at: *mut u8, bits: Self::Bits);
    /// # Safety
    /// As `load`.
    #[doc(hidden)]
    unsafe fn exchange(at: *mut u8, old: Self::Bits, new: Self::Bits) -> Result<Self::Bits, Self::Bits>;
}

macro_rules! words {
    ($($word:ty, $bits:ty, $atomic:ty, $to:expr, $from:expr, $plus:expr;)*) => {$(
        impl sealed::Sealed for $word {}
        impl Word for $word {
            type Bits = $bits;
            #[inline]
            fn to_bits(self) -> $bits {
                let to: fn($word) -> $bits = $to;
                to(self)
            }
            #[inline]
            fn from_bits(bits: $bits) -> $word {
                let from: fn($bits) -> $word = $from;
                from(bits)
            }
            #[inline]
            fn plus(self, other: $word) -> $word {
                let plus: fn($word, $word) -> $word = $plus;
                plus(self, other)
            }
            #[inline]
            unsafe fn load(at: *mut u8) -> $bits {
                // SAFETY: the caller's. Acquire pairs with the Release of `store` and `exchange`.
                unsafe { <$atomic>::from_ptr(at.cast()) }.load(Ordering::Acquire)
            }
            #[inline]
            unsafe fn store(at: *mut u8, bits: $bits) {
                // SAFETY: the caller's. Release pairs with the Acquire of `load` and `exchange`.
                unsafe { <$atomic>::from_ptr(at.cast()) }.store(bits, Ordering::Release);
            }
            #[inline]
            unsafe fn exchange(at: *mut u8, old: $bits, new: $bits) -> Result<$bits, $bits> {
                // SAFETY: the caller's. AcqRel: as both of the above.
                unsafe { <$atomic>::from_ptr(at.cast()) }
                    .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
            }
        }
    )*};
}

words! {
    u8, u8, AtomicU8, |v| v, |b| b, |a, b| a.wrapping_add(b);
    i8, u8, AtomicU8, |v| v as u8, |b| b as i8, |a, b| a.wrapping_add(b);
    u16, u16, AtomicU16, |v| v, |b| b, |a, b| a.wrapping_add(b);
    i16, u16, AtomicU16, |v| v as u16, |b| b as i16, |a, b| a.wrapping_add(b);
    u32, u32, AtomicU32, |v| v, |b| b, |a, b| a.wrapping_add(b);
    i32, u32, AtomicU32, |v| v as u32, |b| b as i32, |a, b| a.wrapping_add(b);
    f32, u32, AtomicU32, f32::to_bits, f32::from_bits, |a, b| a + b;
    u64, u64, AtomicU64, |v| v, |b| b, |a, b| a.wrapping_add(b);
    i64, u64, AtomicU64, |v| v as u64, |b| b as i64, |a, b| a.wrapping_add(b);
    f64, u64, AtomicU64, f64::to_bits, f64::from_bits, |a, b| a + b;
}

/// A region as words of one type, by index.
#[derive(Clone, Copy)]
pub struct Cells<'a, T> {
    start: usize,
    count: usize,
    region: PhantomData<(&'a Region, T)>,
}

impl<T: Word> Cells<'_, T> {
    /// How many there are.
    pub const fn len(self) -> usize {
        self.count
    }

    /// Whether the region is smaller than one word.
    pub const fn is_empty(self) -> bool {
        self.count == 0
    }

    #[inline]
    fn at(self, index: usize) -> Result<*mut u8, OutOfBounds> {
        if index < self.count {
            return Ok(VirtAddr::new(self.start + index * size_of::<T>()).as_ptr());
        }
        let (len_bytes, memory_bytes) = (size_of::<T>(), self.count * size_of::<T>());
        Err(OutOfBounds { offset_bytes: index.saturating_mul(len_bytes), len_bytes, memory_bytes })
    }

    /// The word at `index`.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    #[inline]
    pub fn get(self, index: usize) -> Result<T, OutOfBounds> {
        let at = self.at(index)?;
        // SAFETY: in the region, which begins on a page, so aligned; atomics and volatile copies only (S1).
        Ok(T::from_bits(unsafe { T::load(at) }))
    }

    /// Replaces the word at `index`.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    #[inline]
    pub fn set(self, index: usize, value: T) -> Result<(), OutOfBounds> {
        let at = self.at(index)?;
        // SAFETY: as in `get`.
        unsafe { T::store(at, value.to_bits()) };
        Ok(())
    }

    /// Adds to the word at `index` in one step (integers wrap around), and tells what it was.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    #[inline]
    pub fn add(self, index: usize, value: T) -> Result<T, OutOfBounds> {
        let at = self.at(index)?;
        // SAFETY: as in `get`.
        let mut old = unsafe { T::load(at) };
        loop {
            let was = T::from_bits(old);
            // SAFETY: as in `get`.
            match unsafe { T::exchange(at, old, was.plus(value).to_bits()) } {
                Ok(_) => return Ok(was),
                Err(now) => old = now,
            }
        }
    }

    /// Replaces the word at `index` by `new` if it is `old` (bit for bit); otherwise tells what it is.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    #[inline]
    pub fn compare_exchange(self, index: usize, old: T, new: T) -> Result<Result<T, T>, OutOfBounds> {
        let at = self.at(index)?;
        // SAFETY: as in `get`.
        let exchanged = unsafe { T::exchange(at, old.to_bits(), new.to_bits()) };
        Ok(exchanged.map(T::from_bits).map_err(T::from_bits))
    }
}

impl<T> fmt::Debug for Cells<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cells at {:#x}", self.count, self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_a_table_can_t_hold_are_refused() {
        for bad in ["", "a\0b", &"x".repeat(NAME_BYTES + 1)] {
            assert!(matches!(padded(bad), Err(RegionError::Name { .. })), "{bad:?}");
        }
        assert!(padded(&"x".repeat(NAME_BYTES)).is_ok());
    }

    #[test]
    fn outside_a_thread_there_are_no_regions() {
        assert_eq!(open("x").err(), Some(RegionError::NoThread));
        assert_eq!(create("x", 10).err(), Some(RegionError::NoThread));
        assert_eq!(remove("x").err(), Some(RegionError::NoThread));
    }

    #[test]
    fn words_keep_their_value_through_their_bits() {
        fn check<T: Word + PartialEq + fmt::Debug>(v: T) {
            assert_eq!(T::from_bits(v.to_bits()), v);
        }
        check(-1i8);
        check(-2i16);
        check(-3i32);
        check(i64::MIN);
        check(-0.5f32);
        check(f64::MAX);
        assert_eq!(u8::MAX.plus(1), 0);
    }
}
