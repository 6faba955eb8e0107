//! An interruption beside a program that has a handler for the same signal. A process of its own: what is done about a signal is
//! the process's, and the other tests interrupt too.

use peregrine_base::sync::{AtomicU32, Ordering};
use peregrine_sys::process::thread_id;
use peregrine_sys::signal::interrupt_thread;
use peregrine_sys::signal::{Disposition, HandlerFlags, SIGURG, SigInfo, Signo, UContext, change, install};

static CALLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn own(_: Signo, _: *mut SigInfo, _: *mut UContext) {
    CALLED.fetch_add(1, Ordering::SeqCst);
}

fn now() -> Disposition {
    // SAFETY: only asks.
    unsafe { change(SIGURG, None) }.expect("there is such a signal")
}

#[test]
fn an_interruption_calls_the_programs_own_handler_and_leaves_it_in_place() {
    // A signal that a thread sends to itself is delivered before the call returns. Nobody has a handler yet: one that does nothing
    // is installed.
    interrupt_thread(thread_id()).expect("this thread runs");
    assert!(now().handler > 1, "{:?}", now());

    // SAFETY: the handler adds to an atomic.
    unsafe { install(SIGURG, own, HandlerFlags::ON_ALTSTACK) }.expect("installed");
    let installed = now();
    for _ in 0..3 {
        interrupt_thread(thread_id()).expect("this thread runs");
    }
    assert_eq!(now(), installed);
    assert_eq!(CALLED.load(Ordering::SeqCst), 3);
}
