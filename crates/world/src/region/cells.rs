//! A region as words of one type, each read and written at once.

use super::Region;
use peregrine_base::VirtAddr;
use peregrine_base::sync::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use peregrine_vm::OutOfBounds;
use std::fmt;
use std::marker::PhantomData;

mod sealed {
    pub trait Sealed {}
}

/// A word that is read and written at once: integers and floats of up to eight bytes.
pub trait Word: Copy + sealed::Sealed + 'static {
    #[doc(hidden)]
    type Bits: Copy + PartialEq;
    #[doc(hidden)]
    fn to_bits(self) -> Self::Bits;
    #[doc(hidden)]
    fn from_bits(bits: Self::Bits) -> Self;
    #[doc(hidden)]
    fn plus(self, other: Self) -> Self;
    /// # Safety
    /// `at` is aligned, mapped, and reached by atomics and volatile copies only.
    #[doc(hidden)]
    unsafe fn load(at: *mut u8) -> Self::Bits;
    /// # Safety
    /// As `load`.
    #[doc(hidden)]
    unsafe fn store(at: *mut u8, bits: Self::Bits);
    /// # Safety
    /// As `load`.
    #[doc(hidden)]
    unsafe fn exchange(at: *mut u8, old: Self::Bits, new: Self::Bits) -> Result<Self::Bits, Self::Bits>;
}

macro_rules! words {
    ($($word:ty, $bits:ty, $atomic:ty, $to:expr, $from:expr, $plus:expr;)*) => {$(
        impl sealed::Sealed for $word {}
        impl Word for $word {
            type Bits = $bits;
            #[inline]
            fn to_bits(self) -> $bits {
                let to: fn($word) -> $bits = $to;
                to(self)
            }
            #[inline]
            fn from_bits(bits: $bits) -> $word {
                let from: fn($bits) -> $word = $from;
                from(bits)
            }
            #[inline]
            fn plus(self, other: $word) -> $word {
                let plus: fn($word, $word) -> $word = $plus;
                plus(self, other)
            }
            #[inline]
            unsafe fn load(at: *mut u8) -> $bits {
                // SAFETY: the caller's. Acquire pairs with the Release of `store` and `exchange`.
                unsafe { <$atomic>::from_ptr(at.cast()) }.load(Ordering::Acquire)
            }
            #[inline]
            unsafe fn store(at: *mut u8, bits: $bits) {
                // SAFETY: the caller's. Release pairs with the Acquire of `load` and `exchange`.
                unsafe { <$atomic>::from_ptr(at.cast()) }.store(bits, Ordering::Release);
            }
            #[inline]
            unsafe fn exchange(at: *mut u8, old: $bits, new: $bits) -> Result<$bits, $bits> {
                // SAFETY: the caller's. AcqRel: as both of the above.
                unsafe { <$atomic>::from_ptr(at.cast()) }
                    .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
            }
        }
    )*};
}

words! {
    u8, u8, AtomicU8, |v| v, |b| b, |a, b| a.wrapping_add(b);
    i8, u8, AtomicU8, |v| v as u8, |b| b as i8, |a, b| a.wrapping_add(b);
    u16, u16, AtomicU16, |v| v, |b| b, |a, b| a.wrapping_add(b);
    i16, u16, AtomicU16, |v| v as u16, |b| b as i16, |a, b| a.wrapping_add(b);
    u32, u32, AtomicU32, |v| v, |b| b, |a, b| a.wrapping_add(b);
    i32, u32, AtomicU32, |v| v as u32, |b| b as i32, |a, b| a.wrapping_add(b);
    f32, u32, AtomicU32, f32::to_bits, f32::from_bits, |a, b| a + b;
    u64, u64, AtomicU64, |v| v, |b| b, |a, b| a.wrapping_add(b);
    i64, u64, AtomicU64, |v| v as u64, |b| b as i64, |a, b| a.wrapping_add(b);
    f64, u64, AtomicU64, f64::to_bits, f64::from_bits, |a, b| a + b;
}

/// A region as words of one type, by index.
#[derive(Clone, Copy)]
pub struct Cells<'a, T> {
    start: usize,
    count: usize,
    region: PhantomData<(&'a Region, T)>,
}

