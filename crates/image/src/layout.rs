//! The fixed records of the format, each written once: the struct, its offsets and its row in the documentation
//! come from the same lines.
//!
//! ```text
//! image      ImageHeader    │ pages that hold data, 4096 bytes each │ PageEntry × page_count │ ImageTrailer
//! manifest   ManifestHeader │ ChainEntry × … │ MemberEntry × …      │ ChunkEntry × … │ control │ ManifestTrailer
//! chunk      ChunkHeader    │ output bytes
//! mark       MarkSlot       │ MarkSlot
//! ```
//!
//! All numbers are little-endian, and no record needs alignment, so a record is read from wherever it lies.
//! `FORMAT.md`, which is part of the crate documentation, is compared with the tables built here by a test.

use core::mem::offset_of;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The version that this build writes, and the only one that it reads.
pub const FORMAT_VERSION: u32 = 1;

/// One line of a record's table.
pub struct Field {
    /// Name in the struct and in error messages.
    pub name: &'static str,
    /// First byte, counted from the start of the record.
    pub offset_bytes: usize,
    /// Width.
    pub len_bytes: usize,
    /// What it holds.
    pub meaning: &'static str,
}

/// The layout of one record.
pub struct RecordLayout {
    /// Name of the record.
    pub name: &'static str,
    /// Bytes in one record.
    pub len_bytes: usize,
    /// Its fields in order; they leave no gap.
    pub fields: &'static [Field],
}

/// A record that carries the CRC-32C of itself, taken while the field `crc` is zero.
pub(crate) trait SelfChecked: Copy + IntoBytes + FromBytes + Immutable + KnownLayout {
    fn crc_mut(&mut self) -> &mut U32;

    fn recorded(mut self) -> u32 {
        self.crc_mut().get()
    }

    fn computed(mut self) -> u32 {
        *self.crc_mut() = U32::ZERO;
        crc32c::crc32c(self.as_bytes())
    }

    fn sealed(mut self) -> Self {
        let crc = self.computed();
        *self.crc_mut() = U32::new(crc);
        self
    }
}

