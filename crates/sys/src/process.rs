//! Making processes, without libc's caches in between.

use crate::raw::{Errno, check, syscall6};
use crate::signal::{Signo, number};
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
/// # Errors
/// EAGAIN: the limit of processes. ENOMEM.
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

/// Ends this process at once by SIGKILL, as another one would.
pub fn kill_self() -> ! {
    loop {
        let _ = crate::signal::kill(pid(), crate::signal::number::KILL);
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
    signal_with_parent(number::KILL);
}

/// Have `signo` sent to this process when its parent dies (`PR_SET_PDEATHSIG`), instead of what was asked for before.
pub fn signal_with_parent(signo: Signo) {
    const PR_SET_PDEATHSIG: usize = 1;
    // SAFETY: takes numbers only.
    unsafe { syscall6(k::__NR_prctl, PR_SET_PDEATHSIG, signo as usize, 0, 0, 0, 0) };
}

/// Name of this OS thread, as `/proc/PID/comm` has it (`PR_SET_NAME`); 15 bytes count.
pub fn set_name(name: &core::ffi::CStr) {
    const PR_SET_NAME: usize = 15;
    // SAFETY: the kernel reads up to the zero.
    unsafe { syscall6(k::__NR_prctl, PR_SET_NAME, name.as_ptr() as usize, 0, 0, 0, 0) };
}

/// Writes all of `bytes` to `fd` as far as the kernel takes them; for last words, so errors are dropped.
pub fn write_all(fd: i32, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: the slice is live.
        match check(unsafe {
            syscall6(k::__NR_write, fd as usize, bytes.as_ptr() as usize, bytes.len(), 0, 0, 0)
        }) {
            Ok(n) => bytes = &bytes[n.min(bytes.len())..],
            Err(Errno(4)) => {}
            Err(_) => return,
        }
    }
}

/// Randomisation off, as `personality(2)` knows it.
pub const ADDR_NO_RANDOMIZE: u32 = 0x0004_0000;

/// This process's personality.
///
/// # Errors
/// EPERM: a seccomp filter forbids it.
pub fn personality() -> Result<u32, Errno> {
    // SAFETY: 0xffff_ffff only asks.
    check(unsafe { syscall6(k::__NR_personality, 0xffff_ffff, 0, 0, 0, 0, 0) }).map(|p| p as u32)
}

/// Sets it, for this process and what it executes.
///
/// # Errors
/// EPERM: a seccomp filter forbids it.
pub fn set_personality(persona: u32) -> Result<(), Errno> {
    // SAFETY: takes a number.
    check(unsafe { syscall6(k::__NR_personality, persona as usize, 0, 0, 0, 0, 0) }).map(drop)
}

/// Becomes the ordinary user and group `id` for good (`setresgid`, `setresuid`), and dumpable again, so that
/// `/proc/self` stays its own. Only the calling thread changes: call it before there are others.
///
/// # Errors
/// EPERM: not root.
pub fn become_user(id: u32) -> Result<(), Errno> {
    use linux_raw_sys::{general as g, prctl};
    let id = id as usize;
    // SAFETY: these calls take numbers only, and give rights away.
    unsafe {
        check(syscall6(g::__NR_setgroups, 0, 0, 0, 0, 0, 0))?;
        check(syscall6(g::__NR_setresgid, id, id, id, 0, 0, 0))?;
        check(syscall6(g::__NR_setresuid, id, id, id, 0, 0, 0))?;
        check(syscall6(g::__NR_prctl, prctl::PR_SET_DUMPABLE as usize, 1, 0, 0, 0, 0))?;
    }
    Ok(())
}

/// Whether this process runs as root.
pub fn is_root() -> bool {
    // SAFETY: takes nothing.
    unsafe { syscall6(linux_raw_sys::general::__NR_geteuid, 0, 0, 0, 0, 0, 0) == 0 }
}

