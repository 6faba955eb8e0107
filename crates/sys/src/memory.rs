//! Mapping calls for code that has no `errno`.

use crate::raw::{Errno, check, syscall6};
use linux_raw_sys::general as k;

/// What a mapping of [`map_fixed`] is made of.
#[derive(Clone, Copy, Debug)]
pub enum Backing {
    /// Pages of this process alone, copied on fork.
    PrivateAnonymous,
    /// The file `fd` from `offset` (bytes), shared by all who map it.
    SharedFile {
        /// An open memfd or file.
        fd: i32,
        /// Byte offset, a multiple of the page size.
        offset: u64,
    },
}

/// Maps `len_bytes` readable and writable at exactly `addr`, replacing nothing (`MAP_FIXED_NOREPLACE`).
///
/// # Errors
/// `EEXIST` if something is mapped there, `ENOMEM` beyond `RLIMIT_AS`.
pub fn map_fixed(addr: usize, len_bytes: usize, backing: Backing) -> Result<(), Errno> {
    let base = k::MAP_FIXED_NOREPLACE | k::MAP_NORESERVE;
    let (flags, fd, off) = match backing {
        Backing::PrivateAnonymous => (base | k::MAP_PRIVATE | k::MAP_ANONYMOUS, -1, 0),
        Backing::SharedFile { fd, offset } => (base | k::MAP_SHARED, fd, offset),
    };
    let prot = k::PROT_READ | k::PROT_WRITE;
    // SAFETY: NOREPLACE changes no existing mapping.
    let at = check(unsafe {
        syscall6(
            k::__NR_mmap,
            addr,
            len_bytes,
            prot as usize,
            flags as usize,
            fd as isize as usize,
            off as usize,
        )
    })?;
    if at == addr {
        return Ok(());
    }
    // A kernel older than 4.17 takes the address as a hint only.
    // SAFETY: unmaps what the call above just made.
    unsafe { syscall6(k::__NR_munmap, at, len_bytes, 0, 0, 0, 0) };
    Err(Errno(k_errno::EEXIST))
}

/// Replaces the pages of `[addr, addr + len_bytes)` by anonymous ones of this process, readable and writable, with the
/// same bytes: as if every page of a private file mapping had been written. Atomic: nobody sees other bytes.
///
/// # Errors
/// The kernel's for `mmap` or `mremap`; nothing has changed then.
///
/// # Safety
/// The range is whole pages, readable, and written by nobody meanwhile.
pub unsafe fn make_anonymous(addr: usize, len_bytes: usize) -> Result<(), Errno> {
    let (prot, flags) = (k::PROT_READ | k::PROT_WRITE, k::MAP_PRIVATE | k::MAP_ANONYMOUS);
    // SAFETY: a fresh mapping, filled from the caller's readable range, then moved over it.
    unsafe {
        let fresh =
            check(syscall6(k::__NR_mmap, 0, len_bytes, prot as usize, flags as usize, usize::MAX, 0))?;
        core::ptr::copy_nonoverlapping(addr as *const u8, fresh as *mut u8, len_bytes);
        let how = (k::MREMAP_MAYMOVE | k::MREMAP_FIXED) as usize;
        check(syscall6(k::__NR_mremap, fresh, len_bytes, len_bytes, how, addr, 0)).map(drop).inspect_err(
            |_| {
                syscall6(k::__NR_munmap, fresh, len_bytes, 0, 0, 0, 0);
            },
        )
    }
}

/// Unmaps `[addr, addr + len_bytes)`.
///
/// # Safety
/// Nothing uses the range any more.
pub unsafe fn unmap(addr: usize, len_bytes: usize) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    check(unsafe { syscall6(k::__NR_munmap, addr, len_bytes, 0, 0, 0, 0) }).map(drop)
}

/// `madvise(2)`.
///
/// # Safety
/// The advice must be sound for what lives in the range.
pub unsafe fn advise(addr: usize, len_bytes: usize, advice: Advice) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    check(unsafe { syscall6(k::__NR_madvise, addr, len_bytes, advice as usize, 0, 0, 0) }).map(drop)
}

/// Kinds of advice used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Advice {
    /// Punch a hole in the file behind the range: its pages are freed and read as zero.
    Remove = 9,
    /// Leave the range out of core dumps.
    DontDump = 16,
    /// Install guard markers: any access raises SIGSEGV; contents of a memfd are kept (Linux 6.13).
    GuardInstall = 102,
    /// Remove guard markers.
    GuardRemove = 103,
}

/// Changes what accesses `[addr, addr + len_bytes)` allows; `prot` is the kernel's bit mask.
///
/// # Safety
/// Nothing relies on the accesses taken away.
pub unsafe fn protect(addr: usize, len_bytes: usize, prot: u32) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    check(unsafe { syscall6(k::__NR_mprotect, addr, len_bytes, prot as usize, 0, 0, 0) }).map(drop)
}

/// `PROT_NONE` for [`protect`].
pub const PROT_NONE: u32 = k::PROT_NONE;

/// `PROT_READ | PROT_WRITE` for [`protect`].
pub const PROT_READ_WRITE: u32 = k::PROT_READ | k::PROT_WRITE;

mod k_errno {
    pub const EEXIST: i32 = linux_raw_sys::errno::EEXIST as i32;
}
