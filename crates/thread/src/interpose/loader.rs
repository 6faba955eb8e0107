//! `dl_iterate_phdr`, whole: the loader holds a lock while it calls back, and in a dynamic executable the lock is the process's.
//!
//! A thread that was moved in the middle of a backtrace would unlock another node's; one that was dropped there by a rollback
//! would leave its node's locked for ever. So the call is neither suspended nor reset.
//!
//! A static executable has one object and no loader, and libc's own function can't be named once this one replaces it (this
//! crate does not know how it will be linked): so its object is told of here.

use crate::carrier::{RuntimeSection, current_slot};
use crate::preempt::SIG_RESET;
use crate::template::{DlPhdrInfo, Phdr};
use core::ffi::{c_int, c_void};
use peregrine_sys::signal;

type Callback = unsafe extern "C" fn(*const DlPhdrInfo, usize, *mut c_void) -> c_int;
type Iterate = unsafe extern "C" fn(Callback, *mut c_void) -> c_int;

/// The loader's own function; none in a static executable.
#[cfg(not(target_feature = "crt-static"))]
fn own() -> Option<Iterate> {
    // SAFETY: libc's function has this type.
    super::next_definition(c"dl_iterate_phdr")
        .map(|f| unsafe { core::mem::transmute::<*mut c_void, Iterate>(f) })
}

#[cfg(target_feature = "crt-static")]
fn own() -> Option<Iterate> {
    None
}

/// Tells of the only object of a static executable, as libc would.
unsafe fn tell_of_executable(callback: Callback, data: *mut c_void) -> c_int {
    const AT_PHDR: u64 = 3;
    const AT_PHNUM: u64 = 5;
    const PT_LOAD: u32 = 1;
    /// Bytes of a file's own header; the program headers follow.
    const FILE_HEADER: usize = 64;
    const PT_TLS: u32 = 7;
    unsafe extern "C" {
        fn getauxval(kind: u64) -> u64;
    }
    // SAFETY: the kernel's word on where this executable's headers lie; they are mapped with it.
    let (at, headers) = unsafe {
        let at = getauxval(AT_PHDR) as usize;
        (at, core::slice::from_raw_parts(at as *const Phdr, getauxval(AT_PHNUM) as usize))
    };
    // At its own addresses, or away from them by as much as its first page is.
    let first = headers.iter().find(|h| h.kind == PT_LOAD && h.offset == 0);
    let bias = first.map_or(0, |h| at.wrapping_sub(FILE_HEADER).wrapping_sub(h.vaddr));
    // The block of thread-locals ends at the thread pointer, aligned as it asks.
    let tls = headers.iter().find(|h| h.kind == PT_TLS);
    let tls_data = tls.map_or(0, |h| {
        peregrine_sys::cpu::thread_pointer() - h.memsz.next_multiple_of((h.align as usize).max(1))
    });
    let info = DlPhdrInfo {
        addr: bias,
        name: c"".as_ptr(),
        phdr: headers.as_ptr(),
        phnum: headers.len() as u16,
        adds: 1,
        subs: 0,
        tls_modid: usize::from(tls.is_some()),
        tls_data: tls_data as *const c_void,
    };
    // SAFETY: as libc calls it; the caller vouches for the callback.
    unsafe { callback(&info, size_of::<DlPhdrInfo>(), data) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dl_iterate_phdr(callback: Callback, data: *mut c_void) -> c_int {
    // SAFETY: passed on unchanged.
    let call = || unsafe { own().map_or_else(|| tell_of_executable(callback, data), |f| f(callback, data)) };
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
