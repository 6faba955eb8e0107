//! Which process image this is: a page that the kernel zeroes on fork.
//!
//! A userfaultfd and a pagemap stay bound to the address space that made them. In a child they would act on the *parent's*
//! memory, so everything that uses one remembers the generation it was made in and refuses to work in another.
//! The same page holds the counts of threads inside a trap (see `trap::grace`): in a child they start at zero, as the
//! threads that held them are not there.

use crate::trap::grace::Counts;
use peregrine_base::sync::{AtomicPtr, AtomicU64, Ordering};
use peregrine_base::{PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::mem::{self, Advice, MapOptions, Placement, Source};
use std::fmt;
use std::sync::Once;

#[repr(C)]
pub(crate) struct ProcessPage {
    /// Threads inside a trap; its `life` is the generation.
    pub(crate) counts: Counts,
}

const _: () = assert!(size_of::<ProcessPage>() <= peregrine_base::PAGE_SIZE);

static PAGE: AtomicPtr<ProcessPage> = AtomicPtr::new(core::ptr::null_mut());
static NEXT_GENERATION: AtomicU64 = AtomicU64::new(1);
static MAKE: Once = Once::new();

/// Names one process image; a fork makes another.
#[derive(Clone, Copy)]
pub(crate) struct Generation {
    /// Kept beside the number, so that a check in a trap touches one cache line of somebody else's.
    page: &'static ProcessPage,
    number: u64,
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Generation({})", self.number)
    }
}

/// The page, made on first use. Not for trap code, which uses [`page_if_made`].
pub(crate) fn page() -> &'static ProcessPage {
    MAKE.call_once(|| {
        // SAFETY: a new mapping at a place of the kernel's choice; zeros are valid counts.
        let made = unsafe {
            mem::map(
                PageCount::new(1),
                Protection::ReadWrite,
                Source::Anonymous,
                Placement::Anywhere,
                MapOptions::default(),
            )
        };
        let range = made.unwrap_or_else(|e| panic!("no page for the process's generation: {e}"));
        // SAFETY: the page is ours. Without the advice (before 4.14) a fork is not noticed; the probe names it.
        let _ = unsafe { mem::advise(range, Advice::WipeOnFork) };
        // Release pairs with the Acquire in `page_if_made`.
        PAGE.store(range.start().as_ptr(), Ordering::Release);
    });
    page_if_made().expect("made above")
}

/// The page, if something has made it: always so once a trap region exists.
#[inline]
pub(crate) fn page_if_made() -> Option<&'static ProcessPage> {
    // SAFETY: null or the page made in `page`, which is never unmapped; all its fields are atomics.
    unsafe { PAGE.load(Ordering::Acquire).as_ref() }
}

/// The name of this process image, given one if it has none yet (it was just forked, or just started). Trap-safe.
#[inline]
pub(crate) fn name(page: &ProcessPage) -> u64 {
    match page.counts.life.load(Ordering::Acquire) {
        0 => make_name(page),
        seen => seen,
    }
}

#[cold]
fn make_name(page: &ProcessPage) -> u64 {
    // The static is copied by fork, so a child's number differs from every number its ancestors had given out.
    let fresh = NEXT_GENERATION.fetch_add(1, Ordering::AcqRel);
    let raced = page.counts.life.compare_exchange(0, fresh, Ordering::AcqRel, Ordering::Acquire);
    raced.err().unwrap_or(fresh)
}

/// This process image's generation.
pub(crate) fn current() -> Generation {
    let page = page();
    Generation { page, number: name(page) }
}

impl Generation {
    /// Whether this process image is the one that `self` was taken in. Trap-safe.
    #[inline]
    pub(crate) fn is_current(self) -> bool {
        self.page.counts.life.load(Ordering::Relaxed) == self.number
    }
}

/// Something was used in a process that forked from the one that made it.
///
/// A userfaultfd, its registrations and a pagemap don't pass to a child (they would act on the parent's memory); the
/// child's memory is plain. Make a new region or tracker in the child.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "made before a fork, by the parent: in a child the memory {range:?} is plain; make a new region or tracker here"
)]
pub struct Forked {
    /// The memory.
    pub range: PageRange,
}

impl Forked {
    #[inline]
    pub(crate) fn check(generation: Generation, range: PageRange) -> Result<(), Self> {
        if generation.is_current() { Ok(()) } else { Err(Self { range }) }
    }
}

/// The page that holds `addr`.
#[inline]
pub(crate) const fn page_of(addr: VirtAddr) -> PageRange {
    PageRange::new(addr.page_floor(), PageCount::new(1))
}
