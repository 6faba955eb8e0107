//! C's allocation functions. `free` is told no size, so each block is preceded by 16 bytes that hold it.
//!
//! ```text
//!   talc block:  │ padding up to the alignment │ size, offset │ payload …
//!                ▲ payload - offset                           ▲ what C sees
//! ```

use super::errno::{EINVAL, ENOMEM};
use super::fail;
use crate::heap;
use core::alloc::Layout;
use core::ffi::c_void;
use core::ptr::null_mut;
use peregrine_base::PAGE_SIZE;

const HEADER: usize = 16;

#[repr(C)]
struct Header {
    /// Bytes of the payload.
    size: usize,
    /// From the start of the talc block to the payload; also the block's alignment.
    offset: usize,
}

unsafe fn header(p: *mut c_void) -> *mut Header {
    // SAFETY: every block given out is preceded by one.
    unsafe { p.byte_sub(HEADER).cast() }
}

fn block_layout(size: usize, offset: usize) -> Option<Layout> {
    Layout::from_size_align(size.checked_add(offset)?, offset).ok()
}

fn get(size: usize, align: usize) -> *mut c_void {
    let offset = align.max(HEADER);
    let Some(layout) = block_layout(size, offset) else {
        fail(ENOMEM);
        return null_mut();
    };
    // SAFETY: the size is at least HEADER; the header lies inside the block, before the payload.
    unsafe {
        let block = heap::allocate(layout);
        if block.is_null() {
            fail(ENOMEM);
            return null_mut();
        }
        let p: *mut c_void = block.add(offset).cast();
        header(p).write(Header { size, offset });
        p
    }
}

#[unsafe(no_mangle)]
extern "C" fn malloc(size: usize) -> *mut c_void {
    get(size, HEADER)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn free(p: *mut c_void) {
    if p.is_null() {
        return;
    }
    // SAFETY: C's contract: `p` came from this file.
    unsafe {
        let Header { size, offset } = header(p).read();
        heap::deallocate(
            p.cast::<u8>().sub(offset),
            Layout::from_size_align_unchecked(size + offset, offset),
        );
    }
}

#[unsafe(no_mangle)]
extern "C" fn calloc(n: usize, each: usize) -> *mut c_void {
    let Some(size) = n.checked_mul(each) else {
        fail(ENOMEM);
        return null_mut();
    };
    let p = get(size, HEADER);
    if !p.is_null() {
        // SAFETY: `size` bytes were just allocated.
        unsafe { p.cast::<u8>().write_bytes(0, size) };
    }
    p
}

#[unsafe(no_mangle)]
unsafe extern "C" fn realloc(p: *mut c_void, size: usize) -> *mut c_void {
    if p.is_null() {
        return malloc(size);
    }
    // SAFETY: C's contract; the copy stays inside both blocks.
    unsafe {
        let old = header(p).read();
        let (Some(old_layout), Some(_)) =
            (block_layout(old.size, old.offset), block_layout(size, old.offset))
        else {
            fail(ENOMEM);
            return null_mut();
        };
        if heap::resize_in_place(p.cast::<u8>().sub(old.offset), old_layout, size + old.offset) {
            (*header(p)).size = size;
            return p;
        }
        let new = get(size, HEADER);
        if !new.is_null() {
            core::ptr::copy_nonoverlapping(p.cast::<u8>(), new.cast::<u8>(), old.size.min(size));
            free(p);
        }
        new
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn reallocarray(p: *mut c_void, n: usize, each: usize) -> *mut c_void {
    match n.checked_mul(each) {
        // SAFETY: passed on.
        Some(size) => unsafe { realloc(p, size) },
        None => {
            fail(ENOMEM);
            null_mut()
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn posix_memalign(out: *mut *mut c_void, align: usize, size: usize) -> i32 {
    if !align.is_power_of_two() || align < size_of::<usize>() {
        return EINVAL;
    }
    let p = get(size, align);
    if p.is_null() {
        return ENOMEM;
    }
    // SAFETY: C's contract: `out` is writable.
    unsafe { out.write(p) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn aligned_alloc(align: usize, size: usize) -> *mut c_void {
    if !align.is_power_of_two() {
        fail(EINVAL);
        return null_mut();
    }
    get(size, align)
}

#[unsafe(no_mangle)]
extern "C" fn memalign(align: usize, size: usize) -> *mut c_void {
    match align.checked_next_power_of_two() {
        Some(align) => get(size, align),
        None => {
            fail(EINVAL);
            null_mut()
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn valloc(size: usize) -> *mut c_void {
    get(size, PAGE_SIZE)
}

#[unsafe(no_mangle)]
extern "C" fn pvalloc(size: usize) -> *mut c_void {
    // What is too large to be rounded up is too large to be had.
    get(size.checked_next_multiple_of(PAGE_SIZE).unwrap_or(usize::MAX), PAGE_SIZE)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn malloc_usable_size(p: *mut c_void) -> usize {
    // SAFETY: C's contract.
    if p.is_null() { 0 } else { unsafe { (*header(p)).size } }
}
