//! Memory that goes along with a call: lent in place, or given for good.
//!
//! | | made by | during the call | what the domain sees |
//! |---|---|---|---|
//! | [`Buffer`] | [`Client::buffer`](crate::Client::buffer), kept for many calls | the client may still write it | [`Lent`]: volatile, copied out piece by piece |
//! | [`Gift`] | [`Gift::new`], used once | gone from the client | [`Given`]: sealed against writing by anyone, so a plain `&[u8]` |
//!
//! Each is a memfd of its own, of one client and one domain: mode 0600, its size sealed. A buffer is handed over as a
//! descriptor that is open for reading only; the domain maps it for reading. What the client gives, it unmaps; the domain then
//! adds `F_SEAL_WRITE`, which the kernel refuses as long as anybody maps the file writable. So a gift needs no copy, and
//! the giver no trust.

use crate::error::{CallError, Failure};
use crate::shared::{Shared, map_from_peer};
use peregrine_base::sync::{AtomicBool, Ordering};
use peregrine_base::{PageCount, Protection, VirtAddr};
use peregrine_sys::memfd;
use peregrine_sys::raw::Errno;
use peregrine_sys::rustix::fs::{self, Mode, OFlags, SealFlags};
use peregrine_vm::Volatile;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

fn system(what: &'static str) -> impl Fn(Errno) -> CallError {
    move |errno| CallError::System { what, errno }
}

/// A second descriptor of the same memfd, open for reading only.
///
/// Without `/proc` there is no way to one; then the first is passed, and the kernel keeps the domain from nothing but
/// what its type already keeps it from.
pub(crate) fn read_only(fd: &OwnedFd) -> Option<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// Memory that a client lends to its domain, call after call, without copying.
///
/// Both processes reach it at once, so it is never behind a reference: read and write copy, and
/// [`bytes`](Self::bytes) gives words in place.
pub struct Buffer {
    pub(crate) shared: Shared,
    pub(crate) id: u32,
    pub(crate) len_bytes: usize,
    pub(crate) home: Arc<dyn Forget>,
}

/// The connection that a buffer is registered with.
pub(crate) trait Forget: Send + Sync {
    fn forget(&self, buffer: u32);
    fn is(&self, connection: u64) -> bool;
}

impl Buffer {
    /// Bytes that were asked for.
    pub const fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// The memory in place, whole pages of it.
    pub const fn bytes(&self) -> Volatile<'_> {
        // SAFETY: mapped as long as `self`, and no reference to it is ever made (S1).
        unsafe { Volatile::new(self.shared.range()) }
    }

    /// Copies `from` in at `offset_bytes`.
    ///
    /// # Errors
    /// [`CallError::TooLarge`]: beyond the end.
    pub fn write(&self, offset_bytes: usize, from: &[u8]) -> Result<(), CallError> {
        self.check(offset_bytes, from.len())?;
        self.shared.write(offset_bytes, from).ok_or(CallError::BadReply("a buffer shorter than itself"))
    }

    /// Copies `into.len()` bytes out from `offset_bytes`.
    ///
    /// # Errors
    /// [`CallError::TooLarge`]: beyond the end.
    pub fn read(&self, offset_bytes: usize, into: &mut [u8]) -> Result<(), CallError> {
        self.check(offset_bytes, into.len())?;
        self.bytes().read(offset_bytes, into).map_err(|_| CallError::BadReply("a buffer shorter than itself"))
    }

    fn check(&self, offset_bytes: usize, len_bytes: usize) -> Result<(), CallError> {
        match offset_bytes.checked_add(len_bytes) {
            Some(end) if end <= self.len_bytes => Ok(()),
            end => Err(CallError::TooLarge {
                what: "access to a buffer",
                asked_bytes: end.map_or(u64::MAX, |e| e as u64),
                limit_bytes: self.len_bytes as u64,
            }),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.home.forget(self.id);
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({}, {} bytes)", self.id, self.len_bytes)
    }
}

/// What a domain holds of a client's buffer.
pub(crate) struct Lendable {
    pub shared: Shared,
    /// Whether results may be written into it.
    pub results: bool,
    pub len_bytes: u64,
    /// Whether its client has taken it back.
    pub forgotten: AtomicBool,
}

impl Lendable {
    /// Whether its client has taken it back: a call that is made after that is told has not got it.
    #[inline]
    pub fn is_forgotten(&self) -> bool {
        // Relaxed: told over the socket, as the call that may not have it is by its line; which comes first is for the client to see to.
        self.forgotten.load(Ordering::Relaxed)
    }
}

