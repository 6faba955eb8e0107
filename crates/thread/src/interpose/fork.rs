//! Making processes and OS threads from a thread.
//!
//! `fork` would run two processes on one shared stack, an OS thread would run on statics that are swapped under it:
//! both are refused, by name. `posix_spawn` (what `std::process::Command` uses) needs no help; but a child belongs to
//! the process that started it, so a *wait* that finds no child moves on to the next node and asks there.

use super::errno::EOPNOTSUPP;
use super::{fail, hooks, libc_result};
use crate::carrier::{RuntimeSection, carrier};
use core::ffi::c_void;
use peregrine_sys::linux_raw_sys::general as k;
use peregrine_sys::raw::{Errno, check, syscall6};

unsafe extern "C" {
    fn _Fork() -> i32;
}

fn refuse(what: &str, instead: &str) {
    if let Some((slot, hooks)) = hooks() {
        let mut line = [0u8; 256];
        let mut n = 0;
        for part in ["peregrine: ", what, " was called in a Peregrine thread and refused: ", instead, "\n"] {
            let take = part.len().min(line.len() - n);
            line[n..n + take].copy_from_slice(&part.as_bytes()[..take]);
            n += take;
        }
        let _ = slot;
        if !(hooks.output)(2, &line[..n]) {
            peregrine_sys::process::write_all(2, &line[..n]);
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn fork() -> i32 {
    if hooks().is_some() {
        refuse("fork", "use std::process::Command without pre_exec, or peregrine::spawn");
        return fail(EOPNOTSUPP) as i32;
    }
    // SAFETY: fork without libc's atfork handlers; what may run in the child is the caller's business, as ever.
    unsafe { _Fork() }
}

#[unsafe(no_mangle)]
extern "C" fn vfork() -> i32 {
    fork()
}

/// Raised by `std::thread::spawn` and C libraries alike.
#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_create(
    out: *mut c_void,
    attr: *const c_void,
    start: *const c_void,
    arg: *mut c_void,
) -> i32 {
    if hooks().is_some() {
        refuse("pthread_create", "an OS thread can't be moved or imaged; use peregrine::spawn");
        return EOPNOTSUPP;
    }
    // SAFETY: passed on unchanged.
    unsafe { real_pthread_create(out, attr, start, arg) }
}

#[cfg(not(target_feature = "crt-static"))]
unsafe fn real_pthread_create(
    out: *mut c_void,
    attr: *const c_void,
    start: *const c_void,
    arg: *mut c_void,
) -> i32 {
    type Create = unsafe extern "C" fn(*mut c_void, *const c_void, *const c_void, *mut c_void) -> i32;
    // SAFETY: libc has this function, of this type.
    unsafe {
        match super::next_definition(c"pthread_create") {
            Some(f) => core::mem::transmute::<*mut c_void, Create>(f)(out, attr, start, arg),
            None => EOPNOTSUPP,
        }
    }
}

#[cfg(target_feature = "crt-static")]
unsafe fn real_pthread_create(
    out: *mut c_void,
    attr: *const c_void,
    start: *const c_void,
    arg: *mut c_void,
) -> i32 {
    unsafe extern "C" {
        fn __pthread_create(o: *mut c_void, a: *const c_void, s: *const c_void, x: *mut c_void) -> i32;
    }
    // SAFETY: libc's own function under its other name.
    unsafe { __pthread_create(out, attr, start, arg) }
}

/// Waits on node after node, until one of them knows the child. `wait` is told more options to use.
///
/// A thread may be moved between any two instructions, so "no child here" counts for a node only if the thread was held there
/// while it asked; once the child has been seen, a wait that finds none has only been moved away from it.
fn wait_anywhere(options: i32, mut wait: impl FnMut(i32) -> isize) -> isize {
    const WNOHANG: i32 = k::WNOHANG as i32;
    let gone = |r: isize| check(r) == Err(Errno::ECHILD);
    let Some((_, hooks)) = hooks() else { return libc_result(wait(0)) };
    let mut asked = 0u64;
    loop {
        let (r, node) = {
            // SAFETY: a thread runs. It stays on this node while it asks, without waiting.
            let _here = unsafe { RuntimeSection::enter() };
            let r = wait(WNOHANG);
            // SAFETY: as above.
            (r, unsafe { carrier() }.node)
        };
        if gone(r) {
            asked |= 1 << node;
            if asked.count_ones() >= (hooks.node_count)() || !(hooks.next_node)() {
                return libc_result(r);
            }
            continue;
        }
        if r != 0 || options & WNOHANG != 0 {
            return libc_result(r);
        }
        // It is here and runs on.
        asked = 0;
        let r = wait(0);
        if !gone(r) {
            return libc_result(r);
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn wait4(pid: i32, status: *mut i32, options: i32, usage: *mut c_void) -> i32 {
    wait_anywhere(options, |more| {
        let options = options | more;
        // SAFETY: C's contract.
        unsafe {
            syscall6(
                k::__NR_wait4,
                pid as isize as usize,
                status as usize,
                options as usize,
                usage as usize,
                0,
                0,
            )
        }
    }) as i32
}

#[unsafe(no_mangle)]
unsafe extern "C" fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32 {
    // SAFETY: passed on.
    unsafe { wait4(pid, status, options, core::ptr::null_mut()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn waitid(kind: i32, id: u32, info: *mut c_void, options: i32) -> i32 {
    // The kernel tells by a zero process id in `info` that nothing has changed yet, and returns 0 for a change.
    let mut own = [0u64; 16];
    wait_anywhere(options, |more| {
        let options = options | more;
        own = [0; 16];
        // SAFETY: `own` is as large as a siginfo_t; C's contract for `info`.
        unsafe {
            let r = syscall6(
                k::__NR_waitid,
                kind as usize,
                id as usize,
                own.as_mut_ptr() as usize,
                options as usize,
                0,
                0,
            );
            let pid = (own[1] >> 32) as u32;
            if r != 0 {
                return r;
            }
            if !info.is_null() {
                info.cast::<[u64; 16]>().write_unaligned(own);
            }
            pid as isize
        }
    })
    .min(0) as i32
}
