//! The mark of how much output has left, written in place because it is written often.
//!
//! Each write goes to the slot that does not hold, so a death in the middle of one leaves the mark before it. It is not
//! made durable: after a power cut it may be an older one, and then output that had left leaves once more. Nothing is deleted
//! on its word; each manifest records the mark that it saw, durably, and that is what [`prune`](crate::Store::prune) goes by.

use crate::disk;
use crate::error::{Result, StoreError};
use crate::step::reach;
use peregrine_image::{Mark, WorldId};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

#[derive(Debug)]
pub(crate) struct ReleasedMark {
    path: PathBuf,
    file: File,
    mark: Mark,
}

/// Reads the mark of `world`.
pub(crate) fn read_mark(path: &Path, world: WorldId) -> Result<Mark> {
    let mark = Mark::parse(&disk::read(path)?).map_err(StoreError::damaged(path))?;
    if mark.world != world {
        return Err(StoreError::ForeignWorld {
            path: path.to_path_buf(),
            found: mark.world,
            expected: world,
        });
    }
    Ok(mark)
}

impl ReleasedMark {
    pub(crate) fn open(path: PathBuf, world: WorldId) -> Result<Self> {
        let mark = read_mark(&path, world)?;
        let file = OpenOptions::new().write(true).open(&path).map_err(StoreError::io("open", &path))?;
        Ok(Self { path, file, mark })
    }

    pub(crate) fn released(&self) -> u64 {
        self.mark.released
    }

    pub(crate) fn set(&mut self, released: u64) -> Result<()> {
        let mark = Mark { count: self.mark.count.wrapping_add(1), released, ..self.mark };
        let (at, slot) = mark.to_slot();
        let write = || {
            reach("write mark", &self.path)?;
            self.file.write_all_at(&slot[..Mark::SLOT_LEN / 2], at)?;
            reach("write mark", &self.path)?;
            self.file.write_all_at(&slot[Mark::SLOT_LEN / 2..], at + (Mark::SLOT_LEN / 2) as u64)
        };
        write().map_err(StoreError::io("write", &self.path))?;
        self.mark = mark;
        Ok(())
    }
}
