//! Mappings: `mmap`, `munmap`, `mprotect`, `madvise`, `mremap`, as single system calls that a signal handler may make.

use crate::raw::{self, Errno, syscall6};
use linux_raw_sys::general as g;
use peregrine_base::{PageCount, PageRange, Protection, VirtAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

/// What is behind a new mapping.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// Private zero pages.
    Anonymous,
    /// Zero pages shared with children.
    SharedAnonymous,
    /// A file or memfd, from a page offset on; writes reach it.
    Shared(BorrowedFd<'a>, PageCount),
    /// A file or memfd, from a page offset on; writes stay private.
    Private(BorrowedFd<'a>, PageCount),
}

/// Where a new mapping goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Placement {
    /// Wherever the kernel likes.
    Anywhere,
    /// Exactly here, and only if nothing is (`MAP_FIXED_NOREPLACE`).
    At(VirtAddr),
    /// Exactly here, in place of what is (`MAP_FIXED`).
    Replace(VirtAddr),
}

/// Further wishes of a new mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MapOptions {
    /// Reserve no swap (`MAP_NORESERVE`).
    pub no_reserve: bool,
    /// Fault the pages in now (`MAP_POPULATE`).
    pub populate: bool,
    /// 2 MiB pages from the pool (`MAP_HUGETLB | MAP_HUGE_2MB`), anonymous only.
    pub huge_2m: bool,
    /// Use as a stack (`MAP_STACK`, `MAP_GROWSDOWN` not included).
    pub stack: bool,
}

const fn prot_bits(access: Protection) -> u32 {
    match access {
        Protection::None => g::PROT_NONE,
        Protection::Read => g::PROT_READ,
        Protection::ReadWrite => g::PROT_READ | g::PROT_WRITE,
    }
}

/// `mmap(2)`.
///
/// # Errors
/// ENOMEM: no room, or `vm.max_map_count` mappings already. EEXIST: something is at [`Placement::At`]. EACCES, EINVAL,
/// ENODEV: the descriptor does not allow it.
///
/// # Safety
/// With [`Placement::Replace`] the caller owns what is there.
pub unsafe fn map(
    pages: PageCount,
    access: Protection,
    source: Source<'_>,
    placement: Placement,
    options: MapOptions,
) -> Result<PageRange, Errno> {
    let (mut flags, fd, offset) = match source {
        Source::Anonymous => (g::MAP_PRIVATE | g::MAP_ANONYMOUS, -1, 0),
        Source::SharedAnonymous => (g::MAP_SHARED | g::MAP_ANONYMOUS, -1, 0),
        Source::Shared(fd, at) => (g::MAP_SHARED, fd.as_raw_fd(), at.bytes()),
        Source::Private(fd, at) => (g::MAP_PRIVATE, fd.as_raw_fd(), at.bytes()),
    };
    let at = match placement {
        Placement::Anywhere => 0,
        Placement::At(addr) => {
            flags |= g::MAP_FIXED_NOREPLACE;
            addr.as_usize()
        }
        Placement::Replace(addr) => {
            flags |= g::MAP_FIXED;
            addr.as_usize()
        }
    };
    for (wish, flag) in [
        (options.no_reserve, g::MAP_NORESERVE),
        (options.populate, g::MAP_POPULATE),
        (options.huge_2m, g::MAP_HUGETLB | (21 << 26)),
        (options.stack, g::MAP_STACK),
    ] {
        if wish {
            flags |= flag;
        }
    }
    // SAFETY: a mapping at a new place disturbs nobody; in place of another one it is the caller's promise.
    let start = unsafe {
        raw::check(syscall6(
            g::__NR_mmap,
            at,
            pages.bytes(),
            prot_bits(access) as usize,
            flags as usize,
            fd as usize,
            offset,
        ))?
    };
    if at != 0 && start != at {
        // A kernel before 4.17 takes MAP_FIXED_NOREPLACE as a hint.
        let got = PageRange::new(VirtAddr::new(start), pages);
        // SAFETY: this call has just made that mapping, and nobody has seen it.
        let _ = unsafe { unmap(got) };
        return Err(Errno::EEXIST);
    }
    Ok(PageRange::new(VirtAddr::new(start), pages))
}

