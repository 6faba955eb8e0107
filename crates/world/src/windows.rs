//! The windows of a node as a cache: who is in which, who comes, who has to leave.
//!
//! ```text
//!                          switch to a thread whose window is its own: nothing to do (a hit)
//!                          ▼
//!   in its window ──another thread bound to it comes──▶ stored ──idle for a while──▶ packed
//!        ▲                                                │                            │
//!        └──────────── bring: map, or copy in ────────────┴────── bring: unpack ───────┘
//! ```
//!
//! `ThreadRecord::stored` tells where a thread's memory is while it is in no window:
//!
//! | kind | never ran | suspended | packed |
//! |---|---|---|---|
//! | alias | [`UNBORN`]: nowhere | [`IN_FRAMES`]: its frames, in their file | a block in the archive, compressed |
//! | copy | [`UNBORN`] | a block in the arena | a block in the archive, compressed |
//!
//! What is too large for a slot of the archive is packed in the arena.
//!
//! A copy thread keeps its block while it is in a window: the next time it leaves, nothing need be allocated.
//!
//! **Images.** Every node brings the blocks of its copy threads up to date when it pauses ([`store_all`]); blocks lie in the
//! arena and are part of every image by that alone. Frames are compared by the supervisor, for threads that ran
//! (`NodeShared::ran`, set before anything is written). So after a rollback all windows are simply forgotten.
//!
//! **Moves.** A thread that goes to another node leaves its window first.
//!
//! *Between two threads*, on the scheduler's stack: no static, no thread-local, no panic, no allocation but in the arena.

use crate::blocks::{self, Block};
use crate::control::{Lack, NONE, ThreadRecord, imaged, node, record, state, world};
use crate::killpoint::{Point, at as kill_at};
use crate::local::Local;
use crate::{node as this_node, packed};
use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_base::{PAGE_SIZE, PageCount, Protection, VirtAddr};
use peregrine_sys::mem::{self, MapOptions, Placement, Source};
use peregrine_sys::{memfd, signal, timer::monotonic_ns};
use peregrine_thread::carrier::Carrier;
use peregrine_thread::preempt::SIG_RESET;
use peregrine_thread::slot::{GUARD_BYTES, SlotHeader};
use peregrine_thread::stack_kind::{MOST_THREADS, StackKind, is_windowed};
use peregrine_thread::statics;
use peregrine_thread::template::template;
use peregrine_thread::window::{MOST_WINDOWS, Windows};
use std::os::fd::BorrowedFd;

/// `stored` of an alias thread whose memory is its frames.
pub const IN_FRAMES: usize = 0;
/// `stored` of a thread that never ran.
pub const UNBORN: usize = 1;
/// Charged to World memory for an alias thread that has frames: the page of its stack, of its header and of its heap, and tables.
const FRAMES_CHARGE: u64 = 16 << 10;

/// With no more windows than this, those of alias threads are anchored: see [`anchor`]. It takes a mapping more for each.
const ANCHORED: usize = 8192;

/// Who is in the windows of this node; part of `Local`, all zero at first.
#[repr(C)]
pub struct Owners {
    /// By kind (alias, copy) and window; 0 for nobody (thread 0 has a slot).
    owner: [[u32; MOST_WINDOWS]; 2],
    /// By kind and window, one bit: mapped in this process.
    mapped: [[u64; MOST_WINDOWS / 64]; 2],
    /// Windows from here on have had no owner.
    used: usize,
    /// Threads that left a window while they waited: number, wait, and when.
    idle: crate::local::Ring<Idle, { MOST_THREADS.next_power_of_two() / 2 }>,
}

/// A thread that may have become idle.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Idle {
    number: u32,
    wait: u32,
    since_ns: u64,
}

/// How long a thread is idle before it is packed: not at all while somebody wants room.
fn pack_after_ns() -> u64 {
    let w = world();
    let until = w.room_wanted_until.load(Ordering::Relaxed);
    if until != 0 {
        if monotonic_ns() < until {
            return 0;
        }
        // Unless it has just been put off, nobody need look at the clock for it again.
        let _ = w.room_wanted_until.compare_exchange(until, 0, Ordering::Relaxed, Ordering::Relaxed);
    }
    w.pack_after_ns.load(Ordering::Relaxed)
}

fn shape() -> &'static Windows {
    // SAFETY: windows are looked at on nodes and in the supervisor only, which have a template.
    unsafe { &template().windows }
}