/// What a client lends for the length of one call. The client may change it at any time.
#[derive(Clone)]
pub struct Lent<'a> {
    memory: &'a Shared,
    offset_bytes: usize,
    /// The part of it that is lent: checked once, so that a word is checked against this alone.
    bytes: Volatile<'a>,
}

impl<'a> Lent<'a> {
    /// `None` if it does not lie in `memory`.
    #[inline]
    pub(crate) fn new(memory: &'a Shared, offset_bytes: usize, len_bytes: usize) -> Option<Self> {
        // SAFETY: mapped as long as 'a, and behind no reference (S1).
        let all = unsafe { Volatile::new(memory.range()) };
        Some(Self { memory, offset_bytes, bytes: all.part(offset_bytes, len_bytes).ok()? })
    }

    /// How many bytes are lent.
    #[inline]
    pub const fn len_bytes(&self) -> usize {
        self.bytes.len_bytes()
    }

    /// Copies out `into.len()` bytes from `offset_bytes` of the lent part.
    ///
    /// # Errors
    /// [`Failure::ARGUMENTS`] beyond its end.
    pub fn read(&self, offset_bytes: usize, into: &mut [u8]) -> Result<(), Failure> {
        self.bytes.read(offset_bytes, into).map_err(|_| Failure::arguments())
    }

    /// A private copy of all of it: what can be trusted not to change.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut copy = Vec::new();
        self.append_to(&mut copy);
        copy
    }

    /// Appends a private copy to `into`, whose room is reused.
    pub fn append_to(&self, into: &mut Vec<u8>) {
        let copied = self.memory.append_to(self.offset_bytes, self.len_bytes(), into);
        copied.expect("checked when the call was read");
    }

    /// An aligned word in place. Aligned means from the beginning of the client's buffer, or of the lent slice.
    ///
    /// # Errors
    /// [`Failure::ARGUMENTS`] beyond the end or not aligned.
    #[inline]
    pub fn load_u64(&self, offset_bytes: usize) -> Result<u64, Failure> {
        self.bytes.load_u64(offset_bytes).map_err(|_| Failure::arguments())
    }
}

impl fmt::Debug for Lent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lent({} bytes)", self.len_bytes())
    }
}

/// Memory to be given away: this process's alone until then, so a plain `&mut [u8]`.
///
/// ```
/// use peregrine_call::Gift;
/// let mut gift = Gift::new(1 << 20)?;
/// gift[..5].copy_from_slice(b"frame");
/// # Ok::<(), peregrine_call::CallError>(())
/// ```
pub struct Gift {
    fd: OwnedFd,
    pages: Pages,
}

impl Gift {
    /// `len_bytes` bytes of zeros.
    ///
    /// # Errors
    /// [`CallError::System`]: no memory or descriptors; `len_bytes` is 0.
    pub fn new(len_bytes: usize) -> Result<Self, CallError> {
        if len_bytes == 0 {
            return Err(system("gift of no bytes")(Errno::EINVAL));
        }
        let pages = PageCount::for_bytes(len_bytes);
        let fd = memfd::create(c"peregrine-gift", pages, memfd::Pages::Base).map_err(system("memfd"))?;
        memfd::seal_size(&fd).map_err(system("seal"))?;
        let shared = Shared::map(&fd, len_bytes, Protection::ReadWrite).map_err(system("mmap"))?;
        Ok(Self { fd, pages: Pages { shared, len_bytes } })
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Takes the memory away from this process, for good.
    pub(crate) fn let_go(self) -> (OwnedFd, usize) {
        (self.fd, self.pages.len_bytes)
    }
}

impl Deref for Gift {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: nobody but this value has the descriptor yet, and `&self` excludes writes.
        unsafe { std::slice::from_raw_parts(self.pages.start().as_ptr(), self.pages.len_bytes) }
    }
}

impl DerefMut for Gift {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: nobody but this value has the descriptor yet, and `&mut self` excludes everything else.
        unsafe { std::slice::from_raw_parts_mut(self.pages.start().as_ptr(), self.pages.len_bytes) }
    }
}

impl fmt::Debug for Gift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gift({} bytes)", self.pages.len_bytes)
    }
}

struct Pages {
    shared: Shared,
    len_bytes: usize,
}

impl Pages {
    const fn start(&self) -> VirtAddr {
        self.shared.range().start()
    }
}

/// Memory that was given to this domain: nobody can write it any more.
pub struct Given {
    pages: Pages,
    _fd: OwnedFd,
}

