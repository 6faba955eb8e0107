//! Faults as signals: handlers for SIGSEGV and SIGBUS and what they are given, alternate stacks and masks, as single
//! system calls that are usable where there is no `errno`.
//!
//! The structs are the kernel's, not libc's (whose `struct sigaction` differs).

use crate::raw::{self, Errno, syscall6};
use core::ffi::c_void;
use linux_raw_sys::general as g;
use peregrine_base::VirtAddr;

/// A forbidden access to mapped or unmapped memory.
pub const SIGSEGV: i32 = g::SIGSEGV as i32;
/// An access that the memory's backing can't answer.
pub const SIGBUS: i32 = g::SIGBUS as i32;

/// `SA_SIGINFO`: the handler takes three arguments.
pub const SA_SIGINFO: u64 = g::SA_SIGINFO as u64;
/// `SA_ONSTACK`: the handler runs on the thread's alternate stack, if it has one.
pub const SA_ONSTACK: u64 = g::SA_ONSTACK as u64;
/// `SA_NODEFER`: the signal is not blocked in its own handler.
pub const SA_NODEFER: u64 = g::SA_NODEFER as u64;
/// `SA_RESETHAND`: the default action is restored when the handler is entered.
pub const SA_RESETHAND: u64 = g::SA_RESETHAND as u64;
/// `SA_RESTART`: interrupted calls start again.
pub const SA_RESTART: u64 = g::SA_RESTART as u64;
const SA_RESTORER: u64 = 0x0400_0000;

/// What happens on a signal (`struct sigaction` as the kernel has it).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Action {
    /// The handler's address, [`Action::DEFAULT`] or [`Action::IGNORE`].
    pub handler: usize,
    /// `SA_*`.
    pub flags: u64,
    restorer: usize,
    /// Signals blocked while the handler runs, one bit each.
    pub mask: u64,
}

impl Action {
    /// `SIG_DFL`.
    pub const DEFAULT: usize = 0;
    /// `SIG_IGN`.
    pub const IGNORE: usize = 1;

    /// The default action.
    pub const fn default_action() -> Self {
        Self { handler: Self::DEFAULT, flags: 0, restorer: 0, mask: 0 }
    }

    /// Runs `handler`, with `flags` and `SA_SIGINFO`; nothing more is blocked.
    pub fn run(handler: Handler, flags: u64) -> Self {
        Self {
            handler: handler as usize,
            flags: flags | SA_SIGINFO | SA_RESTORER,
            restorer: restorer as *const () as usize,
            mask: 0,
        }
    }
}

/// A three-argument handler: the signal, its `siginfo_t`, its `ucontext_t`.
pub type Handler = unsafe extern "C" fn(i32, *mut c_void, *mut c_void);

/// `rt_sigreturn`. The bytes are those by which debuggers and unwinders know a signal frame.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn restorer() {
    core::arch::naked_asm!(".byte 0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0", "syscall")
}

/// `rt_sigreturn`; the kernel's own lies in the vDSO.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
unsafe extern "C" fn restorer() {
    core::arch::naked_asm!("mov x8, #139", "svc #0")
}

/// `rt_sigaction(2)`: sets `new` if given and returns what was there.
///
/// # Errors
/// EINVAL: no such signal, or one that can't be caught.
///
/// # Safety
/// `new`'s handler is sound to run whenever the signal comes.
pub unsafe fn action(signal: i32, new: Option<&Action>) -> Result<Action, Errno> {
    let mut old = Action::default_action();
    let new = new.map_or(core::ptr::null(), core::ptr::from_ref);
    // SAFETY: both structs have the kernel's layout and live across the call; the handler is the caller's promise.
    unsafe {
        raw::check(syscall6(
            g::__NR_rt_sigaction,
            signal as usize,
            new as usize,
            (&raw mut old) as usize,
            size_of::<u64>(),
            0,
            0,
        ))?;
    }
    Ok(old)
}

