//! aarch64: the thread pointer is `TPIDR_EL0`, which every program may write.

use super::auxv_entry;
use core::arch::asm;

const AT_HWCAP: u64 = 16;
const AT_HWCAP2: u64 = 26;

/// Whether user code may write the thread pointer itself: always.
pub fn has_fsgsbase() -> bool {
    true
}

/// The thread pointer.
///
/// # Safety
/// None here; on x86-64 the instruction may be forbidden.
#[inline(always)]
pub unsafe fn read_fs_base() -> usize {
    thread_pointer()
}

/// Makes `base` the thread pointer.
///
/// # Safety
/// `base` points at a thread control block, and the caller's code between here and the next write of the
/// base holds no reference into the thread-locals of the old one.
#[inline(always)]
pub unsafe fn set_fs_base(base: usize, _: bool) {
    // SAFETY: as the caller promised.
    unsafe { asm!("msr tpidr_el0, {}", in(reg) base, options(nostack, preserves_flags)) };
}

/// The thread pointer.
#[inline(always)]
pub fn thread_pointer() -> usize {
    let v: usize;
    // SAFETY: reads a register that every program may read.
    unsafe { asm!("mrs {}, tpidr_el0", out(reg) v, options(nostack, preserves_flags, readonly)) };
    v
}

/// The words that decide whether code compiled here, and a signal frame saved here, mean the same elsewhere: what the kernel
/// says that the processor has.
pub fn feature_words() -> [u32; 12] {
    let (a, b) = (auxv_entry(AT_HWCAP).unwrap_or(0), auxv_entry(AT_HWCAP2).unwrap_or(0));
    [a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32, 0, 0, 0, 0, 0, 0, 0, 0]
}
