//! Idle threads, packed: a thread that waits for long keeps its live bytes, and those compressed.
//!
//! ```text
//!   block │ own granules of the statics │ lz4( (live stack │ header │ TLS, TCB, dtv ⊕ pristine │ used heap) ⊕ model ) │
//!           as they are: a resume mends        mostly zeros then
//!           them in place
//! ```
//!
//! Thread-locals and control block differ from those of any new thread in this window by a few words, so the difference is
//! kept: from *pristine* ones, which the World has had since it was made. A process that goes on from disk has others (its
//! stack-protector canary is not the old one's), so they are part of the World and of its images. All of it is
//! kept as the difference from a thread of the same function (`models`). A thread whose live part is larger than [`MOST_BYTES`] is left as it is: the node would stand still for too long.
//!
//! *Between two threads*: no static, no thread-local, no panic, no allocation but in the arena; the working memory lies in the
//! node's private part.

use crate::blocks::{self, Block, new_block};
use crate::control::{imaged, record, world};
use crate::killpoint::{Point, at as kill_at};
use crate::local::{SCRATCH_BYTES, scratch};
use crate::windows::{IN_FRAMES, UNBORN, punch_frames};
use crate::{archive, arena, models};
use peregrine_base::sync::Ordering;
use peregrine_sys::memfd;
use peregrine_thread::slot::SlotHeader;
use peregrine_thread::stack_kind::StackKind;
use peregrine_thread::template::{TemplateHeader, template};
use peregrine_thread::window_image::Head;

/// Most live bytes of a thread that is packed.
pub const MOST_BYTES: usize = 256 << 10;

/// Compresses a thread that is in no window; tells whether it did. One that is packed already, never ran, or is too large stays as
/// it is.
///
/// # Safety
/// The thread is this node's and suspended, and it counts as having run.
pub unsafe fn pack(number: u32) -> bool {
    let r = record(number);
    let at = r.stored.load(Ordering::Relaxed);
    // SAFETY: as promised; the scratch memory is the scheduler's.
    let bytes = unsafe {
        let t = template();
        let raw = scratch();
        let head = match at {
            UNBORN => return false,
            IN_FRAMES if StackKind::of(number) == StackKind::Alias => match gather_frames(number, t, raw) {
                Some(head) => head,
                None => return false,
            },
            IN_FRAMES => return false,
            _ => {
                let block = &*(at as *const Block);
                if block.compressed_len != 0 || block.head.len() > MOST_BYTES {
                    return false;
                }
                let from = (at + size_of::<Block>()) as *const u8;
                core::ptr::copy_nonoverlapping(from, raw as *mut u8, block.head.len());
                block.head
            }
        };
        toggle(number, t, &head, raw);
        let model = models::subtract(number, t, &head, raw + head.statics_len);
        // As it will lie in its block, behind the block's head.
        let block = raw + SCRATCH_BYTES / 2;
        let statics = block + size_of::<Block>();
        core::ptr::copy_nonoverlapping(raw as *const u8, statics as *mut u8, head.statics_len);
        let to = statics + head.statics_len;
        let input =
            core::slice::from_raw_parts((raw + head.statics_len) as *const u8, head.len() - head.statics_len);
        let output = core::slice::from_raw_parts_mut(to as *mut u8, raw + SCRATCH_BYTES - to);
        let Some(len) = compress(input, output) else { return false };
        let bytes = size_of::<Block>() + head.statics_len + len;
        (block as *mut Block).write(Block { capacity: 0, compressed_len: len, head, model });
        if let Some(packed) = keep(block, bytes) {
            kill_at(Point::PackMade);
            r.stored.store(packed, Ordering::Relaxed);
            kill_at(Point::PackKnown);
            if at > UNBORN {
                blocks::give_back(at);
            } else {
                punch_frames(number);
            }
        } else if at > UNBORN {
            // The arena is full. Where its memory was there is room for what it is now.
            let Some(packed) = blocks::replace(at, block, bytes) else { return false };
            r.stored.store(packed, Ordering::Relaxed);
            kill_at(Point::PackKnown);
        } else {
            return false;
        }
        bytes
    };
    kill_at(Point::PackGivenBack);
    // What was granted is not used any more; it is charged again when the thread is unpacked.
    imaged().memory_used.fetch_sub(r.granted.load(Ordering::Relaxed), Ordering::Relaxed);
    world().packed_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    world().packed[0].fetch_add(1, Ordering::Relaxed);
    true
}

/// Puts the block of so many bytes that has been made at `block` where it stays: in the archive, where an image needs no copy of it,
/// or in the arena if it is too large for that.
unsafe fn keep(block: usize, bytes: usize) -> Option<usize> {
    // SAFETY: the caller wrote so many bytes there, in the scratch memory.
    unsafe {
        (*(block as *mut Block)).capacity = archive::slot_bytes(bytes);
        if let Some(at) = archive::store(core::slice::from_raw_parts(block as *const u8, bytes)) {
            return Some(at);
        }
        let place = new_block(blocks::packed_capacity(bytes))?;
        blocks::fill(place as usize, block, bytes);
        Some(place as usize)
    }
}

