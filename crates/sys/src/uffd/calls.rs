//! What a descriptor is asked to do: each call one `ioctl(2)` or `read(2)`, and nothing of this process but its arguments, so that a
//! signal handler can make it.

use super::{Message, RangeIoctls, RegisterMode};
use crate::raw::{self, Errno};
use core::fmt;
use core::mem::MaybeUninit;
use linux_raw_sys::general as g;
use peregrine_base::{PageRange, VirtAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// How a fill leaves the pages and the threads that wait for them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FillMode {
    /// The pages arrive write-protected (`*_MODE_WP`): copy and continue only.
    pub write_protected: bool,
    /// Waiting threads are left asleep (`*_MODE_DONTWAKE`) until a [`UffdRef::wake`].
    pub leave_asleep: bool,
}

impl FillMode {
    #[inline]
    const fn bits(self) -> u64 {
        (self.leave_asleep as u64) | ((self.write_protected as u64) << 1)
    }
}

/// A fill that stopped early.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Partial {
    /// Bytes at the front of the range that were filled before the stop.
    pub done_bytes: usize,
    /// Why it stopped: EEXIST a page was already there, EAGAIN the address space is changing (try again from
    /// `done_bytes`), ENOENT the range is not registered, EFAULT the source or the backing page is absent.
    pub errno: Errno,
}

impl fmt::Display for Partial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stopped after {} bytes: {}", self.done_bytes, self.errno)
    }
}

impl core::error::Error for Partial {}

/// `UFFDIO_MOVE`: `_IOWR(0xAA, 5, struct uffdio_move)`, which linux-raw-sys 0.12 does not carry.
const UFFDIO_MOVE: u32 = raw::iowr(0xAA, g::_UFFDIO_MOVE, size_of::<g::uffdio_move>());
/// `UFFDIO_POISON`: `_IOWR(0xAA, 8, struct uffdio_poison)`.
const UFFDIO_POISON: u32 = raw::iowr(0xAA, g::_UFFDIO_POISON, size_of::<g::uffdio_poison>());
#[inline]
const fn kernel_range(range: PageRange) -> g::uffdio_range {
    g::uffdio_range { start: range.start().as_usize() as u64, len: range.len_bytes() as u64 }
}

/// Turns the kernel's "bytes or negative error" field into a result.
#[inline]
fn finish(ret: Result<usize, Errno>, field: i64, len_bytes: usize) -> Result<(), Partial> {
    match ret {
        Ok(_) => Ok(()),
        Err(_) if field > 0 && (field as usize) < len_bytes => {
            // The kernel writes the bytes done and fails the call with EAGAIN, whatever stopped it: the next
            // call from there tells the true reason.
            Err(Partial { done_bytes: field as usize, errno: Errno::EAGAIN })
        }
        Err(errno) => Err(Partial { done_bytes: 0, errno }),
    }
}

/// A borrowed userfaultfd. No call here touches `errno`, a thread-local, a static or the allocator.
#[derive(Clone, Copy, Debug)]
pub struct UffdRef<'a>(BorrowedFd<'a>);

impl<'a> UffdRef<'a> {
    /// A view of `fd`, which must be a userfaultfd for the calls to succeed.
    pub const fn new(fd: BorrowedFd<'a>) -> Self {
        Self(fd)
    }

    /// # Safety
    /// As for the call made with `req` on this descriptor; `arg` must be its struct.
    #[inline]
    unsafe fn ioctl<T>(self, req: u32, arg: &mut T) -> Result<usize, Errno> {
        // SAFETY: the struct lives across the call; what the call does is the caller's.
        unsafe { raw::ioctl(self.0.as_raw_fd(), req, core::ptr::from_mut(arg) as usize) }
    }

    /// `UFFDIO_REGISTER`: from now on `range` reports the faults in `mode`. Returns what may be done with it.
    ///
    /// # Errors
    /// EINVAL: no mapping there, or its kind does not support `mode`. EBUSY: another descriptor has it. EPERM: a
    /// shared mapping of a file that may not be written.
    ///
    /// # Safety
    /// The caller owns the mappings in `range`: from now on touching them may trap.
    pub unsafe fn register(self, range: PageRange, mode: RegisterMode) -> Result<RangeIoctls, Errno> {
        let mut arg = g::uffdio_register { range: kernel_range(range), mode: mode.bits(), ioctls: 0 };
        // SAFETY: the struct is this ioctl's; ownership of the range is the caller's promise.
        unsafe { self.ioctl(raw::UFFDIO_REGISTER, &mut arg)? };
        Ok(RangeIoctls::from_bits(arg.ioctls))
    }

