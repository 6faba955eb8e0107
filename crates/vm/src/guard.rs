//! Guard ranges in memory that the caller lays out itself: stacks, slots, arenas. A touch raises SIGSEGV; who is to hear of
//! it registers a handler ([`trap::Registration`](crate::trap::Registration)) or a [`Region`](crate::Region), which brings
//! its own guards. **No allocator, lock, static or thread-local**, so a runtime may call this between two threads.
//!
//! Markers (`MADV_GUARD_INSTALL`, Linux 6.13, files 6.15) belong to one page table and split no mapping; where the kernel
//! has none, pages without access (`PROT_NONE`) do the same, at the price of mappings (`vm.max_map_count`).

use crate::region::retry;
use peregrine_base::{PageRange, Protection};
use peregrine_sys::mem;
use peregrine_sys::raw::Errno;

/// What a guard was made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Markers: contents of shared memory are kept, those of private memory are lost.
    Markers,
    /// Pages without access: all contents are kept.
    NoAccess,
}

/// From now on every touch of `range` raises SIGSEGV, in this page table.
///
/// ```
/// use peregrine_vm::{guard, Mapping, PageCount};
/// let stack = Mapping::anonymous(PageCount::new(17))?;
/// let lowest = stack.pages(0, 1)?;
/// // SAFETY: the page is ours and holds nothing; no userfaultfd watches it.
/// unsafe { guard::install(lowest)? };
/// # unsafe { guard::remove(lowest)? };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// ENOMEM: a hole in the range, or no markers and `vm.max_map_count` mappings already.
///
/// # Safety
/// The caller owns the mapping, and nothing refers to the range; its contents may be lost. No page of a shared mapping in it
/// is write-protected by a userfaultfd, also asynchronously (that is, tracked and clean): the kernel would livelock
/// (Linux 6.18). [`RawTrackerRef::mark_written`](crate::dirty::RawTrackerRef::mark_written) lifts that first.
pub unsafe fn install(range: PageRange) -> Result<Kind, Errno> {
    // SAFETY: the caller's promise.
    unsafe {
        match install_markers(range) {
            Ok(()) => Ok(Kind::Markers),
            // After any other failure `remove` would find that there are markers, and leave the pages without access.
            Err(e) if is_without_markers(e) => mem::protect(range, Protection::None).map(|()| Kind::NoAccess),
            Err(e) => Err(e),
        }
    }
}

/// As [`install`], by markers or not at all: the mapping is never split.
///
/// # Errors
/// EINVAL: a kernel before 6.13 (6.15 for a memfd or a file), or locked memory. ENOMEM: a hole in the range.
///
/// # Safety
/// As [`install`].
#[inline]
pub unsafe fn install_markers(range: PageRange) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    retry(|| unsafe { peregrine_sys::guard::install(range) })
}

/// No markers on this kernel, for this memory, or under this filter.
const fn is_without_markers(e: Errno) -> bool {
    matches!(e, Errno::EINVAL | Errno::EPERM | Errno::ENOSYS)
}

/// Takes the guards out of `range`, which is readable and writable then; pages without one are left alone.
///
/// # Errors
/// ENOMEM: a hole in the range.
///
/// # Safety
/// The caller owns the mapping, which is readable and writable but for guards, and not locked (`mlock`).
pub unsafe fn remove(range: PageRange) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    unsafe {
        match remove_markers(range) {
            Err(e) if is_without_markers(e) => mem::protect(range, Protection::ReadWrite),
            done => done,
        }
    }
}

/// As [`remove`], of markers only.
///
/// # Errors
/// As [`install_markers`].
///
/// # Safety
/// The caller owns the mapping.
#[inline]
pub unsafe fn remove_markers(range: PageRange) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    retry(|| unsafe { peregrine_sys::guard::remove(range) })
}