/// How a child ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChildEnd {
    /// It exited with this code.
    Exited(i32),
    /// This signal killed it.
    Killed(i32),
}

/// Waits for the child `pid` to end (`wait4`).
///
/// # Errors
/// ECHILD: not a child of this process. EINTR.
pub fn wait_for(pid: i32) -> Result<ChildEnd, Errno> {
    let mut status = 0i32;
    // SAFETY: the kernel writes one word.
    unsafe { check(syscall6(k::__NR_wait4, pid as usize, (&raw mut status) as usize, 0, 0, 0, 0))? };
    Ok(match status & 0x7f {
        0 => ChildEnd::Exited(status >> 8 & 0xff),
        signal => ChildEnd::Killed(signal),
    })
}

/// From now on, `call` fails with EPERM in this thread and its children, as under a container's seccomp filter.
///
/// # Errors
/// The kernel's, if it has no filters.
pub fn forbid_call(call: u32) -> Result<(), Errno> {
    answer_call(call, Errno::EPERM.0)
}

/// From now on, `call` does nothing and returns 0 in this thread and its children, as in a sandbox that knows its number only.
///
/// # Errors
/// As [`forbid_call`].
pub fn ignore_call(call: u32) -> Result<(), Errno> {
    answer_call(call, 0)
}

/// Has `call` fail with `errno`, or return 0 for 0, without being made.
fn answer_call(call: u32, errno: i32) -> Result<(), Errno> {
    /// One instruction of the filter machine (`struct sock_filter`).
    #[repr(C)]
    struct Instruction(u16, u8, u8, u32);
    /// `struct sock_fprog`.
    #[repr(C)]
    struct Program(u16, *const Instruction);
    const LOAD_WORD: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const ALLOW: u32 = 0x7fff_0000;
    const FAIL_WITH: u32 = 0x0005_0000;
    let program = [
        Instruction(LOAD_WORD, 0, 0, 0),
        Instruction(JUMP_IF_EQUAL, 0, 1, call),
        Instruction(RETURN, 0, 0, FAIL_WITH | errno as u32),
        Instruction(RETURN, 0, 0, ALLOW),
    ];
    let program = Program(program.len() as u16, program.as_ptr());
    // SAFETY: the program lives across the calls, which copy it; a filter only takes away.
    unsafe {
        check(syscall6(k::__NR_prctl, linux_raw_sys::prctl::PR_SET_NO_NEW_PRIVS as usize, 1, 0, 0, 0, 0))?;
        check(syscall6(k::__NR_seccomp, 1, 0, (&raw const program) as usize, 0, 0, 0))?;
    }
    Ok(())
}

/// The number of `userfaultfd(2)`, for [`forbid_call`].
pub const CALL_USERFAULTFD: u32 = k::__NR_userfaultfd;

/// The number of `madvise(2)`, for [`forbid_call`].
pub const CALL_MADVISE: u32 = k::__NR_madvise;

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

/// The processors that a thread may run on; `None` is the calling one (`sched_getaffinity`, `sched_setaffinity`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CpuSet([u64; 16]);

impl CpuSet {
    /// One processor.
    ///
    /// # Errors
    /// EINVAL: a number beyond 1023.
    pub fn one(cpu: usize) -> Result<Self, Errno> {
        let mut words = [0; 16];
        *words.get_mut(cpu / 64).ok_or(Errno::EINVAL)? = 1 << (cpu % 64);
        Ok(Self(words))
    }

    /// Whether `cpu` is in it.
    pub fn contains(&self, cpu: usize) -> bool {
        self.0.get(cpu / 64).is_some_and(|w| w & (1 << (cpu % 64)) != 0)
    }

