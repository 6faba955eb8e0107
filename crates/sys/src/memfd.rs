//! Anonymous files (`memfd_create`): frames that can be mapped more than once.

use crate::raw::{Errno, check, syscall6};
use crate::rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use linux_raw_sys::general as k;
use peregrine_base::{PAGE_SIZE, PageCount};
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

/// What the file's pages are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Pages {
    /// Base pages (huge ones where the kernel's shmem setting gives them).
    #[default]
    Base,
    /// 2 MiB pages from the pool (`MFD_HUGETLB`).
    Huge2M,
}

/// Makes a memfd of `pages` pages of zeros: close-on-exec, not executable where the kernel knows that, mode 0600 (a
/// holder of a read-only descriptor must not be able to open it anew for writing).
///
/// # Errors
/// EMFILE, ENFILE, ENOMEM; ENODEV or ENOENT: no huge pages.
pub fn create(name: &CStr, pages: PageCount, kind: Pages) -> Result<OwnedFd, Errno> {
    use crate::rustix::fs;
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if kind == Pages::Huge2M {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let errno = |e: crate::rustix::io::Errno| Errno(e.raw_os_error());
    // MFD_NOEXEC_SEAL is of Linux 6.3: an older kernel answers EINVAL.
    let fd = match fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(crate::rustix::io::Errno::INVAL) => fs::memfd_create(name, flags),
        other => other,
    }
    .map_err(errno)?;
    fs::fchmod(&fd, fs::Mode::RUSR | fs::Mode::WUSR).map_err(errno)?;
    fs::ftruncate(&fd, pages.bytes() as u64).map_err(errno)?;
    Ok(fd)
}

/// Forbids shrinking the file from now on, so that no holder can make another's access raise SIGBUS by truncating it.
///
/// # Errors
/// EPERM: sealed already, or not a memfd.
pub fn seal_size(fd: impl AsFd) -> Result<(), Errno> {
    seal(fd, SealFlags::SHRINK | SealFlags::GROW)
}

/// As [`seal_size`], and the file may still grow.
///
/// # Errors
/// As [`seal_size`].
pub fn seal_shrink(fd: impl AsFd) -> Result<(), Errno> {
    seal(fd, SealFlags::SHRINK)
}

/// Gives the frames of `pages` pages from `at` back and leaves zeros (`FALLOC_FL_PUNCH_HOLE`), in every mapping.
///
/// # Errors
/// EOPNOTSUPP: the file system can't. EPERM: sealed against writing.
pub fn punch(fd: impl AsFd, at: PageCount, pages: PageCount) -> Result<(), Errno> {
    crate::rustix::fs::fallocate(
        fd,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        at.bytes() as u64,
        pages.bytes() as u64,
    )
    .map_err(|e| Errno(e.raw_os_error()))
}

/// Calls `found` with each of the `pages` pages from `at` that the file has frames or blocks for (`SEEK_DATA`). The file's
/// position is left where it was.
pub fn for_each_data(fd: impl AsFd, at: PageCount, pages: PageCount, mut found: impl FnMut(PageCount)) {
    use crate::rustix::fs::{SeekFrom, seek};
    let position = seek(&fd, SeekFrom::Current(0));
    let end = (at.get() + pages.get()) * PAGE_SIZE;
    let mut next = at.bytes();
    while let Ok(data) = seek(&fd, SeekFrom::Data(next as u64)) {
        let hole = seek(&fd, SeekFrom::Hole(data)).map_or(end, |h| h as usize);
        let first = (data as usize).max(at.bytes()) / PAGE_SIZE;
        for page in first..hole.min(end).div_ceil(PAGE_SIZE) {
            found(PageCount::new(page));
        }
        next = hole;
        if next >= end {
            break;
        }
    }
    if let Ok(position) = position {
        let _ = seek(&fd, SeekFrom::Start(position));
    }
}

/// Reads all of `[offset, offset + len_bytes)` of the file to `to` (`pread`), for code that has no `errno`; holes read as
/// zeros.
///
/// # Errors
/// The kernel's; `ENODATA` if the file ends before.
///
/// # Safety
/// `to` has room, and nobody else uses it.
pub unsafe fn read_raw(fd: i32, mut offset: u64, mut to: usize, mut len_bytes: usize) -> Result<(), Errno> {
    while len_bytes != 0 {
        // SAFETY: the caller's promise.
        match check(unsafe { syscall6(k::__NR_pread64, fd as usize, to, len_bytes, offset as usize, 0, 0) }) {
            Ok(0) => return Err(Errno(linux_raw_sys::errno::ENODATA as i32)),
            Ok(n) => (offset, to, len_bytes) = (offset + n as u64, to + n, len_bytes - n),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Writes `bytes` into the file at `offset` (`pwrite`).
///
/// # Errors
/// The kernel's; `ENOSPC` if the file can't take more.
pub fn write_raw(fd: i32, mut offset: u64, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        // SAFETY: reads a live slice.
        match check(unsafe {
            syscall6(
                k::__NR_pwrite64,
                fd as usize,
                bytes.as_ptr() as usize,
                bytes.len(),
                offset as usize,
                0,
                0,
            )
        }) {
            Ok(0) => return Err(Errno(linux_raw_sys::errno::ENOSPC as i32)),
            Ok(n) => (offset, bytes) = (offset + n as u64, &bytes[n..]),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// As [`punch`], by number and bytes, for code that has no `errno`.
///
/// # Errors
/// As [`punch`].
pub fn punch_raw(fd: i32, offset: u64, len_bytes: u64) -> Result<(), Errno> {
    let mode = (FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE).bits() as usize;
    // SAFETY: changes a file's contents, not memory behind references (S1).
    check(unsafe {
        syscall6(k::__NR_fallocate, fd as usize, mode, offset as usize, len_bytes as usize, 0, 0)
    })
    .map(drop)
}

/// Adds seals (`F_ADD_SEALS`); they stay for good.
///
/// # Errors
/// EPERM: sealed against sealing. EBUSY: [`SealFlags::WRITE`] while somebody maps the file writable.
pub fn seal(fd: impl AsFd, seals: SealFlags) -> Result<(), Errno> {
    crate::rustix::fs::fcntl_add_seals(fd, seals).map_err(|e| Errno(e.raw_os_error()))
}

/// The size in bytes of a file that a stranger handed over, if it is a memfd of base pages that nobody can shrink: then no
/// access to its mapped pages raises SIGBUS, whatever the stranger does.
///
/// Not one of huge pages: the pool can run dry under a mapping.
///
/// # Errors
/// EINVAL: something else, or not sealed so.
pub fn size_if_safe(fd: impl AsFd) -> Result<u64, Errno> {
    use crate::rustix::fs;
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    let errno = |e: crate::rustix::io::Errno| Errno(e.raw_os_error());
    let seals = fs::fcntl_get_seals(&fd).map_err(errno)?;
    if !seals.contains(SealFlags::SHRINK) || fs::fstatfs(&fd).map_err(errno)?.f_type as u64 != TMPFS_MAGIC {
        return Err(Errno::EINVAL);
    }
    u64::try_from(fs::fstat(&fd).map_err(errno)?.st_size).map_err(|_| Errno::EINVAL)
}
