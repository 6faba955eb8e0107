//! Mappings that a thread makes for itself lie in its slot's heap, or they would stay behind when it moves.
//!
//! Anonymous memory is a zeroed block; a private mapping of a file is a block with the file's bytes read in (the
//! standard library maps the executable this way to name the frames of a backtrace). What cannot travel is refused
//! with `EOPNOTSUPP`: shared mappings, executable memory, and fixed addresses outside such a block. Protection of
//! such a block can't be lowered: its pages are the World's.
//!
//! In a static executable libc's data are the thread's, so what libc maps for itself must be too: the stack of a child that
//! `posix_spawn` starts, a locale. Else a thread that is moved, or imaged, between the mapping and its use finds nothing there.
//! There libc's own calls, by the names with underscores, end here as well; in a shared libc they are bound inside it.

use super::errno::{EINVAL, ENOMEM, EOPNOTSUPP};
use super::{fail, hooks, libc_result};
use crate::heap;
use crate::slot::SlotHeader;
use crate::window::holds;
use core::alloc::Layout;
use core::ffi::c_void;
use peregrine_base::PAGE_SIZE as PAGE;
use peregrine_sys::linux_raw_sys::general as k;
use peregrine_sys::raw::{Errno, check, syscall6};

const FAILED: *mut c_void = usize::MAX as *mut c_void;

/// A mapping: its block, and which of its pages are still mapped. C may unmap any part of it, the block is freed as a whole
/// when the last page goes.
#[repr(C)]
struct Mapping {
    next: usize,
    start: usize,
    pages: usize,
    // One bit a page follows.
}

impl Mapping {
    fn layout(pages: usize) -> Layout {
        let words = pages.div_ceil(64);
        // SAFETY: 24 bytes and less than a word per 64 pages of a slot: no overflow.
        unsafe { Layout::from_size_align_unchecked(size_of::<Mapping>() + words * 8, 8) }
    }

    /// Word `i` of the bits.
    unsafe fn word(this: *mut Self, i: usize) -> *mut u64 {
        // SAFETY: allocated behind the struct.
        unsafe { this.add(1).cast::<u64>().add(i) }
    }

    unsafe fn mark(this: *mut Self, from: usize, to: usize, mapped: bool) {
        for page in from..to {
            // SAFETY: pages below `pages` have a bit.
            unsafe {
                let word = Self::word(this, page / 64);
                if mapped { *word |= 1 << (page % 64) } else { *word &= !(1 << (page % 64)) }
            }
        }
    }

    unsafe fn is_empty(this: *mut Self) -> bool {
        // SAFETY: all words of the bits.
        unsafe { (0..(*this).pages.div_ceil(64)).all(|i| *Self::word(this, i) == 0) }
    }

    /// The pages of `[addr, addr + len)` that lie in it, as numbers.
    unsafe fn overlap(this: *mut Self, addr: usize, len: usize) -> (usize, usize) {
        // SAFETY: intact.
        let (start, end) = unsafe { ((*this).start, (*this).start + (*this).pages * PAGE) };
        let (from, to) = (addr.clamp(start, end), addr.saturating_add(len).clamp(start, end));
        ((from - start) / PAGE, (to - start).div_ceil(PAGE))
    }
}

/// Head of the running thread's list.
fn list() -> Option<*mut usize> {
    // SAFETY: only the address of a field of the running thread's own header.
    crate::carrier::current_slot().map(|i| unsafe { &raw mut (*SlotHeader::of(i)).mappings })
}

/// Calls `f` with each mapping of the running thread.
fn each(mut f: impl FnMut(*mut Mapping)) {
    let Some(head) = list() else { return };
    // SAFETY: the list is this thread's, its entries intact.
    unsafe {
        let mut at = *head;
        while at != 0 {
            let next = (*(at as *mut Mapping)).next;
            f(at as *mut Mapping);
            at = next;
        }
    }
}

/// The mapping that holds all of `[addr, addr + len)`.
fn holding(addr: usize, len: usize) -> Option<*mut Mapping> {
    let mut found = None;
    each(|m| {
        // SAFETY: intact.
        let (start, end) = unsafe { ((*m).start, (*m).start + (*m).pages * PAGE) };
        if start <= addr && addr.saturating_add(len) <= end {
            found = Some(m);
        }
    });
    found
}

