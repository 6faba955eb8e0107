//! Blobs: messages, arguments and results on their way between threads, in shared memory.
//!
//! ```text
//!  ARENA … │ next │ len │ ends │ end ids (u32 each) │ bytes … │
//! ```
//!
//! A blob is written by one thread before anybody else knows its address, and read by one after it was taken off its
//! queue; the bytes are copied to the reader's own heap before anything is made of them (S4).

use crate::control::{Arena, imaged, world};
use crate::killpoint::{Point, at};
use crate::room::room;
use core::alloc::Layout;
use core::ptr::NonNull;
use peregrine_base::sync::Ordering;
use peregrine_thread::layout::{ARENA, ARENA_BYTES};

/// The head of a blob.
#[repr(C)]
pub struct Blob {
    /// Next in its queue, 0 for none.
    pub next: usize,
    /// Bytes of payload.
    pub len: usize,
    /// Channel ends that travel in it.
    pub ends: usize,
}

const STEP: usize = 1 << 20;

fn layout(len: usize, ends: usize) -> Option<Layout> {
    let size = size_of::<Blob>().checked_add(ends.checked_mul(4)?)?.checked_add(len)?;
    Layout::from_size_align(size, 16).ok()
}

/// World memory is used up: how much there is.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[error(
    "World memory is used up: {asked} more bytes asked for, {used} of {limit} in use; receive or drop messages, or raise {}",
    self.of.setting()
)]
pub struct OutOfMemory {
    /// Bytes asked for.
    pub asked: usize,
    /// Bytes in use.
    pub used: u64,
    /// The limit.
    pub limit: u64,
    /// What it limits.
    pub of: Limited,
}

/// What there can be no more of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limited {
    /// World memory, by [`Config::memory_bytes`](crate::Config::memory_bytes).
    Memory,
    /// Addresses for messages and for suspended threads without a slot of their own: a sixteenth of `RLIMIT_AS`, or 64 GiB.
    Addresses,
}

impl Limited {
    const fn setting(self) -> &'static str {
        match self {
            Self::Memory => "PEREGRINE_MEMORY",
            Self::Addresses => "the limit on address space (ulimit -v), of which this is a sixteenth",
        }
    }
}

/// Takes `by` bytes from the World's budget.
pub fn charge(by: usize) -> Result<(), OutOfMemory> {
    let (used, limit) = (&imaged().memory_used, world().memory_limit.load(Ordering::Relaxed));
    let before = used.fetch_add(by as u64, Ordering::Relaxed);
    at(Point::ChargeAdded);
    if before + by as u64 > limit {
        used.fetch_sub(by as u64, Ordering::Relaxed);
        at(Point::ChargeRefused);
        return Err(OutOfMemory { asked: by, used: before, limit, of: Limited::Memory });
    }
    Ok(())
}

impl Arena {
    unsafe fn grow(&mut self, layout: Layout, always: bool) -> Result<(), OutOfMemory> {
        let now = if self.end == 0 { ARENA } else { self.end };
        // Room for the alignment of a region, too.
        let by =
            (layout.size() + layout.align() + 4096).max(STEP).max((now - ARENA) / 8).next_multiple_of(STEP);
        let most = room().arena_bytes.load(Ordering::Relaxed);
        if now + by > ARENA + most {
            let used = (now - ARENA) as u64;
            return Err(OutOfMemory { asked: by, used, limit: most as u64, of: Limited::Addresses });
        }
        if always {
            imaged().memory_used.fetch_add(by as u64, Ordering::Relaxed);
        } else {
            charge(by)?;
        }
        at(Point::ArenaCharged);
        // SAFETY: [now, now + by) is reserved for the arena and unused.
        unsafe {
            let end = match NonNull::new(self.end as *mut u8) {
                None => self.talc.claim(now as *mut u8, by),
                Some(end) => Some(self.talc.extend(end, (now + by) as *mut u8)),
            };
            at(Point::ArenaExtended);
            self.end = end.map_or(self.end, |e| e.as_ptr() as usize);
            imaged().arena_end.store(self.end, Ordering::Release);
            at(Point::ArenaGrown);
        }
        Ok(())
    }
}

/// Memory of the arena for blobs and shared regions; what it holds is whatever was there.
pub fn allocate(layout: Layout) -> Result<usize, OutOfMemory> {
    reserve(layout, false)
}

/// The same, beyond the limit on World memory if need be: for what must not fail, because it makes room elsewhere. `None` if the
/// arena's addresses are used up.
pub fn allocate_always(layout: Layout) -> Option<usize> {
    reserve(layout, true).ok()
}

