//! `dl_iterate_phdr`, whole: the loader holds a lock while it calls back, and in a dynamic executable the lock is the process's.
//!
//! A thread that was moved in the middle of a backtrace would unlock another node's; one that was dropped there by a rollback
//! would leave its node's locked for ever. So the call is neither suspended nor reset. (In a static executable the lock is the
//! thread's own, like all of libc's data.)

use crate::carrier::{RuntimeSection, current_slot};
use crate::preempt::SIG_RESET;
use core::ffi::c_void;
use peregrine_sys::signal;

type Callback = unsafe extern "C" fn(*mut c_void, usize, *mut c_void) -> i32;
type Iterate = unsafe extern "C" fn(Callback, *mut c_void) -> i32;

/// libc's own function.
#[cfg(target_feature = "crt-static")]
fn own() -> Option<Iterate> {
    unsafe extern "C" {
        fn __dl_iterate_phdr(callback: Callback, data: *mut c_void) -> i32;
    }
    Some(__dl_iterate_phdr)
}

#[cfg(not(target_feature = "crt-static"))]
fn own() -> Option<Iterate> {
    // SAFETY: libc's function has this type.
    super::next_definition(c"dl_iterate_phdr")
        .map(|f| unsafe { core::mem::transmute::<*mut c_void, Iterate>(f) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dl_iterate_phdr(callback: Callback, data: *mut c_void) -> i32 {
    // SAFETY: passed on unchanged.
    let call = || own().map_or(0, |f| unsafe { f(callback, data) });
    if current_slot().is_none() {
        return call();
    }
    // SAFETY: a thread runs, so this process is a node.
    let stay = unsafe { RuntimeSection::enter() };
    let mask = signal::block(signal::bit(SIG_RESET));
    let result = call();
    signal::set_mask(mask);
    drop(stay);
    result
}
