//! Functions of libc that the executable defines itself, so that unmodified crates run in a thread.
//!
//! A definition in the executable wins over libc's, linked static or dynamic. Each function first asks whether a
//! Peregrine thread runs ([`current_slot`](crate::carrier::current_slot)); if not, it does what libc would do, by
//! plain system call. Names here are libc's and so are the meanings.
//!
//! | functions | in a thread |
//! |---|---|
//! | `malloc` family | allocate in the slot |
//! | `mmap`, `munmap`, `mremap`, `madvise`, `mprotect` | private mappings lie in the slot's heap |
//! | `nanosleep`, `clock_nanosleep`, `usleep`, `sched_yield` | park the thread, not the node |
//! | `sigprocmask`, `pthread_sigmask`, `sigsuspend`, `ppoll`, `pselect`, `epoll_pwait` | the thread's own mask; the runtime's signals stay open |
//! | `sigaction`, `signal` | for the program, on every node |
//! | `environ`, `getenv`, `setenv`, `unsetenv`, `putenv`, `clearenv` | the thread's own environment |
//! | `write`, `writev` on descriptors 1 and 2 | go out with the World's next commit |
//! | `fork`, `vfork`, `pthread_create` | refused, with `errno` and a line that says what to use |
//! | `dl_iterate_phdr` | libc's, during which the thread stays where it is |
//! | `wait4`, `waitpid`, `waitid` | follow a child to the node that started it |
//! | `__cxa_thread_atexit_impl` | destructors of thread-locals, run when the thread ends |

mod action;
mod atexit;
mod environ;
mod fork;
mod io;
mod loader;
mod malloc;
mod mask;
mod mmap;
mod sleep;

pub use atexit::run_destructors;

/// The kernel's error numbers as C has them.
mod errno {
    use peregrine_sys::raw::Errno;
    pub(super) const EINVAL: i32 = Errno::EINVAL.0;
    pub(super) const ENOMEM: i32 = Errno::ENOMEM.0;
    pub(super) const EOPNOTSUPP: i32 = Errno::EOPNOTSUPP.0;
}

/// Has shared libraries set up in this process, before nodes are forked from it, what they set up at first use.
///
/// Their data is the process's, so a thread that made use of it on one node finds it bare on another: the unwinder aborts if a
/// thread comes to a node, in the middle of a panic, where none has ever panicked.
pub fn warm_up() {
    let _ = std::panic::catch_unwind(|| std::panic::resume_unwind(Box::new(())));
}

unsafe extern "C" {
    fn __errno_location() -> *mut i32;
}

/// libc's own definition of a function that this crate defines, in a dynamic executable.
#[cfg(not(target_feature = "crt-static"))]
pub(crate) fn next_definition(name: &core::ffi::CStr) -> Option<*mut core::ffi::c_void> {
    use core::ffi::{c_char, c_void};
    unsafe extern "C" {
        fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    }
    const RTLD_NEXT: *mut c_void = usize::MAX as *mut c_void;
    // SAFETY: a null-terminated name.
    let f = unsafe { dlsym(RTLD_NEXT, name.as_ptr()) };
    (!f.is_null()).then_some(f)
}

/// Sets `errno` and returns -1, as libc does.
pub(crate) fn fail(errno: i32) -> isize {
    // SAFETY: libc's own slot for this thread.
    unsafe { *__errno_location() = errno };
    -1
}

/// Turns the kernel's return convention into libc's.
pub(crate) fn libc_result(ret: isize) -> isize {
    match peregrine_sys::raw::check(ret) {
        Ok(v) => v as isize,
        Err(e) => fail(e.0),
    }
}

/// The hooks of the running thread's node, or `None` where no thread runs.
pub(crate) fn hooks() -> Option<(u32, crate::carrier::Hooks)> {
    // SAFETY: a thread runs, so this process is a node.
    crate::carrier::current_slot().map(|i| (i, unsafe { crate::carrier::carrier() }.hooks))
}
