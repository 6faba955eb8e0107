//! Signal handlers installed by the kernel's own call, with a restorer of ours: libc's wrapper would keep a
//! lock and, in a static executable, statics that belong to whichever thread runs.

use crate::raw::{Errno, check, syscall6};
use linux_raw_sys::general as k;

/// A signal's number.
pub type Signo = i32;

/// Flags of a handler.
#[derive(Clone, Copy)]
pub struct HandlerFlags(u64);

impl HandlerFlags {
    /// Interrupted system calls restart, the signal stays deliverable while its handler runs.
    pub const RESTART_NODEFER: Self = Self((k::SA_RESTART | k::SA_NODEFER) as u64);
    /// The same, and the handler runs on the alternate stack.
    pub const ON_ALTSTACK: Self = Self((k::SA_RESTART | k::SA_NODEFER | k::SA_ONSTACK) as u64);
    /// Interrupted system calls end with EINTR. The handler runs on the alternate stack, once at a time: a frame is some 3 KiB where
    /// AVX-512 is in use, so an alternate stack of 8 KiB does not hold three.
    const ONCE_ON_ALTSTACK: Self = Self(k::SA_ONSTACK as u64);
}

/// The kernel's `siginfo_t`, of which handlers here read three fields.
#[repr(C)]
pub struct SigInfo {
    /// Which signal.
    pub signo: i32,
    errno: i32,
    /// Why it was sent (`SI_USER`, `SEGV_MAPERR`, …).
    pub code: i32,
    pad: i32,
    /// For faults: the address.
    pub addr: usize,
}

pub use arch::{SYSCALL, UContext};

#[cfg(target_arch = "aarch64")]
#[path = "signal/aarch64.rs"]
mod arch;
#[cfg(target_arch = "x86_64")]
#[path = "signal/x86_64.rs"]
mod arch;

/// A handler with the kernel's three arguments.
pub type Handler = extern "C" fn(Signo, *mut SigInfo, *mut UContext);

/// The same on both architectures; aarch64's headers keep it to themselves.
const SA_RESTORER: u64 = 0x0400_0000;

/// What a process does about a signal: the kernel's `struct sigaction`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Disposition {
    /// `SIG_DFL` (0), `SIG_IGN` (1), or the handler's address.
    pub handler: usize,
    /// `SA_` flags.
    pub flags: u64,
    restorer: usize,
    /// Signals blocked while the handler runs: bit n-1 for signal n.
    pub mask: u64,
}

impl Disposition {
    /// The default action.
    pub const NONE: Self = Self { handler: 0, flags: 0, restorer: 0, mask: 0 };

    /// A handler of the program's own, or `SIG_DFL`, or `SIG_IGN`; returns from it go through our restorer.
    pub fn new(handler: usize, flags: u64, mask: u64) -> Self {
        if handler <= 1 {
            return Self { handler, flags: flags & !SA_RESTORER, restorer: 0, mask };
        }
        Self { handler, flags: flags | SA_RESTORER, restorer: restorer as *const () as usize, mask }
    }
}

/// Replaces what this process does about `signo`, if `new` is given; returns what it did (`rt_sigaction`).
///
/// # Safety
/// A handler must be sound at every instruction it can interrupt.
///
/// # Errors
/// EINVAL: no such signal, or one about which nothing can be done.
pub unsafe fn change(signo: Signo, new: Option<&Disposition>) -> Result<Disposition, Errno> {
    let mut old = Disposition::default();
    let new = new.map_or(0, |d| core::ptr::from_ref(d) as usize);
    // SAFETY: both structs have the kernel's layout and live through the call; the caller's promise.
    check(unsafe { syscall6(k::__NR_rt_sigaction, signo as usize, new, &raw mut old as usize, 8, 0, 0) })?;
    Ok(old)
}

unsafe extern "C" {
    #[link_name = "peregrine_sigreturn"]
    fn restorer();
}

fn action(handler: Handler, flags: HandlerFlags, mask: u64) -> Disposition {
    Disposition {
        handler: handler as *const () as usize,
        flags: flags.0 | k::SA_SIGINFO as u64 | SA_RESTORER,
        restorer: restorer as *const () as usize,
        mask,
    }
}

