//! The switch on aarch64.
//!
//! ```text
//!   stack of a thread that is not running          (grows down)
//!   │ … frames of the thread …      │
//!   │ (padding: sp stays at 16)     │
//!   │ address to go on at           │
//!   │ x29                           │
//!   │ x19                           │ ← saved stack pointer (in the slot header)
//! ```
//!
//! Everything else is declared clobbered, so the compiler saves just what is live at each use; x19 and x29 it keeps for
//! itself. x18 is the platform's. As on x86-64 the switch leaves by a jump, and the control word of the floating-point unit
//! (FPCR) is not switched: a [`ControlWords`] guard puts it aside where C code may have changed it.

use core::arch::{asm, global_asm};

/// Leaves the running context, whose stack pointer goes to `*save`, and goes on at the one saved as `to`.
/// Returns when somebody switches back.
///
/// # Safety
/// `to` was saved by this function or made by [`first_frame`], has not been resumed since, and its stack is
/// mapped here. No lock of this process is held. References to thread-locals do not live across the call.
#[inline(always)]
pub unsafe fn switch(save: *mut usize, to: usize) {
    // SAFETY: all registers but sp, x18, x19 and x29 are declared; the last two are saved on the old stack and restored by
    // whoever comes back. `hint #36` is `bti j`, for executables that ask for landing pads.
    unsafe {
        asm!(
            "sub sp, sp, #32",
            "stp x19, x29, [sp]",
            "adr x9, 2f",
            "str x9, [sp, #16]",
            "mov x10, sp",
            "str x10, [x0]",
            "mov sp, x1",
            "ldr x9, [sp, #16]",
            "br x9",
            "2:",
            "hint #36",
            "ldp x19, x29, [sp]",
            "add sp, sp, #32",
            inout("x0") save => _,
            inout("x1") to => _,
            out("x20") _, out("x21") _, out("x22") _, out("x23") _, out("x24") _,
            out("x25") _, out("x26") _, out("x27") _, out("x28") _,
            out("v8") _, out("v9") _, out("v10") _, out("v11") _,
            out("v12") _, out("v13") _, out("v14") _, out("v15") _,
            clobber_abi("C"),
        );
    }
}

/// Has the processor fetch the cache line at `addr`; any address will do.
#[inline(always)]
pub fn prefetch(addr: usize) {
    // SAFETY: a prefetch never faults.
    unsafe { asm!("prfm pldl1keep, [{}]", in(reg) addr, options(nostack, preserves_flags, readonly)) };
}

/// Holds the caller's floating-point control word while the default is in force; puts it back when dropped.
pub struct ControlWords {
    fpcr: u64,
}

impl ControlWords {
    /// Puts the present one aside.
    #[inline]
    pub fn aside() -> Self {
        let fpcr: u64;
        // SAFETY: reads a register that every program may read.
        unsafe { asm!("mrs {}, fpcr", out(reg) fpcr, options(nomem, nostack, preserves_flags)) };
        let words = Self { fpcr };
        words.change_to(0);
        words
    }

    fn change_to(&self, fpcr: u64) {
        if self.fpcr != 0 {
            // SAFETY: zero, the ABI's default, or what was in force before.
            unsafe { asm!("msr fpcr, {}", in(reg) fpcr, options(nomem, nostack, preserves_flags)) };
        }
    }
}

impl Drop for ControlWords {
    #[inline]
    fn drop(&mut self) {
        self.change_to(self.fpcr);
    }
}

// Where a new thread's first switch arrives: the entry's address lies above the frame; nothing is there to return to.
global_asm!(
    ".text",
    ".p2align 2",
    ".globl peregrine_first_entry",
    ".hidden peregrine_first_entry",
    ".type peregrine_first_entry,@function",
    "peregrine_first_entry:",
    "hint #36",
    "ldr x9, [sp, #24]",
    "add sp, sp, #32",
    "mov x29, xzr",
    "mov x30, xzr",
    "br x9",
    ".size peregrine_first_entry, .-peregrine_first_entry",
);

unsafe extern "C" {
    fn peregrine_first_entry();
}

/// Writes the frame from which a new thread's first switch enters `entry` on the stack that ends at `top`;
/// returns the stack pointer to switch to.
///
/// # Safety
/// `top` is 16-byte aligned and the 64 bytes below it are writable and unused.
pub unsafe fn first_frame(top: usize, entry: extern "C" fn() -> !) -> usize {
    let sp = top - 32;
    // SAFETY: inside the 64 bytes that the caller owns.
    unsafe {
        (sp as *mut usize).write(0);
        ((sp + 8) as *mut usize).write(0);
        ((sp + 16) as *mut usize).write(peregrine_first_entry as *const () as usize);
        ((sp + 24) as *mut usize).write(entry as *const () as usize);
    }
    sp
}

/// Drops everything on the present stack and goes on in `entry` on the stack that ends at `top`.
///
/// # Safety
/// Nothing on the present stack is used again; `top` is 16-byte aligned on a mapped, unused stack.
#[inline(always)]
pub unsafe fn jump_to(top: usize, entry: extern "C" fn() -> !) -> ! {
    // SAFETY: as promised; entry never returns. The control word is set to its default.
    unsafe {
        asm!(
            "mov sp, {top}",
            "mov x29, xzr",
            "mov x30, xzr",
            "msr fpcr, xzr",
            "br {entry}",
            top = in(reg) top,
            entry = in(reg) entry as *const () as usize,
            options(noreturn)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(fpcr: u64) {
        // SAFETY: rounding modes only.
        unsafe { asm!("msr fpcr, {}", in(reg) fpcr, options(nomem, nostack, preserves_flags)) };
    }

    fn in_force() -> u64 {
        let v: u64;
        // SAFETY: reads a register.
        unsafe { asm!("mrs {}, fpcr", out(reg) v, options(nomem, nostack, preserves_flags)) };
        v
    }

    #[test]
    fn the_control_word_set_aside_is_the_default_meanwhile_and_comes_back() {
        const TOWARDS_ZERO: u64 = 3 << 22;
        set(TOWARDS_ZERO);
        let before = in_force();
        let words = ControlWords::aside();
        let meanwhile = in_force();
        drop(words);
        let after = in_force();
        set(0);
        assert_eq!((before, meanwhile, after), (TOWARDS_ZERO, 0, TOWARDS_ZERO));
    }
}
