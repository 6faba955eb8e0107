//! Where the copy of a page lies, and the ways to bring a range from one side to the other.

use super::Moved;
use crate::archive;
use crate::room::room;
use peregrine_base::sync::Ordering;
use peregrine_base::{PageRange, VirtAddr};
use peregrine_sys::mem::{self, Advice};
use peregrine_thread::layout::{ARENA, SLOTS, SLOTS_BYTES, slot_index_of};
use peregrine_thread::slot::SlotHeader;
use std::collections::BTreeSet;

/// Where the slots' copies lie.
pub(super) const SHADOW: usize = SLOTS + SLOTS_BYTES;
/// Where the arena's copy lies.
pub(super) const SHADOW_ARENA: usize = 0x0b00_0000_0000;
pub(super) const PAGE: usize = 4096;

/// Address of the copy of `addr`. What lies in the archive is its own copy.
pub fn twin(addr: usize) -> usize {
    if slot_index_of(addr).is_some() {
        addr + (SHADOW - SLOTS)
    } else if archive::contains(addr) {
        addr
    } else {
        addr - ARENA + SHADOW_ARENA
    }
}

pub(super) fn arena_bytes() -> usize {
    room().arena_bytes.load(Ordering::Relaxed)
}

/// Gives all frames of a slot back, on the side that `side` tells the addresses of.
pub(super) fn punch_slot(slot: u32, side: impl Fn(usize) -> usize) {
    let (base, end) = SlotHeader::bounds(slot);
    discard(side(base), side(base) + (end - base));
}

/// Gives the frames of `[start, end)` back: what grew after the image reads as zero when it grows again (S2).
pub(super) fn discard(start: usize, end: usize) {
    if start < end {
        // SAFETY: the range belongs to no thread, or to one that is about to be replaced there.
        let _ =
            unsafe { mem::advise(PageRange::covering(VirtAddr::new(start), end - start), Advice::Remove) };
    }
}

pub(super) unsafe fn copy(from: usize, to: usize, len: usize) -> u64 {
    // SAFETY: the caller's.
    unsafe { core::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, len) };
    (len / PAGE) as u64
}

pub(super) unsafe fn compare_and_copy(
    from: usize,
    to: usize,
    len: usize,
    moved: &mut Moved,
    mut copied: Option<&mut BTreeSet<usize>>,
) {
    for off in (0..len).step_by(PAGE) {
        let n = PAGE.min(len - off);
        // SAFETY: the caller's; S1: these slices live for the comparison only, while nobody writes.
        unsafe {
            let a = core::slice::from_raw_parts((from + off) as *const u8, n);
            let b = core::slice::from_raw_parts((to + off) as *const u8, n);
            moved.compared += 1;
            if a != b {
                moved.pages += copy(from + off, to + off, n);
                if let Some(copied) = &mut copied {
                    copied.insert(from + off);
                }
            }
        }
    }
}
