//! One thread's pages on their way into a commit.

use crate::commit::Commit;
use crate::disk::{self, Writing};
use crate::error::{Result, StoreError};
use peregrine_base::{PAGE_SIZE, VirtAddr};
use peregrine_image::{ImageInfo, ImageWriter, Member, ThreadId, WriteError};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

/// Bytes gathered before a write.
const BUFFER_BYTES: usize = 256 << 10;

/// One thread's image that is being written. Dropped without [`finish`](Self::finish) it is not part of the commit.
#[derive(Debug)]
pub struct ThreadImage<'c, 'a> {
    commit: &'c mut Commit<'a>,
    info: ImageInfo,
    name: PathBuf,
    writer: Unfinished,
}

/// The file underneath, which is removed unless it is finished.
#[derive(Debug)]
struct Unfinished {
    writer: Option<ImageWriter<BufWriter<Writing>>>,
    temporary: PathBuf,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.writer.is_some() {
            // What stays in `tmp` is removed by the next life.
            let _ = disk::remove(&self.temporary);
        }
    }
}

impl<'c, 'a> ThreadImage<'c, 'a> {
    pub(crate) fn begin(
        commit: &'c mut Commit<'a>,
        info: ImageInfo,
        file: Writing,
        name: PathBuf,
    ) -> Result<Self> {
        let temporary = file.path.clone();
        let writer = ImageWriter::new(BufWriter::with_capacity(BUFFER_BYTES, file), &info);
        let writer = Some(writer.map_err(|error| failed(info.thread, &name, error))?);
        Ok(Self { commit, info, name, writer: Unfinished { writer, temporary } })
    }

    /// Adds one page. Pages come in ascending order.
    ///
    /// # Errors
    /// [`StoreError::Page`], [`StoreError::Io`].
    pub fn page(&mut self, address: VirtAddr, page: &[u8; PAGE_SIZE]) -> Result<()> {
        let Some(writer) = &mut self.writer.writer else { return Ok(()) };
        writer.page(address, page).map_err(|error| failed(self.info.thread, &self.name, error))
    }

    /// Ends the image; it is part of the commit.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn finish(mut self) -> Result<()> {
        let Some(writer) = self.writer.writer.take() else { return Ok(()) };
        let remove = |error: WriteError| {
            let _ = disk::remove(&self.writer.temporary);
            failed(self.info.thread, &self.name, error)
        };
        let (file, written) = writer.finish().map_err(remove)?;
        let file = file.into_inner().map_err(|error| remove(WriteError::Io(error.into_error())))?;
        let member = Member {
            generation: self.info.generation,
            sequence: self.info.sequence,
            len_bytes: written.len_bytes,
            seal: written.seal,
        };
        self.commit.add_image(&self.info, member, file, std::mem::take(&mut self.name));
        Ok(())
    }
}

fn failed(thread: ThreadId, name: &Path, error: WriteError) -> StoreError {
    match error {
        WriteError::Io(source) => StoreError::io("write", name)(source),
        source => StoreError::Page { thread, source },
    }
}
