//! The two ends of a file: the same checks, in the same order, for every kind.
//!
//! A checksum says that a record is damaged, not which field. Two fields matter more than the others, because
//! without them the record can't even be read as what it is: the magic number and the version. So when one of them
//! is wrong the checksum is taken once more with the right value in its place: if it matches then, the file *is* of
//! this kind and version and that one field is damaged; if not, it is another kind of file or another version.

use crate::error::{FileKind, ImageError, Part};
use crate::layout::{FORMAT_VERSION, SelfChecked};
use zerocopy::little_endian::U32;

/// A record that starts a file: magic and version lie first in every version of the format.
pub(crate) trait Starts: SelfChecked {
    const FILE: FileKind;
    const MAGIC: [u8; 8];
    fn magic_mut(&mut self) -> &mut [u8; 8];
    fn version_mut(&mut self) -> &mut U32;

    /// Passes `self` on if it is whole and of this version.
    fn checked(mut self, part: Part) -> Result<Self, ImageError> {
        let file = Self::FILE;
        let (recorded, computed) = (self.recorded(), self.computed());
        let (magic, version) = (*self.magic_mut(), self.version_mut().get());
        if magic != Self::MAGIC || version != FORMAT_VERSION {
            let mut mended = self;
            *mended.magic_mut() = Self::MAGIC;
            *mended.version_mut() = U32::new(FORMAT_VERSION);
            let is_ours_but_damaged = mended.computed() == recorded;
            if !is_ours_but_damaged && magic != Self::MAGIC {
                return Err(ImageError::NotOne { file, found: magic, magic: Self::MAGIC });
            }
            if !is_ours_but_damaged {
                return Err(ImageError::Version { file, found: version, supported: FORMAT_VERSION });
            }
        }
        ImageError::check(file, part, recorded, computed)?;
        Ok(self)
    }
}

/// A record that ends a file.
pub(crate) trait Ends: SelfChecked {
    const FILE: FileKind;
    const MAGIC: [u8; 8];
    fn magic_mut(&mut self) -> &mut [u8; 8];
    fn total_len(&self) -> u64;
    fn header_crc(&self) -> u32;

    /// Passes `self` on if it is the whole trailer of a file of `have_bytes` with a header sealed `header_crc`.
    fn checked(mut self, have_bytes: u64, header_crc: u32) -> Result<Self, ImageError> {
        let file = Self::FILE;
        let (recorded, computed) = (self.recorded(), self.computed());
        if *self.magic_mut() != Self::MAGIC {
            let mut mended = self;
            *mended.magic_mut() = Self::MAGIC;
            if mended.computed() != recorded {
                return Err(ImageError::NoTrailer { file, have_bytes });
            }
        }
        ImageError::check(file, Part::Trailer, recorded, computed)?;
        ImageError::expect(file, Part::Trailer, "total_len", self.total_len(), have_bytes)?;
        ImageError::expect(file, Part::Trailer, "header_crc", self.header_crc().into(), header_crc.into())?;
        Ok(self)
    }
}

macro_rules! starts {
    ($record:ty, $kind:ident, $magic:literal) => {
        impl $crate::open::Starts for $record {
            const FILE: $crate::error::FileKind = $crate::error::FileKind::$kind;
            const MAGIC: [u8; 8] = *$magic;
            fn magic_mut(&mut self) -> &mut [u8; 8] {
                &mut self.magic
            }
            fn version_mut(&mut self) -> &mut zerocopy::little_endian::U32 {
                &mut self.version
            }
        }
    };
}

macro_rules! ends {
    ($record:ty, $kind:ident, $magic:literal) => {
        impl $crate::open::Ends for $record {
            const FILE: $crate::error::FileKind = $crate::error::FileKind::$kind;
            const MAGIC: [u8; 8] = *$magic;
            fn magic_mut(&mut self) -> &mut [u8; 8] {
                &mut self.magic
            }
            fn total_len(&self) -> u64 {
                self.total_len.get()
            }
            fn header_crc(&self) -> u32 {
                self.header_crc.get()
            }
        }
    };
}
pub(crate) use {ends, starts};

/// Splits one record off the front of `bytes`.
pub(crate) fn take<R: SelfChecked>(file: FileKind, bytes: &[u8]) -> Result<(R, &[u8]), ImageError> {
    R::read_from_prefix(bytes).map_err(|_| ImageError::Truncated {
        file,
        have_bytes: bytes.len() as u64,
        need_bytes: size_of::<R>() as u64,
    })
}
