//! System calls as single instructions: no `errno`, no thread-local, no static, no cancellation point.

use core::arch::asm;

/// The kernel's error number, always positive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Errno(pub i32);

/// Turns the kernel's return convention into a `Result`.
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
    let ret: isize;
    // SAFETY: the instruction clobbers only rcx, r11 and memory, all declared; what the call does is the caller's.
    unsafe {
        asm!("syscall", inlateout("rax") n as isize => ret, in("rdi") a, in("rsi") b, in("rdx") c,
             in("r10") d, in("r8") e, in("r9") f, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    ret
}