fn new_mapping(pages: usize) -> Option<*mut Mapping> {
    let head = list()?;
    let block = Layout::from_size_align(pages.checked_mul(PAGE)?, PAGE).ok()?;
    // SAFETY: sizes are not zero; both blocks are this thread's.
    unsafe {
        let m = heap::allocate(Mapping::layout(pages)).cast::<Mapping>();
        if m.is_null() {
            return None;
        }
        let start = heap::allocate(block);
        if start.is_null() {
            heap::deallocate(m.cast(), Mapping::layout(pages));
            return None;
        }
        m.write(Mapping { next: *head, start: start as usize, pages });
        for i in 0..pages.div_ceil(64) {
            *Mapping::word(m, i) = 0;
        }
        Mapping::mark(m, 0, pages, true);
        *head = m as usize;
        Some(m)
    }
}

/// Unmaps what of `[addr, addr + len)` is mapped.
fn unmap(addr: usize, len: usize) {
    let Some(head) = list() else { return };
    // SAFETY: the list is this thread's; an entry is taken out before it is freed.
    unsafe {
        let mut link = head;
        while *link != 0 {
            let m = *link as *mut Mapping;
            let (from, to) = Mapping::overlap(m, addr, len);
            if from < to {
                Mapping::mark(m, from, to, false);
                if Mapping::is_empty(m) {
                    *link = (*m).next;
                    let (start, pages) = ((*m).start, (*m).pages);
                    heap::deallocate(start as *mut u8, Layout::from_size_align_unchecked(pages * PAGE, PAGE));
                    heap::deallocate(m.cast(), Mapping::layout(pages));
                    continue;
                }
            }
            link = &raw mut (*m).next;
        }
    }
}

unsafe fn in_slot(
    addr: *mut c_void,
    len: usize,
    prot: u32,
    flags: u32,
    fd: i32,
    offset: i64,
) -> Result<*mut c_void, i32> {
    if len == 0 {
        return Err(EINVAL);
    }
    if flags & k::MAP_SHARED != 0 || prot & k::PROT_EXEC != 0 {
        return Err(EOPNOTSUPP);
    }
    let pages = len.checked_next_multiple_of(PAGE).ok_or(ENOMEM)? / PAGE;
    let fixed = flags & (k::MAP_FIXED | k::MAP_FIXED_NOREPLACE) != 0;
    // SAFETY: the pages are this thread's: new ones, or part of a mapping that it has.
    unsafe {
        let p = if fixed {
            let m = holding(addr as usize, pages * PAGE).ok_or(EOPNOTSUPP)?;
            let (from, to) = Mapping::overlap(m, addr as usize, len);
            Mapping::mark(m, from, to, true);
            addr.cast::<u8>()
        } else {
            (*new_mapping(pages).ok_or(ENOMEM)?).start as *mut u8
        };
        p.write_bytes(0, pages * PAGE);
        if flags & k::MAP_ANONYMOUS == 0 {
            let mut done = 0usize;
            while done < len {
                let r = syscall6(
                    k::__NR_pread64,
                    fd as usize,
                    p as usize + done,
                    len - done,
                    offset as usize + done,
                    0,
                    0,
                );
                match check(r) {
                    Ok(0) => break,
                    Ok(n) => done += n,
                    Err(Errno::EINTR) => {}
                    Err(e) => {
                        unmap(p as usize, len);
                        return Err(e.0);
                    }
                }
            }
        }
        Ok(p.cast())
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mmap(
    addr: *mut c_void,
    len: usize,
    prot: i32,
    flags: i32,
    fd: i32,
    offset: i64,
) -> *mut c_void {
    if hooks().is_some() {
        // SAFETY: C's contract.
        return unsafe { in_slot(addr, len, prot as u32, flags as u32, fd, offset) }.unwrap_or_else(|e| {
            fail(e);
            FAILED
        });
    }
    // SAFETY: C's contract.
    let r = unsafe {
        syscall6(
            k::__NR_mmap,
            addr as usize,
            len,
            prot as usize,
            flags as usize,
            fd as isize as usize,
            offset as usize,
        )
    };
    libc_result(r) as *mut c_void
}

/// The same under its other names: `off_t` has 64 bits here, and libc's own calls go by names with underscores.
macro_rules! mmap_as {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(
            addr: *mut c_void,
            len: usize,
            prot: i32,
            flags: i32,
            fd: i32,
            offset: i64,
        ) -> *mut c_void {
            // SAFETY: passed on.
            unsafe { mmap(addr, len, prot, flags, fd, offset) }
        }
    )*};
}
mmap_as! { mmap64 __mmap __mmap64 }