impl<T: Word> Cells<'_, T> {
    /// The words that fit whole into `len_bytes` bytes from `start` on, a page's first address in a region.
    pub(super) const fn new(start: usize, len_bytes: usize) -> Self {
        Self { start, count: len_bytes / size_of::<T>(), region: PhantomData }
    }

    /// How many there are.
    pub const fn len(self) -> usize {
        self.count
    }

    /// Whether the region is smaller than one word.
    pub const fn is_empty(self) -> bool {
        self.count == 0
    }

    #[inline]
    fn at(self, index: usize) -> Result<*mut u8, OutOfBounds> {
        if index < self.count {
            return Ok(VirtAddr::new(self.start + index * size_of::<T>()).as_ptr());
        }
        let (len_bytes, memory_bytes) = (size_of::<T>(), self.count * size_of::<T>());
        Err(OutOfBounds { offset_bytes: index.saturating_mul(len_bytes), len_bytes, memory_bytes })
    }

    /// The word at `index`.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    #[inline]
    pub fn get(self, index: usize) -> Result<T, OutOfBounds> {
        let at = self.at(index)?;
        // SAFETY: in the region, which begins on a page, so aligned; atomics and volatile copies only (S1).
        Ok(T::from_bits(unsafe { T::load(at) }))
    }

    /// Replaces the word at `index`.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    #[inline]
    pub fn set(self, index: usize, value: T) -> Result<(), OutOfBounds> {
        let at = self.at(index)?;
        // SAFETY: as in `get`.
        unsafe { T::store(at, value.to_bits()) };
        Ok(())
    }

    /// Copies the words from `first` on out, each read at once (all of them are not).
    ///
    /// # Errors
    /// [`OutOfBounds`], if not all of them are there; then nothing was copied.
    #[inline]
    pub fn read(self, first: usize, into: &mut [T]) -> Result<(), OutOfBounds> {
        let from = self.run(first, into.len())?;
        for (i, word) in into.iter_mut().enumerate() {
            // SAFETY: as in `get`; `run` checked them all.
            *word = T::from_bits(unsafe { T::load(from.add(i * size_of::<T>())) });
        }
        Ok(())
    }

    /// Replaces the words from `first` on, each written at once (all of them are not).
    ///
    /// # Errors
    /// [`OutOfBounds`], if there is no room for all; then nothing was written.
    #[inline]
    pub fn write(self, first: usize, from: &[T]) -> Result<(), OutOfBounds> {
        let to = self.run(first, from.len())?;
        for (i, word) in from.iter().enumerate() {
            // SAFETY: as in `get`; `run` checked them all.
            unsafe { T::store(to.add(i * size_of::<T>()), word.to_bits()) };
        }
        Ok(())
    }

    /// Address of the first of `words` words, all of which are there.
    #[inline]
    fn run(self, first: usize, words: usize) -> Result<*mut u8, OutOfBounds> {
        let each = size_of::<T>();
        if first <= self.count && words <= self.count - first {
            return Ok(VirtAddr::new(self.start + first * each).as_ptr());
        }
        Err(OutOfBounds {
            offset_bytes: first.saturating_mul(each),
            len_bytes: words.saturating_mul(each),
            memory_bytes: self.count * each,
        })
    }

    /// Adds to the word at `index` in one step (integers wrap around), and tells what it was.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    #[inline]
    pub fn add(self, index: usize, value: T) -> Result<T, OutOfBounds> {
        let at = self.at(index)?;
        // SAFETY: as in `get`.
        let mut old = unsafe { T::load(at) };
        loop {
            let was = T::from_bits(old);
            // SAFETY: as in `get`.
            match unsafe { T::exchange(at, old, was.plus(value).to_bits()) } {
                Ok(_) => return Ok(was),
                Err(now) => old = now,
            }
        }
    }

    /// Replaces the word at `index` by `new` if it is `old` (bit for bit); otherwise tells what it is.
    ///
    /// # Errors
    /// [`OutOfBounds`].
    #[inline]
    pub fn compare_exchange(self, index: usize, old: T, new: T) -> Result<Result<T, T>, OutOfBounds> {
        let at = self.at(index)?;
        // SAFETY: as in `get`.
        let exchanged = unsafe { T::exchange(at, old.to_bits(), new.to_bits()) };
        Ok(exchanged.map(T::from_bits).map_err(T::from_bits))
    }
}

impl<T> fmt::Debug for Cells<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cells at {:#x}", self.count, self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_keep_their_value_through_their_bits() {
        fn check<T: Word + PartialEq + fmt::Debug>(v: T) {
            assert_eq!(T::from_bits(v.to_bits()), v);
        }
        check(-1i8);
        check(-2i16);
        check(-3i32);
        check(i64::MIN);
        check(-0.5f32);
        check(f64::MAX);
        assert_eq!(u8::MAX.plus(1), 0);
    }
}
