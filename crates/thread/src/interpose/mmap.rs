//! Mappings that a thread makes for itself lie in its slot's heap, or they would stay behind when it moves.
//!
//! Anonymous memory is a zeroed block; a private mapping of a file is a block with the file's bytes read in (the
//! standard library maps the executable this way to name the frames of a backtrace). What cannot travel is refused
//! with `EOPNOTSUPP`: shared mappings, executable memory, and fixed addresses outside such a block. Protection of
//! such a block can't be lowered: its pages are the World's.

use super::{fail, hooks, libc_result};
use crate::heap;
use crate::layout::slot_index_of;
use core::alloc::Layout;
use core::ffi::c_void;
use peregrine_sys::linux_raw_sys::general as k;
use peregrine_sys::raw::{Errno, check, syscall6};

const FAILED: *mut c_void = usize::MAX as *mut c_void;
const ENOMEM: i32 = 12;
const EINVAL: i32 = 22;
const EOPNOTSUPP: i32 = 95;
const PAGE: usize = 4096;

fn block(len: usize) -> Option<Layout> {
    let len = len.checked_next_multiple_of(PAGE).filter(|n| *n != 0)?;
    Layout::from_size_align(len, PAGE).ok()
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
    let fixed = flags & (k::MAP_FIXED | k::MAP_FIXED_NOREPLACE) != 0;
    if fixed && slot_index_of(addr as usize) != crate::carrier::current_slot() {
        return Err(EOPNOTSUPP);
    }
    let layout = block(len).ok_or(ENOMEM)?;
    // SAFETY: the block is this thread's; a fixed request names a block that it owns already.
    unsafe {
        let p = if fixed { addr.cast::<u8>() } else { heap::allocate(layout) };
        if p.is_null() {
            return Err(ENOMEM);
        }
        p.write_bytes(0, layout.size());
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
                    Err(Errno(4)) => {}
                    Err(e) => {
                        if !fixed {
                            heap::deallocate(p, layout);
                        }
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

#[unsafe(no_mangle)]
unsafe extern "C" fn mmap64(
    addr: *mut c_void,
    len: usize,
    prot: i32,
    flags: i32,
    fd: i32,
    offset: i64,
) -> *mut c_void {
    // SAFETY: passed on; off_t has 64 bits here.
    unsafe { mmap(addr, len, prot, flags, fd, offset) }
}

fn is_own(addr: *mut c_void) -> bool {
    let here = crate::carrier::current_slot();
    here.is_some() && slot_index_of(addr as usize) == here
}

#[unsafe(no_mangle)]
unsafe extern "C" fn munmap(addr: *mut c_void, len: usize) -> i32 {
    if is_own(addr) {
        // A part of a block can't be freed on its own: only whole ones, of the size they were made with.
        return match block(len) {
            Some(layout) => {
                // SAFETY: C's contract: a mapping made above, not used again.
                unsafe { heap::deallocate(addr.cast(), layout) };
                0
            }
            None => fail(EINVAL) as i32,
        };
    }
    // SAFETY: C's contract.
    libc_result(unsafe { syscall6(k::__NR_munmap, addr as usize, len, 0, 0, 0, 0) }) as i32
}

#[unsafe(no_mangle)]
unsafe extern "C" fn madvise(addr: *mut c_void, len: usize, advice: i32) -> i32 {
    const DONTNEED: i32 = 4;
    const FREE: i32 = 8;
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
        const MAYMOVE: i32 = 1;
        if flags != MAYMOVE {
            fail(EOPNOTSUPP);
            return FAILED;
        }
        // SAFETY: C's contract; the copy stays inside both blocks.
        unsafe {
            let p = match in_slot(core::ptr::null_mut(), new_len, 0, k::MAP_ANONYMOUS, -1, 0) {
                Ok(p) => p,
                Err(e) => {
                    fail(e);
                    return FAILED;
                }
            };
            core::ptr::copy_nonoverlapping(old.cast::<u8>(), p.cast::<u8>(), old_len.min(new_len));
            munmap(old, old_len);
            return p;
        }
    }
    // SAFETY: C's contract.
    let r =
        unsafe { syscall6(k::__NR_mremap, old as usize, old_len, new_len, flags as usize, new as usize, 0) };
    libc_result(r) as *mut c_void
}