    /// `UFFDIO_UNREGISTER`: `range` reports nothing more, protections are lifted, sleepers are woken.
    ///
    /// # Errors
    /// EINVAL: no mapping there, or a kind that could not have been registered.
    pub fn unregister(self, range: PageRange) -> Result<(), Errno> {
        let mut arg = kernel_range(range);
        // SAFETY: the struct is this ioctl's; it only takes away what `register` had set up.
        unsafe { self.ioctl(raw::UFFDIO_UNREGISTER, &mut arg)? };
        Ok(())
    }

    /// `UFFDIO_WRITEPROTECT`: protects `range` against writes, or lifts that and wakes the writers.
    ///
    /// # Errors
    /// ENOENT: `range` is not wholly registered with [`RegisterMode::WP`]. EAGAIN: the address space is changing.
    #[inline]
    pub fn write_protect(self, range: PageRange, protect: bool) -> Result<(), Errno> {
        let mut arg = g::uffdio_writeprotect { range: kernel_range(range), mode: protect as u64 };
        // SAFETY: the struct is this ioctl's; contents don't change, and only writes to a range registered for
        // it are delayed.
        unsafe { self.ioctl(raw::UFFDIO_WRITEPROTECT, &mut arg)? };
        Ok(())
    }

    /// As [`UffdRef::write_protect`] lifting, but the writers stay asleep until a [`UffdRef::wake`].
    ///
    /// # Errors
    /// As [`UffdRef::write_protect`].
    #[inline]
    pub fn lift_without_waking(self, range: PageRange) -> Result<(), Errno> {
        const DONTWAKE: u64 = 1 << 1;
        let mut arg = g::uffdio_writeprotect { range: kernel_range(range), mode: DONTWAKE };
        // SAFETY: as in `write_protect`.
        unsafe { self.ioctl(raw::UFFDIO_WRITEPROTECT, &mut arg)? };
        Ok(())
    }

    /// `UFFDIO_COPY`: fills the absent pages of `range` with the bytes at `src`.
    ///
    /// # Errors
    /// [`Partial`]; EEXIST: a page was already there.
    ///
    /// # Safety
    /// `src` is readable for `range.len_bytes()`; nobody relies on `range` being absent or zero.
    #[inline]
    pub unsafe fn copy(self, range: PageRange, src: *const u8, mode: FillMode) -> Result<(), Partial> {
        let len = range.len_bytes();
        let mut arg = g::uffdio_copy {
            dst: range.start().as_usize() as u64,
            src: src as u64,
            len: len as u64,
            mode: mode.bits(),
            copy: 0,
        };
        // SAFETY: the struct is this ioctl's; source and destination are the caller's promise.
        let ret = unsafe { self.ioctl(raw::UFFDIO_COPY, &mut arg) };
        finish(ret, arg.copy, len)
    }

    /// `UFFDIO_ZEROPAGE`: fills the absent pages of `range` with zeros.
    ///
    /// # Errors
    /// [`Partial`]; EEXIST: a page was already there; EINVAL: huge pages, which have none.
    ///
    /// # Safety
    /// Nobody relies on `range` being absent.
    #[inline]
    pub unsafe fn zeropage(self, range: PageRange, mode: FillMode) -> Result<(), Partial> {
        let len = range.len_bytes();
        // The zero page has no write-protected form here: only the "don't wake" bit is passed.
        let mode = FillMode { write_protected: false, ..mode }.bits();
        let mut arg = g::uffdio_zeropage { range: kernel_range(range), mode, zeropage: 0 };
        // SAFETY: the struct is this ioctl's; the destination is the caller's promise.
        let ret = unsafe { self.ioctl(raw::UFFDIO_ZEROPAGE, &mut arg) };
        finish(ret, arg.zeropage, len)
    }