/// How [`mask`] changes the set of blocked signals.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum MaskChange {
    /// Block these too.
    Block = g::SIG_BLOCK,
    /// Block these no more.
    Unblock = g::SIG_UNBLOCK,
    /// Block exactly these.
    Set = g::SIG_SETMASK,
}

/// The set that holds `signal` alone.
pub const fn set_of(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// `rt_sigprocmask(2)`: changes this thread's blocked signals and returns what they were.
pub fn mask(change: MaskChange, set: u64) -> u64 {
    let mut old = 0u64;
    // SAFETY: both sets are 8 bytes and live across the call, which can't fail with these arguments; blocking or
    // unblocking a signal breaks no memory rule.
    unsafe {
        syscall6(
            g::__NR_rt_sigprocmask,
            change as usize,
            (&raw const set) as usize,
            (&raw mut old) as usize,
            size_of::<u64>(),
            0,
            0,
        );
    }
    old
}

/// An alternate stack (`stack_t`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct AltStack {
    base: *mut c_void,
    flags: i32,
    len_bytes: usize,
}

impl AltStack {
    /// No alternate stack.
    pub const fn disabled() -> Self {
        Self { base: core::ptr::null_mut(), flags: g::SS_DISABLE as i32, len_bytes: 0 }
    }

    /// The stack of `len_bytes` bytes from `base` up.
    pub const fn new(base: *mut c_void, len_bytes: usize) -> Self {
        Self { base, flags: 0, len_bytes }
    }

    /// Lowest address, or `None` if there is no alternate stack.
    pub fn base(&self) -> Option<VirtAddr> {
        (self.flags & g::SS_DISABLE as i32 == 0 && self.len_bytes > 0)
            .then(|| VirtAddr::new(self.base as usize))
    }

    /// Its size.
    pub const fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Whether `addr` lies in it.
    pub fn contains(&self, addr: VirtAddr) -> bool {
        self.base().is_some_and(|b| addr >= b && addr.as_usize() - b.as_usize() < self.len_bytes)
    }
}

/// `sigaltstack(2)`: sets `new` if given and returns what was there.
///
/// # Errors
/// EPERM: called on the alternate stack. ENOMEM: too small.
///
/// # Safety
/// `new` is memory that nobody else uses until it is replaced.
pub unsafe fn alt_stack(new: Option<&AltStack>) -> Result<AltStack, Errno> {
    let mut old = AltStack::disabled();
    let new = new.map_or(core::ptr::null(), core::ptr::from_ref);
    // SAFETY: both structs have the kernel's layout and live across the call; the memory is the caller's promise.
    unsafe {
        raw::check(syscall6(g::__NR_sigaltstack, new as usize, (&raw mut old) as usize, 0, 0, 0, 0))?;
    }
    Ok(old)
}

/// What a handler was given: the fault's address and kind, and what it interrupted.
#[derive(Clone, Copy)]
pub struct Frame {
    info: *const u8,
    context: *const u8,
}

/// Offsets in x86-64's `ucontext_t`: flags, link, stack (24 bytes), then 23 general registers.
#[cfg(target_arch = "x86_64")]
mod layout {
    pub const STACK: usize = 16;
    const REGS: usize = 40;
    pub const SP: usize = REGS + 15 * 8;
    pub const IP: usize = REGS + 16 * 8;
    pub const ERROR: usize = REGS + 19 * 8;
    pub const ERROR_IS_WRITE: u64 = 2;
}

/// Offsets in aarch64's `ucontext_t`: flags, link, stack (24 bytes), mask (128 bytes); then, at a multiple of 16, the faulting
/// address, 31 registers, stack pointer, program counter, flags, and records that begin at a multiple of 16.
#[cfg(target_arch = "aarch64")]
mod layout {
    pub const STACK: usize = 16;
    const REGS: usize = 176 + 8;
    pub const SP: usize = REGS + 31 * 8;
    pub const IP: usize = SP + 8;
    pub const RECORDS: usize = (IP + 16usize).next_multiple_of(16);
    /// The record that holds the syndrome of the fault, whose bit 6 says that it was a write.
    pub const ESR_MAGIC: u32 = 0x4553_5201;
    pub const ESR_IS_WRITE: u64 = 1 << 6;
}

