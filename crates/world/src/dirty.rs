//! What a node has written since its last report.
//!
//! A node's own page table is asked (`PAGEMAP_SCAN` with asynchronous write-protect): it sees the node's writes and those
//! that the kernel made on its behalf, and nobody else's. The supervisor unites the reports of all nodes; a node that died
//! left no table to ask, so every slot that it had run (`NodeShared::ran`) counts as wholly written.

use crate::arena;
use crate::control::{DIRTY_CAPACITY, PauseKind, dirty_list, node, record, state, world};
use crate::killpoint::{Point, at};
use peregrine_base::sync::Ordering;
use peregrine_base::{PageRange, VirtAddr};
use peregrine_sys::pagemap::{Pagemap, PagemapRef, ScanArgs};
use peregrine_sys::signal;
use peregrine_sys::uffd::{Features, RegisterMode, Uffd, UffdRef};
use peregrine_thread::layout::{ARENA, ARENA_BYTES, SLOT_COUNT, SLOTS, SLOTS_BYTES};
use peregrine_thread::preempt::SIG_RESET;
use peregrine_thread::slot::SlotHeader;
use std::os::fd::{BorrowedFd, IntoRawFd, RawFd};

/// `NodeShared::dirty` of a node that cannot tell.
pub const UNKNOWN: usize = usize::MAX;

const FEATURES: Features = Features::WP_ASYNC
    .union(Features::PAGEFAULT_FLAG_WP)
    .union(Features::WP_HUGETLBFS_SHMEM)
    .union(Features::WP_UNPOPULATED);

/// Opens what is needed to track this process's writes and leaves the descriptors in the node's record.
/// `false`: this kernel can't, and whole slots will be compared instead.
pub fn start(index: u32) -> bool {
    let Ok(uffd) = Uffd::open(FEATURES) else { return false };
    let Ok(pagemap) = Pagemap::open() else { return false };
    let ranges = [(SLOTS, SLOTS_BYTES), (ARENA, ARENA_BYTES)];
    for (start, len) in ranges {
        // SAFETY: with WP_ASYNC nothing ever traps.
        if unsafe { uffd.by_ref().register(PageRange::covering(VirtAddr::new(start), len), RegisterMode::WP) }
            .is_err()
        {
            return false;
        }
    }
    // A kernel before 6.7 has no PAGEMAP_SCAN.
    let probe = PageRange::covering(VirtAddr::new(ARENA), 4096);
    if pagemap.by_ref().scan(ScanArgs::take_written(probe), &mut []).is_err() {
        return false;
    }
    let (u, p): (RawFd, RawFd) = (into_fd(uffd), into_fd(pagemap));
    node(index).fds[0].store(u as u32 + 1, Ordering::Relaxed);
    node(index).fds[1].store(p as u32 + 1, Ordering::Relaxed);
    true
}

fn into_fd(fd: impl std::os::fd::AsFd) -> RawFd {
    // Kept open for the life of the process: the zygote closes it when the node is gone.
    let raw = std::os::fd::AsRawFd::as_raw_fd(&fd.as_fd());
    core::mem::forget(fd);
    let _ = RawFd::into_raw_fd;
    raw
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
    if !world().track.load(Ordering::Relaxed) {
        me.dirty.store(UNKNOWN, Ordering::Relaxed);
        return;
    }
    let fd = me.fds[1].load(Ordering::Relaxed).wrapping_sub(1) as RawFd;
    // SAFETY: opened by `start` and kept; a program that closes foreign descriptors gets an error here, not a wrong one:
    // the scan fails on anything that is not a pagemap.
    let pagemap = PagemapRef::new(unsafe { BorrowedFd::borrow_raw(fd) });
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
                complete &= scan(pagemap, index, &mut found, start, end);
            }
        }
    }
    complete &= scan(pagemap, index, &mut found, ARENA, ARENA + arena::used_bytes());
    me.dirty.store(if complete { found } else { UNKNOWN }, Ordering::Relaxed);
}

fn scan(pagemap: PagemapRef<'_>, index: u32, found: &mut usize, mut start: usize, end: usize) -> bool {
    while start < end {
        let range = PageRange::covering(VirtAddr::new(start), end - start);
        let room = DIRTY_CAPACITY - *found;
        if room == 0 {
            return false;
        }
        // SAFETY: the list belongs to this node while it reports.
        let into = unsafe { core::slice::from_raw_parts_mut(dirty_list(index).add(*found), room) };
        match pagemap.scan(ScanArgs::take_written(range), into) {
            Ok(s) => {
                *found += s.regions;
                at(Point::ReportScanned);
                start = s.walk_end.as_usize();
            }
            Err(peregrine_sys::raw::Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
    true
}

/// Lifts write protection from the guards' neighbourhood of `slot`.
pub fn unprotect_slot(slot: u32) {
    // SAFETY: only on a node.
    let me = node(unsafe { peregrine_thread::carrier::carrier() }.node);
    let fd = me.fds[0].load(Ordering::Relaxed).wrapping_sub(1) as RawFd;
    if fd < 0 {
        return;
    }
    let base = peregrine_thread::layout::slot_base(slot);
    let range = PageRange::covering(VirtAddr::new(base), peregrine_thread::layout::SLOT_BYTES);
    // SAFETY: as in `report`.
    let _ = UffdRef::new(unsafe { BorrowedFd::borrow_raw(fd) }).write_protect(range, false);
    // Pages lost their protection: the whole slot must be taken as written.
    me.note_ran(slot);
}
