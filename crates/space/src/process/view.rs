//! One member's view: what its page table lets it reach of the region. A view is a cache: dropping any part of it is
//! always right, for the next touch asks the address space again.
//!
//! ```text
//!                   closed                         open
//!   kernel-filled   guard markers: SIGSEGV         no markers: the kernel maps a page on its first touch, and system
//!                                                  calls may write into it
//!   trusting        absent pages                   the kernel maps a page on its first touch, open or closed
//!   trap-filled     absent pages: SIGBUS           mapped by UFFDIO_CONTINUE, 16 pages at once; writable or not
//! ```
//!
//! One mapping a region, whatever is opened and closed: guards and userfaultfd never split one.
//!
//! **What can go wrong.** A guard installed over a memfd page that a userfaultfd holds write-protected livelocks in Linux
//! 6.18, with asynchronous protection too: so a tracked view first takes its dirty set, then lifts the protection, then
//! installs the guard. `UFFDIO_CONTINUE` over a page that is there already stops with EEXIST: skip and go on.
//!
//! **Trap code**: everything here but the making allocates nothing, locks nothing and panics never (S3).

use super::frames::Frames;
use super::table::{Lowering, writable};
use peregrine_base::{PageCount, PageRange, Protection};
use peregrine_sys::mem::{self, Advice, MapOptions, Placement, Source};
use peregrine_sys::raw::Errno;
use peregrine_vm::dirty::{DirtyRun, RawTracker, Taken};
use peregrine_vm::region::{Answered, OpenError, RawRegion, RawTraps};
use peregrine_vm::{TrackError, guard};
use std::os::fd::BorrowedFd;

/// Who fills a region's pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Filling {
    /// The kernel, on the first touch: safe to hand to system calls. Closed ranges carry guard markers.
    Kernel,
    /// As `Kernel`, and writes are tracked by the page (`WP_ASYNC`).
    KernelTracked,
    /// The kernel, and nothing is enforced: a closed range only leaves the page table, and a later touch silently reaches the
    /// frame again. For members that touch nothing that is not theirs by rules of their own (threads and their slots).
    KernelTrusting,
    /// This crate, in a trap: rights by the page. A system call that touches an absent page fails with EFAULT.
    Trap,
}

/// A view could not be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ViewError {
    /// The region's addresses are taken, or there is no room.
    #[error("the region can't be mapped at {range:?}: {errno}; every member maps it at the same addresses")]
    Map {
        /// The region.
        range: PageRange,
        /// What the kernel answered.
        errno: Errno,
    },
    /// No guard markers.
    #[error("no guard markers on shared memory: {0}; Linux 6.15 has them, or use Filling::Trap")]
    Guard(Errno),
    /// No userfaultfd.
    #[error("{0}; or use Filling::Kernel, which needs none")]
    Userfaultfd(OpenError),
    /// The range was refused.
    #[error("userfaultfd does not serve the region: {0}; Linux 5.19 does, or use Filling::Kernel")]
    Register(Errno),
    /// No `/proc/self/pagemap`.
    #[error("writes can't be tracked without /proc/self/pagemap: {0}; use Filling::Kernel")]
    Pagemap(Errno),
}

impl From<TrackError> for ViewError {
    fn from(e: TrackError) -> Self {
        match e {
            TrackError::Open(e) => Self::Userfaultfd(e),
            TrackError::Pagemap(e) => Self::Pagemap(e),
            TrackError::Kernel { errno, .. } => Self::Register(errno),
            // A `RawTracker` gives no others.
            _ => Self::Register(Errno::EINVAL),
        }
    }
}

/// How the view is opened and closed.
#[derive(Debug)]
enum Means {
    Guard,
    /// Nothing is closed; frames are dropped from the page table.
    Trust,
    Tracked(RawTracker),
    Continue(RawRegion),
}

/// One process's view of a region.
#[derive(Debug)]
pub(crate) struct View {
    range: PageRange,
    means: Means,
}

/// Calls `f` until no signal interrupted it.
#[inline]
pub(crate) fn retry(mut f: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    loop {
        match f() {
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            other => return other,
        }
    }
}

impl View {
    /// Maps the region, all of it closed. `reserved`: this process holds the addresses by a reservation.
    pub(crate) fn new(
        fd: BorrowedFd<'_>,
        range: PageRange,
        reserved: bool,
        filling: Filling,
    ) -> Result<Self, ViewError> {
        let placement =
            if reserved { Placement::Replace(range.start()) } else { Placement::At(range.start()) };
        let source = Source::Shared(fd, PageCount::new(0));
        let options = MapOptions { no_reserve: true, ..MapOptions::default() };
        // SAFETY: the addresses are this space's reservation, or free.
        unsafe { mem::map(range.pages(), Protection::ReadWrite, source, placement, options) }
            .map_err(|errno| ViewError::Map { range, errno })?;
        // From here on dropping the view gives the addresses back.
        let mut view = Self { range, means: Means::Guard };
        // SAFETY: a child of this process would reach frames that it has no right to, and nobody could tell it so.
        let _ = unsafe { mem::advise(range, Advice::DontFork) };
        match filling {
            Filling::Kernel => {}
            Filling::KernelTrusting => view.means = Means::Trust,
            Filling::KernelTracked => {
                let tracker = RawTracker::open()?;
                // SAFETY: the mapping is this view's, which nobody else tracks; protection is lifted before a guard is laid.
                unsafe { tracker.watch(range) }?;
                view.means = Means::Tracked(tracker);
            }
            Filling::Trap => {
                let traps = RawTraps { answered: Answered::Inline, absent: true, writes: true, shared: true };
                let region = RawRegion::open(traps).map_err(ViewError::Userfaultfd)?;
                // SAFETY: the mapping is this view's, and its users know that it traps.
                unsafe { region.watch(range) }.map_err(ViewError::Register)?;
                view.means = Means::Continue(region);
            }
        }
        if matches!(view.means, Means::Guard | Means::Tracked(_)) {
            // SAFETY: the mapping was made above; nothing refers to it, and no page of it is write-protected yet.
            unsafe { guard::install_markers(range) }.map_err(ViewError::Guard)?;
        }
        Ok(view)
    }