/// libc's own name for it.
#[unsafe(no_mangle)]
unsafe extern "C" fn __munmap(addr: *mut c_void, len: usize) -> i32 {
    // SAFETY: passed on.
    unsafe { munmap(addr, len) }
}

fn is_own(addr: *mut c_void) -> bool {
    let here = crate::carrier::current_slot();
    here.is_some_and(|i| holds(i, addr as usize))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn munmap(addr: *mut c_void, len: usize) -> i32 {
    if is_own(addr) {
        if len == 0 || !(addr as usize).is_multiple_of(PAGE) {
            return fail(EINVAL) as i32;
        }
        unmap(addr as usize, len);
        return 0;
    }
    // SAFETY: C's contract.
    libc_result(unsafe { syscall6(k::__NR_munmap, addr as usize, len, 0, 0, 0, 0) }) as i32
}

#[unsafe(no_mangle)]
unsafe extern "C" fn madvise(addr: *mut c_void, len: usize, advice: i32) -> i32 {
    const DONTNEED: i32 = k::MADV_DONTNEED as i32;
    const FREE: i32 = k::MADV_FREE as i32;
    if is_own(addr) {
        if advice == DONTNEED || advice == FREE {
            // In shared memory this advice would keep the contents; callers expect zeroes.
            // SAFETY: C's contract: the range is the caller's.
            unsafe { addr.cast::<u8>().write_bytes(0, len) };
        }
        return 0;
    }
    // SAFETY: C's contract.
    libc_result(unsafe { syscall6(k::__NR_madvise, addr as usize, len, advice as usize, 0, 0, 0) }) as i32
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mremap(
    old: *mut c_void,
    old_len: usize,
    new_len: usize,
    flags: i32,
    new: *mut c_void,
) -> *mut c_void {
    if is_own(old) {
        const MAYMOVE: i32 = k::MREMAP_MAYMOVE as i32;
        let whole = |len: usize| len.checked_next_multiple_of(PAGE);
        let (Some(old_bytes), Some(new_bytes)) = (whole(old_len), whole(new_len)) else {
            fail(EINVAL);
            return FAILED;
        };
        if new_len == 0 || holding(old as usize, old_bytes).is_none() {
            fail(EINVAL);
            return FAILED;
        }
        if new_bytes <= old_bytes {
            unmap(old as usize + new_bytes, old_bytes - new_bytes);
            return old;
        }
        if flags != MAYMOVE {
            fail(EOPNOTSUPP);
            return FAILED;
        }
        // SAFETY: C's contract; the copy stays inside both mappings.
        unsafe {
            let p = match in_slot(core::ptr::null_mut(), new_len, 0, k::MAP_ANONYMOUS, -1, 0) {
                Ok(p) => p,
                Err(e) => {
                    fail(e);
                    return FAILED;
                }
            };
            core::ptr::copy_nonoverlapping(old.cast::<u8>(), p.cast::<u8>(), old_len);
            unmap(old as usize, old_bytes);
            return p;
        }
    }
    // SAFETY: C's contract.
    let r =
        unsafe { syscall6(k::__NR_mremap, old as usize, old_len, new_len, flags as usize, new as usize, 0) };
    libc_result(r) as *mut c_void
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mprotect(addr: *mut c_void, len: usize, prot: i32) -> i32 {
    if is_own(addr) {
        // The pages stay readable and writable on every node; to promise less would be a lie.
        let all = (k::PROT_READ | k::PROT_WRITE) as i32;
        return if prot == all { 0 } else { fail(EOPNOTSUPP) as i32 };
    }
    // SAFETY: C's contract.
    libc_result(unsafe { syscall6(k::__NR_mprotect, addr as usize, len, prot as usize, 0, 0, 0) }) as i32
}
