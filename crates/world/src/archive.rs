//! The archive: bytes that are written once, of which an image needs no second copy.
//!
//! ```text
//!   chunk of 16 KiB │ slot │ slot │ slot │ … │ rest │     all slots of a chunk have one size
//!   its record      used ▪▪▫▪   what lives now            a slot is taken only if it is in neither
//!                   held ▪▪▪▫   what the last image has
//!
//!   image: held = used, chunks of which nothing is left are free       rollback: used = held, as the image has it
//! ```
//!
//! A packed thread is not changed: it is written before anybody knows where, read, and given back. If its memory is not used again
//! until there is an image without it, then the last image finds all that it needs where it is, whatever has happened since, and a
//! rollback has the books to restore and nothing else. For disk the books tell what is new as well: what is used and not held.
//!
//! Nodes map the archive for reading only, and write with `pwrite`: no stray write of a thread reaches what has no copy.
//!
//! *Between two threads*: no static, no thread-local, no panic, no allocation.

use crate::control::{ARCHIVE_CHUNKS, NONE, imaged, world};
use crate::killpoint::{Point, at as kill_at};
use crate::room::room;
use core::ops::Range;
use peregrine_base::sync::Ordering;
use peregrine_base::{PageRange, Protection, VirtAddr};
use peregrine_sys::raw::Errno;
use peregrine_sys::{mem, memfd};
use peregrine_thread::layout::{ARCHIVE, ARCHIVE_BYTES};

/// Bytes of a chunk.
pub const CHUNK: usize = 16 << 10;
/// Sizes of slots differ by this.
const UNIT: usize = 16;
/// The smallest slot: a record has a bit for each of a chunk's.
const LEAST: usize = CHUNK / 128;
/// The largest: what is left over of a chunk is an eighth of it at most.
pub const MOST: usize = CHUNK / 8;
/// Sizes of slots that there can be, counted in units.
const SIZES: usize = MOST / UNIT + 1;

/// The books, but for the records of the chunks.
#[repr(C)]
pub struct Archive {
    /// By size: the first of the chunks that may have a free slot, or [`NONE`].
    open: [u32; SIZES],
    /// The first free chunk, or [`NONE`].
    free: u32,
    /// Chunks from here on were never used.
    pub used: u32,
    /// Whether anything was taken or given back since the last image.
    changed: bool,
}

/// The record of a chunk; under the lock of the [`Archive`].
#[repr(C, align(64))]
pub struct Chunk {
    used: [u64; 2],
    held: [u64; 2],
    /// Size of its slots in units; 0: it is free.
    units: u32,
    /// Next in the list that it is in.
    next: u32,
    /// Whether it is among the open ones.
    open: bool,
}

impl Chunk {
    /// Bits of the slots that it has.
    fn slots(&self) -> [u64; 2] {
        let count = CHUNK / (self.units as usize * UNIT).max(1);
        let low = |n: usize| if n >= 64 { u64::MAX } else { (1 << n) - 1 };
        [low(count), low(count.saturating_sub(64))]
    }

    /// A slot that is neither used nor held.
    fn free_slot(&self) -> Option<usize> {
        let all = self.slots();
        (0..2).find_map(|w| match all[w] & !(self.used[w] | self.held[w]) {
            0 => None,
            free => Some(w * 64 + free.trailing_zeros() as usize),
        })
    }
}

impl Archive {
    /// Nothing in it.
    pub const EMPTY: Self = Self { open: [NONE; SIZES], free: NONE, used: 0, changed: false };

    /// Takes a slot of so many units; where it is, and whether a chunk was begun for it.
    ///
    /// # Safety
    /// `chunks` has room for `most` records, and those that were ever used are as they were left.
    unsafe fn take(&mut self, chunks: *mut Chunk, units: usize, most: usize) -> Option<(usize, bool)> {
        let mut begun = false;
        loop {
            let i = match self.open[units] {
                NONE => {
                    begun = true;
                    // SAFETY: as promised.
                    unsafe { self.begin(chunks, units, most) }?
                }
                i => i,
            };
            // SAFETY: a chunk of a list has a record, which is ours while the books are locked.
            let c = unsafe { &mut *chunks.add(i as usize) };
            if let Some(slot) = c.free_slot() {
                c.used[slot / 64] |= 1 << (slot % 64);
                self.changed = true;
                return Some((ARCHIVE + i as usize * CHUNK + slot * units * UNIT, begun));
            }
            c.open = false;
            self.open[units] = c.next;
        }
    }

