//! Guard ranges in memory that the caller lays out itself: stacks, slots, arenas. A touch raises SIGSEGV; who is to hear of
//! it registers a handler ([`trap::Registration`](crate::trap::Registration)) or a [`Region`](crate::Region), which brings
//! its own guards. **No allocator, lock, static or thread-local**, so a runtime may call this between two threads.
//!
//! Markers (`MADV_GUARD_INSTALL`, Linux 6.13, files 6.15) belong to one page table and split no mapping; where the kernel
//! has none, pages without access (`PROT_NONE`) do the same, at the price of mappings (`vm.max_map_count`).

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
        if peregrine_sys::guard::install(range).is_ok() {
            return Ok(Kind::Markers);
        }
        mem::protect(range, Protection::None).map(|()| Kind::NoAccess)
    }
}

/// Takes the guards out of `range`, which is readable and writable then; pages without one are left alone.
///
/// # Errors
/// ENOMEM: a hole in the range.
///
/// # Safety
/// The caller owns the mapping, which is readable and writable but for guards.
pub unsafe fn remove(range: PageRange) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    unsafe {
        if peregrine_sys::guard::remove(range).is_ok() {
            return Ok(());
        }
        mem::protect(range, Protection::ReadWrite)
    }
}
