//! `posix_spawn`, whole: libc maps a stack for the child, lets it run there until it executes, and unmaps it.
//!
//! The mapping is the process's. A thread that was carried to another node in between would start a child on no stack, and leave
//! the mapping behind; so it stays for the length of the call, as in any call of the runtime.

use crate::carrier::{RuntimeSection, current_slot};
use core::ffi::{c_char, c_void};

type Spawn = unsafe extern "C" fn(
    *mut i32,
    *const c_char,
    *const c_void,
    *const c_void,
    *const *const c_char,
    *const *const c_char,
) -> i32;

/// libc's own functions, under the names that are not replaced.
#[cfg(target_feature = "crt-static")]
mod own {
    use super::{Spawn, c_char, c_void};
    unsafe extern "C" {
        fn __posix_spawn(
            pid: *mut i32,
            path: *const c_char,
            actions: *const c_void,
            attributes: *const c_void,
            argv: *const *const c_char,
            envp: *const *const c_char,
        ) -> i32;
        fn __posix_spawnp(
            pid: *mut i32,
            file: *const c_char,
            actions: *const c_void,
            attributes: *const c_void,
            argv: *const *const c_char,
            envp: *const *const c_char,
        ) -> i32;
    }
    pub(super) fn posix_spawn() -> Option<Spawn> {
        Some(__posix_spawn)
    }
    pub(super) fn posix_spawnp() -> Option<Spawn> {
        Some(__posix_spawnp)
    }
}

#[cfg(not(target_feature = "crt-static"))]
mod own {
    use super::{Spawn, c_void};
    use crate::interpose::next_definition;

    pub(super) fn posix_spawn() -> Option<Spawn> {
        // SAFETY: libc's function has this type.
        next_definition(c"posix_spawn").map(|f| unsafe { core::mem::transmute::<*mut c_void, Spawn>(f) })
    }
    pub(super) fn posix_spawnp() -> Option<Spawn> {
        // SAFETY: as above.
        next_definition(c"posix_spawnp").map(|f| unsafe { core::mem::transmute::<*mut c_void, Spawn>(f) })
    }
}

/// Calls what `find` finds, where it is neither suspended nor moved.
fn stay<R>(find: impl FnOnce() -> Option<R>, call: impl FnOnce(R) -> i32) -> i32 {
    // SAFETY: a thread runs, so this process is a node.
    let _stay = current_slot().map(|_| unsafe { RuntimeSection::enter() });
    find().map_or(peregrine_sys::raw::Errno::EOPNOTSUPP.0, call)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn posix_spawn(
    pid: *mut i32,
    path: *const c_char,
    actions: *const c_void,
    attributes: *const c_void,
    argv: *const *const c_char,
    envp: *const *const c_char,
) -> i32 {
    // SAFETY: passed on unchanged.
    stay(own::posix_spawn, |f| unsafe { f(pid, path, actions, attributes, argv, envp) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn posix_spawnp(
    pid: *mut i32,
    file: *const c_char,
    actions: *const c_void,
    attributes: *const c_void,
    argv: *const *const c_char,
    envp: *const *const c_char,
) -> i32 {
    // SAFETY: passed on unchanged.
    stay(own::posix_spawnp, |f| unsafe { f(pid, file, actions, attributes, argv, envp) })
}
