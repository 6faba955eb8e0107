//! Where bytes are read from: a file, or a slice in a test.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes that can be read at any offset.
pub trait Source {
    /// How many bytes there are.
    ///
    /// # Errors
    /// If the file can't be asked.
    fn len_bytes(&self) -> io::Result<u64>;

    /// Fills `buf` with the bytes from `offset_bytes` on.
    ///
    /// # Errors
    /// `UnexpectedEof` if there are fewer, or what the kernel says.
    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()>;
}

impl Source for [u8] {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let from = usize::try_from(offset_bytes).ok().and_then(|start| self.get(start..)?.get(..buf.len()));
        buf.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl Source for File {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buf, offset_bytes)
    }
}
