//! Destructors of thread-locals. Rust's standard library registers each with `__cxa_thread_atexit_impl`; libc's
//! own list would be run when the *process's* thread ends, so the list is kept in the slot.

use crate::carrier::current_slot;
use crate::slot::SlotHeader;
use core::ffi::c_void;

struct Entry {
    run: unsafe extern "C" fn(*mut c_void),
    object: *mut c_void,
    next: usize,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn __cxa_thread_atexit_impl(
    run: unsafe extern "C" fn(*mut c_void),
    object: *mut c_void,
    dso: *mut c_void,
) -> i32 {
    let Some(i) = current_slot() else {
        // A thread of the process itself: libc runs these when it ends.
        return of_process(run, object, dso);
    };
    let slot = SlotHeader::of(i);
    // SAFETY: the running thread's own header.
    unsafe {
        let entry = Box::new(Entry { run, object, next: (*slot).destructors });
        (*slot).destructors = Box::into_raw(entry) as usize;
    }
    0
}

#[cfg(not(target_feature = "crt-static"))]
fn of_process(run: unsafe extern "C" fn(*mut c_void), object: *mut c_void, dso: *mut c_void) -> i32 {
    type Register = unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void, *mut c_void) -> i32;
    // SAFETY: libc has this function, of this type.
    unsafe {
        match super::next_definition(c"__cxa_thread_atexit_impl") {
            Some(f) => core::mem::transmute::<*mut c_void, Register>(f)(run, object, dso),
            None => 0,
        }
    }
}

/// In a static executable libc's own function is the one replaced here: the thread-locals of the process's own threads are
/// not dropped, as those of `main` are not in C.
#[cfg(target_feature = "crt-static")]
fn of_process(_: unsafe extern "C" fn(*mut c_void), _: *mut c_void, _: *mut c_void) -> i32 {
    0
}

/// Runs the running thread's destructors, newest first, until none is left: a destructor may register another.
///
/// # Safety
/// Called once, by the thread itself, as the last of its code.
pub unsafe fn run_destructors() {
    let Some(i) = current_slot() else { return };
    let slot = SlotHeader::of(i);
    loop {
        // SAFETY: entries were made by Box above and are taken off the list before they run.
        unsafe {
            let head = (*slot).destructors;
            if head == 0 {
                return;
            }
            let entry = Box::from_raw(head as *mut Entry);
            (*slot).destructors = entry.next;
            (entry.run)(entry.object);
        }
    }
}