macro_rules! records {
    ($($(#[$doc:meta])* $checked:ident $name:ident { $($field:ident: $ty:ty = $meaning:literal,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
            #[repr(C)]
            pub(crate) struct $name { $(#[doc = $meaning] pub $field: $ty,)* }

            impl $name {
                pub(crate) const LEN: usize = size_of::<Self>();
            }

            records!(@$checked $name);
        )*

        /// Every record of the format, in the order in which the documentation lists them.
        pub const RECORDS: &[RecordLayout] = &[$(RecordLayout {
            name: stringify!($name),
            len_bytes: size_of::<$name>(),
            fields: &[$(Field {
                name: stringify!($field),
                offset_bytes: offset_of!($name, $field),
                len_bytes: size_of::<$ty>(),
                meaning: $meaning,
            },)*],
        },)*];
    };
    (@checked $name:ident) => {
        impl SelfChecked for $name {
            fn crc_mut(&mut self) -> &mut U32 {
                &mut self.crc
            }
        }
    };
    (@plain $name:ident) => {};
}

records! {
    /// Starts an image file.
    checked ImageHeader {
        magic: [u8; 8] = "`PRGIMAGE`",
        version: U32 = "format version",
        crc: U32 = "CRC-32C of this record, taken with this field zero",
        build: [u8; 32] = "build id of the executable that wrote it",
        world: [u8; 16] = "world id",
        thread: U64 = "thread",
        generation: U64 = "generation of the life that wrote it",
        sequence: U64 = "its sequence",
        base: U64 = "sequence of the image of this thread that it is a delta to; 0: it is full",
    }
    /// One page of an image, in ascending order of address.
    plain PageEntry {
        address: U64 = "address of the page, a multiple of 4096",
        crc: U32 = "CRC-32C of the page's 4096 bytes",
        kind: U32 = "0: all zero, no data in the file; 1: the next 4096 bytes of data",
    }
    /// Ends an image file.
    checked ImageTrailer {
        page_count: U64 = "entries in the page table",
        stored_count: U64 = "pages that have data in the file",
        total_len: U64 = "bytes in the file, this record included",
        header_crc: U32 = "`crc` of the header: ties the two ends together",
        table_crc: U32 = "CRC-32C of the page table",
        crc: U32 = "CRC-32C of this record, taken with this field zero",
        magic: [u8; 8] = "`PRGIMEND`",
    }
    /// Starts a manifest.
    checked ManifestHeader {
        magic: [u8; 8] = "`PRGWORLD`",
        version: U32 = "format version",
        crc: U32 = "CRC-32C of this record, taken with this field zero",
        build: [u8; 32] = "build id of the executable that wrote it",
        world: [u8; 16] = "world id",
        generation: U64 = "generation of the life that wrote it",
        sequence: U64 = "its sequence",
        previous: U64 = "sequence of the world image that it continues; 0: none",
        released: U64 = "bytes of output that had left the store when it was written",
        output_end: U64 = "bytes of output that are committed with it and before it",
        chain_count: U64 = "threads",
        member_count: U64 = "images, over all threads",
        chunk_count: U64 = "chunks of output from `released` on",
        control_len: U64 = "bytes of control state",
    }
    /// One thread of a manifest, in ascending order; its images are the next `member_count` members.
    plain ChainEntry {
        thread: U64 = "thread",
        member_count: U64 = "images in its chain, a full one first",
    }
    /// One image of a chain, the oldest first.
    plain MemberEntry {
        generation: U64 = "generation in the image's header",
        sequence: U64 = "sequence in the image's header",
        len: U64 = "bytes in the image file",
        seal: U32 = "`crc` of the image's trailer",
    }
    /// One chunk of output that is committed and was not known to have been released.
    plain ChunkEntry {
        start: U64 = "offset of its first byte in all output",
        len: U64 = "bytes of output in it",
        generation: U64 = "generation in the chunk's header",
        sequence: U64 = "sequence in the chunk's header",
        body_crc: U32 = "CRC-32C of the output bytes",
    }
    /// Ends a manifest.
    checked ManifestTrailer {
        total_len: U64 = "bytes in the file, this record included",
        header_crc: U32 = "`crc` of the header: ties the two ends together",
        lists_crc: U32 = "CRC-32C of all chain, member and chunk entries",
        control_crc: U32 = "CRC-32C of the control state",
        crc: U32 = "CRC-32C of this record, taken with this field zero",
        magic: [u8; 8] = "`PRGWREND`",
    }
    /// Starts a chunk of output; the bytes follow and end the file.
    checked ChunkHeader {
        magic: [u8; 8] = "`PRGOUTPT`",
        version: U32 = "format version",
        crc: U32 = "CRC-32C of this record, taken with this field zero",
        world: [u8; 16] = "world id",
        generation: U64 = "generation of the life that wrote it",
        sequence: U64 = "sequence of the commit that it belongs to",
        start: U64 = "offset of its first byte in all output",
        len: U64 = "bytes of output",
        body_crc: U32 = "CRC-32C of the output bytes",
    }
    /// One of the two slots of the released mark: the valid one with the higher count holds.
    checked MarkSlot {
        magic: [u8; 8] = "`PRGMARK1`",
        version: U32 = "format version",
        crc: U32 = "CRC-32C of this record, taken with this field zero",
        world: [u8; 16] = "world id",
        count: U64 = "how often the mark was written",
        released: U64 = "bytes of output that have left the store",
        zero: [u8; 464] = "zero; fills the sector",
    }
}

/// Appends the records' tables in the form that `FORMAT.md` holds.
pub fn render_tables() -> String {
    let mut text = String::new();
    for record in RECORDS {
        text += &format!("\n### `{}`, {} bytes\n\n", record.name, record.len_bytes);
        text += "| offset | bytes | field | meaning |\n|---|---|---|---|\n";
        for f in record.fields {
            text += &format!("| {} | {} | `{}` | {} |\n", f.offset_bytes, f.len_bytes, f.name, f.meaning);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_tables_are_the_structs() {
        let documented = include_str!("../FORMAT.md");
        let tables = render_tables();
        assert!(documented.ends_with(&tables), "FORMAT.md must end with these tables:\n\n{tables}");
    }

    #[test]
    fn records_have_no_gaps_and_fit_the_sector_where_they_must() {
        for record in RECORDS {
            let mut next = 0;
            for field in record.fields {
                assert_eq!(field.offset_bytes, next, "{}.{}", record.name, field.name);
                next += field.len_bytes;
            }
            assert_eq!(next, record.len_bytes, "{}", record.name);
        }
        assert_eq!(MarkSlot::LEN, 512);
    }
}
