//! The switch on x86-64.
//!
//! ```text
//!   stack of a thread that is not running          (grows down)
//!   │ … frames of the thread …      │
//!   │ rbp                           │
//!   │ rbx                           │
//!   │ address to go on at           │ ← saved stack pointer (in the slot header)
//! ```
//!
//! Everything else is declared clobbered, so the compiler saves just what is live at each use. The switch is
//! inlined and leaves by a `jmp`, not a `ret`: a `ret` to an address that no `call` pushed is mispredicted
//! (12 ns instead of 2).
//!
//! The control words of the floating-point units (rounding, masks) are not switched: reading them costs as much as the
//! rest of the switch. Instead every switch happens with the defaults in force: Rust code has them by the language's
//! rules, a signal handler gets them from the kernel, and where C code may have set others, at the doors of interposed
//! functions and where a runtime section ends, a [`ControlWords`] guard puts them aside.

use core::arch::asm;

/// Leaves the running context, whose stack pointer goes to `*save`, and goes on at the one saved as `to`.
/// Returns when somebody switches back.
///
/// # Safety
/// `to` was saved by this function or made by [`first_frame`], has not been resumed since, and its stack is
/// mapped here. No lock of this process is held. References to thread-locals do not live across the call.
#[inline(always)]
pub unsafe fn switch(save: *mut usize, to: usize) {
    // SAFETY: all registers but rsp, rbx and rbp are declared; those three are saved on the old stack and restored
    // by whoever comes back. Pushing is allowed: without `nostack` the compiler keeps nothing in the red zone.
    unsafe {
        asm!(
            "push rbp",
            "push rbx",
            "lea rax, [rip + 2f]",
            "push rax",
            "mov [rdi], rsp",
            "mov rsp, rsi",
            "pop rax",
            "jmp rax",
            "2:",
            "pop rbx",
            "pop rbp",
            inout("rdi") save => _,
            inout("rsi") to => _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            clobber_abi("C"),
        );
    }
}

/// Has the processor fetch the cache line at `addr`; any address will do.
#[inline(always)]
pub fn prefetch(addr: usize) {
    // SAFETY: a prefetch never faults.
    unsafe { core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(addr as *const i8) };
}

/// What the ABI gives a new process: all exceptions masked, round to nearest, extended precision.
const DEFAULT_MXCSR: u32 = 0x1f80;
const DEFAULT_X87: u16 = 0x37f;

/// Holds the caller's floating-point control words while the defaults are in force; puts them back when dropped.
pub struct ControlWords {
    mxcsr: u32,
    x87: u16,
}

impl ControlWords {
    /// Puts the present ones aside.
    #[inline]
    pub fn aside() -> Self {
        let mut now = Self { mxcsr: 0, x87: 0 };
        // SAFETY: stores 4 and 2 bytes into live fields.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &raw mut now.mxcsr, options(nostack, preserves_flags));
            asm!("fnstcw [{}]", in(reg) &raw mut now.x87, options(nostack, preserves_flags));
        }
        now.change_to(DEFAULT_MXCSR, DEFAULT_X87);
        now
    }

    fn change_to(&self, mxcsr: u32, x87: u16) {
        // The lowest six bits of MXCSR are flags: they never force a load.
        if (self.mxcsr ^ DEFAULT_MXCSR) & !0x3f != 0 || self.x87 != DEFAULT_X87 {
            // SAFETY: both words are the defaults or were in force before, so no reserved bit is set.
            unsafe {
                asm!("ldmxcsr [{}]", in(reg) &raw const mxcsr, options(nostack, preserves_flags));
                asm!("fldcw [{}]", in(reg) &raw const x87, options(nostack, preserves_flags));
            }
        }
    }
}

impl Drop for ControlWords {
    #[inline]
    fn drop(&mut self) {
        self.change_to(self.mxcsr, self.x87);
    }
}

/// Writes the frame from which a new thread's first switch enters `entry` on the stack that ends at `top`;
/// returns the stack pointer to switch to.
///
/// # Safety
/// `top` is 16-byte aligned and the 64 bytes below it are writable and unused.
pub unsafe fn first_frame(top: usize, entry: extern "C" fn() -> !) -> usize {
    // At `entry` the stack must look as after a `call`: rsp % 16 == 8, a zero return address and frame pointer
    // for whoever walks the stack.
    let sp = top - 32;
    // SAFETY: inside the 64 bytes that the caller owns.
    unsafe {
        (sp as *mut usize).write(entry as *const () as usize);
        ((sp + 8) as *mut usize).write(0);
        ((sp + 16) as *mut usize).write(0);
    }
    sp
}

/// Drops everything on the present stack and goes on in `entry` on the stack that ends at `top`.
///
/// # Safety
/// Nothing on the present stack is used again; `top` is 16-byte aligned on a mapped, unused stack.
#[inline(always)]
pub unsafe fn jump_to(top: usize, entry: extern "C" fn() -> !) -> ! {
    // SAFETY: as promised; entry never returns. The control words are set to their defaults.
    unsafe {
        asm!(
            "mov rsp, {top}",
            "xor ebp, ebp",
            "push 0",
            "push 0x1f80",
            "ldmxcsr [rsp]",
            "mov dword ptr [rsp], 0x37f",
            "fldcw [rsp]",
            "add rsp, 8",
            "jmp {entry}",
            top = in(reg) top,
            entry = in(reg) entry as *const () as usize,
            options(noreturn)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_force() -> (u32, u16) {
        let (mut mxcsr, mut x87) = (0u32, 0u16);
        // SAFETY: stores into live variables.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr);
            asm!("fnstcw [{}]", in(reg) &raw mut x87);
        }
        (mxcsr & !0x3f, x87)
    }

    #[test]
    fn control_words_set_aside_are_the_defaults_meanwhile_and_come_back() {
        // SAFETY: round towards zero, in both units; no arithmetic happens before they are put back.
        unsafe {
            let (mxcsr, x87) = (0x7f80u32, 0x0f7fu16);
            asm!("ldmxcsr [{}]", in(reg) &raw const mxcsr);
            asm!("fldcw [{}]", in(reg) &raw const x87);
        }
        let before = in_force();
        let words = ControlWords::aside();
        let meanwhile = in_force();
        drop(words);
        let after = in_force();
        ControlWords::aside().forget_old();
        assert_eq!(before, (0x7f80, 0x0f7f));
        assert_eq!(meanwhile, (DEFAULT_MXCSR, DEFAULT_X87));
        assert_eq!(after, before);
        assert_eq!(in_force(), meanwhile);
    }

    impl ControlWords {
        fn forget_old(self) {
            core::mem::forget(self);
        }
    }
}
