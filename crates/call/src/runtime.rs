//! What a runtime of user-level threads adds: waiting without its node, carried calls, and wired threads.
//!
//! This crate blocks the OS thread that calls. A runtime whose threads are not OS threads implements [`CallerRuntime`] and
//! installs it once ([`install`]): then a call that does not return at once parks only the runtime's thread. On the other
//! side, a domain that multiplexes threads of its own over activations implements [`Wire`].

use crate::chain::Deadline;
use crate::error::CallError;
use std::os::fd::BorrowedFd;
use std::sync::OnceLock;

/// How the calling thread waits when it is not an OS thread of its own.
pub trait CallerRuntime: Send + Sync + 'static {
    /// Whether the code that is running now is a thread of this runtime. If not, the call blocks its OS thread.
    fn is_mine(&self) -> bool;

    /// Parks the running thread until `reply` can be read (or has hung up) or the deadline passed, and lets others run.
    /// May return early: the call looks again. The thread must come back in the same process, for the connection's
    /// mappings are this process's: the runtime pins it for as long as this call lasts.
    fn wait(&self, reply: BorrowedFd<'_>, until: Option<Deadline>);

    /// Polls of the reply that are worth making before [`wait`](Self::wait), as microseconds: what a switch to
    /// another thread and back costs.
    fn worth_us(&self) -> u32 {
        5
    }
}

static RUNTIME: OnceLock<Box<dyn CallerRuntime>> = OnceLock::new();

/// Installs the runtime of this process.
///
/// # Errors
/// The runtime itself, if one is installed already.
pub fn install(runtime: Box<dyn CallerRuntime>) -> Result<(), Box<dyn CallerRuntime>> {
    RUNTIME.set(runtime)
}

/// The runtime that the running thread belongs to, if any.
pub(crate) fn of_caller() -> Option<&'static dyn CallerRuntime> {
    RUNTIME.get().map(|r| &**r).filter(|r| r.is_mine())
}

/// Calls that carry the caller's stack along: the closure runs in the domain's process at the same addresses.
///
/// Implemented where both processes map one World. `enter` must be given a function and data that mean the same in both,
/// which holds for processes forked from one zygote.
pub trait CarriedCalls {
    /// Runs `entry(data)` in the domain, on the caller's own stack as mapped there, and returns when it has returned.
    ///
    /// # Errors
    /// As for a fresh call, except that death of the domain does not return: the thread is rolled back to its
    /// commit or killed, for the memory it shared may be torn.
    ///
    /// # Safety
    /// `data` is valid for `entry`, and what it points to lies in memory that the domain maps for this call.
    unsafe fn carry(
        &self,
        entry: unsafe fn(*mut ()),
        data: *mut (),
        until: Option<Deadline>,
    ) -> Result<(), CallError>;
}

/// Binds a user-level thread of the domain's own to each call.
///
/// A domain with its own thread library can't let a call run on whatever user-level thread is at hand: the call has its own
/// priority and must return on the OS thread that it came in on. The activation calls [`run`](Self::run), which makes one
/// user-level thread current on this OS thread, runs `call` on it to its end, and returns.
pub trait Wire: Send + Sync + 'static {
    /// Runs `call` exactly once, on the calling OS thread, before returning. If it does not, the call is terminated.
    fn run(&self, call: &mut dyn FnMut());
}
