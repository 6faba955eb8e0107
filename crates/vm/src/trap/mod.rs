//! TRAP: code of ours that runs when memory is touched.
//!
//! Two ways to be told. **Inline**, on the thread that touched: a signal (SIGSEGV from `mprotect` and guards, SIGBUS from a
//! userfaultfd). No context switch, but the handler runs at an arbitrary instruction of arbitrary code, and a system call
//! that touches the memory fails with EFAULT instead. **Pager**, on another thread that reads userfaultfd messages while
//! the toucher sleeps: ordinary code, and system calls are served too (unless the descriptor is `USER_MODE_ONLY`).

mod altstack;
pub(crate) mod grace;
pub(crate) mod pager;
mod registry;
mod remote;
mod signal;

use peregrine_base::{PageRange, VirtAddr};
use peregrine_sys::raw::Errno;
use std::fmt;
use std::sync::Arc;

pub use altstack::AltStack;
pub use remote::{RemoteFault, RemotePager};

/// What was attempted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Access {
    /// A load or an instruction fetch.
    Read,
    /// A store, or a load and store in one.
    Write,
}

/// How the trap came.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Cause {
    /// SIGSEGV: `mprotect`, a guard, or no mapping.
    Segv,
    /// SIGBUS: a userfaultfd, a poisoned page, or a file that is shorter than its mapping.
    Bus,
    /// A userfaultfd message: a write to a protected page.
    WriteProtected,
    /// A userfaultfd message: a page that is nowhere.
    Missing,
    /// A userfaultfd message: a page that the object has and this page table has not.
    Minor,
}

/// What a handler decides.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Decision {
    /// The page can be accessed now: the access repeats.
    Filled,
    /// Nothing was done, or somebody else did it: the access repeats, and may trap again.
    Retry,
    /// Not ours: to the registration around this one, then to the signal handler installed before ours, then to the
    /// default. From a pager: the page is poisoned, or the thread is sent SIGBUS.
    Deny,
}

/// A fault as a [`SignalHandler`] sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The address that was touched.
    pub address: VirtAddr,
    /// What was attempted.
    pub access: Access,
    /// How it came.
    pub cause: Cause,
    /// The instruction that touched it; 0 from a pager.
    pub instruction: VirtAddr,
}

impl Fault {
    /// The page that was touched.
    #[inline]
    pub const fn page(&self) -> PageRange {
        crate::process::page_of(self.address)
    }
}

/// A handler for faults on a range of addresses, run in a signal handler on the faulting thread.
///
/// This is the bare primitive, for memory whose protection somebody else manages. A [`Region`](crate::Region) brings its own
/// memory operations and needs only an [`InlineHandler`](crate::InlineHandler).
///
/// # Safety
/// `on_fault` runs at an arbitrary instruction of arbitrary code on any thread, several at once. The implementor promises
/// that it allocates nothing, takes no lock that interrupted code may hold, does not panic, does not unwind or jump
/// out, preserves `errno` if it calls libc, and neither registers nor unregisters handlers (S3).
pub unsafe trait SignalHandler: Send + Sync + 'static {
    /// Serves one fault.
    fn on_fault(&self, fault: &Fault) -> Decision;
}

/// A registered [`SignalHandler`]; dropping it unregisters, and returns when no thread is inside the handler any more.
///
/// A thread may have faulted before that, and its signal arrive after: up to 256 faults in the range are answered by
/// repeating the access, which succeeds if the memory is plain by then; the next one goes down the chain.
///
/// Must not be dropped inside a handler.
pub struct Registration {
    entry: Arc<registry::Entry>,
}

impl Registration {
    /// From now on, faults in `range` go to `handler` first; registrations made earlier come after it.
    ///
    /// # Errors
    /// EINVAL: signal handlers can't be installed (a seccomp filter).
    ///
    /// ```
    /// use peregrine_vm::trap::{Decision, Fault, Registration, SignalHandler};
    /// use peregrine_vm::{Mapping, PageCount, Protection};
    ///
    /// struct Deny;
    /// // SAFETY: does nothing at all.
    /// unsafe impl SignalHandler for Deny {
    ///     fn on_fault(&self, _: &Fault) -> Decision {
    ///         Decision::Deny
    ///     }
    /// }
    /// let memory = Mapping::reserve(PageCount::new(1))?;
    /// let registration = Registration::new(memory.range(), Deny)?;
    /// assert_eq!(registration.range(), memory.range());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(range: PageRange, handler: impl SignalHandler) -> Result<Self, Errno> {
        Self::shared(range, Arc::new(handler))
    }

    pub(crate) fn shared(range: PageRange, handler: Arc<dyn SignalHandler>) -> Result<Self, Errno> {
        // Makes the table first: the handler then finds it, and a fault before that goes where it always went.
        let entry = Arc::new(registry::Entry { range, handler });
        registry::add(entry.clone());
        match signal::install() {
            Ok(()) => Ok(Self { entry }),
            Err(e) => {
                registry::remove(&entry);
                Err(e)
            }
        }
    }

    /// The addresses it serves.
    pub fn range(&self) -> PageRange {
        self.entry.range
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        registry::remove(&self.entry);
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registration({:?})", self.entry.range)
    }
}
