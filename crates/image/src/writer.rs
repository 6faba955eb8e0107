//! Writing an image, front to back, in one pass.
//!
//! The page table comes *after* the data and the counts stand in the trailer, so that a caller can pass pages as it
//! finds them: neither their number nor which of them are zero is known when the header is written, and the file
//! underneath never needs to seek. What is kept meanwhile is 16 bytes a page.

use crate::error::WriteError;
use crate::ids::{BuildId, Generation, Sequence, ThreadId, WorldId};
use crate::layout::{FORMAT_VERSION, ImageHeader, ImageTrailer, PageEntry, SelfChecked};
use crate::open::{Ends, Starts, ends, starts};
use peregrine_base::{PAGE_SIZE, VirtAddr};
use std::io::Write;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

starts!(ImageHeader, Image, b"PRGIMAGE");
ends!(ImageTrailer, Image, b"PRGIMEND");

pub(crate) const KIND_ZERO: u32 = 0;
pub(crate) const KIND_STORED: u32 = 1;

/// A page of zeros.
pub static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// CRC-32C of [`ZERO_PAGE`].
pub(crate) const ZERO_PAGE_CRC: u32 = 0x98f9_4189;

/// Whose pages an image holds, and what they are relative to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ImageInfo {
    /// The executable of the world.
    pub build: BuildId,
    /// The world.
    pub world: WorldId,
    /// The thread that owns the pages.
    pub thread: ThreadId,
    /// The life that writes it.
    pub generation: Generation,
    /// The world image that it is part of.
    pub sequence: Sequence,
    /// The image of this thread that it is a delta to, or `None` if it is full.
    pub base: Option<Sequence>,
}

/// What was written: enough to tell this image from any other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Written {
    /// Bytes in the file.
    pub len_bytes: u64,
    /// The trailer's checksum, which covers the header's and the page table's, and that those of all pages.
    pub seal: u32,
    /// Pages in the image.
    pub pages: u64,
    /// Pages that took space, that is, were not all zero.
    pub stored_pages: u64,
}

/// Writes one image to `W`.
///
/// # Examples
/// ```
/// # use peregrine_image::*;
/// # use peregrine_base::VirtAddr;
/// let info = ImageInfo {
///     build: BuildId::from_bytes([1; 32]),
///     world: WorldId::from_bytes([2; 16]),
///     thread: ThreadId::new(7),
///     generation: Generation::new(1),
///     sequence: Sequence::FIRST,
///     base: None,
/// };
/// let mut writer = ImageWriter::new(Vec::new(), &info)?;
/// writer.page(VirtAddr::new(0x10_0000), &[0xab; 4096])?;
/// writer.page(VirtAddr::new(0x20_0000), &[0; 4096])?;
/// let (bytes, written) = writer.finish()?;
/// assert_eq!((written.pages, written.stored_pages), (2, 1));
///
/// let image = Image::parse(&bytes)?;
/// assert_eq!(image.info(), &info);
/// let (address, page) = image.pages().next().unwrap()?;
/// assert_eq!((address, page[0]), (VirtAddr::new(0x10_0000), 0xab));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ImageWriter<W> {
    out: W,
    header_crc: u32,
    table: Vec<PageEntry>,
    previous: Option<VirtAddr>,
    stored_pages: u64,
}

impl core::fmt::Debug for PageEntry {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:#x}", self.address.get())
    }
}

impl<W: Write> ImageWriter<W> {
    /// Starts an image by writing its header.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn new(mut out: W, info: &ImageInfo) -> Result<Self, WriteError> {
        let header = ImageHeader {
            magic: <ImageHeader as Starts>::MAGIC,
            version: U32::new(FORMAT_VERSION),
            crc: U32::ZERO,
            build: *info.build.as_bytes(),
            world: *info.world.as_bytes(),
            thread: U64::new(info.thread.get()),
            generation: U64::new(info.generation.get()),
            sequence: U64::new(info.sequence.get()),
            base: U64::new(Sequence::encode(info.base)),
        }
        .sealed();
        out.write_all(header.as_bytes())?;
        Ok(Self { out, header_crc: header.crc.get(), table: Vec::new(), previous: None, stored_pages: 0 })
    }

    /// Adds the page at `address`. A page of zeros takes 16 bytes, any other 4112.
    ///
    /// # Errors
    /// If `address` starts no page or is not above the page before; those of the writer underneath. After an error
    /// of the writer the image can't be finished to any use.
    pub fn page(&mut self, address: VirtAddr, page: &[u8; PAGE_SIZE]) -> Result<(), WriteError> {
        if !address.is_page_aligned() {
            return Err(WriteError::Unaligned { address });
        }
        if let Some(previous) = self.previous.filter(|previous| *previous >= address) {
            return Err(WriteError::OutOfOrder { previous, next: address });
        }
        let (kind, crc) = if *page == ZERO_PAGE {
            (KIND_ZERO, ZERO_PAGE_CRC)
        } else {
            self.out.write_all(page)?;
            self.stored_pages += 1;
            (KIND_STORED, crc32c::crc32c(page))
        };
        let address64 = U64::new(address.as_usize() as u64);
        self.table.push(PageEntry { address: address64, crc: U32::new(crc), kind: U32::new(kind) });
        self.previous = Some(address);
        Ok(())
    }

    /// Ends the image and hands the writer back, flushed. Making it durable is the caller's.
    ///
    /// # Errors
    /// Those of the writer underneath.
    pub fn finish(mut self) -> Result<(W, Written), WriteError> {
        let table = self.table.as_bytes();
        let data_len = self.stored_pages * PAGE_SIZE as u64;
        let len_bytes = (ImageHeader::LEN + table.len() + ImageTrailer::LEN) as u64 + data_len;
        let trailer = ImageTrailer {
            page_count: U64::new(self.table.len() as u64),
            stored_count: U64::new(self.stored_pages),
            total_len: U64::new(len_bytes),
            header_crc: U32::new(self.header_crc),
            table_crc: U32::new(crc32c::crc32c(table)),
            crc: U32::ZERO,
            magic: <ImageTrailer as Ends>::MAGIC,
        }
        .sealed();
        self.out.write_all(table)?;
        self.out.write_all(trailer.as_bytes())?;
        self.out.flush()?;
        let seal = trailer.crc.get();
        let pages = self.table.len() as u64;
        Ok((self.out, Written { len_bytes, seal, pages, stored_pages: self.stored_pages }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_a_zero_page_is_the_constant() {
        assert_eq!(crc32c::crc32c(&ZERO_PAGE), ZERO_PAGE_CRC);
    }
}