impl Frame {
    /// The frame of a running handler.
    ///
    /// # Safety
    /// The pointers are the second and third arguments of a handler that has not returned, for a signal that the kernel
    /// raised on a fault.
    pub const unsafe fn new(info: *const c_void, context: *const c_void) -> Self {
        Self { info: info.cast(), context: context.cast() }
    }

    fn context_word(&self, offset: usize) -> u64 {
        // SAFETY: the offset lies in the ucontext_t that `new` was promised.
        unsafe { self.context.add(offset).cast::<u64>().read() }
    }

    /// `si_code`: positive if the kernel raised it, else somebody sent it.
    pub fn code(&self) -> i32 {
        // SAFETY: si_code is the third word of the siginfo_t that `new` was promised.
        unsafe { self.info.add(8).cast::<i32>().read() }
    }

    /// `si_addr`: the address that was touched.
    pub fn address(&self) -> VirtAddr {
        // SAFETY: si_addr lies at 16 in the siginfo_t of a fault, which `new` was promised.
        VirtAddr::new(unsafe { self.info.add(16).cast::<usize>().read() })
    }

    /// Whether the access was a write.
    pub fn is_write(&self) -> bool {
        #[cfg(target_arch = "aarch64")]
        {
            let mut at = layout::RECORDS;
            loop {
                let head = self.context_word(at);
                let (magic, size) = (head as u32, (head >> 32) as usize);
                if magic == layout::ESR_MAGIC {
                    return self.context_word(at + 8) & layout::ESR_IS_WRITE != 0;
                }
                if magic == 0 || size < 16 {
                    return false;
                }
                at += size;
            }
        }
        #[cfg(target_arch = "x86_64")]
        {
            self.context_word(layout::ERROR) & layout::ERROR_IS_WRITE != 0
        }
    }

    /// Where the stack pointer was.
    pub fn stack_pointer(&self) -> VirtAddr {
        VirtAddr::new(self.context_word(layout::SP) as usize)
    }

    /// The instruction that was interrupted.
    pub fn instruction(&self) -> VirtAddr {
        VirtAddr::new(self.context_word(layout::IP) as usize)
    }

    /// The alternate stack that was in force.
    pub fn alt_stack(&self) -> AltStack {
        // SAFETY: uc_stack is a stack_t in the ucontext_t that `new` was promised.
        unsafe { self.context.add(layout::STACK).cast::<AltStack>().read() }
    }
}

/// Sends `signal` to one thread of this process with `code` and `address` in its `siginfo_t`, as a fault would
/// (`rt_tgsigqueueinfo(2)`). The code has to be negative, for the kernel keeps the others for itself.
///
/// # Errors
/// ESRCH: no such thread. EPERM: the code.
pub fn queue_to_thread(thread_id: u32, signal: i32, code: i32, address: VirtAddr) -> Result<(), Errno> {
    let mut info = [0u64; 16];
    info[0] = signal as u32 as u64;
    info[1] = code as u32 as u64;
    info[2] = address.as_usize() as u64;
    // SAFETY: getpid takes nothing; the queued siginfo is 128 bytes and lives across the call.
    unsafe {
        let pid = syscall6(g::__NR_getpid, 0, 0, 0, 0, 0, 0) as usize;
        raw::check(syscall6(
            g::__NR_rt_tgsigqueueinfo,
            pid,
            thread_id as usize,
            signal as usize,
            info.as_ptr() as usize,
            0,
            0,
        ))?;
    }
    Ok(())
}

/// `gettid(2)`.
pub fn current_thread_id() -> u32 {
    // SAFETY: takes nothing.
    unsafe { syscall6(g::__NR_gettid, 0, 0, 0, 0, 0, 0) as u32 }
}