/// Installs `handler` for `signo` (`rt_sigaction`).
///
/// # Errors
/// EINVAL: there is no such signal, or it is SIGKILL or SIGSTOP.
///
/// # Safety
/// The handler must be sound at every instruction it can interrupt.
pub unsafe fn install(signo: Signo, handler: Handler, flags: HandlerFlags) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    unsafe { install_masked(signo, handler, flags, 0) }
}

/// [`install`], with the signals in `mask` blocked from before the handler's first instruction to its return.
///
/// # Errors
/// As [`install`].
///
/// # Safety
/// As [`install`].
pub unsafe fn install_masked(
    signo: Signo,
    handler: Handler,
    flags: HandlerFlags,
    mask: u64,
) -> Result<(), Errno> {
    let act = action(handler, flags, mask);
    // SAFETY: the struct has the kernel's layout and lives through the call.
    check(unsafe { syscall6(k::__NR_rt_sigaction, signo as usize, &raw const act as usize, 0, 8, 0, 0) })
        .map(drop)
}

/// `si_code` of a signal from the kernel that tells no more (`SI_KERNEL`): of SIGSEGV that there was no room for a signal's frame, or that
/// an address was none at all.
pub const SI_KERNEL: i32 = k::SI_KERNEL as i32;

/// How far below the stack pointer the kernel may write when it delivers a signal: the frame (`AT_MINSIGSTKSZ`), behind the red zone.
///
/// ```
/// // Registers alone take some hundred bytes, AVX-512 two thousand more.
/// assert!((1024..65536).contains(&peregrine_sys::signal::frame_bytes()));
/// ```
pub fn frame_bytes() -> usize {
    /// As much as any processor of before the kernel told needs.
    const UNTOLD: usize = 4096;
    const RED_ZONE: usize = 128;
    unsafe extern "C" {
        fn getauxval(kind: u64) -> u64;
    }
    // SAFETY: reads what the kernel told the process at its start; 0 if it did not.
    let told = unsafe { getauxval(linux_raw_sys::auxvec::AT_MINSIGSTKSZ.into()) } as usize;
    RED_ZONE + if told == 0 { UNTOLD } else { told }
}

/// Gives `signo` its default action.
///
/// # Errors
/// As [`install`].
pub fn set_default(signo: Signo) -> Result<(), Errno> {
    let act = Disposition { handler: 0, flags: 0, restorer: 0, mask: 0 };
    // SAFETY: SIG_DFL runs no code of this process.
    check(unsafe { syscall6(k::__NR_rt_sigaction, signo as usize, &raw const act as usize, 0, 8, 0, 0) })
        .map(drop)
}

/// Ignores `signo` (`SIG_IGN`).
pub fn ignore(signo: Signo) {
    let act = Disposition { handler: 1, flags: 0, restorer: 0, mask: 0 };
    // SAFETY: SIG_IGN runs no code of this process.
    unsafe { syscall6(k::__NR_rt_sigaction, signo as usize, &raw const act as usize, 0, 8, 0, 0) };
}

/// Replaces the set of blocked signals by `mask` (bit n-1 for signal n); returns the old set.
pub fn set_mask(mask: u64) -> u64 {
    let mut old = 0u64;
    // SAFETY: both words live through the call. SIG_SETMASK is 2.
    unsafe {
        syscall6(k::__NR_rt_sigprocmask, 2, &raw const mask as usize, &raw mut old as usize, 8, 0, 0);
    }
    old
}

/// Blocks the signals of `mask` besides those that are; returns the old set.
pub fn block(mask: u64) -> u64 {
    let mut old = 0u64;
    // SAFETY: as in `set_mask`. SIG_BLOCK is 0.
    unsafe {
        syscall6(k::__NR_rt_sigprocmask, 0, &raw const mask as usize, &raw mut old as usize, 8, 0, 0);
    }
    old
}

/// The signals that are blocked and have come (`rt_sigpending`), as bits; they stay pending.
pub fn pending() -> u64 {
    let mut set = 0u64;
    // SAFETY: the kernel writes one word.
    unsafe { syscall6(k::__NR_rt_sigpending, &raw mut set as usize, 8, 0, 0, 0, 0) };
    set
}

