//! Blocks: a windowed thread's memory while another is in its window: in the arena, or packed in the archive.
//!
//! ```text
//!   block │ capacity, length if compressed, head │ statics │ stack │ header, TLS, TCB, dtv │ heap │ room to grow │
//! ```
//!
//! A conflict of two copy threads is one pass over the window ([`exchange`]): so many bytes of it as fit into the processor's first
//! cache go to the old owner's block, and the new owner's take their place while they are there. Two passes, all out and then all
//! in, read and write the window twice: up to a quarter dearer from 512 KiB of live stack on.
//!
//! *Between two threads*: no static, no thread-local, no panic, no allocation but in the arena.

use crate::control::{Lack, node, record, world};
use crate::killpoint::{Point, at as kill_at};
use crate::local::Local;
use crate::windows::{self, UNBORN};
use crate::{archive, arena, node as this_node, sched};
use peregrine_base::sync::{AtomicU32, Ordering};
use peregrine_sys::futex;
use peregrine_thread::carrier::Carrier;
use peregrine_thread::slot::SlotHeader;
use peregrine_thread::stack_kind::StackKind;
use peregrine_thread::template::TemplateHeader;
use peregrine_thread::window_image::{Head, LINE};

/// A block of the arena that holds a thread's memory. The bytes follow, and begin on a line if the block does.
#[repr(C)]
pub struct Block {
    /// Bytes of the allocation, this head included.
    pub capacity: usize,
    /// 0: as they are; else they are compressed (`packed`) to so many after the statics.
    pub compressed_len: usize,
    /// What they are.
    pub head: Head,
    /// Of a compressed one: the model that it differs from (`models`), or 0.
    pub model: u64,
}

const _: () = assert!(size_of::<Block>() == LINE);

/// Copies a copy thread's live bytes to its block, if it ran since that was last done.
///
/// # Safety
/// The thread is in its window, suspended, and its statics have been saved.
pub unsafe fn store(c: &Carrier, l: &mut Local, number: u32, t: &TemplateHeader) {
    let r = record(number);
    let at = r.stored.load(Ordering::Relaxed);
    if at > UNBORN && !node(c.node).has_run(number) {
        return;
    }
    // SAFETY: the thread is in its window and suspended.
    unsafe {
        let header = &*SlotHeader::of(number);
        let home = core::ptr::from_ref(header) as usize;
        let head = Head::of(header, home, t);
        let to = block_for(c, l, number, head, number) as usize + size_of::<Block>();
        head.gather(header, home, t, to, |from, to, len| {
            core::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, len);
        });
    }
    kill_at(Point::BlockFilled);
}

/// Whether `old`, which is in its window, and `new` can change places in one pass: both are copy threads, `old` has something to
/// save, and `new` has a block that is not compressed.
pub fn can_exchange(c: &Carrier, old: u32, new: u32) -> bool {
    let at = record(new).stored.load(Ordering::Relaxed);
    StackKind::of(new) == StackKind::Copy
        && at > UNBORN
        // SAFETY: a copy thread's block, once it is known, is intact (S7: a death in between rolls all back).
        && unsafe { (*(at as *const Block)).compressed_len == 0 }
        && node(c.node).has_run(old)
}

/// Copies the live bytes of `old` from its window to its block, and those of `new` from its block to the window.
///
/// # Safety
/// As [`can_exchange`] says, and both are suspended threads of this node, bound to one window; the statics of `old` have been saved.
pub unsafe fn exchange(c: &Carrier, l: &mut Local, old: u32, new: u32, t: &TemplateHeader) {
    // SAFETY: `old` is in the window, so header and window are mapped; its block has room for what its head says.
    unsafe {
        let header = SlotHeader::of(old);
        let home = header as usize;
        let out = Head::of(&*header, home, t);
        let to = block_for(c, l, old, out, new) as usize + size_of::<Block>();
        let from = record(new).stored.load(Ordering::Relaxed);
        let coming = (*(from as *const Block)).head;
        out.exchange(header, home, t, to, &coming, from + size_of::<Block>());
    }
    kill_at(Point::BlockFilled);
}

