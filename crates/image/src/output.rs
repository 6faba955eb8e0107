//! Output that a commit made visible, and how much of it has left the store.
//!
//! A *chunk* is written once, with its commit. The *mark* is written over and over, in place, after output reached its
//! real destination, so it has two slots that take turns: a write that is cut short damages the older one only.
//!
//! ```text
//! mark   [ count 8, released 512 ][ count 7, released 490 ]   count 8 holds; the next write goes to the right slot
//! ```

use crate::error::{FileKind, ImageError, Part};
use crate::ids::{Generation, Sequence, WorldId};
use crate::layout::{ChunkHeader, FORMAT_VERSION, MarkSlot, SelfChecked};
use crate::manifest::ChunkRef;
use crate::open::{Starts, starts, take};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

starts!(ChunkHeader, Chunk, b"PRGOUTPT");
starts!(MarkSlot, Mark, b"PRGMARK1");

/// A chunk of output over the bytes of its file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Chunk<'a> {
    /// The world that wrote it.
    pub world: WorldId,
    /// Where it lies in the output, and whose it is.
    pub place: ChunkRef,
    /// The output.
    pub bytes: &'a [u8],
}

impl<'a> Chunk<'a> {
    /// A chunk of `bytes` that starts at offset `start` of all output.
    pub fn new(
        world: WorldId,
        generation: Generation,
        sequence: Sequence,
        start: u64,
        bytes: &'a [u8],
    ) -> Self {
        let (len_bytes, body_crc) = (bytes.len() as u64, crc32c::crc32c(bytes));
        Self { world, place: ChunkRef { start, len_bytes, generation, sequence, body_crc }, bytes }
    }

    /// What comes before `bytes` in its file.
    pub fn header_bytes(&self) -> Vec<u8> {
        let header = ChunkHeader {
            magic: <ChunkHeader as Starts>::MAGIC,
            version: U32::new(FORMAT_VERSION),
            crc: U32::ZERO,
            world: *self.world.as_bytes(),
            generation: U64::new(self.place.generation.get()),
            sequence: U64::new(self.place.sequence.get()),
            start: U64::new(self.place.start),
            len: U64::new(self.place.len_bytes),
            body_crc: U32::new(self.place.body_crc),
        };
        header.sealed().as_bytes().to_vec()
    }

    /// Reads a chunk from all bytes of its file.
    ///
    /// # Errors
    /// [`ImageError`], which names the part that is wrong.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ImageError> {
        const FILE: FileKind = FileKind::Chunk;
        let (header, body) = take::<ChunkHeader>(FILE, bytes)?;
        let header = header.checked(Part::Header)?;
        let (have, len_bytes) = (body.len() as u64, header.len.get());
        if have < len_bytes {
            let need_bytes = len_bytes.saturating_add(ChunkHeader::LEN as u64);
            return Err(ImageError::Truncated { file: FILE, have_bytes: bytes.len() as u64, need_bytes });
        }
        ImageError::expect(FILE, Part::Header, "len", len_bytes, have)?;
        ImageError::check(FILE, Part::Output, header.body_crc.get(), crc32c::crc32c(body))?;
        let start = header.start.get();
        let room = u64::MAX - start;
        let no_sequence = ImageError::Inconsistent {
            file: FILE,
            part: Part::Header,
            field: "sequence",
            found: 0,
            expected: 1,
        };
        if len_bytes > room {
            return Err(ImageError::Inconsistent {
                file: FILE,
                part: Part::Header,
                field: "start",
                found: start,
                expected: u64::MAX - len_bytes,
            });
        }
        let place = ChunkRef {
            start,
            len_bytes,
            generation: Generation::new(header.generation.get()),
            sequence: Sequence::new(header.sequence.get()).ok_or(no_sequence)?,
            body_crc: header.body_crc.get(),
        };
        Ok(Self { world: WorldId::from_bytes(header.world), place, bytes: body })
    }
}

/// How much output has left the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark {
    /// The world.
    pub world: WorldId,
    /// How often the mark was written.
    pub count: u64,
    /// Bytes of output that have left the store.
    pub released: u64,
}

impl Mark {
    /// Bytes in a mark's file.
    pub const FILE_LEN: usize = 2 * MarkSlot::LEN;

    /// Bytes in one slot.
    pub const SLOT_LEN: usize = MarkSlot::LEN;

    /// The slot's bytes, and where in the file they go.
    pub fn to_slot(&self) -> (u64, [u8; Self::SLOT_LEN]) {
        let slot = MarkSlot {
            magic: <MarkSlot as Starts>::MAGIC,
            version: U32::new(FORMAT_VERSION),
            crc: U32::ZERO,
            world: *self.world.as_bytes(),
            count: U64::new(self.count),
            released: U64::new(self.released),
            zero: [0; 464],
        };
        let mut bytes = [0; Self::SLOT_LEN];
        bytes.copy_from_slice(slot.sealed().as_bytes());
        ((self.count % 2) * Self::SLOT_LEN as u64, bytes)
    }

    /// The bytes of a file that holds this mark in both slots.
    pub fn to_file(&self) -> Vec<u8> {
        let mut bytes = vec![0; Self::FILE_LEN];
        for mark in [*self, Self { count: self.count.wrapping_add(1), ..*self }] {
            let (at, slot) = mark.to_slot();
            bytes[at as usize..][..Self::SLOT_LEN].copy_from_slice(&slot);
        }
        bytes
    }

    /// Reads both slots.
    ///
    /// # Errors
    /// For the file if its length is wrong, else for each slot on its own.
    pub fn parse_slots(bytes: &[u8]) -> Result<[Result<Self, ImageError>; 2], ImageError> {
        let (have_bytes, need_bytes) = (bytes.len() as u64, Self::FILE_LEN as u64);
        if have_bytes < need_bytes {
            return Err(ImageError::Truncated { file: FileKind::Mark, have_bytes, need_bytes });
        }
        ImageError::expect(FileKind::Mark, Part::Trailer, "length", have_bytes, need_bytes)?;
        let (left, right) = bytes.split_at(Self::SLOT_LEN);
        Ok([Self::parse_slot(0, left), Self::parse_slot(1, right)])
    }

    /// Reads the mark: the intact slot with the higher count. The other slot may be damaged, for its write may have
    /// been cut short; then up to one release is forgotten, and that output is released again.
    ///
    /// # Errors
    /// If neither slot is intact.
    pub fn parse(bytes: &[u8]) -> Result<Self, ImageError> {
        match Self::parse_slots(bytes)? {
            [Ok(left), Ok(right)] => Ok(if left.count > right.count { left } else { right }),
            [Ok(intact), Err(_)] | [Err(_), Ok(intact)] => Ok(intact),
            [Err(left), Err(_)] => Err(left),
        }
    }

    fn parse_slot(index: usize, bytes: &[u8]) -> Result<Self, ImageError> {
        let slot = take::<MarkSlot>(FileKind::Mark, bytes)?.0.checked(Part::Slot(index))?;
        let count = slot.count.get();
        ImageError::expect(FileKind::Mark, Part::Slot(index), "count modulo 2", count % 2, index as u64)?;
        Ok(Self { world: WorldId::from_bytes(slot.world), count, released: slot.released.get() })
    }
}