    /// Puts a chunk of slots of so many units among the open ones.
    unsafe fn begin(&mut self, chunks: *mut Chunk, units: usize, most: usize) -> Option<u32> {
        let i = match self.free {
            NONE if (self.used as usize) < most => {
                self.used += 1;
                self.used - 1
            }
            NONE => return None,
            i => {
                // SAFETY: as in `take`.
                self.free = unsafe { (*chunks.add(i as usize)).next };
                i
            }
        };
        let c = Chunk { used: [0; 2], held: [0; 2], units: units as u32, next: self.open[units], open: true };
        // SAFETY: as in `take`; it is below `most`.
        unsafe { chunks.add(i as usize).write(c) };
        self.open[units] = i;
        Some(i)
    }

    /// Gives the slot at `at` back; one that the last image has stays as it is until there is another.
    unsafe fn give_back(&mut self, chunks: *mut Chunk, at: usize) {
        let i = (at - ARCHIVE) / CHUNK;
        // SAFETY: as in `take`; the caller has `at` from there.
        let c = unsafe { &mut *chunks.add(i) };
        let slot = (at - ARCHIVE) % CHUNK / (c.units as usize * UNIT).max(1);
        c.used[slot / 64 % 2] &= !(1 << (slot % 64));
        self.changed = true;
        if !c.open {
            c.open = true;
            c.next = self.open[c.units as usize % SIZES];
            self.open[c.units as usize % SIZES] = i as u32;
        }
    }

    /// What is used is held from now on. Tells `written` where the bytes are that were not held before, and `freed` which chunks
    /// nothing is left of.
    unsafe fn hold(
        &mut self,
        chunks: *mut Chunk,
        mut written: impl FnMut(Range<usize>),
        mut freed: impl FnMut(usize),
    ) {
        if !core::mem::take(&mut self.changed) {
            return;
        }
        (self.open, self.free) = ([NONE; SIZES], NONE);
        // From the last to the first, so that the first come first in the lists, and those at the end get empty.
        for i in (0..self.used).rev() {
            // SAFETY: as in `take`.
            let c = unsafe { &mut *chunks.add(i as usize) };
            let (base, size) = (ARCHIVE + i as usize * CHUNK, c.units as usize * UNIT);
            for w in 0..2 {
                let mut new = c.used[w] & !c.held[w];
                while new != 0 {
                    let at = base + (w * 64 + new.trailing_zeros() as usize) * size;
                    written(at..at + size);
                    new &= new - 1;
                }
            }
            c.held = c.used;
            if c.used == [0; 2] {
                if c.units != 0 {
                    freed(base);
                }
                *c = Chunk { used: [0; 2], held: [0; 2], units: 0, next: self.free, open: false };
                self.free = i;
                continue;
            }
            c.open = c.free_slot().is_some();
            if c.open {
                c.next = core::mem::replace(&mut self.open[c.units as usize % SIZES], i);
            }
        }
    }
}

/// The records of the World's chunks.
const RECORDS: *mut Chunk = ARCHIVE_CHUNKS as *mut Chunk;

fn fd() -> i32 {
    world().archive_fd.load(Ordering::Relaxed) as i32
}

/// Most chunks.
pub fn most_chunks() -> usize {
    room().archive_bytes.load(Ordering::Relaxed) / CHUNK
}

/// Whether `at` lies in the archive.
pub fn contains(at: usize) -> bool {
    (ARCHIVE..ARCHIVE + ARCHIVE_BYTES).contains(&at)
}

/// Bytes that a slot has which is to hold `len`.
pub fn slot_bytes(len: usize) -> usize {
    len.max(LEAST).next_multiple_of(UNIT)
}