    /// `UFFDIO_CONTINUE`: maps the pages that the backing file already has into `range`.
    ///
    /// # Errors
    /// [`Partial`]; EFAULT: the file has no such page; EEXIST: it is mapped already.
    ///
    /// # Safety
    /// Nobody relies on `range` being absent.
    #[inline]
    pub unsafe fn continue_(self, range: PageRange, mode: FillMode) -> Result<(), Partial> {
        let len = range.len_bytes();
        let mut arg = g::uffdio_continue { range: kernel_range(range), mode: mode.bits(), mapped: 0 };
        // SAFETY: the struct is this ioctl's; the destination is the caller's promise.
        let ret = unsafe { self.ioctl(raw::UFFDIO_CONTINUE, &mut arg) };
        finish(ret, arg.mapped, len)
    }

    /// `UFFDIO_MOVE`: moves the page frames at `src` into the absent pages of `range`; `src` is left absent.
    ///
    /// Only private anonymous memory of one process. `allow_holes` leaves absent source pages absent.
    ///
    /// # Errors
    /// [`Partial`]; ENOENT: a source page is absent; EBUSY: it is shared (after a fork) or pinned; EEXIST.
    ///
    /// # Safety
    /// The caller owns both ranges, and nothing refers to bytes at `src` any more.
    #[inline]
    pub unsafe fn move_(
        self,
        range: PageRange,
        src: VirtAddr,
        allow_holes: bool,
        mode: FillMode,
    ) -> Result<(), Partial> {
        let len = range.len_bytes();
        let mut arg = g::uffdio_move {
            dst: range.start().as_usize() as u64,
            src: src.as_usize() as u64,
            len: len as u64,
            mode: mode.leave_asleep as u64 | ((allow_holes as u64) << 1),
            move_: 0,
        };
        // SAFETY: the struct is this ioctl's; both ranges are the caller's promise.
        let ret = unsafe { self.ioctl(UFFDIO_MOVE, &mut arg) };
        finish(ret, arg.move_, len)
    }

    /// `UFFDIO_POISON`: from now on, touching the absent pages of `range` raises SIGBUS (`BUS_MCEERR_AR`).
    ///
    /// # Errors
    /// [`Partial`]; EEXIST: a page was already there.
    ///
    /// # Safety
    /// The caller owns `range`.
    pub unsafe fn poison(self, range: PageRange, mode: FillMode) -> Result<(), Partial> {
        let len = range.len_bytes();
        let mode = mode.leave_asleep as u64;
        let mut arg = g::uffdio_poison { range: kernel_range(range), mode, updated: 0 };
        // SAFETY: the struct is this ioctl's; the range is the caller's promise.
        let ret = unsafe { self.ioctl(UFFDIO_POISON, &mut arg) };
        finish(ret, arg.updated, len)
    }

    /// `UFFDIO_WAKE`: threads asleep on a fault in `range` try again.
    ///
    /// # Errors
    /// EINVAL: not a range of this address space.
    #[inline]
    pub fn wake(self, range: PageRange) -> Result<(), Errno> {
        let mut arg = kernel_range(range);
        // SAFETY: the struct is this ioctl's; a woken thread repeats its access.
        unsafe { self.ioctl(raw::UFFDIO_WAKE, &mut arg)? };
        Ok(())
    }

    /// Reads the next messages without blocking; returns how many of `into` were written.
    ///
    /// # Errors
    /// EAGAIN: none waits; with [`Features::SIGBUS`](super::Features::SIGBUS) always so.
    #[inline]
    pub fn read(self, into: &mut [MaybeUninit<Message>]) -> Result<usize, Errno> {
        const { assert!(size_of::<Message>() == size_of::<g::uffd_msg>()) };
        let len = core::mem::size_of_val(into);
        // SAFETY: the kernel writes whole messages into the slice, at most `len` bytes; `Message` is the raw struct.
        let n = unsafe {
            raw::check(raw::syscall6(
                g::__NR_read,
                self.0.as_raw_fd() as usize,
                into.as_mut_ptr() as usize,
                len,
                0,
                0,
                0,
            ))?
        };
        Ok(n / size_of::<Message>())
    }
}

impl AsFd for UffdRef<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0
    }
}
