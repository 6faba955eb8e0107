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
    _dso: *mut c_void,
) -> i32 {
    let Some(i) = current_slot() else {
        // Threads of the process itself: their thread-locals are dropped by nobody, as `main`'s are in C.
        return 0;
    };
    let slot = SlotHeader::of(i);
    // SAFETY: the running thread's own header.
    unsafe {
        let entry = Box::new(Entry { run, object, next: (*slot).destructors });
        (*slot).destructors = Box::into_raw(entry) as usize;
    }
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
