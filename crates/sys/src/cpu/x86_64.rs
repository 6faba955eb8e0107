//! x86-64: the thread pointer is the base of FS.

use super::auxv_entry;
use crate::raw::{check, syscall6};
use core::arch::asm;
use linux_raw_sys::general::__NR_arch_prctl;

const ARCH_SET_FS: usize = 0x1002;
const AT_HWCAP2: u64 = 26;
const HWCAP2_FSGSBASE: u64 = 2;

/// Whether user code may write the FS base itself (`AT_HWCAP2` bit 1): 7 ns instead of a system call.
pub fn has_fsgsbase() -> bool {
    auxv_entry(AT_HWCAP2).unwrap_or(0) & HWCAP2_FSGSBASE != 0
}

/// The FS base that the instruction reads.
///
/// # Safety
/// [`has_fsgsbase`] is true.
#[inline(always)]
pub unsafe fn read_fs_base() -> usize {
    let v: usize;
    // SAFETY: the caller checked that the instruction is allowed.
    unsafe { asm!("rdfsbase {}", out(reg) v, options(nomem, nostack, preserves_flags)) };
    v
}

/// Makes `base` the thread pointer.
///
/// # Safety
/// `base` points at a thread control block, and the caller's code between here and the next write of the
/// base holds no reference into the thread-locals of the old one. `fast` only if [`has_fsgsbase`].
#[inline(always)]
pub unsafe fn set_fs_base(base: usize, fast: bool) {
    if fast {
        // SAFETY: as the caller promised.
        unsafe { asm!("wrfsbase {}", in(reg) base, options(nostack, preserves_flags)) };
    } else {
        // SAFETY: as the caller promised.
        let r = check(unsafe { syscall6(__NR_arch_prctl, ARCH_SET_FS, base, 0, 0, 0, 0) });
        debug_assert!(r.is_ok());
    }
}

/// The word at the thread pointer: glibc keeps the pointer itself there.
#[inline(always)]
pub fn thread_pointer() -> usize {
    let v: usize;
    // SAFETY: every thread of a glibc process has a mapped control block whose first word is its own address.
    unsafe { asm!("mov {}, fs:0", out(reg) v, options(nostack, preserves_flags, readonly)) };
    v
}

/// The leaves of CPUID that decide whether code compiled here, and a signal frame saved here, mean the same
/// elsewhere: vendor and model feature words, extended features, and the size and set of the XSAVE area.
pub fn feature_words() -> [u32; 12] {
    use core::arch::x86_64::{__cpuid, __cpuid_count};
    let (l1, l7, l71, d0, d1) =
        (__cpuid(1), __cpuid_count(7, 0), __cpuid_count(7, 1), __cpuid_count(0xd, 0), __cpuid_count(0xd, 1));
    let ext = __cpuid(0x8000_0001);
    // Leaf 1 EBX holds the APIC id of the core that asked, and ECX bit 27 only mirrors the kernel: both left out.
    [
        l1.ecx & !(1 << 27),
        l1.edx,
        l7.ebx,
        l7.ecx,
        l7.edx,
        l71.eax,
        d0.eax,
        d0.ecx,
        d0.edx,
        d1.eax,
        ext.ecx,
        ext.edx,
    ]
}
