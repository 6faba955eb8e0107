//! The program's statics as a window: the running thread's copy lies in it.
//!
//! ```text
//!   window (.data, .bss)  ◀── load ──  slot A: statics copy      A has written its statics
//!      │    ▲                          slot B: (none)            B has not: the template serves
//!      └────┼──── save ──▶ …           TEMPLATE: pristine copy
//! ```
//!
//! The window keeps its last owner: nothing is copied while the same thread comes back. When another comes, the
//! owner's bytes are *saved*: a thread that never wrote a static is found equal to the template by a compare and
//! needs no copy, neither now nor when it returns to a window that is still pristine. Comparing was chosen over
//! write-protecting the window because a protected page makes system calls that write into a static fail with
//! EFAULT.
//!
//! All this runs between two threads: it uses no static, no thread-local, and calls nothing but `memcpy`.

use crate::carrier::{Carrier, NONE};
use crate::slot::SlotHeader;
use crate::template::TemplateHeader;
use peregrine_base::sync::Ordering;

/// Saves the window's owner, if any, so that its slot alone holds all its statics. The window stays valid.
///
/// # Safety
/// Runs on the node of `c`; the owner's slot is mapped and not in use elsewhere.
#[inline]
pub unsafe fn save(c: &mut Carrier, t: &TemplateHeader) {
    let owner = c.window_owner.load(Ordering::Relaxed);
    if owner == NONE {
        return;
    }
    // SAFETY: the owner is a live thread of this node (S5), and its slot has room for the window's bytes.
    unsafe {
        let slot = SlotHeader::of(owner);
        if !(*slot).statics_private {
            if equal(c.wide_compare, t.statics_start, t.bytes, t.statics_len) {
                c.window_pristine = true;
                return;
            }
            (*slot).statics_private = true;
        }
        c.window_pristine = false;
        core::ptr::copy_nonoverlapping(
            t.statics_start as *const u8,
            (*slot).statics as *mut u8,
            t.statics_len,
        );
    }
}

/// Puts the statics of the thread in `slot` into the window, saving the last owner's.
///
/// # Safety
/// As [`save`]; the caller runs no code that uses statics until the thread is switched to.
#[inline]
pub unsafe fn bring(c: &mut Carrier, t: &TemplateHeader, index: u32) {
    if c.window_owner.load(Ordering::Relaxed) == index {
        return;
    }
    // SAFETY: as the caller promised.
    unsafe {
        save(c, t);
        let slot = SlotHeader::of(index);
        if (*slot).statics_private {
            core::ptr::copy_nonoverlapping(
                (*slot).statics as *const u8,
                t.statics_start as *mut u8,
                t.statics_len,
            );
            c.window_pristine = false;
        } else if !c.window_pristine {
            core::ptr::copy_nonoverlapping(t.bytes as *const u8, t.statics_start as *mut u8, t.statics_len);
            c.window_pristine = true;
        }
    }
    c.window_owner.store(index, Ordering::Relaxed);
}

/// Saves and forgets the owner: its thread leaves this node, or ends.
///
/// # Safety
/// As [`save`].
pub unsafe fn evict(c: &mut Carrier, t: &TemplateHeader, index: u32) {
    if c.window_owner.load(Ordering::Relaxed) == index {
        // SAFETY: as the caller promised.
        unsafe { save(c, t) };
        c.window_owner.store(NONE, Ordering::Relaxed);
    }
}

/// Forgets the owner without saving: its memory is about to be replaced.
pub fn forget(c: &mut Carrier) {
    c.window_owner.store(NONE, Ordering::Relaxed);
    c.window_pristine = false;
}

#[inline(always)]
unsafe fn equal(wide: bool, a: usize, b: usize, len: usize) -> bool {
    // SAFETY: both ranges are mapped for `len` bytes, a multiple of 64; the wide form only where the CPU has it.
    unsafe { if wide { equal_wide(a, b, len) } else { equal_words(a, b, len) } }
}

#[target_feature(enable = "avx2")]
unsafe fn equal_wide(a: usize, b: usize, len: usize) -> bool {
    use core::arch::x86_64::*;
    let mut off = 0;
    while off < len {
        // SAFETY: inside both ranges; unaligned loads.
        let differ = unsafe {
            let load = |p: usize, o: usize| _mm256_loadu_si256((p + off + o) as *const __m256i);
            _mm256_or_si256(
                _mm256_xor_si256(load(a, 0), load(b, 0)),
                _mm256_xor_si256(load(a, 32), load(b, 32)),
            )
        };
        if _mm256_testz_si256(differ, differ) == 0 {
            return false;
        }
        off += 64;
    }
    true
}

unsafe fn equal_words(a: usize, b: usize, len: usize) -> bool {
    // SAFETY: as `equal`.
    (0..len / 8).all(|i| unsafe { ((a + i * 8) as *const u64).read() == ((b + i * 8) as *const u64).read() })
}
