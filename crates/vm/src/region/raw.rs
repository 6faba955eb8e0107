//! Traps, protection and fills as one descriptor and nothing else, for runtimes that lay out an address space themselves, or
//! serve the memory of another process. **No allocator, lock, static or thread-local in [`RawRegionRef`]'s calls.**
//!
//! ```text
//!   RawRegion::open ─▶ watch(range), …            in the process whose memory it is
//!        │ answered Inline: SIGBUS in the toucher, served by a trap::Registration
//!        │ answered Pager:  messages, read by a RemotePager: a thread here, or another process that was given the descriptor
//!        ▼
//!   RawRegionRef: protect, unprotect, fill_…, wake     here, or there
//! ```
//!
//! [`Region`](super::Region) is the same with owners: it keeps the mapping, the registration and the books, and is safe.

use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::io;
use peregrine_sys::raw::Errno;
use peregrine_sys::uffd::{Features, FillMode, OpenError, Partial, RegisterMode, Uffd, UffdRef};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Who answers the traps of a [`RawRegion`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Answered {
    /// The thread that touched, by SIGBUS: a [`trap::Registration`](crate::trap::Registration) hears of it. A system call that
    /// would trap fails with EFAULT.
    Inline,
    /// Whoever reads the messages ([`trap::RemotePager`](crate::trap::RemotePager)), while the toucher sleeps. System calls are
    /// served too if [`RawRegion::serves_system_calls`].
    Pager,
}

/// What a [`RawRegion`] is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RawTraps {
    /// Who answers.
    pub answered: Answered,
    /// Touches of absent pages trap (of shared memory also those that only this page table lacks).
    pub absent: bool,
    /// Writes to protected pages trap.
    pub writes: bool,
    /// The memory is a memfd mapped shared; else it is private and anonymous.
    pub shared: bool,
}

impl RawTraps {
    fn features(self) -> Features {
        let mut features = Features::empty();
        let mut want = |on: bool, feature: Features| {
            if on {
                features |= feature;
            }
        };
        want(self.answered == Answered::Inline, Features::SIGBUS);
        want(self.writes, Features::PAGEFAULT_FLAG_WP);
        want(self.writes && self.shared, Features::WP_HUGETLBFS_SHMEM);
        want(self.absent && self.shared, Features::MISSING_SHMEM | Features::MINOR_SHMEM);
        features
    }

    fn mode(self) -> RegisterMode {
        let mut mode = RegisterMode::empty();
        if self.writes {
            mode |= RegisterMode::WP;
        }
        if self.absent {
            mode |= RegisterMode::MISSING;
            if self.shared {
                mode |= RegisterMode::MINOR;
            }
        }
        mode
    }
}

/// The descriptor. Dropping it (and every copy of it) makes what it watches plain memory again.
///
/// ```
/// use peregrine_vm::region::{Answered, RawRegion, RawTraps};
/// use peregrine_vm::{Mapping, PageCount, Protection};
///
/// let memory = Mapping::memfd(PageCount::new(32))?;
/// memory.bytes().store_u64(8, 7)?;
/// memory.evict(memory.range())?; // in the memfd, and in no page table
/// let traps = RawTraps { answered: Answered::Inline, absent: true, writes: true, shared: true };
/// let Ok(region) = RawRegion::open(traps) else { return Ok(()) }; // no userfaultfd here
/// // SAFETY: the mapping is ours, outlives the region, and nobody touches it between here and the fill.
/// unsafe {
///     region.watch(memory.range())?;
///     region.by_ref().fill_continue(memory.pages(0, 1)?, Protection::ReadWrite)?;
/// }
/// assert_eq!(memory.bytes().load_u64(8)?, 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct RawRegion {
    uffd: Uffd,
    traps: RawTraps,
}

impl RawRegion {
    /// Opens a descriptor for the calling process's memory.
    ///
    /// # Errors
    /// [`OpenError`]: no userfaultfd, with what would allow it, or a kernel that lacks what `traps` needs.
    pub fn open(traps: RawTraps) -> Result<Self, OpenError> {
        Ok(Self { uffd: Uffd::open(traps.features())?, traps })
    }

    /// Whether a system call that touches the memory is served like any touch ([`Answered::Pager`] only). It takes
    /// `CAP_SYS_PTRACE`, `vm.unprivileged_userfaultfd=1` or `/dev/userfaultfd`; without, the call fails with EFAULT.
    pub fn serves_system_calls(&self) -> bool {
        self.traps.answered == Answered::Pager && self.uffd.access().serves_kernel_faults()
    }

