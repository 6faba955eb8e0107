//! The thread that reads userfaultfd messages and runs a pager handler.
//!
//! Between two messages it allocates nothing, so that memory of the program's allocator may be paged by it, as far as the
//! handler itself keeps to that.

use super::remote::{RemoteFault, read_faults};
use super::{Cause, Decision, Fault};
use crate::region::{Operations, PagerHandler, Trap};
use peregrine_base::{PageRange, VirtAddr};
use peregrine_sys::raw::Errno;
use peregrine_sys::{fault as signal, io};
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

    /// Ends the thread; in a child, where it does not exist, only forgets it.
    pub(crate) fn stop(mut self, here: bool) {
        self.stop = None;
        match self.thread.take() {
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

fn serve(operations: &Operations, mut handler: impl PagerHandler, stop: &std::io::PipeReader) {
    let Some(uffd) = operations.uffd_for_pager() else { return };
    loop {
        match io::wait_readable(&[uffd.as_fd(), stop.as_fd()], None) {
            Ok(ready) if ready & 2 != 0 => return,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
        // EAGAIN: somebody else answered, or the toucher was killed.
        let _ = read_faults(uffd, |RemoteFault { address, access, cause }, thread_id| {
            let fault = Fault { address, access, cause, instruction: VirtAddr::new(0) };
            answer(operations, &mut handler, fault, thread_id);
        });
    }
}

/// Into the loop, too: see [`read_faults`].
#[inline(always)]
fn answer(operations: &Operations, handler: &mut impl PagerHandler, fault: Fault, thread_id: u32) {
    let trap = Trap::new(fault, operations);
    // A pager that dies would leave its touchers asleep for ever: a panic (whose message is printed) denies one access.
    let decision = catch_unwind(AssertUnwindSafe(|| handler.on_trap(&trap))).unwrap_or(Decision::Deny);
    let page = trap.page();
    match decision {
        Decision::Filled if trap.was_woken() => {}
        Decision::Filled | Decision::Retry => {
            let _ = operations.wake(page);
        }
        // The region is being undone, so the handler could do nothing; unregistering wakes everybody.
        Decision::Deny if !operations.is_live() => {
            let _ = operations.wake(page);
        }
        Decision::Deny => refuse(operations, page, &fault, thread_id),
    }
}

#[cold]
fn refuse(operations: &Operations, page: PageRange, fault: &Fault, thread_id: u32) {
    let absent = matches!(fault.cause, Cause::Missing | Cause::Minor);
    if !(absent && operations.poison(page).is_ok()) {
        // No poison on this kernel or for this page: the thread gets the signal that it would have got from it.
        let _ = signal::queue_to_thread(thread_id, signal::SIGBUS, -1, fault.address);
    }
    let _ = operations.wake(page);
}