#[inline(always)]
fn row(number: u32) -> usize {
    (StackKind::of(number) == StackKind::Copy) as usize
}

impl Owners {
    /// Forgets who is where, after a rollback. What is mapped stays so.
    pub fn clear(&mut self) {
        for row in &mut self.owner {
            row[..self.used].fill(0);
        }
        self.used = 0;
        self.idle.clear();
    }

    /// Whether `number` is in its window.
    #[inline(always)]
    pub fn is_in(&self, number: u32) -> bool {
        self.owner[row(number)][shape().window_of(number) as usize] == number
    }

    fn set(&mut self, number: u32, owner: u32) {
        let w = shape().window_of(number) as usize;
        self.owner[row(number)][w] = owner;
        self.used = self.used.max(w + 1);
    }

    /// Notes that `number` waits outside of a window, and may be packed if it goes on waiting.
    pub fn note_idle(&mut self, number: u32) {
        let r = record(number);
        let waits = matches!(r.state.load(Ordering::Relaxed), state::PARKED | state::SLEEPING);
        if waits && world().pack_after_ns.load(Ordering::Relaxed) != u64::MAX {
            let wait = r.waits.load(Ordering::Relaxed);
            self.idle.push(Idle { number, wait, since_ns: monotonic_ns() });
        }
    }

    /// When the next one may be packed.
    pub fn next_due(&self) -> Option<u64> {
        self.idle.first().map(|i| i.since_ns.saturating_add(pack_after_ns()))
    }
}

/// Puts `number` into its window; whoever is there leaves.
///
/// # Safety
/// On the scheduler's stack; the thread is this node's and suspended.
pub unsafe fn bring(c: &mut Carrier, l: &mut Local, number: u32) {
    if l.windows.is_in(number) {
        return;
    }
    let w = shape();
    let before = l.windows.owner[row(number)][w.window_of(number) as usize];
    // Before anything of it is written.
    node(c.node).note_ran(number);
    let count = &node(c.node).window_entries[row(number)];
    count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    if before != 0 {
        // SAFETY: it is in its window and does not run; the other is this node's, suspended, and bound to the same window.
        unsafe {
            if blocks::can_exchange(c, before, number) {
                let t = template();
                statics::evict(c, t, before);
                blocks::exchange(c, l, before, number, t);
                kill_at(Point::WindowEntered);
                l.windows.set(number, number);
                return l.windows.note_idle(before);
            }
            leave(c, l, before);
        }
    }
    // SAFETY: nobody is in the window now.
    unsafe {
        map(l, w, number);
        kill_at(Point::WindowMapped);
        enter(number);
    }
    kill_at(Point::WindowEntered);
    l.windows.set(number, number);
}

/// Shows the thread's frames in its window; for a copy thread, sees to it that there is memory.
unsafe fn map(l: &mut Local, w: &Windows, number: u32) {
    let (start, end) = w.mapped_of(number);
    let window = w.window_of(number) as usize;
    let (word, bit) = (&mut l.windows.mapped[row(number)][window / 64], 1u64 << (window % 64));
    let known = *word & bit != 0;
    let alias = StackKind::of(number) == StackKind::Alias;
    let source = match alias {
        false if known => return,
        false => Source::Anonymous,
        true => {
            let inside = start - w.base_of(number);
            // SAFETY: open for the life of the World.
            let frames = unsafe { BorrowedFd::borrow_raw(world().frames_fd.load(Ordering::Relaxed) as i32) };
            Source::Shared(frames, PageCount::for_bytes(w.file_offset(number) as usize + inside))
        }
    };
    let at = VirtAddr::new(start);
    let place = if known { Placement::Replace(at) } else { Placement::At(at) };
    let options = MapOptions { no_reserve: true, ..MapOptions::default() };
    // A reset between the two would leave a window that is mapped and not known to be, and could not be mapped again.
    let mask = (!known).then(|| signal::set_mask(signal::bit(SIG_RESET)));
    // SAFETY: what is replaced was mapped by this function, and nobody is in the window.
    let done =
        unsafe { mem::map(PageCount::for_bytes(end - start), Protection::ReadWrite, source, place, options) };
    if done.is_err() {
        this_node::give_up(number, Lack::Window);
    }
    kill_at(Point::WindowMade);
    *word |= bit;
    if let Some(mask) = mask {
        signal::set_mask(mask);
    }
    if !known && alias && w.count() <= ANCHORED {
        anchor(start - GUARD_BYTES, GUARD_BYTES);
        anchor(end, w.tail_bytes());
    }
}