    /// From now on touches of `range` trap, as far as its pages are absent or protected.
    ///
    /// # Errors
    /// EINVAL: no mapping there, or of another kind than was said. EBUSY: another userfaultfd has it. EPERM: a shared mapping
    /// of a file that may not be written.
    ///
    /// # Safety
    /// The caller owns the mappings in `range`, which stay while this value lives, and answers the traps.
    pub unsafe fn watch(&self, range: PageRange) -> Result<(), Errno> {
        // SAFETY: the caller owns the range.
        unsafe { self.uffd.by_ref().register(range, self.traps.mode()) }.map(drop)
    }

    /// `range` is plain memory again; whoever waits in it goes on.
    ///
    /// # Errors
    /// EINVAL: no mapping there.
    pub fn unwatch(&self, range: PageRange) -> Result<(), Errno> {
        self.uffd.by_ref().unregister(range)
    }

    /// A copyable view that makes the calls.
    pub fn by_ref(&self) -> RawRegionRef<'_> {
        RawRegionRef(self.uffd.by_ref())
    }
}

impl AsFd for RawRegion {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

/// The descriptor itself, for a runtime that keeps it by number or gives it to another process.
impl From<RawRegion> for OwnedFd {
    fn from(region: RawRegion) -> Self {
        region.uffd.into()
    }
}

/// A borrowed [`RawRegion`], of this process or of another: every address means one of the process that opened it.
#[derive(Clone, Copy, Debug)]
pub struct RawRegionRef<'a>(UffdRef<'a>);

impl<'a> RawRegionRef<'a> {
    /// Of a descriptor that a [`RawRegion`] was turned into. With any other the calls fail.
    pub const fn new(fd: BorrowedFd<'a>) -> Self {
        Self(UffdRef::new(fd))
    }

    /// PROT1, PROTN: writes to `range` trap from now on.
    ///
    /// # Errors
    /// ENOENT: `range` is not watched for writes. ESRCH: its process is gone.
    #[inline]
    pub fn protect(self, range: PageRange) -> Result<(), Errno> {
        self.write_protect(range, true)
    }

    /// UNPROT: writes to `range` don't trap any more; writers that wait go on.
    ///
    /// # Errors
    /// As [`RawRegionRef::protect`].
    #[inline]
    pub fn unprotect(self, range: PageRange) -> Result<(), Errno> {
        self.write_protect(range, false)
    }

    #[inline]
    fn write_protect(self, range: PageRange, on: bool) -> Result<(), Errno> {
        loop {
            match self.0.write_protect(range, on) {
                Err(Errno::EINTR | Errno::EAGAIN) => peregrine_base::sync::spin_loop(),
                done => return done,
            }
        }
    }

    /// Maps the pages of `range` that the memfd has, with `access` (`ReadWrite`, or `Read`: write-protected). Pages that are
    /// mapped already stay; with `ReadWrite` their protection is lifted. Returns how many were mapped.
    ///
    /// # Errors
    /// EFAULT: the memfd has no such page. EINVAL: `access` is `None`. ENOENT: not watched. ESRCH: the process is gone.
    ///
    /// # Safety
    /// The caller owns the memory, in whichever process it is, and nobody relies on its being absent.
    #[inline]
    pub unsafe fn fill_continue(self, range: PageRange, access: Protection) -> Result<PageCount, Errno> {
        let mode = fill_mode(access)?;
        let present = Present { or_continue: None, lift: access == Protection::ReadWrite, ..Present::STAYS };
        // SAFETY: the caller's promise, for all of the range.
        fill_loop(self.0, range, present, |part| unsafe { self.0.continue_(part, mode) }).map_err(|(_, e)| e)
    }

    /// Fills the absent pages of `range` with the bytes at `source` (of the calling process). Pages that are there stay as they
    /// are; with `ReadWrite` their protection is lifted. Returns how many were filled.
    ///
    /// # Errors
    /// As [`RawRegionRef::fill_continue`]; EFAULT: the source.
    ///
    /// # Safety
    /// As [`RawRegionRef::fill_continue`]; `source` is readable for the range's length.
    #[inline]
    pub unsafe fn fill_copy(
        self,
        range: PageRange,
        source: *const u8,
        access: Protection,
    ) -> Result<PageCount, Errno> {
        let mode = fill_mode(access)?;
        let lift = access == Protection::ReadWrite;
        let present = Present { or_continue: Some(mode), lift, ..Present::STAYS };
        let fill = |part: PageRange| {
            let offset = part.start().as_usize() - range.start().as_usize();
            // SAFETY: the caller's promise; the source holds the range's bytes, so the part's from `offset` on.
            unsafe { self.0.copy(part, source.wrapping_add(offset), mode) }
        };
        fill_loop(self.0, range, present, fill).map_err(|(_, e)| e)
    }