impl Given {
    /// Seals and maps what a client gave. The client is not trusted to have let go.
    pub(crate) fn open(fd: OwnedFd, len_bytes: usize) -> Result<Self, Errno> {
        memfd::seal(&fd, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let shared = map_from_peer(fd.as_fd(), len_bytes, Protection::Read)?;
        Ok(Self { pages: Pages { shared, len_bytes }, _fd: fd })
    }
}

impl Deref for Given {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `open` sealed the file against writing, which the kernel grants only when no writable mapping exists and then
        // allows none, nor writes, nor holes; sealed against shrinking it stays accessible.
        unsafe { std::slice::from_raw_parts(self.pages.start().as_ptr(), self.pages.len_bytes) }
    }
}

impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Given({} bytes)", self.pages.len_bytes)
    }
}

/// A part of a lent buffer, as an argument.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    pub(crate) buffer: &'a Buffer,
    pub(crate) offset_bytes: usize,
    pub(crate) len_bytes: usize,
}

impl<'a> From<&'a Buffer> for Part<'a> {
    fn from(buffer: &'a Buffer) -> Self {
        Self { buffer, offset_bytes: 0, len_bytes: buffer.len_bytes }
    }
}

impl Buffer {
    /// A part of it, to be lent alone.
    ///
    /// # Errors
    /// [`CallError::TooLarge`]: beyond the end.
    pub fn part(&self, offset_bytes: usize, len_bytes: usize) -> Result<Part<'_>, CallError> {
        self.check(offset_bytes, len_bytes)?;
        Ok(Part { buffer: self, offset_bytes, len_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peregrine_base::PAGE_SIZE;

    #[test]
    fn a_gift_that_is_still_mapped_is_not_accepted() {
        let mut gift = Gift::new(10_000).unwrap();
        gift[9_999] = 7;
        let copy = gift.fd.try_clone().unwrap();
        assert_eq!(Given::open(copy, 10_000).unwrap_err(), Errno::EBUSY);
        let (fd, len) = gift.let_go();
        let writer = fd.try_clone().unwrap();
        let given = Given::open(fd, len).unwrap();
        assert_eq!((given.len(), given[9_999]), (10_000, 7));
        assert!(Shared::map(&writer, len, Protection::ReadWrite).is_err(), "nobody can write it any more");
        assert!(memfd::punch(&writer, PageCount::new(0), PageCount::new(1)).is_err());
    }

    #[test]
    fn a_lent_part_ends_where_it_was_said_to() {
        let fd = crate::shared::sealed_memfd(c"test", PAGE_SIZE).unwrap();
        let memory = Shared::map(&fd, PAGE_SIZE, Protection::ReadWrite).unwrap();
        let bytes: Vec<u8> = (0..PAGE_SIZE).map(|i| (i % 251) as u8).collect();
        memory.write(0, &bytes).unwrap();
        let word = |at: usize| Ok(u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap()));
        let lent = Lent::new(&memory, 64, 24).unwrap();
        assert_eq!((lent.len_bytes(), lent.to_vec()), (24, bytes[64..88].to_vec()));
        assert_eq!([0, 8, 16].map(|at| lent.load_u64(at)), [64, 72, 80].map(word));
        for beyond in [17, 24, usize::MAX - 6, usize::MAX] {
            assert_eq!(lent.load_u64(beyond), Err(Failure::arguments()), "{beyond}");
        }
        assert_eq!(lent.load_u64(4), Err(Failure::arguments()), "not aligned");
        let mut some = [0; 8];
        lent.read(16, &mut some).unwrap();
        assert_eq!(some, bytes[80..88]);
        assert_eq!(lent.read(17, &mut some), Err(Failure::arguments()));
        // A word is aligned by where it is in the client's buffer.
        let odd = Lent::new(&memory, 4, 12).unwrap();
        assert_eq!((odd.load_u64(0), odd.load_u64(4)), (Err(Failure::arguments()), word(8)));
        for (offset, len) in [(0, PAGE_SIZE + 1), (PAGE_SIZE, 1), (PAGE_SIZE + 1, 0), (8, usize::MAX)] {
            assert!(Lent::new(&memory, offset, len).is_none(), "{len} at {offset}");
        }
    }

    #[test]
    fn a_gift_shorter_than_said_is_not_accepted() {
        let (fd, _) = Gift::new(100).unwrap().let_go();
        assert_eq!(Given::open(fd, PAGE_SIZE + 1).unwrap_err(), Errno::EINVAL);
    }
}
