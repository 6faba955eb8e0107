//! The image of alias threads: a second file, with a copy of the frames that each had when the image was taken.
//!
//! ```text
//!   frames   │ thread 0 │ thread 1 │ …     mapped in windows, here and there; window_bytes for each thread, mostly holes
//!                 │ commit ▼   ▲ rollback
//!   copy     │ thread 0 │ thread 1 │ …     mapped nowhere
//! ```
//!
//! What a node writes in a window no scan of its page table reports once the window shows another thread, so frames of every
//! thread that ran are compared. Both files are read and written, never mapped: a supervisor's address space stays small,
//! however many threads there are. A thread that never ran, or is packed, has no frames, and then none in the copy either.

use crate::control::{record, world};
use crate::memory::{self, MemoryError};
use crate::shadow::Moved;
use crate::windows::IN_FRAMES;
use peregrine_base::sync::Ordering;
use peregrine_base::{PAGE_SIZE, PageCount};
use peregrine_sys::memfd;
use peregrine_thread::slot::SlotHeader;
use peregrine_thread::stack_kind::StackKind;
use peregrine_thread::template::template;
use peregrine_thread::window::Windows;
use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

const PAGE: usize = PAGE_SIZE;

/// The copy of the frames, in the supervisor.
#[derive(Debug)]
pub struct Frames {
    copy: OwnedFd,
    /// Threads whose copy changed since it was last taken, for who writes it elsewhere; `None`: nobody does.
    unsaved: Option<BTreeSet<u32>>,
}

fn shape() -> Windows {
    // SAFETY: in the supervisor, after the World was made.
    unsafe { template() }.windows
}

fn world_file() -> BorrowedFd<'static> {
    // SAFETY: open for the life of the supervisor.
    unsafe { BorrowedFd::borrow_raw(world().frames_fd.load(Ordering::Relaxed) as i32) }
}

/// Offsets in either file of the pages of `number` that `file` has.
fn pages(file: BorrowedFd<'_>, number: u32) -> Vec<u64> {
    let w = shape();
    let (first, count) = (w.file_offset(number) as usize, w.bytes());
    let mut list = Vec::new();
    memfd::for_each_data(file, PageCount::for_bytes(first), PageCount::for_bytes(count), |p| {
        list.push(p.bytes() as u64);
    });
    list
}

fn read(file: BorrowedFd<'_>, offset: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    // SAFETY: the target is this function's own. A page that can't be read is one that the file does not have: zeros.
    let _ = unsafe { memfd::read_raw(file.as_raw_fd(), offset, page.as_mut_ptr() as usize, PAGE) };
    page
}

/// As [`read`], neighbouring pages at once.
fn read_run(file: BorrowedFd<'_>, run: &[u64]) -> Vec<u8> {
    let mut bytes = vec![0; run.len() * PAGE];
    // SAFETY: as in `read`.
    let _ = unsafe { memfd::read_raw(file.as_raw_fd(), run[0], bytes.as_mut_ptr() as usize, bytes.len()) };
    bytes
}

impl Frames {
    /// An empty copy for windows of this size.
    pub fn new(window_bytes: usize) -> Result<Self, MemoryError> {
        Ok(Self { copy: memory::frames(c"peregrine-image-frames", window_bytes)?, unsaved: None })
    }

