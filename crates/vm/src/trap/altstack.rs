//! A larger alternate stack for one thread.

use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection};
use peregrine_sys::fault as signal;
use peregrine_sys::mem::{self, MapOptions, Placement, Source};
use peregrine_sys::raw::Errno;
use std::marker::PhantomData;

/// This thread's alternate signal stack, with a guard page below it, until it is dropped.
///
/// Rust's own alternate stacks hold about 8 KiB: enough for a handler that makes system calls, too little for one with
/// buffers on the stack or one that faults in another region. Threads that Rust did not start have none; they need one
/// only if a fault may lie on the stack itself.
///
/// Several nest: drop the latest first. One that is dropped while a later one is in force stays mapped, for the later one
/// puts it back when it goes.
///
/// ```
/// let stack = peregrine_vm::AltStack::install(64 << 10)?;
/// // … faults on this thread are now handled with 64 KiB to spare …
/// drop(stack);
/// # Ok::<(), peregrine_vm::sys_errno::Errno>(())
/// ```
#[derive(Debug)]
pub struct AltStack {
    whole: PageRange,
    before: signal::AltStack,
    /// It belongs to the thread that installed it.
    not_send: PhantomData<*const ()>,
}

impl AltStack {
    /// Gives the calling thread an alternate stack of at least `len_bytes` bytes.
    ///
    /// # Errors
    /// ENOMEM: no room. EPERM: the thread runs on its alternate stack just now.
    pub fn install(len_bytes: usize) -> Result<Self, Errno> {
        if len_bytes > isize::MAX as usize {
            return Err(Errno::ENOMEM);
        }
        let pages = PageCount::for_bytes(len_bytes);
        let with_guard = PageCount::new(pages.get() + 1);
        // SAFETY: a new mapping at a place of the kernel's choice.
        let whole = unsafe {
            mem::map(
                with_guard,
                Protection::ReadWrite,
                Source::Anonymous,
                Placement::Anywhere,
                MapOptions { stack: true, ..MapOptions::default() },
            )?
        };
        let guard = PageRange::new(whole.start(), PageCount::new(1));
        let unmap = |e| {
            // SAFETY: mapped above, and not in use.
            let _ = unsafe { mem::unmap(whole) };
            e
        };
        // SAFETY: the first page of what was mapped above.
        unsafe { crate::guard::install(guard) }.map_err(unmap)?;
        let stack = signal::AltStack::new(guard.end().as_ptr(), pages.bytes());
        // SAFETY: the memory is this value's, and stays until `drop` has put the old stack back.
        let before = unsafe { signal::alt_stack(Some(&stack)) }.map_err(unmap)?;
        Ok(Self { whole, before, not_send: PhantomData })
    }
}

impl AltStack {
    /// Whether the kernel would use it for the next signal.
    fn is_in_force(&self) -> bool {
        let lowest = self.whole.start().checked_add(PAGE_SIZE);
        // SAFETY: asks only.
        unsafe { signal::alt_stack(None) }.is_ok_and(|now| now.base().is_some() && now.base() == lowest)
    }
}

impl Drop for AltStack {
    fn drop(&mut self) {
        if !self.is_in_force() {
            // A later one is, which holds this one as what it puts back: unmapped, it would be a stack that is not there.
            return;
        }
        // SAFETY: `before` was this thread's stack when this value was made (it is not Send); whoever owns it still does.
        if unsafe { signal::alt_stack(Some(&self.before)) }.is_ok() {
            // SAFETY: no longer the alternate stack, so nobody uses it.
            let _ = unsafe { mem::unmap(self.whole) };
        }
    }
}
