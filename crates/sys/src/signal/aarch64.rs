//! aarch64: the frame of a signal, and the return from it.

use core::arch::global_asm;

/// The instruction of a system call: `svc #0`.
pub const SYSCALL: &[u8] = &[0x01, 0x00, 0x00, 0xd4];

/// The kernel's `ucontext` on aarch64, up to the general registers.
#[repr(C)]
pub struct UContext {
    flags: u64,
    link: u64,
    stack: [u64; 3],
    blocked: u64,
    unused: [u64; 15],
    /// The machine context is aligned to 16.
    padding: u64,
    fault_address: u64,
    /// x0 … x30.
    pub regs: [u64; 31],
    stack_pointer: u64,
    program_counter: u64,
}

const _: () = assert!(core::mem::offset_of!(UContext, fault_address) == 176);

impl UContext {
    /// The number of the system call that the interrupted code makes, if it is at one (the register that holds it).
    pub fn call_number(&self) -> u64 {
        self.regs[8]
    }
    /// What the last system call returned, if the interrupted code comes from one.
    pub fn call_result(&self) -> i64 {
        self.regs[0] as i64
    }
    /// The stack pointer of the interrupted code.
    pub fn sp(&self) -> usize {
        self.stack_pointer as usize
    }
    /// The instruction that the interrupted code goes on with.
    pub fn ip(&self) -> usize {
        self.program_counter as usize
    }
    /// The signals that the interrupted code blocks.
    pub fn blocked(&self) -> u64 {
        self.blocked
    }
    /// The frame pointer register.
    pub fn bp(&self) -> usize {
        self.regs[29] as usize
    }
}

// The return from a handler; the kernel's own lies in the vDSO, whose address differs between processes. Unwinders know it by
// its bytes.
global_asm!(
    ".text",
    ".p2align 2",
    "nop",
    ".globl peregrine_sigreturn",
    ".hidden peregrine_sigreturn",
    ".type peregrine_sigreturn,@function",
    "peregrine_sigreturn:",
    "mov x8, #139",
    "svc #0",
    ".size peregrine_sigreturn, .-peregrine_sigreturn",
);
