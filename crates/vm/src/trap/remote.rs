//! A pager for memory of another process (or for a [`RawRegion`](crate::region::RawRegion) of this one): reads the messages,
//! answers by the same calls.
//!
//! ```text
//!   process A: RawRegion::open(Pager), watch ── its descriptor: SCM_RIGHTS, or pidfd_getfd ──▶ process B: RemotePager
//!      a touch: the thread sleeps ───────────────── RemoteFault ───────────────────────────────▶ read
//!      goes on ◀──────────────────────────── unprotect, fill_… ──────────────────────────────── by_ref
//! ```
//!
//! **What can go wrong.** If B dies, its copy of the descriptor goes; as long as A or anybody else keeps one, A's threads sleep
//! until somebody reads it, and when the last is closed they go on over plain memory. If A dies, calls fail with ESRCH,
//! and nothing more is to be read: that it died is told by its pidfd, not by the descriptor.

use super::{Access, Cause};
use crate::region::RawRegionRef;
use peregrine_base::VirtAddr;
use peregrine_sys::other;
use peregrine_sys::raw::Errno;
use peregrine_sys::uffd::{Event, Message, UffdRef};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

/// A touch that waits for an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RemoteFault {
    /// The page that was touched, in the process that the pager serves: its first address.
    pub address: VirtAddr,
    /// What was attempted.
    pub access: Access,
    /// How it came: [`Cause::WriteProtected`], [`Cause::Missing`] or [`Cause::Minor`].
    pub cause: Cause,
}

impl RemoteFault {
    #[inline]
    fn of(event: Event) -> Option<(Self, u32)> {
        let Event::PageFault { address, write, write_protected, minor, thread_id } = event else {
            return None;
        };
        let cause = match (write_protected, minor) {
            (true, _) => Cause::WriteProtected,
            (false, true) => Cause::Minor,
            (false, false) => Cause::Missing,
        };
        let access = if write { Access::Write } else { Access::Read };
        Some((Self { address, access, cause }, thread_id))
    }
}

/// Messages that were read and not looked at yet. Compiled into the pager's loop, for the reason given at
/// [`Operations::protect`](crate::region::Operations::protect).
pub(crate) struct Faults {
    messages: [MaybeUninit<Message>; 16],
    /// Which of them to look at next, and how many there are.
    next: usize,
    count: usize,
}

impl Faults {
    pub(crate) const fn new() -> Self {
        Self { messages: [const { MaybeUninit::uninit() }; 16], next: 0, count: 0 }
    }

    /// Reads as many as fit; what was not looked at is gone. Returns how many.
    #[inline(always)]
    pub(crate) fn read(&mut self, uffd: UffdRef<'_>) -> Result<usize, Errno> {
        (self.next, self.count) = (0, 0);
        self.count = uffd.read(&mut self.messages)?;
        Ok(self.count)
    }

    /// The next fault, and the thread that sleeps in it (0 if the descriptor does not say).
    #[inline(always)]
    pub(crate) fn next(&mut self) -> Option<(RemoteFault, u32)> {
        while self.next < self.count {
            let message = self.messages.get(self.next)?;
            self.next += 1;
            // SAFETY: `read` has written the first `count`, and this is one of them.
            if let Some(fault) = RemoteFault::of(unsafe { message.assume_init_ref() }.event()) {
                return Some(fault);
            }
        }
        None
    }
}

/// Whoever answers the traps of a [`RawRegion`](crate::region::RawRegion), in this process or in another one.
///
/// ```
/// use peregrine_vm::region::{Answered, RawRegion, RawTraps};
/// use peregrine_vm::trap::RemotePager;
/// use peregrine_vm::{Mapping, PageCount, PageRange};
/// use std::os::fd::OwnedFd;
///
/// let memory = Mapping::anonymous(PageCount::new(8))?;
/// let traps = RawTraps { answered: Answered::Pager, absent: true, writes: false, shared: false };
/// let Ok(region) = RawRegion::open(traps) else { return Ok(()) }; // no userfaultfd here
/// // SAFETY: the mapping is ours and outlives the region; the thread below answers.
/// unsafe { region.watch(memory.range())? };
/// let pager = RemotePager::of(OwnedFd::from(region)); // as if it had come over a socket
/// std::thread::scope(|scope| {
///     let toucher = scope.spawn(|| memory.bytes().load_u8(5000));
///     let mut served = 0;
///     while served == 0 {
///         pager.wait(None)?;
///         served = pager.read(|fault| {
///             let page = PageRange::new(fault.address, PageCount::new(1));
///             let bytes = [7; 4096];
///             // SAFETY: an absent page of the region.
///             unsafe { pager.by_ref().fill_copy(page, bytes.as_ptr(), peregrine_vm::Protection::ReadWrite) }
///                 .expect("the page was absent");
///         })?;
///     }
///     assert_eq!(toucher.join().expect("it went on")?, 7);
///     Ok::<(), Box<dyn std::error::Error>>(())
/// })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct RemotePager(OwnedFd);

impl RemotePager {
    /// Over the descriptor of a [`RawRegion`](crate::region::RawRegion) that was answered [`Pager`](crate::region::Answered), as
    /// it came over a socket (`SCM_RIGHTS`) or was inherited. With any other the calls fail.
    pub const fn of(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Takes a copy of descriptor number `fd` of the process behind `pidfd` (`pidfd_getfd`, Linux 5.6).
    ///
    /// # Errors
    /// EPERM: not allowed to trace that process. EBADF: it has no such descriptor. ESRCH: it is gone.
    pub fn of_process(pidfd: BorrowedFd<'_>, fd: RawFd) -> Result<Self, Errno> {
        other::descriptor_of(pidfd, fd).map(Self)
    }

    /// Sleeps until a fault waits, for `timeout_ms` at most; `false` if none came. To wait for several pagers at once, or for
    /// the end of a process too (its pidfd), poll the descriptors ([`AsFd`]).
    ///
    /// # Errors
    /// EINTR: a signal.
    pub fn wait(&self, timeout_ms: Option<i32>) -> Result<bool, Errno> {
        let fds = [self.0.as_fd(), self.0.as_fd()];
        Ok(peregrine_sys::io::wait_readable(&fds, timeout_ms)? != 0)
    }

    /// Calls `answer` with each fault that waits (16 at most), without sleeping. Returns how many messages there were.
    ///
    /// Threads that touch a page whose fault is under way, or that a signal interrupts, may be told of again: an answer for a
    /// page that was answered already must do no harm, as `unprotect` and the fills don't.
    ///
    /// # Errors
    /// EAGAIN: none waits (as always where the traps are answered [`Inline`](crate::region::Answered)).
    #[inline]
    pub fn read(&self, mut answer: impl FnMut(RemoteFault)) -> Result<usize, Errno> {
        let mut faults = Faults::new();
        let count = faults.read(UffdRef::new(self.0.as_fd()))?;
        while let Some((fault, _)) = faults.next() {
            answer(fault);
        }
        Ok(count)
    }

    /// The calls that answer.
    pub fn by_ref(&self) -> RawRegionRef<'_> {
        RawRegionRef::new(self.0.as_fd())
    }
}

impl AsFd for RemotePager {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
