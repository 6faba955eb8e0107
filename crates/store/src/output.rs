//! What the program printed, from the commit to its real destination.
//!
//! ```text
//! 0 ─────────── released ─────────────── output_end
//!   has left              committed, to be        not committed: nobody has it
//!   (perhaps a little     written (again)
//!   more: no fsync)
//! ```
//!
//! Output becomes visible with a commit and leaves after it, so nobody sees what a crash could undo (S10). Between the
//! two a death may fall: then the next life finds what was committed and not marked as released, and writes that again.

use crate::disk;
use crate::error::{Misuse, Result, StoreError};
use crate::released::read_mark;
use crate::store::Store;
use crate::world::WorldImage;
use peregrine_image::{Chunk, ChunkRef, Sequence};

/// Committed output that may not have left.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unreleased {
    /// Offset of its first byte in all output.
    pub offset: u64,
    /// The output.
    pub bytes: Vec<u8>,
}

impl Store {
    /// How many bytes of output are known to have left the store.
    ///
    /// # Errors
    /// If the mark can't be read or is damaged.
    pub fn released(&self) -> Result<u64> {
        match &self.held {
            Some(held) => Ok(held.mark.released()),
            None => Ok(read_mark(&self.paths.released(), self.format.world)?.released),
        }
    }

    /// Says that the first `total_bytes` of all output have reached their destination. Cheap: one write, not durable.
    ///
    /// # Errors
    /// [`Misuse::ReleasedBeyondCommit`] if that much was never committed; [`Misuse::ReleasedBackwards`];
    /// [`Misuse::NoGeneration`]; [`StoreError::Io`].
    pub fn mark_released(&mut self, total_bytes: u64) -> Result<()> {
        let held = self.held_mut()?;
        let committed = held.life()?.output_end;
        if total_bytes > committed {
            return Err(Misuse::ReleasedBeyondCommit { given: total_bytes, committed }.into());
        }
        let released = held.mark.released();
        if total_bytes < released {
            return Err(Misuse::ReleasedBackwards { given: total_bytes, released }.into());
        }
        held.mark.set(total_bytes)
    }

    /// The output that `image` committed, or one before it, and that is not marked as released. Written again, it is
    /// at most what was written between the last mark and the death.
    ///
    /// # Errors
    /// If a chunk is missing, damaged or not the one that was committed; if the mark is damaged.
    pub fn unreleased(&self, image: &WorldImage) -> Result<Unreleased> {
        let manifest = &image.manifest;
        let offset = self.released()?.max(manifest.released).min(manifest.output_end);
        let mut bytes = Vec::new();
        for chunk in &manifest.chunks {
            let end = chunk.start + chunk.len_bytes;
            if end > offset {
                let output = self.read_chunk(chunk, manifest.sequence)?;
                // No truncation: the skipped part is shorter than `output`.
                bytes.extend_from_slice(&output[offset.saturating_sub(chunk.start) as usize..]);
            }
        }
        Ok(Unreleased { offset, bytes })
    }

    /// Reads the output of a chunk that the manifest `named_by` lists.
    pub(crate) fn read_chunk(&self, place: &ChunkRef, named_by: Sequence) -> Result<Vec<u8>> {
        let path = self.paths.chunk(place);
        let mut bytes = disk::read(&path)?;
        let chunk = Chunk::parse(&bytes).map_err(StoreError::damaged(&path))?;
        if chunk.world != self.format.world {
            return Err(StoreError::ForeignWorld { path, found: chunk.world, expected: self.format.world });
        }
        if chunk.place != *place {
            let (found, expected) = (format!("{:?}", chunk.place), format!("{place:?}"));
            return Err(StoreError::Replaced { path, sequence: named_by, field: "place", found, expected });
        }
        let header_len = bytes.len() - chunk.bytes.len();
        bytes.drain(..header_len);
        Ok(bytes)
    }
}