/// Writes `bytes`, for good; `None` if they are too many, or there is no room.
pub fn store(bytes: &[u8]) -> Option<usize> {
    let size = slot_bytes(bytes.len());
    if size > MOST {
        return None;
    }
    let most = most_chunks();
    let at = imaged().archive.with(|a| {
        // SAFETY: the records are mapped wherever the World is, and change under this lock only.
        let (at, begun) = unsafe { a.take(RECORDS, size / UNIT, most) }?;
        kill_at(Point::ArchiveTaken);
        if begun {
            imaged().memory_used.fetch_add(CHUNK as u64, Ordering::Relaxed);
        }
        Some(at)
    })?;
    if memfd::write_raw(fd(), (at - ARCHIVE) as u64, bytes).is_err() {
        // SAFETY: just taken.
        unsafe { give_back(at) };
        return None;
    }
    kill_at(Point::ArchiveWritten);
    Some(at)
}

/// Gives back what [`store`] returned.
///
/// # Safety
/// Nobody reads it any more.
pub unsafe fn give_back(at: usize) {
    // SAFETY: as promised; the records are mapped.
    imaged().archive.with(|a| unsafe { a.give_back(RECORDS, at) });
    kill_at(Point::ArchiveGivenBack);
}

/// Makes what is in the archive part of the image that is being taken; tells `written` what no image had before.
///
/// # Safety
/// In the supervisor; every node is paused.
pub unsafe fn hold(written: impl FnMut(Range<usize>)) {
    let freed = |base: usize| {
        imaged().memory_used.fetch_sub(CHUNK as u64, Ordering::Relaxed);
        let _ = memfd::punch_raw(fd(), (base - ARCHIVE) as u64, CHUNK as u64);
    };
    // SAFETY: as promised; no lock is held in a pause.
    imaged().archive.with(|a| unsafe { a.hold(RECORDS, written, freed) });
}

/// Where the slots are that the last image has.
///
/// # Safety
/// As [`hold`].
#[cfg(feature = "killpoints")]
pub unsafe fn held() -> Vec<Range<usize>> {
    let mut all = Vec::new();
    for i in 0..crate::control::used_now()[5] {
        // SAFETY: as promised: nobody changes the records.
        let c = unsafe { &*RECORDS.add(i) };
        let size = c.units as usize * UNIT;
        for slot in (0..128).filter(|s| c.held[s / 64] & 1 << (s % 64) != 0) {
            let at = ARCHIVE + i * CHUNK + slot * size;
            all.push(at..at + size);
        }
    }
    all
}

