//! Guard ranges (`MADV_GUARD_INSTALL`): every touch raises SIGSEGV, and no mapping is split.
//!
//! On anonymous memory installing one destroys the contents; on a memfd it keeps them (only this page table's entries
//! go). Installing over a memfd page that a userfaultfd holds write-protected, synchronously or asynchronously (both
//! tried), livelocks in Linux 6.18 until the process is killed: lift the protection first.

use crate::mem::{self, Advice};
use crate::raw::Errno;
use peregrine_base::PageRange;

/// `MADV_GUARD_INSTALL`: from now on every touch of `range` raises SIGSEGV.
///
/// # Errors
/// EINVAL: a kernel before 6.13 (6.15 for files), or a locked or special mapping. ENOMEM: a hole. EINTR: try again.
///
/// # Safety
/// The caller owns the mapping and nothing refers to its bytes; on anonymous memory they are lost. No page of a shared
/// mapping in `range` may be write-protected by a userfaultfd (the kernel would livelock).
#[inline]
pub unsafe fn install(range: PageRange) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    unsafe { mem::advise(range, Advice::GuardInstall) }
}

/// `MADV_GUARD_REMOVE`: takes the guards off; other pages are left alone.
///
/// # Errors
/// As [`install`].
///
/// # Safety
/// The caller owns the mapping.
#[inline]
pub unsafe fn remove(range: PageRange) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    unsafe { mem::advise(range, Advice::GuardRemove) }
}