    fn copy(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.copy)
    }

    /// From now on, notes which copies change.
    pub fn note_unsaved(&mut self) {
        self.unsaved.get_or_insert_default();
    }

    /// Takes what was noted.
    pub fn take_unsaved(&mut self) -> BTreeSet<u32> {
        self.unsaved.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Puts back what could not be written.
    pub fn put_back_unsaved(&mut self, mut threads: BTreeSet<u32>) {
        if let Some(mine) = &mut self.unsaved {
            mine.append(&mut threads);
        }
    }

    /// Makes the present frames of `number` the copy. In a pause.
    pub fn commit(&mut self, number: u32, moved: &mut Moved) {
        if StackKind::of(number) != StackKind::Alias {
            // A copy thread's bytes lie in the arena.
            return;
        }
        if record(number).stored.load(Ordering::Relaxed) != IN_FRAMES {
            return self.drop_copy(number);
        }
        let mut changed = 0;
        let now = pages(world_file(), number);
        for run in now.chunk_by(|a, b| a + PAGE as u64 == *b) {
            let (ours, copied) = (read_run(world_file(), run), read_run(self.copy(), run));
            moved.compared += run.len() as u64;
            for ((offset, page), old) in
                run.iter().zip(ours.chunks_exact(PAGE)).zip(copied.chunks_exact(PAGE))
            {
                if page != old {
                    write(self.copy(), *offset, page);
                    changed += 1;
                }
            }
        }
        // What has no frame any more has no copy: the thread's slot of the file was given back in between.
        for offset in pages(self.copy(), number).into_iter().filter(|o| now.binary_search(o).is_err()) {
            let _ = memfd::punch_raw(self.copy.as_raw_fd(), offset, PAGE as u64);
            changed += 1;
        }
        moved.pages += changed;
        if let (Some(unsaved), true) = (&mut self.unsaved, changed != 0) {
            unsaved.insert(number);
        }
    }

    /// The thread has no frames any more.
    pub fn drop_copy(&mut self, number: u32) {
        if StackKind::of(number) == StackKind::Alias {
            let w = shape();
            let _ = memfd::punch_raw(self.copy.as_raw_fd(), w.file_offset(number), w.bytes() as u64);
            if let Some(unsaved) = &mut self.unsaved {
                unsaved.insert(number);
            }
        }
    }

    /// Makes the copy the frames of `number`. While every node is paused, after the tables were rolled back.
    pub fn roll_back(&self, number: u32, moved: &mut Moved) {
        if StackKind::of(number) != StackKind::Alias {
            return;
        }
        if record(number).stored.load(Ordering::Relaxed) != IN_FRAMES {
            return crate::windows::punch_frames(number);
        }
        let then = pages(self.copy(), number);
        // Pages that the copy has not were zero, or not there, when the image was taken; what grew since reads as zero when it
        // grows again (S2).
        for offset in pages(world_file(), number).into_iter().filter(|o| then.binary_search(o).is_err()) {
            if memfd::punch_raw(world_file().as_raw_fd(), offset, PAGE as u64).is_err() {
                write(world_file(), offset, &[0; PAGE]);
            }
            moved.pages += 1;
        }
        for offset in then {
            let page = read(self.copy(), offset);
            moved.compared += 1;
            if page != read(world_file(), offset) {
                write(world_file(), offset, &page);
                moved.pages += 1;
            }
        }
    }

    /// Where the frames of `number` are not what the copy holds: the address, and what either has there.
    #[cfg(feature = "killpoints")]
    pub fn differences(&self, number: u32) -> Vec<(usize, u8, u8)> {
        if StackKind::of(number) != StackKind::Alias
            || record(number).stored.load(Ordering::Relaxed) != IN_FRAMES
        {
            return Vec::new();
        }
        let w = shape();
        let all: BTreeSet<u64> =
            pages(world_file(), number).into_iter().chain(pages(self.copy(), number)).collect();
        let mut list = Vec::new();
        for offset in all {
            let (ours, copied) = (read(world_file(), offset), read(self.copy(), offset));
            let first = ours.iter().zip(&copied).rposition(|(a, b)| a != b);
            list.extend(first.map(|i| {
                (w.base_of(number) + (offset - w.file_offset(number)) as usize + i, ours[i], copied[i])
            }));
        }
        list
    }

    /// The stack pointer that `number` was suspended with, as the copy has it.
    #[cfg(feature = "killpoints")]
    pub fn stack_pointer(&self, number: u32) -> usize {
        let w = shape();
        let at = SlotHeader::of(number) as usize + core::mem::offset_of!(SlotHeader, saved_sp);
        let mut sp = 0usize;
        let place = w.file_offset(number) + (at - w.base_of(number)) as u64;
        // SAFETY: a word of this function's own. A thread without a header has no stack either.
        let _ = unsafe {
            memfd::read_raw(self.copy.as_raw_fd(), place, &raw mut sp as usize, size_of::<usize>())
        };
        sp
    }

    /// The pages of the copy that `number` has, by their addresses in its window.
    pub fn pages_of(&self, number: u32) -> Vec<(usize, [u8; PAGE])> {
        if StackKind::of(number) != StackKind::Alias {
            return Vec::new();
        }
        let w = shape();
        let address = |offset: u64| w.base_of(number) + (offset - w.file_offset(number)) as usize;
        pages(self.copy(), number).into_iter().map(|o| (address(o), read(self.copy(), o))).collect()
    }

    /// Puts a page into the copy; `false` if it can't be one of this thread's.
    pub fn set_page(&self, number: u32, address: usize, bytes: &[u8; PAGE]) -> bool {
        let w = shape();
        let (start, end) = w.mapped_of(number);
        let inside = StackKind::of(number) == StackKind::Alias
            && address.is_multiple_of(PAGE)
            && (start..end).contains(&address);
        if inside {
            write(self.copy(), w.file_offset(number) + (address - w.base_of(number)) as u64, bytes);
        }
        inside
    }

    /// Changes the own statics of alias thread `number` in the copy: `mend` gets each granule's offset and bytes.
    pub fn mend_statics(&self, number: u32, mut mend: impl FnMut(usize, &mut [u8])) {
        let (w, t) = (shape(), {
            // SAFETY: as in `shape`.
            unsafe { template() }
        });
        let at = |address: usize| w.file_offset(number) + (address - w.base_of(number)) as u64;
        let fd = self.copy.as_raw_fd();
        let mut header = core::mem::MaybeUninit::<SlotHeader>::zeroed();
        // SAFETY: plain words, read to memory of their size and alignment; a thread with frames has a header there.
        let header = unsafe {
            let home = SlotHeader::of(number) as usize;
            if memfd::read_raw(fd, at(home), header.as_mut_ptr() as usize, size_of::<SlotHeader>()).is_err() {
                return;
            }
            header.assume_init_ref()
        };
        if header.index != number {
            return;
        }
        for (offset, len) in peregrine_thread::window_image::granules(t, header.statics_written) {
            let mut bytes = vec![0; len];
            let place = at(header.statics + offset);
            // SAFETY: the target is this function's own.
            if unsafe { memfd::read_raw(fd, place, bytes.as_mut_ptr() as usize, len) }.is_ok() {
                mend(offset, &mut bytes);
                let _ = memfd::write_raw(fd, place, &bytes);
            }
        }
    }
}

fn write(file: BorrowedFd<'_>, offset: u64, page: &[u8]) {
    if let Err(e) = memfd::write_raw(file.as_raw_fd(), offset, page) {
        // Nothing may be committed, or go on, over a page that is neither old nor new.
        eprintln!(
            "peregrine: the image has no room for a page of an alias thread: {e}; give the machine more memory"
        );
        peregrine_sys::process::exit_now(70);
    }
}
