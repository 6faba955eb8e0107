//! Whether this is the process that joined: a page that the kernel wipes on fork.
//!
//! A child of a member inherits all that the member has in private memory, handlers too, but neither its view nor its place. Were
//! it to answer what its parent is asked, the parent's view would stay open and count as closed.

use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_base::{PageCount, PageRange, Protection};
use peregrine_sys::mem::{self, Advice, MapOptions, Placement, Source};
use peregrine_sys::raw::Errno;

/// A word that is 1 in the process that made it, and 0 in its children.
#[derive(Debug)]
pub(crate) struct Mine(PageRange);

impl Mine {
    pub(crate) fn new() -> Result<Self, Errno> {
        let (rights, place) = (Protection::ReadWrite, Placement::Anywhere);
        // SAFETY: a new mapping at a place of the kernel's choice, and advice about it.
        let page = unsafe {
            let page = mem::map(PageCount::new(1), rights, Source::Anonymous, place, MapOptions::default())?;
            if let Err(e) = mem::advise(page, Advice::WipeOnFork) {
                let _ = mem::unmap(page);
                return Err(e);
            }
            page
        };
        let this = Self(page);
        this.word().store(1, Ordering::Relaxed);
        Ok(this)
    }

    fn word(&self) -> &AtomicU64 {
        // SAFETY: the page is this value's, and mapped as long as it.
        unsafe { &*self.0.start().as_ptr::<AtomicU64>() }
    }

    /// Whether this process made it. Trap code.
    #[inline]
    pub(crate) fn is_mine(&self) -> bool {
        // Relaxed: written before anybody else could look.
        self.word().load(Ordering::Relaxed) == 1
    }
}

impl Drop for Mine {
    fn drop(&mut self) {
        // SAFETY: only this value refers to the page.
        let _ = unsafe { mem::unmap(self.0) };
    }
}
