//! What an image holds and where, found without reading its pages.
//!
//! Read from both ends inwards, each step trusting only what the step before has checked:
//!
//! ```text
//! 1  length ≥ header + trailer                          else Truncated
//! 2  header: magic, version, checksum                   else NotOne, Version, Damaged(header)
//! 3  trailer: magic, checksum, its total_len, its tie to this header
//!                                                       else NoTrailer, Damaged(trailer), Inconsistent
//! 4  header + stored_count pages + page_count entries + trailer = length, checked for overflow:
//!    only now is memory for the table taken, never more than the file is long
//! 5  page table: checksum, then each entry
//! ```
//!
//! Pages are checked when they are read ([`PageRef::check`]).

use crate::error::{FileKind, ImageError, Part};
use crate::ids::{BuildId, Generation, Sequence, ThreadId, WorldId};
use crate::layout::{ImageHeader, ImageTrailer, PageEntry};
use crate::open::{Ends, Starts, take};
use crate::source::Source;
use crate::writer::{ImageInfo, KIND_STORED, KIND_ZERO, ZERO_PAGE_CRC};
use peregrine_base::{PAGE_SIZE, VirtAddr};
use std::io;
use zerocopy::FromBytes;

const FILE: FileKind = FileKind::Image;

/// One page of an image: its address, and how to get at it and check it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRef {
    address: VirtAddr,
    crc: u32,
    /// 0 (where the header lies) for a page that has no data in the file.
    offset_bytes: u64,
}

impl PageRef {
    /// Where the page lies in its thread's world.
    pub const fn address(&self) -> VirtAddr {
        self.address
    }

    /// Where its 4096 bytes lie in the file, or `None` for a page of zeros.
    pub const fn offset_bytes(&self) -> Option<u64> {
        if self.offset_bytes == 0 { None } else { Some(self.offset_bytes) }
    }

    /// Checks that `page` is what was written.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] that names the page's address.
    pub fn check(&self, page: &[u8; PAGE_SIZE]) -> Result<(), ImageError> {
        ImageError::check(FILE, Part::Page(self.address), self.crc, crc32c::crc32c(page))
    }
}

/// An image without its pages' bytes.
#[derive(Clone, Debug)]
pub struct ImageIndex {
    info: ImageInfo,
    seal: u32,
    len_bytes: u64,
    pages: Vec<PageRef>,
}

fn io_error(source: io::Error) -> ImageError {
    ImageError::Io { file: FILE, source }
}

impl ImageIndex {
    /// Reads and checks everything but the pages.
    ///
    /// # Errors
    /// Every [`ImageError`] but a damaged page.
    pub fn read<S: Source + ?Sized>(source: &S) -> Result<Self, ImageError> {
        let len_bytes = source.len_bytes().map_err(io_error)?;
        let ends_len = (ImageHeader::LEN + ImageTrailer::LEN) as u64;
        if len_bytes < ends_len {
            return Err(ImageError::Truncated { file: FILE, have_bytes: len_bytes, need_bytes: ends_len });
        }
        let mut bytes = [0; ImageHeader::LEN];
        source.read_exact_at(&mut bytes, 0).map_err(io_error)?;
        let header = take::<ImageHeader>(FILE, &bytes)?.0.checked(Part::Header)?;
        let mut bytes = [0; ImageTrailer::LEN];
        source.read_exact_at(&mut bytes, len_bytes - ImageTrailer::LEN as u64).map_err(io_error)?;
        let trailer = take::<ImageTrailer>(FILE, &bytes)?.0.checked(len_bytes, header.crc.get())?;

        let info = ImageInfo {
            build: BuildId::from_bytes(header.build),
            world: WorldId::from_bytes(header.world),
            thread: ThreadId::new(header.thread.get()),
            generation: Generation::new(header.generation.get()),
            sequence: sequence(&header)?,
            base: base(&header)?,
        };
        let pages = read_table(source, &trailer, len_bytes)?;
        Ok(Self { info, seal: trailer.crc.get(), len_bytes, pages })
    }

    /// Whose pages these are.
    pub const fn info(&self) -> &ImageInfo {
        &self.info
    }

    /// The trailer's checksum, which tells this image from any other of the same name.
    pub const fn seal(&self) -> u32 {
        self.seal
    }

    /// Bytes in the file.
    pub const fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// The pages in ascending order of address, each once.
    pub fn pages(&self) -> &[PageRef] {
        &self.pages
    }
}

