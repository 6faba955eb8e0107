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
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::guard;
use peregrine_sys::mem::{self, Advice, MapOptions, Placement, Source};
use peregrine_sys::pagemap::{PageRegion, Pagemap, ScanArgs};
use peregrine_sys::raw::Errno;
use peregrine_sys::uffd::{Features, FillMode, OpenError, RegisterMode, Uffd};
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

/// How the view is opened and closed.
#[derive(Debug)]
enum Means {
    Guard,
    /// Nothing is closed; frames are dropped from the page table.
    Trust,
    Tracked {
        uffd: Uffd,
        pagemap: Pagemap,
    },
    Continue {
        uffd: Uffd,
    },
}

/// One process's view of a region.
#[derive(Debug)]
pub(crate) struct View {
    range: PageRange,
    means: Means,
}

/// Calls `f` until no signal interrupted it.
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
                let features = Features::WP_ASYNC
                    .union(Features::PAGEFAULT_FLAG_WP)
                    .union(Features::WP_HUGETLBFS_SHMEM)
                    .union(Features::WP_UNPOPULATED);
                let uffd = Uffd::open(features).map_err(ViewError::Userfaultfd)?;
                // SAFETY: the mapping is this view's; asynchronous protection never traps.
                unsafe { uffd.by_ref().register(range, RegisterMode::WP) }.map_err(ViewError::Register)?;
                let pagemap = Pagemap::open().map_err(ViewError::Pagemap)?;
                view.means = Means::Tracked { uffd, pagemap };
            }
            Filling::Trap => {
                let features = Features::SIGBUS
                    .union(Features::MINOR_SHMEM)
                    .union(Features::MISSING_SHMEM)
                    .union(Features::PAGEFAULT_FLAG_WP)
                    .union(Features::WP_HUGETLBFS_SHMEM);
                let uffd = Uffd::open(features).map_err(ViewError::Userfaultfd)?;
                let mode = RegisterMode::MISSING.union(RegisterMode::MINOR).union(RegisterMode::WP);
                // SAFETY: the mapping is this view's, and its users know that it traps.
                unsafe { uffd.by_ref().register(range, mode) }.map_err(ViewError::Register)?;
                view.means = Means::Continue { uffd };
            }
        }
        if matches!(view.means, Means::Guard | Means::Tracked { .. }) {
            retry(|| {
                // SAFETY: the mapping was made above; nothing refers to it, and no page of it is write-protected yet.
                unsafe { guard::install(range) }
            })
            .map_err(ViewError::Guard)?;
        }
        Ok(view)
    }

    /// Whether pages must be mapped one by one after they were filled.
    pub(crate) const fn is_trap_filled(&self) -> bool {
        matches!(self.means, Means::Continue { .. })
    }

    /// Opens `range`. Kernel-filled: for reading and writing. Trap-filled: its frames exist, and `rights` hold.
    #[inline]
    pub(crate) fn open(&self, range: PageRange, rights: Protection) -> Result<(), Errno> {
        match &self.means {
            Means::Trust => Ok(()),
            // SAFETY: the range lies in the view's mapping.
            Means::Guard => retry(|| unsafe { guard::remove(range) }),
            Means::Tracked { pagemap, .. } => {
                // SAFETY: as above.
                retry(|| unsafe { guard::remove(range) })?;
                // From here on its writes are seen.
                protect_for_tracking(pagemap, range)
            }
            Means::Continue { uffd } => {
                let mode = FillMode { write_protected: !writable(rights), leave_asleep: false };
                let end = range.end().as_usize();
                let mut at = range.start().as_usize();
                while at < end {
                    let rest = PageRange::new(VirtAddr::new(at), PageCount::new((end - at) / PAGE_SIZE));
                    // SAFETY: absent pages of this view, on which nobody relies.
                    match unsafe { uffd.by_ref().continue_(rest, mode) } {
                        Ok(()) => break,
                        Err(p) if p.done_bytes > 0 => at += p.done_bytes,
                        Err(p) => match p.errno {
                            Errno::EEXIST => {
                                if writable(rights) {
                                    let page = PageRange::new(rest.start(), PageCount::new(1));
                                    retry(|| uffd.by_ref().write_protect(page, false))?;
                                }
                                at += PAGE_SIZE;
                            }
                            Errno::EAGAIN | Errno::EINTR => {}
                            other => return Err(other),
                        },
                    }
                }
                Ok(())
            }
        }
    }

    /// Takes access away from this member. Where writes are tracked, pages written since they were last asked for are noted in
    /// `frames` first.
    #[inline]
    pub(crate) fn lower(&self, range: PageRange, to: Lowering, frames: &Frames) -> Result<(), Errno> {
        match (&self.means, to) {
            (Means::Guard, _) => retry(|| {
                // SAFETY: the range lies in the view's mapping; no userfaultfd is registered on it. Its users hold no
                // references to its bytes (S1).
                unsafe { guard::install(range) }
            }),
            (Means::Tracked { uffd, pagemap }, _) => {
                note_written(pagemap, range, frames, false)?;
                retry(|| uffd.by_ref().write_protect(range, false))?;
                // SAFETY: as above; the protection was lifted just now, and only this thread could have set it anew.
                retry(|| unsafe { guard::install(range) })
            }
            (Means::Continue { .. }, Lowering::Close) | (Means::Trust, _) => retry(|| {
                // SAFETY: the range lies in the view's mapping; the frames stay in the memfd.
                unsafe { mem::advise(range, Advice::DontNeed) }
            }),
            (Means::Continue { uffd }, Lowering::ReadOnly) => {
                retry(|| uffd.by_ref().write_protect(range, true))
            }
        }
    }

    /// Drops everything.
    pub(crate) fn close_all(&self, frames: &Frames) -> Result<(), Errno> {
        self.lower(self.range, Lowering::Close, frames)
    }

    /// Notes the pages of `range` that this member has written since the last such call, and starts over.
    pub(crate) fn note_written(&self, range: PageRange, frames: &Frames) -> Result<(), Errno> {
        match &self.means {
            Means::Tracked { pagemap, .. } => note_written(pagemap, range, frames, true),
            _ => Ok(()),
        }
    }
}

/// Write-protects asynchronously what of `range` is not, reporting nothing.
fn protect_for_tracking(pagemap: &Pagemap, range: PageRange) -> Result<(), Errno> {
    scan(pagemap, ScanArgs::take_written(range), |_| {})
}

fn note_written(pagemap: &Pagemap, range: PageRange, frames: &Frames, again: bool) -> Result<(), Errno> {
    let args = ScanArgs { write_protect: again, ..ScanArgs::take_written(range) };
    // A page that was never there counts as written by its lack of protection: only those that are there matter.
    let args = ScanArgs {
        all_of: peregrine_sys::pagemap::Categories::WRITTEN
            .union(peregrine_sys::pagemap::Categories::PRESENT),
        ..args
    };
    scan(pagemap, args, |found| frames.note_written(found.range()))
}

fn scan(pagemap: &Pagemap, mut args: ScanArgs, mut found: impl FnMut(&PageRegion)) -> Result<(), Errno> {
    let end = args.range.end();
    let mut into = [PageRegion::default(); 16];
    while args.range.start() < end {
        match pagemap.by_ref().scan(args, &mut into) {
            Ok(done) => {
                into[..done.regions].iter().for_each(&mut found);
                let left = end.as_usize() - done.walk_end.as_usize();
                args.range = PageRange::new(done.walk_end, PageCount::new(left / PAGE_SIZE));
            }
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
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
