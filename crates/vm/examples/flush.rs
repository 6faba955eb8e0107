//! A write-tracked buffer whose dirty pages are flushed to a file: each flush writes what changed since the last one.
//!
//! The buffer is plain Rust memory (`&mut [u8]`): tracking changes when the kernel traps, never what the bytes are.

use peregrine_vm::{Capabilities, PAGE_SIZE, PageCount, PrivateMemory, Tracker};
use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// A buffer and the file that follows it.
struct Flushed {
    memory: PrivateMemory,
    tracker: Tracker,
    file: File,
}

impl Flushed {
    fn new(pages: PageCount, file: File, caps: &Capabilities) -> Result<Self, Box<dyn Error>> {
        let memory = PrivateMemory::new(pages)?;
        file.set_len(pages.bytes() as u64)?;
        let tracker = Tracker::of_private(&memory).start(caps)?;
        Ok(Self { memory, tracker, file })
    }

    /// Writes the pages that changed; returns how many. If the file refuses, they stay dirty.
    fn flush(&mut self) -> Result<usize, Box<dyn Error>> {
        let dirty = self.tracker.take_dirty()?;
        let start = self.memory.range().start().as_usize();
        for run in dirty.runs() {
            let offset = run.start().as_usize() - start;
            let bytes = &self.memory[offset..offset + run.len_bytes()];
            if let Err(e) = self.file.write_all_at(bytes, offset as u64) {
                self.tracker.give_back(&dirty);
                return Err(e.into());
            }
        }
        self.file.sync_data().inspect_err(|_| self.tracker.give_back(&dirty))?;
        Ok(dirty.page_count().get())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let caps = Capabilities::probe();
    let path = tempfile::NamedTempFile::new()?;
    let mut buffer = Flushed::new(PageCount::new(1024), path.reopen()?, &caps)?;
    println!("tracked by {}", buffer.tracker.choice());

    buffer.memory[10 * PAGE_SIZE..][..5].copy_from_slice(b"hello");
    buffer.memory[11 * PAGE_SIZE] = 1;
    buffer.memory[900 * PAGE_SIZE + 17] = 2;
    let flushed = buffer.flush()?;
    println!("first flush: {flushed} of 1024 pages");
    assert_eq!(flushed, 3);

    buffer.memory[10 * PAGE_SIZE] = b'H';
    let flushed = buffer.flush()?;
    println!("second flush: {flushed}");
    assert_eq!(flushed, 1);
    assert_eq!(buffer.flush()?, 0, "nothing changed");

    let on_disk = std::fs::read(path.path())?;
    assert_eq!(&on_disk[10 * PAGE_SIZE..][..5], b"Hello");
    assert!(on_disk == buffer.memory[..], "the file is the buffer");

    // A flush that fails loses nothing: the pages are still dirty, and the next flush writes them.
    buffer.memory[500 * PAGE_SIZE] = 3;
    let good = std::mem::replace(&mut buffer.file, File::open(path.path())?);
    let refused = buffer.flush().expect_err("the file is open for reading only");
    println!("a flush that fails: {refused}");
    buffer.file = good;
    assert_eq!(buffer.flush()?, 1);
    Ok(())
}
