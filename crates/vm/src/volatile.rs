//! Memory that somebody else may change: copied in and out, never referred to (S1).
//!
//! A pager fills pages, an alias writes them, another process shares them. The compiler may assume that the bytes
//! behind a `&[u8]` stand still, so no reference to such bytes is ever made: [`Volatile`] copies. A copy is not atomic
//! as a whole; aligned words of up to eight bytes are.

use core::fmt;
use core::marker::PhantomData;
use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_base::{PageRange, VirtAddr};

/// Bytes that others may change at any time, for as long as `'a`.
///
/// ```
/// use peregrine_vm::{Mapping, PageCount};
/// let memory = Mapping::memfd(PageCount::new(1))?;
/// let bytes = memory.bytes();
/// bytes.write(10, b"frame")?;
/// let mut back = [0; 5];
/// bytes.read(10, &mut back)?;
/// assert_eq!(&back, b"frame");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// There is no way to a slice:
///
/// ```compile_fail
/// use peregrine_vm::{Mapping, PageCount};
/// let memory = Mapping::memfd(PageCount::new(1)).unwrap();
/// let slice: &[u8] = &memory;
/// ```
#[derive(Clone, Copy)]
pub struct Volatile<'a> {
    start: *mut u8,
    len_bytes: usize,
    memory: PhantomData<&'a ()>,
}

// SAFETY: every access is of an atomic word, or made by an instruction that the compiler knows nothing of, so threads may make
// them at the same time (S1).
unsafe impl Send for Volatile<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for Volatile<'_> {}

/// An access that does not lie wholly inside the memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{len_bytes} bytes at offset {offset_bytes} lie beyond the {memory_bytes} bytes of this memory, or unaligned"
)]
pub struct OutOfBounds {
    /// First byte asked for.
    pub offset_bytes: usize,
    /// Bytes asked for.
    pub len_bytes: usize,
    /// Bytes that there are.
    pub memory_bytes: usize,
}

impl<'a> Volatile<'a> {
    /// The bytes of `range`.
    ///
    /// # Safety
    /// `range` stays mapped for `'a`, and no reference to its bytes exists. It need not be accessible: a touch may trap.
    #[inline]
    pub const unsafe fn new(range: PageRange) -> Self {
        Self { start: range.start().as_ptr(), len_bytes: range.len_bytes(), memory: PhantomData }
    }

    /// How many bytes there are.
    #[inline]
    pub const fn len_bytes(self) -> usize {
        self.len_bytes
    }

    /// `len_bytes` of them from `offset_bytes` on. What is aligned in it is so by its address.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    #[inline]
    pub fn part(self, offset_bytes: usize, len_bytes: usize) -> Result<Self, OutOfBounds> {
        Ok(Self { start: self.at(offset_bytes, len_bytes, 1)?, len_bytes, memory: PhantomData })
    }

