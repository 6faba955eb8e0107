//! x86-64: the frame of a signal, and the return from it.

use core::arch::global_asm;

/// The instruction of a system call.
pub const SYSCALL: &[u8] = &[0x0f, 0x05];

/// The kernel's `ucontext` on x86-64.
#[repr(C)]
pub struct UContext {
    flags: u64,
    link: u64,
    stack: [u64; 3],
    /// r8…r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, eflags, …
    pub gregs: [u64; 23],
    vector_state: u64,
    reserved: [u64; 8],
    blocked: u64,
}

const _: () = assert!(core::mem::offset_of!(UContext, blocked) == 40 + 256);

impl UContext {
    /// The number of the system call that the interrupted code makes, if it is at one (the register that holds it).
    pub fn call_number(&self) -> u64 {
        self.gregs[13]
    }
    /// What the last system call returned, if the interrupted code comes from one.
    pub fn call_result(&self) -> i64 {
        self.gregs[13] as i64
    }
    /// The stack pointer of the interrupted code.
    pub fn sp(&self) -> usize {
        self.gregs[15] as usize
    }
    /// The instruction that the interrupted code goes on with.
    pub fn ip(&self) -> usize {
        self.gregs[16] as usize
    }
    /// The signals that the interrupted code blocks.
    pub fn blocked(&self) -> u64 {
        self.blocked
    }
    /// The frame pointer register.
    pub fn bp(&self) -> usize {
        self.gregs[10] as usize
    }
}

// The return from a handler. Unwinders know a signal frame by these very bytes, and only where no unwind
// table covers them: so no `.cfi` here, which a naked function would get.
global_asm!(
    ".text",
    ".p2align 4",
    "nop",
    ".globl peregrine_sigreturn",
    ".hidden peregrine_sigreturn",
    ".type peregrine_sigreturn,@function",
    "peregrine_sigreturn:",
    ".byte 0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0",
    "syscall",
    ".size peregrine_sigreturn, .-peregrine_sigreturn",
);