/// From now on, this process and those that are forked of it can't write to the archive but by [`store`].
///
/// # Errors
/// The kernel's.
pub fn make_read_only() -> Result<(), Errno> {
    let range = PageRange::covering(VirtAddr::new(ARCHIVE), room().archive_bytes.load(Ordering::Relaxed));
    // SAFETY: the archive's own mapping; nothing in a node writes there.
    unsafe { mem::protect(range, Protection::Read) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    /// Books of their own, with room for so many chunks.
    struct Books {
        archive: Archive,
        chunks: Vec<Chunk>,
    }

    impl Books {
        fn new(chunks: usize) -> Self {
            let none = || Chunk { used: [0; 2], held: [0; 2], units: 0, next: 0, open: false };
            Self { archive: Archive::EMPTY, chunks: (0..chunks).map(|_| none()).collect() }
        }

        fn take(&mut self, size: usize) -> Option<usize> {
            let most = self.chunks.len();
            // SAFETY: as many records as there are said to be.
            unsafe { self.archive.take(self.chunks.as_mut_ptr(), size / UNIT, most) }.map(|(at, _)| at)
        }

        fn give_back(&mut self, at: usize) {
            // SAFETY: as in `take`.
            unsafe { self.archive.give_back(self.chunks.as_mut_ptr(), at) };
        }

        fn hold(&mut self) -> (BTreeSet<usize>, Vec<usize>) {
            let (mut written, mut freed) = (BTreeSet::new(), Vec::new());
            // SAFETY: as in `take`.
            unsafe {
                self.archive.hold(
                    self.chunks.as_mut_ptr(),
                    |r| assert!(written.insert(r.start), "told twice"),
                    |base| freed.push(base),
                );
            }
            (written, freed)
        }

        /// All bytes of the books.
        fn copy(&self) -> (Archive, Vec<Chunk>) {
            // SAFETY: plain words.
            unsafe {
                (core::ptr::read(&self.archive), self.chunks.iter().map(|c| core::ptr::read(c)).collect())
            }
        }
    }

    #[test]
    fn without_images_what_is_given_back_is_there_for_the_next() {
        let mut books = Books::new(3);
        for _ in 0..5 {
            let all: Vec<usize> = core::iter::from_fn(|| books.take(MOST)).collect();
            assert_eq!(all.len(), 3 * (CHUNK / MOST));
            all.into_iter().for_each(|at| books.give_back(at));
        }
    }

    #[test]
    fn a_chunk_is_free_when_none_of_its_slots_is_used_whichever_was_the_last() {
        for size in [LEAST, slot_bytes(300), MOST] {
            let count = CHUNK / size;
            for last in 0..count {
                let mut books = Books::new(1);
                let mut all: Vec<usize> = (0..count).map(|_| books.take(size).expect("room")).collect();
                let last = all.remove(last);
                all.into_iter().for_each(|at| books.give_back(at));
                assert!(books.hold().1.is_empty(), "{last:#x} of {count} is still used");
                books.give_back(last);
                assert_eq!(books.hold().1, [ARCHIVE], "{last:#x} of {count}");
            }
        }
    }

    /// Takes, gives back, takes images and goes back to them at random, beside two sets of what lives now and what lived then.
    #[test]
    fn what_the_last_image_has_is_never_given_to_anybody_else() {
        for seed in 1..60u64 {
            let mut dice = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut random = |n: u64| {
                dice ^= dice << 13;
                dice ^= dice >> 7;
                dice ^= dice << 17;
                (dice >> 11) % n
            };
            let mut books = Books::new(12);
            let (mut now, mut then): (BTreeMap<usize, usize>, BTreeMap<usize, usize>) = Default::default();
            let mut image = books.copy();
            let mut refused = 0;
            for _ in 0..4000 {
                match random(40) {
                    0 => {
                        let (written, freed) = books.hold();
                        let new: BTreeSet<usize> =
                            now.keys().filter(|at| !then.contains_key(at)).copied().collect();
                        assert_eq!(written, new, "seed {seed}: what no image had");
                        for base in freed {
                            let left = now.range(base..base + CHUNK).next();
                            assert_eq!(left, None, "seed {seed}: a chunk that is not empty was freed");
                        }
                        (then, image) = (now.clone(), books.copy());
                    }
                    1 => {
                        now = then.clone();
                        (books.archive, books.chunks) = image;
                        image = books.copy();
                    }
                    // Only the second half of each chunk is left.
                    2 if random(4) == 0 => {
                        let first_half = |at: &usize| (at - ARCHIVE) % CHUNK < CHUNK / 2;
                        let gone: Vec<usize> = now.keys().copied().filter(first_half).collect();
                        for at in gone {
                            now.remove(&at);
                            books.give_back(at);
                        }
                    }
                    2..20 if !now.is_empty() => {
                        let at = *now.keys().nth(random(now.len() as u64) as usize).unwrap();
                        now.remove(&at);
                        books.give_back(at);
                    }
                    _ => {
                        let size = slot_bytes([100, 300, 304, 2000, 2048][random(5) as usize]);
                        let Some(at) = books.take(size) else {
                            refused += 1;
                            continue;
                        };
                        for taken in [&now, &then] {
                            let before = taken.range(..at + size).next_back();
                            assert!(
                                before.is_none_or(|(b, len)| b + len <= at),
                                "seed {seed}: {at:#x} lies in {before:x?}"
                            );
                        }
                        assert!(at % UNIT == 0 && (at - ARCHIVE) % CHUNK + size <= CHUNK);
                        now.insert(at, size);
                    }
                }
            }
            // Twelve chunks are few; and all of them come free in the end, whatever has been.
            for at in core::mem::take(&mut now).into_keys() {
                books.give_back(at);
            }
            books.hold();
            let all = (0..).map_while(|_| books.take(MOST)).count();
            assert_eq!(all, 12 * (CHUNK / MOST), "seed {seed}, {refused} refused");
        }
    }
}
