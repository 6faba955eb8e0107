//! MAP2 at addresses of the caller's choice, for runtimes that lay out an address space themselves: windows, slots, the same
//! range in several processes. **No allocator, lock, static or thread-local.**
//!
//! [`Mapping::alias`](crate::Mapping::alias) is the same for everybody else: it finds the place and owns it.

use peregrine_base::{PageCount, PageRange, Protection};
use peregrine_sys::mem::{self, MapOptions, Placement, Source};
use peregrine_sys::raw::Errno;
use std::os::fd::BorrowedFd;

const OPTIONS: MapOptions = MapOptions { no_reserve: true, populate: false, huge_2m: false, stack: false };

/// Maps the pages of `object` from `first` on at exactly `range`, where nothing may be mapped yet.
///
/// ```
/// use peregrine_vm::{alias, Mapping, PageCount, PageRange, Protection};
/// let one = Mapping::memfd(PageCount::new(4))?;
/// let object = one.object_fd().expect("a memfd has one");
/// let place = Mapping::reserve(PageCount::new(4))?;
/// // SAFETY: the reservation is ours, and nothing refers to it.
/// unsafe { alias::over(place.range(), object, PageCount::new(0), Protection::Read)? };
/// one.bytes().store_u64(8, 7)?;
/// assert_eq!(place.bytes().load_u64(8)?, 7);
/// // Taken by now:
/// assert!(alias::at(place.range(), object, PageCount::new(0), Protection::Read).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// EEXIST: something is mapped there. ENOMEM: `RLIMIT_AS`, or `vm.max_map_count` mappings. EACCES: the object is not open
/// for `access`.
pub fn at(
    range: PageRange,
    object: BorrowedFd<'_>,
    first: PageCount,
    access: Protection,
) -> Result<(), Errno> {
    let (source, place) = (Source::Shared(object, first), Placement::At(range.start()));
    // SAFETY: replaces nothing.
    unsafe { mem::map(range.pages(), access, source, place, OPTIONS) }.map(drop)
}

/// Maps the pages of `object` from `first` on at exactly `range`, in place of what is mapped there.
///
/// # Errors
/// As [`at`], without EEXIST.
///
/// # Safety
/// The caller owns what is mapped in `range`, and nothing refers to its bytes.
pub unsafe fn over(
    range: PageRange,
    object: BorrowedFd<'_>,
    first: PageCount,
    access: Protection,
) -> Result<(), Errno> {
    let (source, place) = (Source::Shared(object, first), Placement::Replace(range.start()));
    // SAFETY: the caller's promise.
    unsafe { mem::map(range.pages(), access, source, place, OPTIONS) }.map(drop)
}