/// The block of copy thread `number`, with room for what `head` says, and with that head; its bytes are still to be written. Where there
/// is no room other threads are packed, but never `but`.
///
/// # Safety
/// The thread is this node's and suspended; on the scheduler's stack.
unsafe fn block_for(c: &Carrier, l: &mut Local, number: u32, head: Head, but: u32) -> *mut Block {
    let r = record(number);
    let at = r.stored.load(Ordering::Relaxed);
    let mut block = at as *mut Block;
    let needed = size_of::<Block>() + head.len();
    // SAFETY: a block that is known is this thread's own (S5), and intact.
    unsafe {
        let fits = at > UNBORN && (needed..=needed * 4 + 4096).contains(&(*block).capacity);
        if !fits {
            if at > UNBORN {
                give_back(at);
            }
            // A little more than now: live stacks differ from switch to switch.
            let capacity = (needed + needed / 8).next_multiple_of(256);
            block = new_block(capacity)
                .or_else(|| after_packing(c, l, capacity, but))
                .unwrap_or_else(|| this_node::give_up(number, Lack::Arena));
            kill_at(Point::BlockMade);
            r.stored.store(block as usize, Ordering::Relaxed);
            kill_at(Point::BlockKnown);
        }
        (*block).compressed_len = 0;
        (*block).head = head;
    }
    block
}

/// A block of `capacity` bytes that the arena has room for once threads are packed: this node's, or those of others, which are asked. An
/// image that this node is waited for is put off: who has paused for it packs nothing.
///
/// # Safety
/// On the scheduler's stack.
#[cold]
unsafe fn after_packing(c: &Carrier, l: &mut Local, capacity: usize, but: u32) -> Option<*mut Block> {
    /// How long others are waited for: they may be in the middle of something, or not have been given a processor for a while.
    const PATIENCE_MS: u32 = 500;
    let (lacking, bit) = (&world().lacking, 1 << c.node);
    let (mut waited_ms, mut found) = (0, None);
    while found.is_none() && waited_ms < PATIENCE_MS {
        // SAFETY: as promised.
        if unsafe { windows::pack_early(c.node, l, but) } == 0 {
            lacking.fetch_or(bit, Ordering::Relaxed);
            sched::want_room(c.node);
            futex::wait(&AtomicU32::new(0), 0, Some(1_000_000));
            waited_ms += 1;
        }
        // SAFETY: as promised.
        found = unsafe { new_block(capacity) };
    }
    // A death or a rollback in between clears it as well.
    lacking.fetch_and(!bit, Ordering::Relaxed);
    found
}

/// What a packed thread of so many bytes takes in the arena.
pub const fn packed_capacity(bytes: usize) -> usize {
    bytes.next_multiple_of(16)
}

/// Writes the packed thread that has been made at `from` to the place in the arena that was allocated for it.
///
/// # Safety
/// There are so many bytes at `from`, which begin with a [`Block`], and `place` has room for [`packed_capacity`] and is nobody else's.
pub unsafe fn fill(place: usize, from: usize, bytes: usize) {
    // SAFETY: as promised.
    unsafe {
        (*(from as *mut Block)).capacity = packed_capacity(bytes);
        core::ptr::copy_nonoverlapping(from as *const u8, place as *mut u8, bytes);
    }
}

/// Puts the packed thread that has been made at `from` where the thread's block is, or near: what it leaves is free. `None`: it is no smaller.
///
/// # Safety
/// As [`fill`] for `from`; `at` is the thread's block in the arena, and nobody reads it any more.
pub unsafe fn replace(at: usize, from: usize, bytes: usize) -> Option<usize> {
    // SAFETY: as promised; a death in between rolls all back (S7).
    unsafe {
        let (old, new) = ((*(at as *const Block)).capacity, packed_capacity(bytes));
        if new >= old {
            return None;
        }
        let place = arena::replace(at, block_layout(old), block_layout(new));
        fill(place, from, bytes);
        Some(place)
    }
}

/// What the arena is asked for a block of `capacity` bytes. What is copied in and out begins on a line of the cache; a packed
/// thread, which is smaller, need not.
pub fn block_layout(capacity: usize) -> core::alloc::Layout {
    let align = if capacity < 4096 { 16 } else { LINE };
    core::alloc::Layout::from_size_align(capacity, align)
        .expect("a suspended thread is smaller than half the addresses")
}

/// Gives the memory of a suspended thread back, from the arena or the archive.
///
/// # Safety
/// `at` is the thread's block, and nobody reads it any more.
pub unsafe fn give_back(at: usize) {
    // SAFETY: as promised; a block is intact as long as it is somebody's.
    unsafe {
        if archive::contains(at) {
            archive::give_back(at);
        } else {
            arena::give_back(at, block_layout((*(at as *const Block)).capacity));
        }
    }
}

/// A block of `capacity` bytes, if there is room.
pub unsafe fn new_block(capacity: usize) -> Option<*mut Block> {
    let block = arena::allocate_always(block_layout(capacity))? as *mut Block;
    // SAFETY: just allocated.
    unsafe { (*block).capacity = capacity };
    Some(block)
}