/// The bit of `signo` in a mask.
pub const fn bit(signo: Signo) -> u64 {
    1 << (signo - 1)
}

/// Makes `[base, base + len_bytes)` the stack for handlers with [`HandlerFlags::ON_ALTSTACK`].
///
/// # Errors
/// EPERM: the thread runs on its alternate stack just now. ENOMEM: too small.
///
/// # Safety
/// The memory stays mapped, and is used for nothing else, while this process lives.
pub unsafe fn set_altstack(base: usize, len_bytes: usize) -> Result<(), Errno> {
    let ss: [usize; 3] = [base, 0, len_bytes];
    // SAFETY: stack_t is pointer, flags (int, padded), size.
    check(unsafe { syscall6(k::__NR_sigaltstack, ss.as_ptr() as usize, 0, 0, 0, 0, 0) }).map(drop)
}

/// Sends `signo` to the process `pid` (`kill`).
///
/// # Errors
/// ESRCH: no such process. EPERM: not ours. EINVAL: no such signal.
pub fn kill(pid: i32, signo: Signo) -> Result<(), Errno> {
    // SAFETY: no memory is passed.
    check(unsafe { syscall6(k::__NR_kill, pid as usize, signo as usize, 0, 0, 0, 0) }).map(drop)
}

/// `SIGINT` and its kin, by number, so that no caller needs libc's header.
#[allow(missing_docs)]
pub mod number {
    pub const INT: i32 = 2;
    pub const ILL: i32 = 4;
    pub const TRAP: i32 = 5;
    pub const ABRT: i32 = 6;
    pub const BUS: i32 = 7;
    pub const FPE: i32 = 8;
    pub const KILL: i32 = 9;
    pub const SEGV: i32 = 11;
    pub const PIPE: i32 = 13;
    pub const TERM: i32 = 15;
    pub const CHLD: i32 = 17;
    pub const HUP: i32 = 1;
    pub const QUIT: i32 = 3;
    pub const CONT: i32 = 18;
    pub const STOP: i32 = 19;
    /// First of the real-time signals that libc does not keep for itself.
    pub const RT_BASE: i32 = 40;
}

/// A descriptor from which the blocked signals in `mask` are read (`signalfd4`), non-blocking and close-on-exec.
///
/// # Errors
/// EMFILE, ENFILE: too many open files. ENOMEM.
pub fn signalfd(mask: u64) -> Result<i32, Errno> {
    let flags = (k::O_CLOEXEC | k::O_NONBLOCK) as usize;
    // SAFETY: the mask lives through the call.
    check(unsafe { syscall6(k::__NR_signalfd4, usize::MAX, &raw const mask as usize, 8, flags, 0, 0) })
        .map(|fd| fd as i32)
}

/// `SIGURG`: ignored by default, and sent by nobody to a process that does not ask for out-of-band data.
pub const SIGURG: Signo = 23;

/// Makes a system call that the thread `tid` of this process waits in return EINTR, by `SIGURG` with a handler that does
/// nothing. A handler that the program has installed for it is left alone, and called.
///
/// # Errors
/// ESRCH: no such thread.
pub fn interrupt_thread(tid: i32) -> Result<(), Errno> {
    interrupt_after(tid, || ())
}