    /// The processors in it, in rising order.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..1024).filter(|&cpu| self.contains(cpu))
    }

    /// Those of the calling thread.
    ///
    /// # Errors
    /// EINVAL: more than 1024 processors.
    pub fn current() -> Result<Self, Errno> {
        Self::of(0)
    }

    /// Those of an OS thread; 0 is the calling one.
    ///
    /// # Errors
    /// EINVAL: more than 1024 processors. ESRCH: there is no such thread.
    pub fn of(tid: i32) -> Result<Self, Errno> {
        let mut words = [0u64; 16];
        let (bytes, at) = (size_of_val(&words), words.as_mut_ptr() as usize);
        // SAFETY: the kernel writes at most the array.
        check(unsafe { syscall6(k::__NR_sched_getaffinity, tid as usize, bytes, at, 0, 0, 0) })?;
        Ok(Self(words))
    }

    /// Binds the calling thread to them.
    ///
    /// # Errors
    /// EINVAL: none of them is this process's to use.
    pub fn bind(&self) -> Result<(), Errno> {
        self.bind_other(0)
    }

    /// Binds an OS thread to them; 0 is the calling one. One that sleeps is bound without being woken, and wakes on one of them.
    ///
    /// # Errors
    /// EINVAL: none of them is that process's to use. EPERM: it is another user's. ESRCH: there is no such thread.
    pub fn bind_other(&self, tid: i32) -> Result<(), Errno> {
        let (bytes, at) = (size_of_val(&self.0), self.0.as_ptr() as usize);
        // SAFETY: the kernel reads the array.
        check(unsafe { syscall6(k::__NR_sched_setaffinity, tid as usize, bytes, at, 0, 0, 0) }).map(drop)
    }
}

/// The nice value of an OS thread; 0 is the calling one.
///
/// # Errors
/// ESRCH: there is none.
pub fn nice_of(tid: i32) -> Result<i32, Errno> {
    // SAFETY: takes numbers only. The kernel answers 20 - nice, so that no answer looks like an error.
    check(unsafe { syscall6(k::__NR_getpriority, 0, tid as usize, 0, 0, 0, 0) }).map(|n| 20 - n as i32)
}

/// Sets the nice value of an OS thread; 0 is the calling one.
///
/// # Errors
/// EACCES: more urgent than `RLIMIT_NICE` permits. ESRCH, EPERM.
pub fn set_nice(tid: i32, nice: i32) -> Result<(), Errno> {
    // SAFETY: takes numbers only.
    check(unsafe { syscall6(k::__NR_setpriority, 0, tid as usize, nice as isize as usize, 0, 0, 0) })
        .map(drop)
}

/// The calling OS thread's id.
pub fn thread_id() -> i32 {
    // SAFETY: takes nothing.
    (unsafe { syscall6(k::__NR_gettid, 0, 0, 0, 0, 0, 0) }) as i32
}

/// The processor that the calling thread runs on (`getcpu`, through the vDSO): true at some moment of the asking.
#[inline]
pub fn current_cpu() -> usize {
    crate::rustix::thread::sched_getcpu()
}

/// As [`current_cpu`], by system call: the vDSO would need a static.
///
/// # Errors
/// ENOSYS: forbidden here.
pub fn cpu_by_call() -> Result<usize, Errno> {
    let mut cpu = 0u32;
    // SAFETY: the kernel writes the number; it is not asked for the NUMA node.
    check(unsafe { syscall6(k::__NR_getcpu, &raw mut cpu as usize, 0, 0, 0, 0, 0) })?;
    Ok(cpu as usize)
}

/// Lets this process have `count` descriptors open (`RLIMIT_NOFILE`); the hard limit is raised too where that is permitted.
///
/// # Errors
/// EPERM: beyond the hard limit.
pub fn raise_descriptor_limit(count: u64) -> Result<(), Errno> {
    use crate::rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    if now.current.is_none_or(|current| current >= count) {
        return Ok(());
    }
    let maximum = now.maximum.map(|maximum| maximum.max(count));
    setrlimit(Resource::Nofile, Rlimit { current: Some(count), maximum }).map_err(|e| Errno(e.raw_os_error()))
}
