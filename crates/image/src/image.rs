//! An image that lies in memory as a whole.

use crate::error::{FileKind, ImageError};
use crate::index::{ImageIndex, PageRef};
use crate::writer::{ImageInfo, ZERO_PAGE};
use peregrine_base::{PAGE_SIZE, VirtAddr};

/// An image over the bytes of its file. [`ImageIndex`] reads one from a file without its pages.
#[derive(Clone, Debug)]
pub struct Image<'a> {
    index: ImageIndex,
    bytes: &'a [u8],
}

impl<'a> Image<'a> {
    /// Reads an image from all bytes of its file. Pages are checked when they are taken out.
    ///
    /// # Errors
    /// Every [`ImageError`] but a damaged page.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ImageError> {
        Ok(Self { index: ImageIndex::read(bytes)?, bytes })
    }

    /// Whose pages these are.
    pub const fn info(&self) -> &ImageInfo {
        self.index.info()
    }

    /// What it holds and where.
    pub const fn index(&self) -> &ImageIndex {
        &self.index
    }

    /// The pages in ascending order, each checked as it comes.
    ///
    /// An item is an error if that page is damaged; the pages after it still come.
    pub fn pages(&self) -> impl Iterator<Item = Result<(VirtAddr, &'a [u8; PAGE_SIZE]), ImageError>> {
        self.index.pages().iter().map(|page| Ok((page.address(), self.bytes_of(page)?)))
    }

    fn bytes_of(&self, page: &PageRef) -> Result<&'a [u8; PAGE_SIZE], ImageError> {
        let Some(offset) = page.offset_bytes() else { return Ok(&ZERO_PAGE) };
        let from = usize::try_from(offset).ok().and_then(|start| self.bytes.get(start..)?.first_chunk());
        let bytes = from.ok_or(ImageError::Truncated {
            file: FileKind::Image,
            have_bytes: self.bytes.len() as u64,
            need_bytes: offset + PAGE_SIZE as u64,
        })?;
        page.check(bytes)?;
        Ok(bytes)
    }
}