/// [`interrupt_thread`]; `meanwhile` is what another thread does between the look at what is done about the signal and our own handler.
fn interrupt_after(tid: i32, meanwhile: impl FnOnce()) -> Result<(), Errno> {
    extern "C" fn nothing(_: Signo, _: *mut SigInfo, _: *mut UContext) {}
    let mut now = Disposition { handler: 0, flags: 0, restorer: 0, mask: 0 };
    // SAFETY: the kernel writes the struct, which has its layout.
    check(unsafe { syscall6(k::__NR_rt_sigaction, SIGURG as usize, 0, &raw mut now as usize, 8, 0, 0) })?;
    if now.handler <= 1 {
        meanwhile();
        let act = action(nothing, HandlerFlags::ONCE_ON_ALTSTACK, 0);
        // SAFETY: a handler that does nothing is sound everywhere; both structs have the kernel's layout.
        check(unsafe {
            let (new, old) = (&raw const act as usize, &raw mut now as usize);
            syscall6(k::__NR_rt_sigaction, SIGURG as usize, new, old, 8, 0, 0)
        })?;
        let installed_meanwhile = now.handler > 1 && now.handler != act.handler;
        if installed_meanwhile {
            // Another thread of the program did, between the look and our own: it is put back. What came in between met a handler
            // that does nothing, as it would have a moment earlier.
            // SAFETY: what the program installed itself.
            check(unsafe {
                syscall6(k::__NR_rt_sigaction, SIGURG as usize, &raw const now as usize, 0, 8, 0, 0)
            })?;
        }
    }
    // SAFETY: takes numbers only.
    check(unsafe {
        syscall6(k::__NR_tgkill, crate::process::pid() as usize, tid as usize, SIGURG as usize, 0, 0, 0)
    })
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use peregrine_base::sync::{AtomicBool, AtomicI32, AtomicU32, Ordering};
    use std::{thread, time::Duration};

    /// The alternate stack that std gives a thread holds two frames of this kernel's size and no third.
    #[test]
    fn a_flood_of_interruptions_does_not_nest() {
        let tid = AtomicI32::new(0);
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                tid.store(crate::process::thread_id(), Ordering::Release);
                while !is_over.load(Ordering::Acquire) {
                    core::hint::spin_loop();
                }
            });
            while tid.load(Ordering::Acquire) == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            for _ in 0..200_000 {
                interrupt_thread(tid.load(Ordering::Acquire)).expect("the thread runs");
            }
            is_over.store(true, Ordering::Release);
        });
    }

    static CALLED: AtomicU32 = AtomicU32::new(0);

    extern "C" fn own(_: Signo, _: *mut SigInfo, _: *mut UContext) {
        CALLED.fetch_add(1, Ordering::Relaxed);
    }

    #[test]
    fn a_handler_that_the_program_installs_at_the_same_time_is_put_back_and_called() {
        // In a process of its own: other tests interrupt too, and what is done about a signal is the process's.
        let alone = ["--exact", "--ignored", "signal::tests::helper_installs_a_handler_meanwhile"];
        let me = std::env::current_exe().expect("known");
        let o = std::process::Command::new(me).args(alone).output().expect("it starts");
        let said = String::from_utf8_lossy(&o.stdout);
        assert!(o.status.success() && said.contains("1 passed"), "{said}");
    }

    #[test]
    #[ignore = "run by the test above"]
    fn helper_installs_a_handler_meanwhile() {
        // SAFETY: only asks.
        let now = || unsafe { change(SIGURG, None) }.expect("there is such a signal");
        assert_eq!(now().handler, 0);
        let mut installed = None;
        let meanwhile = || {
            // SAFETY: the handler adds to an atomic.
            unsafe { install(SIGURG, own, HandlerFlags::ON_ALTSTACK) }.expect("installed");
            installed = Some(now());
        };
        // A signal that a thread sends to itself is delivered before the call returns.
        interrupt_after(crate::process::thread_id(), meanwhile).expect("this thread runs");
        assert_eq!(Some(now()), installed);
        assert_eq!(CALLED.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn who_has_ended_is_not_interrupted() {
        let ended = thread::spawn(crate::process::thread_id).join().expect("it ends");
        let begun = std::time::Instant::now();
        // `join` returns when libc knows of the end, a moment before the kernel forgets the number.
        while interrupt_thread(ended) != Err(Errno::ESRCH) {
            assert!(begun.elapsed() < Duration::from_secs(60), "it is still found");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn an_interruption_ends_a_wait() {
        let tid = AtomicI32::new(0);
        let word = AtomicU32::new(0);
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                tid.store(crate::process::thread_id(), Ordering::Release);
                crate::futex::wait(&word, 0, None);
                is_over.store(true, Ordering::Release);
            });
            while !is_over.load(Ordering::Acquire) {
                if tid.load(Ordering::Acquire) != 0 {
                    let _ = interrupt_thread(tid.load(Ordering::Acquire));
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
    }
}
