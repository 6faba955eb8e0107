//! Starting a program: in one piece.
//!
//! `posix_spawn` maps a stack for the child, which shares the caller's memory until it executes the program, and unmaps it after.
//! That mapping is the process's: a thread that was moved in between would find none. So the whole call is a runtime section. It
//! lasts until the program is executed, and no longer.

use crate::carrier::{RuntimeSection, current_slot};
use core::ffi::{c_char, c_int, c_void};

type Spawn = unsafe extern "C" fn(
    *mut c_int,
    *const c_char,
    *const c_void,
    *const c_void,
    *const *mut c_char,
    *const *mut c_char,
) -> c_int;

#[cfg(not(target_feature = "crt-static"))]
unsafe fn real(
    search: bool,
    pid: *mut c_int,
    file: *const c_char,
    actions: *const c_void,
    attributes: *const c_void,
    argv: *const *mut c_char,
    envp: *const *mut c_char,
) -> c_int {
    const ENOSYS: c_int = 38;
    let name = if search { c"posix_spawnp" } else { c"posix_spawn" };
    // SAFETY: libc has these functions, of this type.
    unsafe {
        match super::next_definition(name) {
            Some(f) => {
                core::mem::transmute::<*mut c_void, Spawn>(f)(pid, file, actions, attributes, argv, envp)
            }
            None => ENOSYS,
        }
    }
}

#[cfg(target_feature = "crt-static")]
unsafe fn real(
    search: bool,
    pid: *mut c_int,
    file: *const c_char,
    actions: *const c_void,
    attributes: *const c_void,
    argv: *const *mut c_char,
    envp: *const *mut c_char,
) -> c_int {
    unsafe extern "C" {
        fn __posix_spawn(
            pid: *mut c_int,
            file: *const c_char,
            actions: *const c_void,
            attributes: *const c_void,
            argv: *const *mut c_char,
            envp: *const *mut c_char,
        ) -> c_int;
        fn __posix_spawnp(
            pid: *mut c_int,
            file: *const c_char,
            actions: *const c_void,
            attributes: *const c_void,
            argv: *const *mut c_char,
            envp: *const *mut c_char,
        ) -> c_int;
    }
    // libc's own functions under their other names.
    let f: Spawn = if search { __posix_spawnp } else { __posix_spawn };
    // SAFETY: C's contract.
    unsafe { f(pid, file, actions, attributes, argv, envp) }
}

/// Runs the call in a section if a thread makes it.
fn in_one_piece(call: impl FnOnce() -> c_int) -> c_int {
    // SAFETY: a thread runs.
    let _here = current_slot().map(|_| unsafe { RuntimeSection::enter() });
    call()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn posix_spawn(
    pid: *mut c_int,
    file: *const c_char,
    actions: *const c_void,
    attributes: *const c_void,
    argv: *const *mut c_char,
    envp: *const *mut c_char,
) -> c_int {
    // SAFETY: passed on.
    in_one_piece(|| unsafe { real(false, pid, file, actions, attributes, argv, envp) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn posix_spawnp(
    pid: *mut c_int,
    file: *const c_char,
    actions: *const c_void,
    attributes: *const c_void,
    argv: *const *mut c_char,
    envp: *const *mut c_char,
) -> c_int {
    // SAFETY: passed on.
    in_one_piece(|| unsafe { real(true, pid, file, actions, attributes, argv, envp) })
}