/// Keeps a page table that a window begins or ends in from being freed, and made anew, each time the window is mapped over: a
/// table goes when its last mapping does, and that takes 3 us, half as long as all the rest of a remap. What is mapped here has no
/// access, so it guards as what is not mapped; without it (too many mappings) nothing is lost but time. The tail of a window and
/// the guard of the next are one mapping to the kernel. Tables in the middle of a window of more than two can't be kept: what keeps
/// them would split the window, and a second remap costs as much as a table.
fn anchor(at: usize, bytes: usize) {
    if bytes == 0 {
        return;
    }
    let at = Placement::At(VirtAddr::new(at));
    let options = MapOptions { no_reserve: true, ..MapOptions::default() };
    // SAFETY: a new mapping, of what no thread is ever mapped to.
    let _ =
        unsafe { mem::map(PageCount::for_bytes(bytes), Protection::None, Source::Anonymous, at, options) };
}

/// Has the frames that the next switch uses mapped by faults for writing. A fault for reading maps the pages around as well, and
/// costs, with their unmapping, as much as three of these.
///
/// # Safety
/// `number` is in its window, and suspended.
unsafe fn touch(number: u32) {
    let header = SlotHeader::of(number);
    let write = |addr: usize| {
        // SAFETY: a word of the window, which is mapped and in nobody's use. An exchange that fails writes nothing new, and is
        // a write to the processor (on x86-64).
        let _ = unsafe { &*((addr & !7) as *const AtomicU64) }.compare_exchange(
            0,
            0,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
    };
    write(header as usize);
    // SAFETY: the header is mapped now.
    let (sp, tp) = unsafe { ((*header).saved_sp, (*header).fs_base) };
    let page = |addr: usize| addr & !(PAGE_SIZE - 1);
    if page(sp) != page(header as usize) {
        write(sp);
    }
    if page(tp) != page(header as usize) {
        write(tp);
    }
}

/// Fills the window with what the thread has.
unsafe fn enter(number: u32) {
    let r = record(number);
    // SAFETY: the window is mapped and nobody's.
    unsafe {
        let t = template();
        match r.stored.load(Ordering::Relaxed) {
            UNBORN => {
                SlotHeader::prepare(number, t, 0, crate::thread::first);
                kill_at(Point::BirthPrepared);
                r.stored.store(IN_FRAMES, Ordering::Relaxed);
                charge_frames(r, number, FRAMES_CHARGE);
                kill_at(Point::BirthCharged);
            }
            // A copy thread's block, once it is born, is never away but while it is in its window.
            IN_FRAMES => touch(number),
            at => {
                let block = &*(at as *const Block);
                if block.compressed_len != 0 {
                    packed::unpack(number, t, block);
                    world().packed[1].fetch_add(1, Ordering::Relaxed);
                    kill_at(Point::Unpacked);
                    blocks::give_back(at);
                    kill_at(Point::UnpackGivenBack);
                    r.stored.store(IN_FRAMES, Ordering::Relaxed);
                    let granted = r.granted.load(Ordering::Relaxed);
                    imaged().memory_used.fetch_add(granted, Ordering::Relaxed);
                    kill_at(Point::UnpackCharged);
                } else {
                    block.head.scatter(number, t, at + size_of::<Block>());
                }
            }
        }
    }
}

fn charge_frames(r: &ThreadRecord, number: u32, bytes: u64) {
    if StackKind::of(number) == StackKind::Alias {
        r.granted.fetch_add(bytes, Ordering::Relaxed);
        imaged().memory_used.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Takes `number` out of its window, if it is in.
///
/// # Safety
/// The thread is this node's and suspended; its statics may still be in the window of the statics.
pub unsafe fn leave(c: &mut Carrier, l: &mut Local, number: u32) {
    if !l.windows.is_in(number) {
        return;
    }
    // SAFETY: as promised; the header is in its window until the last line.
    unsafe {
        let t = template();
        statics::evict(c, t, number);
        if StackKind::of(number) == StackKind::Copy {
            blocks::store(c, l, number, t);
        }
    }
    kill_at(Point::WindowLeft);
    l.windows.set(number, 0);
    l.windows.note_idle(number);
    kill_at(Point::WindowFreed);
}

/// Brings the blocks of all copy threads in windows up to date. Their windows stay theirs.
///
/// # Safety
/// In a pause: no thread runs, and statics have been saved.
pub unsafe fn store_all(c: &Carrier, l: &mut Local) {
    for w in 0..l.windows.used {
        let number = l.windows.owner[1][w];
        if number != 0 {
            // SAFETY: the thread is in its window.
            unsafe { blocks::store(c, l, number, template()) };
        }
    }
}

/// How many threads are packed at a time.
const AT_ONCE: usize = 8;

/// Packs threads that have been idle for long enough, a few at a time; of a node that others wait for, more than those.
///
/// # Safety
/// On the scheduler's stack.
pub unsafe fn pack_idle(c: &Carrier, l: &mut Local) {
    if world().lacking.load(Ordering::Relaxed) & !(1 << c.node) != 0 {
        // SAFETY: as promised.
        unsafe { pack_early(c.node, l, NONE) };
        return;
    }
    let Some(due) = l.windows.next_due() else { return };
    let now = monotonic_ns();
    if due > now {
        return;
    }
    let after = pack_after_ns();
    for _ in 0..AT_ONCE {
        match l.windows.idle.first() {
            Some(i) if i.since_ns.saturating_add(after) <= now => {
                l.windows.idle.pop();
                // SAFETY: as promised.
                unsafe { pack_if_idle(c.node, l, i) };
            }
            _ => return,
        }
    }
}

/// Packs a few threads before their time, for memory is used up: of those that wait the ones that have waited longest, then of those
/// that can run the ones whose turn comes last. Tells how many; `but` is not among them.
///
/// # Safety
/// On the scheduler's stack.
pub unsafe fn pack_early(index: u32, l: &mut Local, but: u32) -> usize {
    let mut count = 0;
    while count < AT_ONCE
        && let Some(i) = l.windows.idle.pop()
    {
        // SAFETY: as promised.
        count += usize::from(i.number != but && unsafe { pack_if_idle(index, l, i) });
    }
    for place in (0..l.queued()).rev() {
        if count >= AT_ONCE {
            break;
        }
        let number = l.peek(place);
        let r = record(number);
        if is_windowed(number)
            && number != but
            && r.node.load(Ordering::Relaxed) == index
            && r.state.load(Ordering::Relaxed) == state::RUNNABLE
            && !l.windows.is_in(number)
        {
            node(index).note_ran(number);
            // SAFETY: the thread is ours, suspended, and in no window.
            count += usize::from(unsafe { packed::pack(number) });
        }
    }
    count
}

/// Packs the thread of this node's list if it still waits, outside of its window; tells whether it is packed now.
unsafe fn pack_if_idle(index: u32, l: &Local, i: Idle) -> bool {
    let r = record(i.number);
    let still = r.node.load(Ordering::Relaxed) == index
        && matches!(r.state.load(Ordering::Relaxed), state::PARKED | state::SLEEPING)
        && r.waits.load(Ordering::Relaxed) == i.wait
        && !l.windows.is_in(i.number);
    if !still {
        return false;
    }
    node(index).note_ran(i.number);
    // SAFETY: the thread is ours, suspended, and in no window.
    unsafe { packed::pack(i.number) }
}

/// Gives back all memory of a windowed thread that has ended. In a node, or in the supervisor while all nodes are paused.
pub fn bury(number: u32) {
    debug_assert!(is_windowed(number));
    let r = record(number);
    let at = r.stored.swap(UNBORN, Ordering::Relaxed);
    if at > UNBORN {
        // SAFETY: the block is this thread's, which is gone.
        unsafe {
            let block = &*(at as *const Block);
            if block.compressed_len != 0 {
                // Taken back when it was packed; the caller takes it back once more.
                imaged().memory_used.fetch_add(r.granted.load(Ordering::Relaxed), Ordering::Relaxed);
            }
            blocks::give_back(at);
            kill_at(Point::BlockBuried);
        }
    }
    if StackKind::of(number) == StackKind::Alias && at != UNBORN {
        punch_frames(number);
    }
}

/// Frees the frames of alias thread `number`; they read as zeros (S2).
pub fn punch_frames(number: u32) {
    let (w, fd) = (shape(), world().frames_fd.load(Ordering::Relaxed) as i32);
    let _ = memfd::punch_raw(fd, w.file_offset(number), w.bytes() as u64);
    kill_at(Point::FramesPunched);
}

/// Notes that the thread which ended was in its window.
pub fn forget(l: &mut Local, number: u32) {
    if l.windows.is_in(number) {
        l.windows.set(number, 0);
    }
}

const _: () = assert!(NONE != 0, "0 stands for nobody here");
