//! The way back from a signal handler without the kernel: what a trap would cost were `rt_sigreturn` for nothing. For measuring
//! how far that would get, and no more: it leaves out what only the kernel can put back (the mask, a disarmed alternate stack, a
//! shadow stack), and a tool that watches signals sees a handler that never ends.

use std::ffi::c_void;

/// Goes back to what the signal interrupted, by its `ucontext_t`: floating-point state, registers, flags, stack pointer.
///
/// The five words behind the last general register (stack pointer, instruction, flags, segments, error) become what `iretq`
/// takes (instruction, code segment, flags, stack pointer, stack segment), so a signal that comes in the middle finds a
/// stack pointer below all that is still to be read.
///
/// # Safety
/// `context` is the third argument of a running handler whose signal blocked nothing and was raised on an alternate stack that
/// stays in force, and no value of a frame in between needs to be dropped.
#[unsafe(naked)]
pub unsafe extern "C" fn leave(context: *mut c_void) -> ! {
    core::arch::naked_asm!(
        "lea r8, [rdi + 40]",  // the general registers: r8 is the first
        "mov r9, [r8 + 184]",  // the floating-point state
        "mov eax, [r9 + 472]", // what of it there is
        "mov edx, [r9 + 476]",
        "xrstor64 [r9]",
        "mov rax, [r8 + 120]",            // stack pointer
        "mov rcx, [r8 + 128]",            // instruction
        "mov rdx, [r8 + 136]",            // flags
        "movzx rsi, word ptr [r8 + 144]", // code segment
        "movzx r10, word ptr [r8 + 150]", // stack segment
        "mov [r8 + 120], rcx",
        "mov [r8 + 128], rsi",
        "mov [r8 + 136], rdx",
        "mov [r8 + 144], rax",
        "mov [r8 + 152], r10",
        "mov rsp, r8",
        "pop r8",
        "pop r9",
        "pop r10",
        "pop r11",
        "pop r12",
        "pop r13",
        "pop r14",
        "pop r15",
        "pop rdi",
        "pop rsi",
        "pop rbp",
        "pop rbx",
        "pop rdx",
        "pop rax",
        "pop rcx",
        "iretq",
    )
}
