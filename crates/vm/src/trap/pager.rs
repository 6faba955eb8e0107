//! The thread that reads userfaultfd messages and runs a pager handler.
//!
//! Between two messages it allocates nothing, so that memory of the program's allocator may be paged by it, as far as the
//! handler itself keeps to that.

use super::remote::{Faults, RemoteFault};
use super::{Cause, Decision, Fault};
use crate::region::{Operations, PagerHandler, Trap};
use peregrine_base::VirtAddr;
use peregrine_sys::raw::Errno;
use peregrine_sys::{fault as signal, io};
use std::cell::Cell;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;

pub(crate) struct PagerThread {
    thread: Option<JoinHandle<()>>,
    /// Closing the write end tells the thread to stop.
    stop: Option<OwnedFd>,
}

impl PagerThread {
    pub(crate) fn start(
        operations: Arc<Operations>,
        handler: impl PagerHandler,
    ) -> Result<Self, std::io::Error> {
        let (reader, writer) = std::io::pipe()?;
        // A thread allocates while it starts; once it serves, it must not.
        let serving = Arc::new(Barrier::new(2));
        let started = serving.clone();
        let thread = std::thread::Builder::new().name("pager".into()).spawn(move || {
            started.wait();
            serve(&operations, handler, &reader);
        })?;
        serving.wait();
        Ok(Self { thread: Some(thread), stop: Some(writer.into()) })
    }

    /// Ends the thread; in a child, where it does not exist, only forgets it. Called by the thread itself, from its handler, it
    /// ends when that returns.
    pub(crate) fn stop(mut self, here: bool) {
        self.stop = None;
        match self.thread.take() {
            Some(thread) if here && thread.thread().id() == std::thread::current().id() => {}
            // A handler that panicked was answered with Deny; the thread itself does not fail.
            Some(thread) if here => drop(thread.join()),
            other => std::mem::forget(other),
        }
    }
}

impl fmt::Debug for PagerThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PagerThread")
    }
}

/// The fault that the handler is at work on, and the thread that sleeps in it.
type AtWork = Cell<Option<(Fault, u32)>>;

fn serve(operations: &Operations, mut handler: impl PagerHandler, stop: &std::io::PipeReader) {
    let Some(uffd) = operations.uffd_for_pager() else { return };
    let mut faults = Faults::new();
    let at_work = AtWork::new(None);
    // A pager that dies would leave its touchers asleep for ever: a panic (whose message is printed) denies one access. It is
    // caught around the loop and not around each call, for each frame between the loop and a system call costs a trap (see
    // `Operations::protect`).
    while catch_unwind(AssertUnwindSafe(|| {
        loop {
            while let Some((RemoteFault { address, access, cause }, thread_id)) = faults.next() {
                let fault = Fault { address, access, cause, instruction: VirtAddr::new(0) };
                at_work.set(Some((fault, thread_id)));
                let trap = Trap::new(fault, operations);
                let decision = handler.on_trap(&trap);
                at_work.set(None);
                answer(operations, &trap, decision, thread_id);
            }
            match io::wait_readable(&[uffd.as_fd(), stop.as_fd()], None) {
                Ok(ready) if ready & 2 != 0 => return,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
            // EAGAIN: somebody else answered, or the toucher was killed.
            let _ = faults.read(uffd);
        }
    }))
    .is_err()
    {
        if let Some((fault, thread_id)) = at_work.take() {
            answer(operations, &Trap::new(fault, operations), Decision::Deny, thread_id);
        }
    }
}

/// Lets the toucher go on as was decided.
#[inline(always)]
fn answer(operations: &Operations, trap: &Trap<'_>, decision: Decision, thread_id: u32) {
    match decision {
        Decision::Filled if trap.was_woken() => {}
        Decision::Filled | Decision::Retry => {
            let _ = operations.wake(trap.page());
        }
        // The region is being undone, so the handler could do nothing; unregistering wakes everybody.
        Decision::Deny if !operations.is_live() => {
            let _ = operations.wake(trap.page());
        }
        Decision::Deny => refuse(operations, trap, thread_id),
    }
}

#[cold]
fn refuse(operations: &Operations, trap: &Trap<'_>, thread_id: u32) {
    let page = trap.page();
    let absent = matches!(trap.cause(), Cause::Missing | Cause::Minor);
    if !(absent && operations.poison(page).is_ok()) {
        // No poison on this kernel or for this page: the thread gets the signal that it would have got from it.
        let _ = signal::queue_to_thread(thread_id, signal::SIGBUS, -1, trap.address());
    }
    let _ = operations.wake(page);
}
