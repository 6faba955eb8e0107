//! System calls as single instructions: no `errno`, no thread-local, no static, no cancellation point.

use core::arch::asm;

/// The kernel's error number, always positive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Errno(pub i32);

/// Turns the kernel's return convention into a `Result`.
///
/// # Errors
/// The [`Errno`] that `ret` stands for.
#[inline]
pub fn check(ret: isize) -> Result<usize, Errno> {
    if (-4095..0).contains(&ret) { Err(Errno(-ret as i32)) } else { Ok(ret as usize) }
}

/// `syscall(2)` with six arguments; the kernel ignores those that the call does not take.
///
/// # Safety
/// The call must be sound with these arguments.
#[inline]
pub unsafe fn syscall6(n: u32, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize) -> isize {
    #[cfg(target_arch = "aarch64")]
    let ret: isize;
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the instruction changes x0 and memory, both declared; what the call does is the caller's.
    unsafe {
        asm!("svc #0", in("x8") n as usize, inlateout("x0") a as isize => ret, in("x1") b, in("x2") c,
             in("x3") d, in("x4") e, in("x5") f, options(nostack));
    }
    #[cfg(target_arch = "x86_64")]
    let ret: isize;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction clobbers only rcx, r11 and memory, all declared; what the call does is the caller's.
    unsafe {
        asm!("syscall", inlateout("rax") n as isize => ret, in("rdi") a, in("rsi") b, in("rdx") c,
             in("r10") d, in("r8") e, in("r9") f, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    ret
}

/// `ioctl(2)`.
///
/// # Errors
/// What the request fails with; ENOTTY: the descriptor does not know it.
///
/// # Safety
/// The request must be sound on this descriptor with this argument (a value, or the address of its struct).
#[inline]
pub unsafe fn ioctl(fd: i32, request: u32, arg: usize) -> Result<usize, Errno> {
    // SAFETY: passed on to the caller.
    unsafe {
        check(syscall6(linux_raw_sys::general::__NR_ioctl, fd as usize, request as usize, arg, 0, 0, 0))
    }
}

/// `_IOWR(kind, number, size)` as x86-64 and aarch64 encode it.
pub(crate) const fn iowr(kind: u8, number: u32, size_bytes: usize) -> u32 {
    (3 << 30) | ((size_bytes as u32) << 16) | ((kind as u32) << 8) | number
}

pub(crate) use linux_raw_sys::ioctl::{
    UFFDIO_API, UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE,
    UFFDIO_WRITEPROTECT, UFFDIO_ZEROPAGE,
};