    /// Fills the absent pages of `range` with zeros, writable. Pages that are there stay as they are. Returns how many were
    /// filled.
    ///
    /// # Errors
    /// As [`RawRegionRef::fill_continue`].
    ///
    /// # Safety
    /// As [`RawRegionRef::fill_continue`].
    #[inline]
    pub unsafe fn fill_zero(self, range: PageRange) -> Result<PageCount, Errno> {
        let mode = FillMode::default();
        let present = Present { or_continue: Some(mode), ..Present::STAYS };
        // SAFETY: the caller's promise, for all of the range.
        fill_loop(self.0, range, present, |part| unsafe { self.0.zeropage(part, mode) }).map_err(|(_, e)| e)
    }

    /// Threads asleep on a fault in `range` try again. Fills and [`RawRegionRef::unprotect`] do this by themselves.
    ///
    /// # Errors
    /// EINVAL: not addresses. ESRCH: the process is gone.
    pub fn wake(self, range: PageRange) -> Result<(), Errno> {
        self.0.wake(range)
    }
}

/// What a fill does with a page that is there already. Its contents always stay.
#[derive(Clone, Copy)]
pub(super) struct Present {
    /// How to map it if the memfd has it, and the page table perhaps has not.
    pub(super) or_continue: Option<FillMode>,
    /// Lift its write-protection.
    pub(super) lift: bool,
    /// Pages that the kernel fills as one.
    pub(super) grain: PageCount,
}

impl Present {
    pub(super) const STAYS: Self = Self { or_continue: None, lift: false, grain: PageCount::new(1) };
}

/// Calls `fill` until the whole range is served: skips pages that are there, goes on after the kernel stopped early. Returns how
/// many were filled, or where it failed. Trap code.
#[inline]
pub(super) fn fill_loop(
    uffd: UffdRef<'_>,
    range: PageRange,
    present: Present,
    fill: impl Fn(PageRange) -> Result<(), Partial>,
) -> Result<PageCount, (PageRange, Errno)> {
    let end = range.end().as_usize();
    let (mut at, mut filled) = (range.start().as_usize(), 0);
    while at < end {
        let rest = PageRange::new(VirtAddr::new(at), PageCount::new((end - at) / PAGE_SIZE));
        match fill(rest) {
            Ok(()) => return Ok(PageCount::new(filled + rest.pages().get())),
            // Whatever stopped it, the next call tells.
            Err(Partial { done_bytes, .. }) if done_bytes > 0 => {
                at += done_bytes;
                filled += done_bytes / PAGE_SIZE;
            }
            Err(Partial { errno: Errno::EINTR, .. }) => {}
            // The address space is changing (a fork, a remap): the other side will finish.
            Err(Partial { errno: Errno::EAGAIN, .. }) => io::yield_now(),
            Err(Partial { errno: Errno::EEXIST, .. }) => {
                let grain = present.grain.bytes();
                let start = VirtAddr::new(at / grain * grain);
                let page = PageRange::new(start, present.grain);
                leave(uffd, page, present).map_err(|e| (page, e))?;
                at = start.as_usize() + grain;
            }
            Err(Partial { errno, .. }) => return Err((rest, errno)),
        }
    }
    Ok(PageCount::new(filled))
}

/// `page` is there already: see that whoever waits for it may go on.
fn leave(uffd: UffdRef<'_>, page: PageRange, present: Present) -> Result<(), Errno> {
    if let Some(mode) = present.or_continue {
        // SAFETY: a page of the range that the fill's caller owns. What fails here is mapped already, or private.
        let _ = unsafe { uffd.continue_(page, mode) };
    }
    if present.lift {
        // Wakes as well.
        match RawRegionRef(uffd).write_protect(page, false) {
            // Not watched for writes, so not protected either.
            Err(Errno::ENOENT) => {}
            done => return done,
        }
    }
    // What fails here has nobody to wake.
    let _ = uffd.wake(page);
    Ok(())
}

const fn fill_mode(access: Protection) -> Result<FillMode, Errno> {
    match access {
        Protection::ReadWrite => Ok(FillMode { write_protected: false, leave_asleep: false }),
        Protection::Read => Ok(FillMode { write_protected: true, leave_asleep: false }),
        Protection::None => Err(Errno::EINVAL),
    }
}