/// Fills the window of thread `number` from a packed block.
///
/// # Safety
/// The window is mapped and nobody is in it.
pub unsafe fn unpack(number: u32, t: &TemplateHeader, block: &Block) {
    let (head, from) = (block.head, core::ptr::from_ref(block) as usize + size_of::<Block>());
    let raw = scratch();
    // SAFETY: sizes are those that `pack` wrote, at most half the scratch memory.
    unsafe {
        core::ptr::copy_nonoverlapping(from as *const u8, raw as *mut u8, head.statics_len);
        let input = core::slice::from_raw_parts((from + head.statics_len) as *const u8, block.compressed_len);
        let room = head.len() - head.statics_len;
        let output = core::slice::from_raw_parts_mut((raw + head.statics_len) as *mut u8, room);
        if !lz4_flex::block::decompress_into(input, output).is_ok_and(|n| n == room)
            || !models::restore(number, t, &head, raw + head.statics_len, block.model)
        {
            peregrine_sys::process::write_all(2, b"peregrine: a packed thread can't be unpacked\n");
            peregrine_sys::process::exit_now(70);
        }
        toggle(number, t, &head, raw);
        head.scatter(number, t, raw);
    }
}

/// Keeps this process's thread-locals, as they were before `main`, as those that packed threads are told apart from.
///
/// # Safety
/// In the supervisor of a new World, before any node exists.
pub unsafe fn keep_pristine() -> Result<(), arena::OutOfMemory> {
    // SAFETY: the template is installed; the allocation is new and has room for all of it.
    unsafe {
        let t = template();
        let at = arena::allocate(pristine_layout(t))?;
        (at as *mut usize).write(t.maker_tp);
        core::ptr::copy_nonoverlapping(t.tls(), (at + size_of::<usize>()) as *mut u8, t.tls_area_len());
        imaged().pristine.store(at, Ordering::Relaxed);
    }
    Ok(())
}

fn pristine_layout(t: &TemplateHeader) -> core::alloc::Layout {
    core::alloc::Layout::from_size_align(size_of::<usize>() + t.tls_area_len(), 16)
        .expect("thread-locals are smaller than half the addresses")
}

/// The template with the World's pristine thread-locals in place of this process's.
fn pristine(t: &TemplateHeader) -> TemplateHeader {
    let at = imaged().pristine.load(Ordering::Relaxed);
    // SAFETY: `keep_pristine` wrote it, in this life of the World or an earlier one; the contract says that the sizes are equal.
    let maker_tp = unsafe { (at as *const usize).read() };
    TemplateHeader { maker_tp, bytes: at + size_of::<usize>() - t.statics_len, ..*t }
}

/// Reads an alias thread's frames, which no window shows.
unsafe fn gather_frames(number: u32, t: &TemplateHeader, to: usize) -> Option<Head> {
    let (w, fd) = (&t.windows, world().frames_fd.load(Ordering::Relaxed) as i32);
    let (base, home) = (w.base_of(number), SlotHeader::of(number) as usize);
    let mut complete = true;
    let mut read = |from: usize, to: usize, len: usize| {
        // SAFETY: the target has room, as `gather` promises its caller's.
        complete &=
            unsafe { memfd::read_raw(fd, w.file_offset(number) + (from - base) as u64, to, len) }.is_ok();
    };
    // SAFETY: the header is plain words; it is read to memory of its size and alignment.
    unsafe {
        let mut header = core::mem::MaybeUninit::<SlotHeader>::uninit();
        read(home, header.as_mut_ptr() as usize, size_of::<SlotHeader>());
        let header = header.assume_init_ref();
        if header.index != number {
            return None;
        }
        let head = Head::of(header, home, t);
        if head.len() > MOST_BYTES {
            return None;
        }
        head.gather(header, home, t, to, &mut read);
        complete.then_some(head)
    }
}

/// Replaces the thread-locals among the gathered bytes by their difference from pristine ones, and back.
unsafe fn toggle(number: u32, t: &TemplateHeader, head: &Head, raw: usize) {
    let header_at = raw + head.statics_len + head.stack_len;
    // SAFETY: inside the gathered bytes; the pristine copy lies behind both halves of the scratch memory.
    unsafe {
        let header = header_at as *const SlotHeader;
        let home = SlotHeader::of(number) as usize;
        // Neither lies in the part that is changed.
        let area = (&raw const (*header).fs_base).read_unaligned() - t.tls_len;
        let other = scratch() + SCRATCH_BYTES;
        peregrine_thread::tls::build_for(&pristine(t), other, area, number);
        let at = header_at + (area - home);
        // Both are multiples of 8 long.
        let words = t.tls_area_len().min(head.header_len - (area - home)) / 8;
        for i in 0..words {
            let (own, base) = ((at as *mut u64).add(i), (other as *const u64).add(i));
            own.write_unaligned(own.read_unaligned() ^ base.read());
        }
    }
}

fn compress(input: &[u8], output: &mut [u8]) -> Option<usize> {
    lz4_flex::block::compress_into(input, output).ok()
}
