//! What a node has written since its last report.
//!
//! A node's own page table is asked (`PAGEMAP_SCAN` with asynchronous write-protect): it sees the node's writes and those
//! that the kernel made on its behalf, and nobody else's. The supervisor unites the reports of all nodes; a node that died
//! left no table to ask, so every slot that it had run (`NodeShared::ran`) counts as wholly written.

use crate::arena;
use crate::control::{PauseKind, dirty_capacity, dirty_list, node, record, state, world};
use crate::killpoint::{Point, at};
use crate::room::room;
use peregrine_base::sync::Ordering;
use peregrine_base::{PageRange, VirtAddr};
use peregrine_sys::descriptors::out_of_the_way;
use peregrine_sys::signal;
use peregrine_thread::layout::{ARENA, SLOT_COUNT, SLOTS};
use peregrine_thread::preempt::SIG_RESET;
use peregrine_thread::slot::SlotHeader;
use peregrine_vm::dirty::{RawTracker, RawTrackerRef};
use std::os::fd::{BorrowedFd, IntoRawFd, RawFd};

/// `NodeShared::dirty` of a node that cannot tell.
pub const UNKNOWN: usize = usize::MAX;

/// Opens what is needed to track this process's writes and leaves the descriptors in the node's record.
/// `false`: this kernel can't, and whole slots will be compared instead.
pub fn start(index: u32) -> bool {
    let Ok(tracker) = RawTracker::open() else { return false };
    let (slots, arena) = (&room().slots_bytes, &room().arena_bytes);
    for (start, len) in [(SLOTS, slots.load(Ordering::Relaxed)), (ARENA, arena.load(Ordering::Relaxed))] {
        let range = PageRange::covering(VirtAddr::new(start), len);
        // SAFETY: World memory stays mapped as long as this process; nobody else tracks it here, and `unprotect_slot` comes
        // before each guard.
        if unsafe { tracker.watch(range) }.is_err() {
            return false;
        }
    }
    // Kept open for the life of the process: the zygote closes them when the node is gone.
    let (u, p) = tracker.into_fds();
    for (word, fd) in node(index).fds.iter().zip([u, p]) {
        word.store(out_of_the_way(fd).into_raw_fd() as u32 + 1, Ordering::Relaxed);
    }
    true
}

/// This node's tracker, if [`start`] made one.
fn tracker(index: u32) -> Option<RawTrackerRef<'static>> {
    let fd = |i: usize| node(index).fds[i].load(Ordering::Relaxed).checked_sub(1).map(|fd| fd as RawFd);
    let (uffd, pagemap) = (fd(0)?, fd(1)?);
    // SAFETY: opened by `start` and kept; should the program have closed them, calls on what has their numbers now fail.
    Some(unsafe { RawTrackerRef::new(BorrowedFd::borrow_raw(uffd), BorrowedFd::borrow_raw(pagemap)) })
}

/// Adds what was written since the last report to this node's list, and starts over.
///
/// The supervisor empties the list when it has read it, so a report for an image that was given up is not lost to the next.
/// A reset must not come between the scan, which forgets, and the count that makes it known: it is held off meanwhile.
///
/// A scan leaves pages write-protected, even those that are not there yet: `scanned` gets a bit for each slot looked at.
pub fn report(index: u32, scanned: &mut [u64]) {
    let mask = signal::set_mask(signal::bit(SIG_RESET));
    at(Point::ReportBegins);
    add_to_report(index, scanned);
    at(Point::ReportCounted);
    signal::set_mask(mask);
}

fn add_to_report(index: u32, scanned: &mut [u64]) {
    let me = node(index);
    if me.dirty.load(Ordering::Relaxed) == UNKNOWN {
        return;
    }
    let (true, Some(tracker)) = (world().track.load(Ordering::Relaxed), tracker(index)) else {
        me.dirty.store(UNKNOWN, Ordering::Relaxed);
        return;
    };
    // After an image only live stack counts; before a rollback also what was live when the image was taken.
    let live_only = world().pause_kind.load(Ordering::Relaxed) == PauseKind::Image as u32;
    let mut found = me.dirty.load(Ordering::Relaxed);
    let mut complete = true;
    for (w, word) in me.ran.iter().enumerate().take(SLOT_COUNT / 64) {
        let mut bits = word.load(Ordering::Relaxed);
        while bits != 0 {
            let slot = (w * 64) as u32 + bits.trailing_zeros();
            bits &= bits - 1;
            if !state::is_alive(record(slot).state.load(Ordering::Relaxed)) {
                // Its pages have been punched out, its header with them.
                continue;
            }
            scanned[w] |= 1 << (slot % 64);
            // Its thread may be on another node that has not paused yet, and may be ending there: then there is nothing to tell.
            for (start, end) in SlotHeader::extents_of_foreign(slot, live_only).into_iter().flatten() {
                complete &= take(tracker, index, &mut found, start, end);
            }
        }
    }
    complete &= take(tracker, index, &mut found, ARENA, ARENA + arena::used_bytes());
    me.dirty.store(if complete { found } else { UNKNOWN }, Ordering::Relaxed);
}

/// Adds the pages of `[start, end)` that were written to the list; `false` if it is full or the kernel refuses.
fn take(tracker: RawTrackerRef<'_>, index: u32, found: &mut usize, start: usize, end: usize) -> bool {
    let mut rest = PageRange::covering(VirtAddr::new(start), end.saturating_sub(start));
    while !rest.is_empty() && *found < dirty_capacity() {
        // SAFETY: the list belongs to this node while it reports.
        let into = unsafe {
            core::slice::from_raw_parts_mut(dirty_list(index).add(*found), dirty_capacity() - *found)
        };
        let Ok(taken) = tracker.take_into(rest, into) else { return false };
        *found += taken.runs;
        at(Point::ReportScanned);
        rest = taken.rest;
    }
    rest.is_empty()
}

/// Lifts write protection from the guards' neighbourhood of `slot`.
pub fn unprotect_slot(slot: u32) {
    // SAFETY: only on a node.
    let index = unsafe { peregrine_thread::carrier::carrier() }.node;
    let Some(tracker) = tracker(index) else { return };
    let (base, end) = SlotHeader::bounds(slot);
    let range = PageRange::covering(VirtAddr::new(base), end - base);
    let _ = tracker.mark_written(range);
    // Pages lost their protection: the whole slot must be taken as written.
    node(index).note_ran(slot);
}