    /// Address of the byte at `offset_bytes`, to be handed to a system call.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    pub fn address(self, offset_bytes: usize) -> Result<VirtAddr, OutOfBounds> {
        Ok(VirtAddr::new(self.at(offset_bytes, 1, 1)? as usize))
    }

    #[inline]
    fn at(self, offset_bytes: usize, len_bytes: usize, align: usize) -> Result<*mut u8, OutOfBounds> {
        let fits = offset_bytes <= self.len_bytes && len_bytes <= self.len_bytes - offset_bytes;
        let at = self.start.wrapping_add(offset_bytes);
        if fits && at.addr().is_multiple_of(align) {
            Ok(at)
        } else {
            Err(OutOfBounds { offset_bytes, len_bytes, memory_bytes: self.len_bytes })
        }
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    #[inline]
    pub fn read(self, offset_bytes: usize, into: &mut [u8]) -> Result<(), OutOfBounds> {
        let from = self.at(offset_bytes, into.len(), 1)?;
        // SAFETY: `at` checked the source, which stays mapped for 'a; the destination is exclusive.
        unsafe { copy(into.as_mut_ptr(), from, into.len()) };
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    #[inline]
    pub fn write(self, offset_bytes: usize, from: &[u8]) -> Result<(), OutOfBounds> {
        let to = self.at(offset_bytes, from.len(), 1)?;
        // SAFETY: `at` checked the destination, which stays mapped for 'a and is behind no reference (S1).
        unsafe { copy(to, from.as_ptr(), from.len()) };
        Ok(())
    }

    /// Sets `len_bytes` bytes to `byte`.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    pub fn fill(self, offset_bytes: usize, len_bytes: usize, byte: u8) -> Result<(), OutOfBounds> {
        let to = self.at(offset_bytes, len_bytes, 1)?;
        for i in 0..len_bytes {
            // SAFETY: `at` checked the whole destination (S1).
            unsafe { put(to.add(i), byte) };
        }
        Ok(())
    }

    /// Reads one byte.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    #[inline]
    pub fn load_u8(self, offset_bytes: usize) -> Result<u8, OutOfBounds> {
        let from = self.at(offset_bytes, 1, 1)?;
        // SAFETY: `at` checked it (S1).
        Ok(unsafe { get(from) })
    }

    /// Writes one byte.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    #[inline]
    pub fn store_u8(self, offset_bytes: usize, value: u8) -> Result<(), OutOfBounds> {
        let to = self.at(offset_bytes, 1, 1)?;
        // SAFETY: `at` checked it (S1).
        unsafe { put(to, value) };
        Ok(())
    }

    /// Reads an aligned word at once.
    ///
    /// # Errors
    /// [`OutOfBounds`], also if the word is not aligned to eight bytes.
    #[inline]
    pub fn load_u64(self, offset_bytes: usize) -> Result<u64, OutOfBounds> {
        // Acquire pairs with the Release of `store_u64` on the same word, in whatever thread or process.
        Ok(self.word(offset_bytes)?.load(Ordering::Acquire))
    }

    /// Writes an aligned word at once.
    ///
    /// # Errors
    /// As [`Volatile::load_u64`].
    #[inline]
    pub fn store_u64(self, offset_bytes: usize, value: u64) -> Result<(), OutOfBounds> {
        // Release pairs with the Acquire of `load_u64`.
        self.word(offset_bytes)?.store(value, Ordering::Release);
        Ok(())
    }

    /// Adds to an aligned word at once and returns what it was.
    ///
    /// # Errors
    /// As [`Volatile::load_u64`].
    #[inline]
    pub fn fetch_add_u64(self, offset_bytes: usize, value: u64) -> Result<u64, OutOfBounds> {
        // AcqRel: pairs with itself and with load and store above.
        Ok(self.word(offset_bytes)?.fetch_add(value, Ordering::AcqRel))
    }

    #[inline]
    fn word(self, offset_bytes: usize) -> Result<&'a AtomicU64, OutOfBounds> {
        let at = self.at(offset_bytes, 8, 8)?;
        // SAFETY: checked and aligned by `at`; an atomic may be changed by others at any
        // time, and the reference does not leave this file.
        Ok(unsafe { AtomicU64::from_ptr(at.cast()) })
    }
}

impl fmt::Debug for Volatile<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Volatile({:p}, {} bytes)", self.start, self.len_bytes)
    }
}

/// Reads a byte that others may be writing. Two plain accesses at once, volatile or not, would be undefined behaviour, and an
/// atomic one may be left out if nobody needs its value, with the trap that it was to raise: an instruction is neither.
///
/// # Safety
/// It is readable, or a touch traps.
#[inline]
unsafe fn get(from: *const u8) -> u8 {
    #[cfg(target_arch = "x86_64")]
    {
        let value: u8;
        // SAFETY: the caller's promise; reads one byte.
        unsafe {
            core::arch::asm!("mov {v}, byte ptr [{from}]", v = out(reg_byte) value, from = in(reg) from,
                options(nostack, preserves_flags, readonly));
        }
        value
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller's promise; the reference does not leave this line. Relaxed: bytes order nothing.
    unsafe { peregrine_base::sync::AtomicU8::from_ptr(from.cast_mut()) }.load(Ordering::Relaxed)
}

/// Writes a byte that others may be reading and writing.
///
/// # Safety
/// It is writable, or a touch traps.
#[inline]
unsafe fn put(to: *mut u8, value: u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise; writes one byte.
    unsafe {
        core::arch::asm!("mov byte ptr [{to}], {v}", v = in(reg_byte) value, to = in(reg) to,
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: as in `get`.
    unsafe { peregrine_base::sync::AtomicU8::from_ptr(to) }.store(value, Ordering::Relaxed);
}

/// Copies with an instruction that the compiler can't see into, so it can't assume that the source stands still, read it
/// twice or split it in a way of its own.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes, or a touch traps; they don't overlap.
#[inline]
unsafe fn copy(to: *mut u8, from: *const u8, len: usize) {
    if len <= 32 {
        for i in 0..len {
            // SAFETY: the caller's promise; short copies are not worth the start-up of a string instruction.
            unsafe { put(to.add(i), get(from.add(i))) };
        }
        return;
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise; `rep movsb` reads and writes exactly `len` bytes, and can be resumed after a trap in
    // its middle. The direction flag is clear by the calling convention.
    unsafe {
        core::arch::asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..len {
        // SAFETY: the caller's promise.
        unsafe { put(to.add(i), get(from.add(i))) };
    }
}
