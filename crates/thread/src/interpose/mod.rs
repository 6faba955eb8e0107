//! Functions of libc that the executable defines itself, so that unmodified crates run in a thread.
//!
//! A definition in the executable wins over libc's, linked static or dynamic. Each function first asks whether a
//! Peregrine thread runs ([`current_slot`](crate::carrier::current_slot)); if not, it does what libc would do, by
//! plain system call. Names here are libc's and so are the meanings.
//!
//! | functions | in a thread |
//! |---|---|
//! | `malloc` family | allocate in the slot |
//! | `mmap`, `munmap`, `mremap`, `madvise` | private mappings lie in the slot's heap |
//! | `nanosleep`, `clock_nanosleep`, `usleep`, `sched_yield` | park the thread, not the node |
//! | `write`, `writev` on descriptors 1 and 2 | go out with the World's next commit |
//! | `fork`, `vfork`, `pthread_create` | refused, with `errno` and a line that says what to use |
//! | `wait4`, `waitpid`, `waitid` | follow a child to the node that started it |
//! | `__cxa_thread_atexit_impl` | destructors of thread-locals, run when the thread ends |

mod atexit;
mod fork;
mod io;
mod malloc;
mod mmap;
mod sleep;

pub use atexit::run_destructors;

unsafe extern "C" {
    fn __errno_location() -> *mut i32;
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
