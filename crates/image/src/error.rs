//! What can be wrong with a file, said so that a reader knows which bytes and what to do.

use core::fmt;
use peregrine_base::VirtAddr;
use std::io;

/// The kinds of file in the format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileKind {
    /// One thread's pages.
    Image,
    /// One commit of the whole world.
    Manifest,
    /// Output that became visible with one commit.
    Chunk,
    /// How much output has left the store.
    Mark,
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Image => "thread image",
            Self::Manifest => "world manifest",
            Self::Chunk => "output chunk",
            Self::Mark => "released mark",
        })
    }
}

/// A part of a file that has a checksum of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// The first record.
    Header,
    /// An image's table of pages.
    PageTable,
    /// The page of this address.
    Page(VirtAddr),
    /// A manifest's lists of threads, images and chunks.
    Lists,
    /// A manifest's control state.
    Control,
    /// A chunk's bytes.
    Output,
    /// Slot 0 or 1 of the mark.
    Slot(usize),
    /// The last record.
    Trailer,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => f.write_str("header"),
            Self::PageTable => f.write_str("page table"),
            Self::Page(addr) => write!(f, "page at {addr}"),
            Self::Lists => f.write_str("list of threads and images"),
            Self::Control => f.write_str("control state"),
            Self::Output => f.write_str("output"),
            Self::Slot(n) => write!(f, "slot {n}"),
            Self::Trailer => f.write_str("trailer"),
        }
    }
}

/// Why bytes are not a whole, intact file of the format.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The file is shorter than the least that its kind can be, or than its header says.
    #[error(
        "the {file} is truncated: it has {have_bytes} bytes and needs {need_bytes}; restore it from a copy"
    )]
    Truncated {
        /// What it should be.
        file: FileKind,
        /// Its length.
        have_bytes: u64,
        /// The least length that would do.
        need_bytes: u64,
    },
    /// The file does not end with a trailer.
    #[error(
        "the {file} has no trailer in its last bytes (it is {have_bytes} bytes long): it was truncated, or something \
         was appended to it; restore it from a copy"
    )]
    NoTrailer {
        /// What it should be.
        file: FileKind,
        /// Its length.
        have_bytes: u64,
    },
    /// The file starts with something else than its magic number.
    #[error(
        "not a {file}: it starts with \"{}\" where the magic is \"{}\"; was another file put in its place?",
        found.escape_ascii(), magic.escape_ascii()
    )]
    NotOne {
        /// What it should be.
        file: FileKind,
        /// What it starts with.
        found: [u8; 8],
        /// What it must start with.
        magic: [u8; 8],
    },
    /// Another version of the format.
    #[error(
        "the {file} has format version {found}, this build reads version {supported}; use the build that wrote it"
    )]
    Version {
        /// What it is.
        file: FileKind,
        /// The version in the file.
        found: u32,
        /// The version that this build reads.
        supported: u32,
    },
    /// A checksum does not match.
    #[error(
        "the {part} of the {file} is damaged (CRC-32C {computed:#010x}, recorded {recorded:#010x}); restore the file \
         from a copy"
    )]
    Damaged {
        /// What it is.
        file: FileKind,
        /// Where the damage is.
        part: Part,
        /// Checksum in the file.
        recorded: u32,
        /// Checksum of the bytes in the file.
        computed: u32,
    },
    /// The checksums match and the numbers don't: the file was put together wrongly.
    #[error(
        "the {part} of the {file} has {field} {found} where only {expected} is possible, though its checksum matches: \
         whoever wrote it was faulty; restore the file from a copy"
    )]
    Inconsistent {
        /// What it is.
        file: FileKind,
        /// Where the wrong number is.
        part: Part,
        /// Its field.
        field: &'static str,
        /// Its value.
        found: u64,
        /// The value (or the bound) that would have been right.
        expected: u64,
    },
    /// The file could not be read.
    #[error("the {file} can't be read")]
    Io {
        /// What it is.
        file: FileKind,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl ImageError {
    pub(crate) fn check(file: FileKind, part: Part, recorded: u32, computed: u32) -> Result<(), Self> {
        if recorded == computed { Ok(()) } else { Err(Self::Damaged { file, part, recorded, computed }) }
    }

    pub(crate) fn expect(
        file: FileKind,
        part: Part,
        field: &'static str,
        found: u64,
        expected: u64,
    ) -> Result<(), Self> {
        if found == expected {
            Ok(())
        } else {
            Err(Self::Inconsistent { file, part, field, found, expected })
        }
    }
}

/// Why an image could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// An address that starts no page.
    #[error("{address} is not the address of a page; pass multiples of 4096")]
    Unaligned {
        /// The address that was given.
        address: VirtAddr,
    },
    /// Pages that came in the wrong order, or twice.
    #[error(
        "page {next} came after page {previous}; pass the pages of an image in ascending order, each once"
    )]
    OutOfOrder {
        /// The page before.
        previous: VirtAddr,
        /// The page that was refused.
        next: VirtAddr,
    },
    /// The writer underneath failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}