/// `munmap(2)`.
///
/// # Errors
/// ENOMEM: it would split a mapping and there are `vm.max_map_count` already.
///
/// # Safety
/// The caller owns the range and nothing refers to it.
pub unsafe fn unmap(range: PageRange) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    unsafe {
        raw::check(syscall6(g::__NR_munmap, range.start().as_usize(), range.len_bytes(), 0, 0, 0, 0))?;
    }
    Ok(())
}

/// `mprotect(2)`.
///
/// # Errors
/// ENOMEM: a hole in the range, or it would split a mapping and there are `vm.max_map_count` already. EACCES: the file
/// is not open for that.
///
/// # Safety
/// The caller owns the range, and a trap on it is expected.
#[inline]
pub unsafe fn protect(range: PageRange, access: Protection) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    unsafe {
        raw::check(syscall6(
            g::__NR_mprotect,
            range.start().as_usize(),
            range.len_bytes(),
            prot_bits(access) as usize,
            0,
            0,
            0,
        ))?;
    }
    Ok(())
}

/// What `madvise(2)` is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Advice {
    /// Drop the pages: private ones are zero afterwards, shared ones come back from the file.
    DontNeed = g::MADV_DONTNEED,
    /// Drop the pages and punch the file.
    Remove = g::MADV_REMOVE,
    /// Write out to swap or file now.
    PageOut = g::MADV_PAGEOUT,
    /// Fault in for reading (5.14).
    PopulateRead = g::MADV_POPULATE_READ,
    /// Fault in for writing (5.14).
    PopulateWrite = g::MADV_POPULATE_WRITE,
    /// Huge pages welcome.
    HugePage = g::MADV_HUGEPAGE,
    /// No huge pages.
    NoHugePage = g::MADV_NOHUGEPAGE,
    /// Make huge pages now (6.1).
    Collapse = g::MADV_COLLAPSE,
    /// Left out of core dumps.
    DontDump = g::MADV_DONTDUMP,
    /// A child does not get it.
    DontFork = g::MADV_DONTFORK,
    /// A child gets zeros (4.14).
    WipeOnFork = g::MADV_WIPEONFORK,
    /// Guard markers (6.13).
    GuardInstall = g::MADV_GUARD_INSTALL,
    /// No guard markers.
    GuardRemove = g::MADV_GUARD_REMOVE,
}

/// `madvise(2)`.
///
/// # Errors
/// EINVAL: the kernel does not know the advice, or not for this mapping. ENOMEM: a hole. EFAULT, EHWPOISON: populate
/// met a page that raises SIGBUS. EAGAIN, EINTR: try again.
///
/// # Safety
/// The caller owns the range; advice that drops contents drops them.
#[inline]
pub unsafe fn advise(range: PageRange, advice: Advice) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    unsafe {
        raw::check(syscall6(
            g::__NR_madvise,
            range.start().as_usize(),
            range.len_bytes(),
            advice as u32 as usize,
            0,
            0,
            0,
        ))?;
    }
    Ok(())
}

/// `mremap(2)` to a new place of the kernel's choice or to exactly `to` (`MREMAP_FIXED`, which replaces what is there).
///
/// # Errors
/// EFAULT: not one mapping. ENOMEM, EINVAL.
///
/// # Safety
/// The caller owns `from`, and `to` if given; nothing refers to the old addresses.
pub unsafe fn remap(from: PageRange, new_pages: PageCount, to: Option<VirtAddr>) -> Result<PageRange, Errno> {
    let flags = g::MREMAP_MAYMOVE | if to.is_some() { g::MREMAP_FIXED } else { 0 };
    // SAFETY: the caller's promise.
    let start = unsafe {
        raw::check(syscall6(
            g::__NR_mremap,
            from.start().as_usize(),
            from.len_bytes(),
            new_pages.bytes(),
            flags as usize,
            to.map_or(0, VirtAddr::as_usize),
            0,
        ))?
    };
    Ok(PageRange::new(VirtAddr::new(start), new_pages))
}