    /// Whether pages must be mapped one by one after they were filled.
    pub(crate) const fn is_trap_filled(&self) -> bool {
        matches!(self.means, Means::Continue(_))
    }

    /// Opens `range`. Kernel-filled: for reading and writing. Trap-filled: its frames exist, and `rights` hold.
    #[inline]
    pub(crate) fn open(&self, range: PageRange, rights: Protection) -> Result<(), Errno> {
        // Three ways and the rest: four would be a jump through a table, which the processor guesses wrong behind a system call.
        match &self.means {
            Means::Trust => Ok(()),
            // SAFETY: the range lies in the view's mapping.
            Means::Guard => unsafe { guard::remove_markers(range) },
            Means::Continue(region) => {
                let access = if writable(rights) { Protection::ReadWrite } else { Protection::Read };
                // SAFETY: absent pages of this view, on which nobody relies.
                unsafe { region.by_ref().fill_continue(range, access) }.map(drop)
            }
            _ => self.open_tracked(range),
        }
    }

    fn open_tracked(&self, range: PageRange) -> Result<(), Errno> {
        // SAFETY: the range lies in the view's mapping.
        unsafe { guard::remove_markers(range)? };
        match &self.means {
            // From here on its writes are seen.
            Means::Tracked(tracker) => {
                take(range, |part, into| tracker.by_ref().take_into(part, into), |_| {})
            }
            _ => Ok(()),
        }
    }

    /// Takes access away from this member. Where writes are tracked, pages written since they were last asked for are noted in
    /// `frames` first.
    #[inline]
    pub(crate) fn lower(&self, range: PageRange, to: Lowering, frames: &Frames) -> Result<(), Errno> {
        match &self.means {
            // SAFETY: the range lies in the view's mapping; no userfaultfd is registered on it. Its users hold no references to
            // its bytes (S1).
            Means::Guard => unsafe { guard::install_markers(range) },
            Means::Continue(region) if to == Lowering::ReadOnly => region.by_ref().protect(range),
            Means::Continue(_) | Means::Trust => retry(|| {
                // SAFETY: the range lies in the view's mapping; the frames stay in the memfd.
                unsafe { mem::advise(range, Advice::DontNeed) }
            }),
            Means::Tracked(tracker) => lower_tracked(tracker, range, frames),
        }
    }

    /// Drops everything.
    pub(crate) fn close_all(&self, frames: &Frames) -> Result<(), Errno> {
        self.lower(self.range, Lowering::Close, frames)
    }

    /// Notes the pages of `range` that this member has written since the last such call, and starts over.
    pub(crate) fn note_written(&self, range: PageRange, frames: &Frames) -> Result<(), Errno> {
        match &self.means {
            Means::Tracked(tracker) => take(
                range,
                |part, into| tracker.by_ref().take_unguarded_into(part, into),
                |found| frames.note_written(found.range()),
            ),
            _ => Ok(()),
        }
    }
}

fn lower_tracked(tracker: &RawTracker, range: PageRange, frames: &Frames) -> Result<(), Errno> {
    let tracker = tracker.by_ref();
    let peek = |part, into: &mut [DirtyRun]| tracker.peek_unguarded_into(part, into);
    take(range, peek, |found| frames.note_written(found.range()))?;
    retry(|| tracker.mark_written(range))?;
    // SAFETY: the range lies in the view's mapping, to whose bytes its users hold no references (S1); the protection was lifted just
    // now, and only this thread could have set it anew.
    unsafe { guard::install_markers(range) }
}

/// Calls `more` until all of `range` was looked at, and `found` with each run.
fn take(
    mut range: PageRange,
    more: impl Fn(PageRange, &mut [DirtyRun]) -> Result<Taken, Errno>,
    found: impl Fn(&DirtyRun),
) -> Result<(), Errno> {
    let mut into = [DirtyRun::default(); 16];
    while !range.is_empty() {
        let taken = more(range, &mut into)?;
        into[..taken.runs].iter().for_each(&found);
        range = taken.rest;
    }
    Ok(())
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the mapping is this view's; whoever uses the region's bytes does so through a member, which is gone.
        unsafe {
            // What is given back is a reservation: this process may join again.
            let options = MapOptions { no_reserve: true, ..MapOptions::default() };
            let place = Placement::Replace(self.range.start());
            let _ = mem::map(self.range.pages(), Protection::None, Source::Anonymous, place, options);
        }
    }
}
