//! The loader's list of modules: read in one go, so that no thread is carried away with the loader's lock.
//!
//! `dl_iterate_phdr` calls its callback with a lock of the loader held, which is the process's. The callback is ordinary code (the
//! standard library's, when it names the frames of a backtrace) that may be preempted and moved: the lock would stay taken on the
//! node it left. So the list is copied inside a runtime section and the callback called after. Its entries stay true: a module is
//! never unloaded under a thread that has it on its stack. In a static executable the lock is the thread's own, and nothing is done.
#![cfg(not(target_feature = "crt-static"))]

use crate::carrier::{RuntimeSection, current_slot};
use core::ffi::{c_int, c_void};

/// `struct dl_phdr_info`.
type Info = [u64; 8];
type Callback = unsafe extern "C" fn(*mut Info, usize, *mut c_void) -> c_int;
/// Modules that are kept: programs have three to thirty.
const MOST: usize = 96;

struct Copied {
    list: [Info; MOST],
    len: usize,
}

unsafe extern "C" fn copy(info: *mut Info, size: usize, to: *mut c_void) -> c_int {
    // SAFETY: the loader's entry, of at least `size` bytes; our own copy.
    unsafe {
        let to = &mut *to.cast::<Copied>();
        let Some(place) = to.list.get_mut(to.len) else { return 1 };
        let bytes = size.min(size_of::<Info>());
        core::ptr::copy_nonoverlapping(info.cast::<u8>(), place.as_mut_ptr().cast::<u8>(), bytes);
        to.len += 1;
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dl_iterate_phdr(callback: Callback, data: *mut c_void) -> c_int {
    type Iterate = unsafe extern "C" fn(Callback, *mut c_void) -> c_int;
    // SAFETY: libc has this function, of this type; C's contract for the rest.
    unsafe {
        let Some(real) = super::next_definition(c"dl_iterate_phdr") else { return 0 };
        let real = core::mem::transmute::<*mut c_void, Iterate>(real);
        if current_slot().is_none() {
            return real(callback, data);
        }
        let mut copied = Copied { list: [[0; 8]; MOST], len: 0 };
        {
            let _here = RuntimeSection::enter();
            real(copy, (&raw mut copied).cast());
        }
        for info in &mut copied.list[..copied.len] {
            let r = callback(info, size_of::<Info>(), data);
            if r != 0 {
                return r;
            }
        }
    }
    0
}
