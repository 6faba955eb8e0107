//! Program output: what a thread writes to descriptors 1 and 2 is held until a commit includes it.

use super::{hooks, libc_result};
use core::slice::from_raw_parts;
use peregrine_sys::linux_raw_sys::general as k;
use peregrine_sys::raw::syscall6;

#[unsafe(no_mangle)]
unsafe extern "C" fn write(fd: i32, buf: *const u8, len: usize) -> isize {
    if (fd == 1 || fd == 2)
        && let Some((_, hooks)) = hooks()
        && len != 0
    {
        // C code may have set others.
        let _words = crate::arch::ControlWords::aside();
        // SAFETY: C's contract: `len` readable bytes.
        if (hooks.output)(fd, unsafe { from_raw_parts(buf, len) }) {
            return len as isize;
        }
    }
    // SAFETY: C's contract.
    libc_result(unsafe { syscall6(k::__NR_write, fd as isize as usize, buf as usize, len, 0, 0, 0) })
}

#[repr(C)]
struct IoVec {
    base: *const u8,
    len: usize,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn writev(fd: i32, parts: *const IoVec, count: i32) -> isize {
    if (fd == 1 || fd == 2) && hooks().is_some() {
        let mut total = 0;
        for i in 0..count.max(0) as usize {
            // SAFETY: C's contract: `count` readable vectors of readable bytes.
            let n = unsafe {
                let part = &*parts.add(i);
                if part.len == 0 { 0 } else { write(fd, part.base, part.len) }
            };
            if n < 0 {
                return if total > 0 { total } else { n };
            }
            total += n;
        }
        return total;
    }
    // SAFETY: C's contract.
    libc_result(unsafe {
        syscall6(k::__NR_writev, fd as isize as usize, parts as usize, count as usize, 0, 0, 0)
    })
}
