//! Making processes, without libc's caches in between.

use crate::raw::{Errno, check, syscall6};
use linux_raw_sys::general as k;

/// Which side of a [`fork_with`] this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Forked {
    /// The new process.
    Child,
    /// The old one, with the new one's process id.
    Parent(i32),
}

/// How the new process relates to this one.
#[derive(Clone, Copy, Default, Debug)]
pub struct ForkFlags {
    /// Share the descriptor table (`CLONE_FILES`): a descriptor opened by one is open in all.
    pub share_files: bool,
    /// Make the new process a child of this one's parent (`CLONE_PARENT`).
    pub sibling: bool,
}

/// `clone(2)` without a new stack: copies this single-threaded process.
///
/// # Safety
/// The process has one thread. In the child, libc's cached thread id is the parent's.
pub unsafe fn fork_with(flags: ForkFlags) -> Result<Forked, Errno> {
    const SIGCHLD: u32 = 17;
    let mut bits = SIGCHLD;
    if flags.share_files {
        bits |= k::CLONE_FILES;
    }
    if flags.sibling {
        bits |= k::CLONE_PARENT;
    }
    // SAFETY: with stack 0 and no CLONE_VM the child runs on its copy of this stack.
    match check(unsafe { syscall6(k::__NR_clone, bits as usize, 0, 0, 0, 0, 0) })? {
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(pid as i32)),
    }
}

/// Ends this process at once, with nothing flushed (`exit_group`).
pub fn exit_now(code: i32) -> ! {
    loop {
        // SAFETY: does not return.
        unsafe { syscall6(k::__NR_exit_group, code as usize, 0, 0, 0, 0, 0) };
    }
}

/// This process's id, asked of the kernel each time.
pub fn pid() -> i32 {
    // SAFETY: takes nothing.
    (unsafe { syscall6(k::__NR_getpid, 0, 0, 0, 0, 0, 0) }) as i32
}

/// The parent's id.
pub fn parent_pid() -> i32 {
    // SAFETY: takes nothing.
    (unsafe { syscall6(k::__NR_getppid, 0, 0, 0, 0, 0, 0) }) as i32
}

/// Have this process killed when its parent dies (`PR_SET_PDEATHSIG`).
pub fn die_with_parent() {
    const PR_SET_PDEATHSIG: usize = 1;
    // SAFETY: takes numbers only.
    unsafe { syscall6(k::__NR_prctl, PR_SET_PDEATHSIG, 9, 0, 0, 0, 0) };
}

/// Writes all of `bytes` to `fd` as far as the kernel takes them; for last words, so errors are dropped.
pub fn write_all(fd: i32, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: the slice is live.
        match check(unsafe { syscall6(k::__NR_write, fd as usize, bytes.as_ptr() as usize, bytes.len(), 0, 0, 0) }) {
            Ok(n) => bytes = &bytes[n.min(bytes.len())..],
            Err(Errno(4)) => {}
            Err(_) => return,
        }
    }
}

/// Randomisation off, as `personality(2)` knows it.
pub const ADDR_NO_RANDOMIZE: u32 = 0x0004_0000;

/// This process's personality.
pub fn personality() -> Result<u32, Errno> {
    // SAFETY: 0xffff_ffff only asks.
    check(unsafe { syscall6(k::__NR_personality, 0xffff_ffff, 0, 0, 0, 0, 0) }).map(|p| p as u32)
}

/// Sets it, for this process and what it executes.
pub fn set_personality(persona: u32) -> Result<(), Errno> {
    // SAFETY: takes a number.
    check(unsafe { syscall6(k::__NR_personality, persona as usize, 0, 0, 0, 0, 0) }).map(drop)
}

/// Binds the calling thread, and those it will start, to one processor (`sched_setaffinity`).
///
/// # Errors
/// EINVAL: no such processor for this process.
pub fn pin_to_cpu(cpu: usize) -> Result<(), Errno> {
    let mut set = [0u64; 16];
    *set.get_mut(cpu / 64).ok_or(Errno::EINVAL)? = 1 << (cpu % 64);
    // SAFETY: the kernel reads the set.
    unsafe {
        check(syscall6(k::__NR_sched_setaffinity, 0, size_of_val(&set), set.as_ptr() as usize, 0, 0, 0))?
    };
    Ok(())
}
