//! Memory that a stranger writes at the same time: words as atomics, bytes by copy, nothing by reference (S1).
//!
//! Every access names an offset and is checked against the mapping's length, which is this process's own knowledge. What
//! was read is a private copy; whoever reads twice may see two values, so callers read once.

use peregrine_base::sync::{AtomicU32, AtomicU64};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection};
use peregrine_sys::mem::{self, MapOptions, Placement, Source};
use peregrine_sys::raw::Errno;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

/// A mapping of a sealed memfd that another process maps too. Unmapped when dropped.
pub(crate) struct Shared {
    range: PageRange,
}

// SAFETY: plain addresses of memory that stays mapped as long as the value lives; every access is an atomic or an opaque copy.
unsafe impl Send for Shared {}
// SAFETY: as for `Send`.
unsafe impl Sync for Shared {}

impl Shared {
    /// Maps the first `len_bytes` bytes of `fd`. The file is a memfd that can't shrink below that (the caller checked,
    /// [`peregrine_sys::memfd::size_if_safe`], or made it so itself).
    pub fn map(fd: impl AsFd, len_bytes: usize, access: Protection) -> Result<Self, Errno> {
        let source = Source::Shared(fd.as_fd(), PageCount::new(0));
        // SAFETY: a new place in the address space disturbs nobody.
        let range = unsafe {
            mem::map(
                PageCount::for_bytes(len_bytes),
                access,
                source,
                Placement::Anywhere,
                MapOptions { no_reserve: true, ..MapOptions::default() },
            )?
        };
        // A forked child has no business in the call, and must not keep the pages of a client that has gone.
        // SAFETY: this mapping is ours alone, and the advice drops nothing here.
        unsafe { mem::advise(range, mem::Advice::DontFork)? };
        Ok(Self { range })
    }

    /// Bytes of the mapping, a whole number of pages.
    #[inline]
    pub const fn len_bytes(&self) -> usize {
        self.range.len_bytes()
    }

    pub const fn range(&self) -> PageRange {
        self.range
    }

    /// The 32-bit word at `offset`.
    ///
    /// # Panics
    /// If it does not lie in the first page or is not aligned: offsets of words are constants of this crate.
    #[inline(always)]
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset < PAGE_SIZE);
        let at = self.range.start().as_usize() + offset;
        // SAFETY: inside the mapping's first page (a mapping has one at least), aligned, and mapped as long as `self`; an
        // atomic may change at any time.
        unsafe { AtomicU32::from_ptr(std::ptr::with_exposed_provenance_mut(at)) }
    }

    /// The 64-bit word at `offset`.
    ///
    /// # Panics
    /// As [`Shared::word`].
    #[inline(always)]
    pub fn word64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset < PAGE_SIZE);
        let at = self.range.start().as_usize() + offset;
        // SAFETY: as for `word`.
        unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(at)) }
    }

    #[inline(always)]
    fn at(&self, offset: usize, len_bytes: usize) -> Option<usize> {
        let fits = offset <= self.len_bytes() && len_bytes <= self.len_bytes() - offset;
        fits.then(|| self.range.start().as_usize() + offset)
    }

    /// Where the bytes at `offset` lie, if there are `len_bytes` of them, and any.
    pub fn address(&self, offset: usize, len_bytes: usize) -> Option<usize> {
        self.at(offset, len_bytes).filter(|_| len_bytes != 0)
    }

    /// Copies `into.len()` bytes out; `None` (and nothing done) beyond the mapping.
    #[must_use]
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [MaybeUninit<u8>]) -> Option<()> {
        let from = self.at(offset, into.len())?;
        // SAFETY: the source lies in the mapping, the destination is exclusive.
        unsafe { copy(into.as_mut_ptr() as usize, from, into.len()) };
        Some(())
    }

    /// Appends `len_bytes` bytes at `offset` to `into`; `None` (and nothing done) beyond the mapping.
    #[must_use]
    #[inline]
    pub fn append_to(&self, offset: usize, len_bytes: usize, into: &mut Vec<u8>) -> Option<()> {
        self.at(offset, len_bytes)?;
        into.reserve(len_bytes);
        self.read(offset, &mut into.spare_capacity_mut()[..len_bytes])?;
        // SAFETY: `reserve` made the room and `read` has just filled it.
        unsafe { into.set_len(into.len() + len_bytes) };
        Some(())
    }

    /// Copies bytes in; `None` (and nothing done) beyond the mapping.
    #[must_use]
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) -> Option<()> {
        let to = self.at(offset, from.len())?;
        // SAFETY: the destination lies in the mapping, behind no reference (S1).
        unsafe { copy(to, from.as_ptr() as usize, from.len()) };
        Some(())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own; words and copies borrowed from it are gone.
        let _ = unsafe { mem::unmap(self.range) };
    }
}

