//! A region: memory whose absence, protection and traps are in the program's hands.
//!
//! ```text
//!   Mapping ──▶ Region::builder(mapping).inline(handler) / .pager(handler) ──build(&caps)──▶ Region
//!                                                                                       │ drop: plain memory again
//!    touch of an absent or protected page ─▶ handler.on_trap(&Trap)
//!                                               │ trap.unprotect(), trap.region().fill_copy(…)
//!                                               ▼ Filled | Retry | Deny
//! ```

mod builder;
mod fills;
mod handler;
mod mechanism;
mod operations;
mod raw;
mod states;

use crate::claims::Claim;
use crate::mapping::Mapping;
use crate::trap::Registration;
use crate::trap::pager::PagerThread;
pub(crate) use builder::unforced;
pub use builder::{BuildError, Builder};
pub use handler::{Inline, InlineHandler, PagerHandler, Trap};
pub use mechanism::{Choice, Mechanism};
pub(crate) use mechanism::{Wishes, objection};
pub(crate) use operations::retry;
pub use operations::{Operations, RegionError};
use peregrine_base::sync::Ordering;
pub use peregrine_sys::uffd::OpenError;
use peregrine_sys::{guard, mem};
pub use raw::{Answered, RawRegion, RawRegionRef, RawTraps};
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// Memory whose absence, protection and traps are in the program's hands; dropping it makes the memory plain again.
///
/// Must not be dropped inside an inline handler (whose `unsafe` promises that). A pager's handler may drop its own region: the
/// memory is plain then, and the pager ends when the handler returns.
///
/// ```
/// use peregrine_vm::{Capabilities, Decision, Inline, Mapping, PageCount, Protection, Region, Trap};
/// use std::sync::Arc;
///
/// let memory = Arc::new(Mapping::memfd(PageCount::new(8))?);
/// // SAFETY: makes one system call, and nothing else.
/// let handler = unsafe { Inline::new(|trap: &Trap<'_>| trap.unprotect()) };
/// let region = Region::builder(memory.clone()).inline(handler).build(&Capabilities::probe())?;
/// region.protect(&[region.range()], Protection::Read)?;
/// memory.bytes().write(100, b"traps, is unprotected, and goes on")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Region {
    // In this order they are undone: first no handler runs, then the memory is made plain, then it may be claimed anew.
    registration: Option<Registration>,
    pager: Option<PagerThread>,
    operations: Arc<Operations>,
    choice: Choice<Mechanism>,
    claim: Option<Claim>,
}

impl Region {
    /// A region over the whole of `mapping`, unless the builder is told otherwise.
    pub fn builder(mapping: Arc<Mapping>) -> Builder {
        let wishes = Wishes {
            inline: None,
            write_traps: true,
            read_traps: false,
            absent_traps: false,
            may_lose: false,
        };
        Builder::over(mapping, wishes)
    }

    /// What carries it, and why nothing better does.
    pub const fn choice(&self) -> &Choice<Mechanism> {
        &self.choice
    }

    /// Whether a system call that touches a trapping page is served (by the pager) rather than failing with EFAULT.
    pub fn serves_system_calls(&self) -> bool {
        self.pager.is_some()
            && self.operations.uffd.as_ref().is_some_and(|u| u.access().serves_kernel_faults())
    }
}

impl Deref for Region {
    type Target = Operations;
    fn deref(&self) -> &Operations {
        &self.operations
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({:?} over {})", self.operations.range, self.choice)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let ops = &self.operations;
        let here = ops.generation.is_current();
        // Release pairs with the Acquire in `is_live`; the calls below come after it.
        ops.live.store(false, Ordering::Release);
        match ops.mechanism {
            // In a child the descriptor is the parent's: unregistering there would strip the parent's memory.
            Mechanism::Sigbus | Mechanism::Pager if here => {
                if let Some(uffd) = &ops.uffd {
                    let _ = uffd.by_ref().unregister(ops.range);
                }
            }
            Mechanism::Sigbus | Mechanism::Pager => {}
            Mechanism::Mprotect => {
                // SAFETY: the region's own range, given back the access it was mapped with.
                let _ = unsafe { mem::protect(ops.range, ops.mapping.access()) };
            }
            Mechanism::Guard => {
                // SAFETY: the region's own range.
                let _ = unsafe { guard::remove(ops.range) };
            }
        }
        // After the memory is plain, so that a thread trapping meanwhile still finds its handler.
        self.registration = None;
        if let Some(pager) = self.pager.take() {
            pager.stop(here);
        }
        self.claim = None;
    }
}