fn sequence(header: &ImageHeader) -> Result<Sequence, ImageError> {
    Sequence::new(header.sequence.get()).ok_or(ImageError::Inconsistent {
        file: FILE,
        part: Part::Header,
        field: "sequence",
        found: 0,
        expected: 1,
    })
}

fn base(header: &ImageHeader) -> Result<Option<Sequence>, ImageError> {
    let (base, sequence) = (header.base.get(), header.sequence.get());
    if base >= sequence {
        let expected = sequence - 1;
        return Err(ImageError::Inconsistent {
            file: FILE,
            part: Part::Header,
            field: "base",
            found: base,
            expected,
        });
    }
    Ok(Sequence::new(base))
}

fn read_table<S: Source + ?Sized>(
    source: &S,
    trailer: &ImageTrailer,
    len_bytes: u64,
) -> Result<Vec<PageRef>, ImageError> {
    let (count, stored) = (trailer.page_count.get(), trailer.stored_count.get());
    let inner = len_bytes - (ImageHeader::LEN + ImageTrailer::LEN) as u64;
    let table_len = count.saturating_mul(PageEntry::LEN as u64);
    let data_len = stored.saturating_mul(PAGE_SIZE as u64);
    ImageError::expect(
        FILE,
        Part::Trailer,
        "page and stored counts of",
        table_len.saturating_add(data_len),
        inner,
    )?;

    // Bounded by the file's length now, but a sparse file can be longer than memory: ask, don't abort.
    let mut bytes = Vec::new();
    let no_memory = |_| io_error(io::ErrorKind::OutOfMemory.into());
    let table_bytes = usize::try_from(table_len).map_err(|_| io_error(io::ErrorKind::OutOfMemory.into()))?;
    bytes.try_reserve_exact(table_bytes).map_err(no_memory)?;
    bytes.resize(table_bytes, 0);
    source.read_exact_at(&mut bytes, ImageHeader::LEN as u64 + data_len).map_err(io_error)?;
    ImageError::check(FILE, Part::PageTable, trailer.table_crc.get(), crc32c::crc32c(&bytes))?;

    let mut pages = Vec::new();
    pages.try_reserve_exact(table_bytes / PageEntry::LEN).map_err(no_memory)?;
    let mut next_data = ImageHeader::LEN as u64;
    let data_end = next_data + data_len;
    for entry in bytes.chunks_exact(PageEntry::LEN) {
        let (entry, _) = PageEntry::read_from_prefix(entry).map_err(|_| wrong("length", 0, 16))?;
        let after = pages.last().map(|page: &PageRef| page.address.as_usize() as u64);
        let page = page_ref(&entry, after, next_data, data_end)?;
        if page.offset_bytes != 0 {
            next_data += PAGE_SIZE as u64;
        }
        pages.push(page);
    }
    if next_data != data_end {
        return Err(wrong("end of data", next_data, data_end));
    }
    Ok(pages)
}

fn wrong(field: &'static str, found: u64, expected: u64) -> ImageError {
    ImageError::Inconsistent { file: FILE, part: Part::PageTable, field, found, expected }
}

fn page_ref(
    entry: &PageEntry,
    after: Option<u64>,
    next_data: u64,
    data_end: u64,
) -> Result<PageRef, ImageError> {
    let address = entry.address.get();
    let least = after.map_or(Some(0), |a| a.checked_add(PAGE_SIZE as u64)).ok_or(wrong(
        "address",
        address,
        u64::MAX,
    ))?;
    if address < least || !address.is_multiple_of(PAGE_SIZE as u64) {
        return Err(wrong("address", address, least));
    }
    let address = usize::try_from(address).map_err(|_| wrong("address", address, usize::MAX as u64))?;
    let (crc, kind) = (entry.crc.get(), entry.kind.get());
    let offset_bytes = match kind {
        KIND_STORED if next_data < data_end => next_data,
        KIND_STORED => return Err(wrong("end of data", next_data + PAGE_SIZE as u64, data_end)),
        KIND_ZERO if crc == ZERO_PAGE_CRC => 0,
        KIND_ZERO => return Err(wrong("crc of a zero page", crc.into(), ZERO_PAGE_CRC.into())),
        _ => return Err(wrong("kind", kind.into(), KIND_STORED.into())),
    };
    Ok(PageRef { address: VirtAddr::new(address), crc, offset_bytes })
}