fn reserve(layout: Layout, always: bool) -> Result<usize, OutOfMemory> {
    imaged().arena.with(|arena| {
        // SAFETY: the size is not zero; the arena is ours while locked.
        unsafe {
            if let Some(p) = arena.talc.try_allocate(layout) {
                at(Point::ArenaAllocated);
                return Ok(p.as_ptr() as usize);
            }
            arena.grow(layout, always)?;
            let again = arena.talc.try_allocate(layout);
            again.map(|p| p.as_ptr() as usize).ok_or(OutOfMemory {
                asked: layout.size(),
                used: (arena.end - ARENA) as u64,
                limit: room().arena_bytes.load(Ordering::Relaxed) as u64,
                of: Limited::Addresses,
            })
        }
    })
}

/// Gives memory back that [`allocate`] or [`allocate_always`] gave.
///
/// # Safety
/// It was allocated with this layout, and nobody uses it any more.
pub unsafe fn give_back(at: usize, layout: Layout) {
    // SAFETY: the caller's promise.
    imaged().arena.with(|arena| unsafe { arena.talc.deallocate(at as *mut u8, layout) });
}

/// Gives memory back as [`give_back`] does, and takes less of it, which is there whatever else asks. The bytes are not kept.
///
/// # Safety
/// As [`give_back`]; `new` is smaller than `old`, and not more aligned.
pub unsafe fn replace(at: usize, old: Layout, new: Layout) -> usize {
    imaged().arena.with(|arena| {
        // SAFETY: the caller's promise.
        unsafe {
            arena.talc.deallocate(at as *mut u8, old);
            crate::killpoint::at(Point::ArenaFreed);
            // What has just been given back is large enough, and the arena is locked. Were it not so, a node that dies here loses nothing.
            arena
                .talc
                .try_allocate(new)
                .map_or_else(|| peregrine_sys::process::kill_self(), |p| p.as_ptr() as usize)
        }
    })
}

/// Writes a blob.
pub fn write(bytes: &[u8], ends: &[u32]) -> Result<usize, OutOfMemory> {
    let Some(layout) = layout(bytes.len(), ends.len()) else {
        let limit = ARENA_BYTES as u64;
        return Err(OutOfMemory { asked: bytes.len(), used: 0, limit, of: Limited::Addresses });
    };
    let blob = allocate(layout)?;
    // SAFETY: just allocated with this layout; unknown to anybody else.
    unsafe {
        (blob as *mut Blob).write(Blob { next: 0, len: bytes.len(), ends: ends.len() });
        let ids = (blob + size_of::<Blob>()) as *mut u32;
        core::ptr::copy_nonoverlapping(ends.as_ptr(), ids, ends.len());
        core::ptr::copy_nonoverlapping(bytes.as_ptr(), ids.add(ends.len()).cast(), bytes.len());
        at(Point::ArenaFilled);
    }
    Ok(blob)
}

/// Copies a blob out and frees it: its bytes and its channel ends.
///
/// # Safety
/// `blob` came from [`write`], and the caller took it off its queue.
pub unsafe fn take(blob: usize) -> (Vec<u8>, Vec<u32>) {
    // SAFETY: the caller owns the blob.
    unsafe {
        let copy = read(blob);
        at(Point::BlobCopied);
        free(blob);
        copy
    }
}

/// Copies a blob out.
///
/// # Safety
/// As [`take`].
pub unsafe fn read(blob: usize) -> (Vec<u8>, Vec<u32>) {
    // SAFETY: the caller owns the blob.
    unsafe {
        let Blob { len, ends, .. } = (blob as *const Blob).read();
        let ids = (blob + size_of::<Blob>()) as *const u32;
        let (mut bytes, mut list) = (Vec::with_capacity(len), Vec::with_capacity(ends));
        core::ptr::copy_nonoverlapping(ids, list.as_mut_ptr(), ends);
        list.set_len(ends);
        core::ptr::copy_nonoverlapping(ids.add(ends).cast::<u8>(), bytes.as_mut_ptr(), len);
        bytes.set_len(len);
        (bytes, list)
    }
}

/// Frees a blob without reading it; its ends must have been dealt with.
///
/// # Safety
/// As [`take`].
pub unsafe fn free(blob: usize) {
    // SAFETY: the caller owns the blob, whose head is intact.
    unsafe {
        let Blob { len, ends, .. } = (blob as *const Blob).read();
        let Some(layout) = layout(len, ends) else { return };
        imaged().arena.with(|arena| {
            arena.talc.deallocate(blob as *mut u8, layout);
            at(Point::ArenaFreed);
        });
    }
}

/// The ends that travel in a blob.
///
/// # Safety
/// As [`take`]; no allocation happens.
pub unsafe fn ends_of(blob: usize) -> &'static [u32] {
    // SAFETY: the caller owns the blob and keeps it while it uses the slice.
    unsafe {
        let n = (*(blob as *const Blob)).ends;
        core::slice::from_raw_parts((blob + size_of::<Blob>()) as *const u32, n)
    }
}

/// Used part of the arena, from its start. Takes no lock: it is asked for while a dead node may hold it.
pub fn used_bytes() -> usize {
    imaged().arena_end.load(Ordering::Acquire).saturating_sub(ARENA)
}
