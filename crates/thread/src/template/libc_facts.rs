//! What libc tells about its thread control block, and what can be found out where it does not.

#[cfg(target_feature = "crt-static")]
mod found {
    unsafe extern "C" {
        static _thread_db_sizeof_pthread: u32;
        static _thread_db_pthread_tid: [u32; 3];
        static __rseq_offset: isize;
    }
    pub fn sizeof_pthread() -> Option<usize> {
        // SAFETY: a constant of libc's.
        Some(unsafe { _thread_db_sizeof_pthread } as usize)
    }
    pub fn offset_of_tid() -> Option<usize> {
        // SAFETY: a constant of libc's, for debuggers: bits, elements, offset.
        Some(unsafe { _thread_db_pthread_tid }[2] as usize)
    }
    pub fn rseq_offset() -> Option<isize> {
        // SAFETY: set once, before constructors run.
        Some(unsafe { __rseq_offset })
    }
}
#[cfg(not(target_feature = "crt-static"))]
mod found {
    use core::ffi::{c_char, c_void};
    unsafe extern "C" {
        fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    }
    fn find<T: Copy>(name: &core::ffi::CStr) -> Option<T> {
        // SAFETY: RTLD_DEFAULT is null; the symbol, if found, is an object of type T.
        unsafe { dlsym(core::ptr::null_mut(), name.as_ptr()).cast::<T>().as_ref() }.copied()
    }
    pub fn sizeof_pthread() -> Option<usize> {
        find::<u32>(c"_thread_db_sizeof_pthread").map(|n| n as usize)
    }
    pub fn offset_of_tid() -> Option<usize> {
        find::<[u32; 3]>(c"_thread_db_pthread_tid").map(|[_, _, offset]| offset as usize)
    }
    pub fn rseq_offset() -> Option<isize> {
        find::<isize>(c"__rseq_offset")
    }
}
pub use found::{offset_of_tid, rseq_offset, sizeof_pthread};

/// A static executable whose final crate alone was told so has no way to ask libc. But libc has put the thread control block at the end of the data segment, with
/// nothing but some alignment behind it: this close to the start nobody else has moved the break.
pub fn size_up_to_break(tp: usize) -> Option<usize> {
    use peregrine_sys::linux_raw_sys::general as k;
    // SAFETY: only asks where the break is.
    let end = unsafe { peregrine_sys::raw::syscall6(k::__NR_brk, 0, 0, 0, 0, 0, 0) } as usize;
    // Whole units of 64, so that rounding up later does not pass the end.
    end.checked_sub(tp).map(|n| n & !63).filter(|n| *n != 0)
}

/// Where libc keeps the thread id, as an offset from the thread pointer: it has told the kernel, which clears it when the thread ends.
pub fn kernels_word_on_tid(tp: usize) -> Option<usize> {
    use peregrine_sys::linux_raw_sys::{general::__NR_prctl, prctl::PR_GET_TID_ADDRESS};
    let mut at = 0usize;
    let to = &raw mut at as usize;
    // SAFETY: the kernel writes one word, if it was built with CONFIG_CHECKPOINT_RESTORE.
    let r = unsafe { peregrine_sys::raw::syscall6(__NR_prctl, PR_GET_TID_ADDRESS as usize, to, 0, 0, 0, 0) };
    if r == 0 { at.checked_sub(tp) } else { None }
}