/// Makes a memfd of `len_bytes` (rounded up to pages), mode 0600, that can never change its size nor its seals.
pub(crate) fn sealed_memfd(name: &std::ffi::CStr, len_bytes: usize) -> Result<std::os::fd::OwnedFd, Errno> {
    use peregrine_sys::rustix::fs::SealFlags;
    let fd = peregrine_sys::memfd::create(
        name,
        PageCount::for_bytes(len_bytes),
        peregrine_sys::memfd::Pages::Base,
    )?;
    peregrine_sys::memfd::seal(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// Maps a memfd that the peer made, after checking that it can't be pulled from under us, and that it has the size that
/// was agreed.
pub(crate) fn map_from_peer(
    fd: BorrowedFd<'_>,
    len_bytes: usize,
    access: Protection,
) -> Result<Shared, Errno> {
    if len_bytes == 0 || peregrine_sys::memfd::size_if_safe(fd)? < len_bytes as u64 {
        return Err(Errno::EINVAL);
    }
    Shared::map(fd, len_bytes, access)
}

/// The most that is copied by a loop. Beyond it the one instruction that copies strings takes less than a loop in spite of its beginning.
const LOOP_BYTES: usize = 1024;

/// Copies by instructions that are opaque to the compiler, so that it can't assume that the bytes stand still. Those at the end of a short
/// piece may be copied twice; the last copy is the one that stays, and nobody looks at the private side before.
///
/// # Safety
/// `from` readable and `to` writable for `len` bytes, without overlap; whichever is private is exclusively the caller's.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn copy(to: usize, from: usize, len: usize) {
    use std::arch::asm;
    // SAFETY: the caller's promise: each piece begins at the first byte or after it, and ends at the last or before it. The direction flag is
    // clear by the calling convention.
    unsafe {
        match len {
            0 => {}
            // First, middle and last.
            1..=3 => {
                asm!("mov {a:l}, [{from}]", "mov {b:l}, [{from} + {half}]", "mov [{to}], {a:l}", "mov [{to} + {half}], {b:l}",
                "mov {a:l}, [{from} + {len} - 1]", "mov [{to} + {len} - 1], {a:l}",
                a = out(reg_abcd) _, b = out(reg_abcd) _, from = in(reg) from, to = in(reg) to, len = in(reg) len, half = in(reg) len / 2,
                options(nostack, preserves_flags))
            }
            4..=7 => {
                asm!("mov {a:e}, [{from}]", "mov {b:e}, [{from} + {len} - 4]", "mov [{to}], {a:e}", "mov [{to} + {len} - 4], {b:e}",
                a = out(reg) _, b = out(reg) _, from = in(reg) from, to = in(reg) to, len = in(reg) len,
                options(nostack, preserves_flags))
            }
            8..=15 => {
                asm!("mov {a}, [{from}]", "mov {b}, [{from} + {len} - 8]", "mov [{to}], {a}", "mov [{to} + {len} - 8], {b}",
                a = out(reg) _, b = out(reg) _, from = in(reg) from, to = in(reg) to, len = in(reg) len,
                options(nostack, preserves_flags))
            }
            16..=32 => {
                asm!("movups {a}, [{from}]", "movups {b}, [{from} + {len} - 16]", "movups [{to}], {a}",
                "movups [{to} + {len} - 16], {b}",
                a = out(xmm_reg) _, b = out(xmm_reg) _, from = in(reg) from, to = in(reg) to, len = in(reg) len,
                options(nostack, preserves_flags))
            }
            // All but the last 32 bytes or fewer, and those, counted from the end.
            33..=LOOP_BYTES => {
                asm!("2:", "movups {a}, [{from} + {at}]", "movups {b}, [{from} + {at} + 16]", "movups [{to} + {at}], {a}",
                "movups [{to} + {at} + 16], {b}", "add {at}, 32", "cmp {at}, {last}", "jb 2b",
                "movups {a}, [{from} + {last}]", "movups {b}, [{from} + {last} + 16]", "movups [{to} + {last}], {a}",
                "movups [{to} + {last} + 16], {b}",
                a = out(xmm_reg) _, b = out(xmm_reg) _, at = inout(reg) 0usize => _, last = in(reg) len - 32,
                from = in(reg) from, to = in(reg) to, options(nostack))
            }
            // The microcode writes whole lines when it begins at one: the first 64 bytes apart, and then from the first line after
            // `to` on, so that the two overlap or meet.
            _ => {
                let ahead = 64 - to % 64;
                asm!("movups {a}, [{from}]", "movups {b}, [{from} + 16]", "movups {c}, [{from} + 32]", "movups {d}, [{from} + 48]",
                "movups [{to}], {a}", "movups [{to} + 16], {b}", "movups [{to} + 32], {c}", "movups [{to} + 48], {d}",
                a = out(xmm_reg) _, b = out(xmm_reg) _, c = out(xmm_reg) _, d = out(xmm_reg) _, from = in(reg) from, to = in(reg) to,
                options(nostack, preserves_flags));
                asm!("rep movsb", inout("rcx") len - ahead => _, inout("rdi") to + ahead => _, inout("rsi") from + ahead => _,
                options(nostack, preserves_flags))
            }
        }
    }
}

/// Copies by volatile accesses, so that the compiler can't read twice, or assume that the bytes stand still.
///
/// # Safety
/// `from` readable and `to` writable for `len` bytes, without overlap; whichever is private is exclusively the caller's.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn copy(to: usize, from: usize, len: usize) {
    for i in 0..len {
        // SAFETY: the caller's promise.
        unsafe {
            let byte: *const u8 = std::ptr::with_exposed_provenance(from + i);
            let place: *mut u8 = std::ptr::with_exposed_provenance_mut(to + i);
            place.write_volatile(byte.read_volatile());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_as_written_and_nothing_is_read_beyond_the_mapping() {
        let fd = sealed_memfd(c"test", 3 * PAGE_SIZE).unwrap();
        let a = Shared::map(&fd, 3 * PAGE_SIZE, Protection::ReadWrite).unwrap();
        let b = map_from_peer(fd.as_fd(), 3 * PAGE_SIZE, Protection::Read).unwrap();
        let some = [(64, 256), (100, 5000), (8, 0), (3 * PAGE_SIZE - 1, 1)];
        for (offset, len) in
            (0..80).map(|len| (len % 9, len)).chain((1000..1050).map(|len| (3, len))).chain(some)
        {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + offset) as u8).collect();
            // Between two others that stay as they are.
            let begin = offset.saturating_sub(1);
            let end = (offset + len + 1).min(3 * PAGE_SIZE);
            a.write(begin, &vec![0xEE; end - begin]).unwrap();
            a.write(offset, &bytes).unwrap();
            let mut back = vec![9];
            b.append_to(begin, end - begin, &mut back).unwrap();
            let mut expected = vec![0xEE; end - begin];
            expected[offset - begin..][..len].copy_from_slice(&bytes);
            assert_eq!((back[0], &back[1..]), (9, &expected[..]), "{len} at {offset}");
            let mut back = vec![9, 8];
            b.append_to(offset, len, &mut back).unwrap();
            assert_eq!((&back[..2], &back[2..]), (&[9, 8][..], &bytes[..]), "{len} at {offset}");
        }
        assert!(b.append_to(3 * PAGE_SIZE, 1, &mut Vec::new()).is_none());
        assert!(b.append_to(usize::MAX, 2, &mut Vec::new()).is_none());
        assert!(a.write(3 * PAGE_SIZE - 1, &[1, 2]).is_none());
    }

    #[test]
    fn a_file_that_can_shrink_is_not_mapped() {
        use peregrine_sys::memfd;
        let fd = memfd::create(c"test", PageCount::new(2), memfd::Pages::Base).unwrap();
        assert!(map_from_peer(fd.as_fd(), PAGE_SIZE, Protection::Read).is_err());
        memfd::seal_size(&fd).unwrap();
        assert!(map_from_peer(fd.as_fd(), 2 * PAGE_SIZE, Protection::Read).is_ok());
        assert!(map_from_peer(fd.as_fd(), 3 * PAGE_SIZE, Protection::Read).is_err(), "longer than the file");
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        assert!(map_from_peer(file.as_fd(), PAGE_SIZE, Protection::Read).is_err(), "not a memfd");
    }
}
