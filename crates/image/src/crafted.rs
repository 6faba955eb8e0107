//! Files whose checksums all match and whose numbers are nonsense: what a faulty or hostile writer makes.
//!
//! Damage never gets this far, so these files are sealed by hand. The oracle: an error that names the field, no panic, and
//! no allocation for a length that the file does not have (a wild one would abort the test).

use crate::error::{FileKind, ImageError};
use crate::layout::{
    ChainEntry, ChunkEntry, ChunkHeader, FORMAT_VERSION, ImageHeader, ImageTrailer, ManifestHeader,
    ManifestTrailer, MemberEntry, PageEntry, SelfChecked,
};
use crate::open::{Ends, Starts};
use crate::{Chunk, Image, Manifest};
use proptest::prelude::*;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromZeros, IntoBytes};

/// An image with this table and `data` pages of data; `edit` changes header and trailer before they are sealed.
fn image(
    entries: &[(u64, u32, u32)],
    data: usize,
    edit: impl Fn(&mut ImageHeader, &mut ImageTrailer),
) -> Vec<u8> {
    let table: Vec<u8> = entries
        .iter()
        .flat_map(|&(address, crc, kind)| {
            let entry = PageEntry { address: U64::new(address), crc: U32::new(crc), kind: U32::new(kind) };
            entry.as_bytes().to_vec()
        })
        .collect();
    let mut header = ImageHeader::new_zeroed();
    header.magic = <ImageHeader as Starts>::MAGIC;
    header.version = U32::new(FORMAT_VERSION);
    header.sequence = U64::new(1);
    let total = ImageHeader::LEN + data * 4096 + table.len() + ImageTrailer::LEN;
    let mut trailer = ImageTrailer::new_zeroed();
    trailer.magic = <ImageTrailer as Ends>::MAGIC;
    trailer.page_count = U64::new(entries.len() as u64);
    trailer.stored_count = U64::new(data as u64);
    trailer.total_len = U64::new(total as u64);
    trailer.table_crc = U32::new(crc32c::crc32c(&table));
    edit(&mut header, &mut trailer);
    let header = header.sealed();
    trailer.header_crc = header.crc;
    let pages = vec![1; data * 4096];
    [header.as_bytes(), &pages, &table, trailer.sealed().as_bytes()].concat()
}

fn field(found: Result<(), ImageError>) -> &'static str {
    match found {
        Err(ImageError::Inconsistent { field, .. }) => field,
        other => panic!("{other:?}"),
    }
}

fn field_of_image(bytes: &[u8]) -> &'static str {
    field(Image::parse(bytes).map(drop))
}

const ZERO_CRC: u32 = 0x98f9_4189;

#[test]
fn a_page_table_that_makes_no_sense_is_refused_by_field() {
    let none = |_: &mut ImageHeader, _: &mut ImageTrailer| {};
    Image::parse(&image(&[(0, ZERO_CRC, 0), (0x1000, 5, 1)], 1, none)).unwrap();
    assert_eq!(field_of_image(&image(&[(0x1000, ZERO_CRC, 0), (0x1000, ZERO_CRC, 0)], 0, none)), "address");
    assert_eq!(field_of_image(&image(&[(0x2000, ZERO_CRC, 0), (0x1000, ZERO_CRC, 0)], 0, none)), "address");
    assert_eq!(field_of_image(&image(&[(0x1001, ZERO_CRC, 0)], 0, none)), "address");
    let last = u64::MAX - 4095;
    assert_eq!(field_of_image(&image(&[(last, ZERO_CRC, 0), (0, ZERO_CRC, 0)], 0, none)), "address");
    assert_eq!(field_of_image(&image(&[(0, ZERO_CRC, 7)], 0, none)), "kind");
    assert_eq!(field_of_image(&image(&[(0, 1, 0)], 0, none)), "crc of a zero page");
    assert_eq!(field_of_image(&image(&[(0, 1, 1)], 0, none)), "end of data");
    assert_eq!(field_of_image(&image(&[(0, ZERO_CRC, 0)], 1, none)), "end of data");
}

#[test]
fn wild_counts_are_refused_before_anything_is_allocated() {
    for wild in [1, 2, u64::MAX / 16, u64::MAX / 16 + 1, u64::MAX / 4096 + 1, u64::MAX] {
        let counted = "page and stored counts of";
        assert_eq!(field_of_image(&image(&[], 0, |_, trailer| trailer.page_count = U64::new(wild))), counted);
        assert_eq!(
            field_of_image(&image(&[], 0, |_, trailer| trailer.stored_count = U64::new(wild))),
            counted
        );
    }
    let length = |_: &mut ImageHeader, trailer: &mut ImageTrailer| trailer.total_len = U64::new(u64::MAX);
    assert_eq!(field_of_image(&image(&[], 0, length)), "total_len");
}

#[test]
fn sequences_that_make_no_sense_are_refused() {
    assert_eq!(field_of_image(&image(&[], 0, |header, _| header.sequence = U64::ZERO)), "sequence");
    assert_eq!(field_of_image(&image(&[], 0, |header, _| header.base = U64::new(1))), "base");
    assert_eq!(field_of_image(&image(&[], 0, |header, _| header.base = U64::new(u64::MAX))), "base");
}

/// A manifest with these lists, sealed; the counts are as `counts` says.
fn manifest(
    chains: &[(u64, u64)],
    members: &[u64],
    chunks: &[(u64, u64)],
    counts: [u64; 4],
    ends: [u64; 4],
) -> Vec<u8> {
    let mut lists = Vec::new();
    for &(thread, count) in chains {
        let entry = ChainEntry { thread: U64::new(thread), member_count: U64::new(count) };
        lists.extend_from_slice(entry.as_bytes());
    }
    for &sequence in members {
        let entry = MemberEntry { sequence: U64::new(sequence), ..MemberEntry::new_zeroed() };
        lists.extend_from_slice(entry.as_bytes());
    }
    for &(start, len) in chunks {
        let (start, len, sequence) = (U64::new(start), U64::new(len), U64::new(1));
        lists.extend_from_slice(ChunkEntry { start, len, sequence, ..ChunkEntry::new_zeroed() }.as_bytes());
    }
    let mut header = ManifestHeader::new_zeroed();
    header.magic = <ManifestHeader as Starts>::MAGIC;
    header.version = U32::new(FORMAT_VERSION);
    [header.chain_count, header.member_count, header.chunk_count, header.control_len] = counts.map(U64::new);
    [header.sequence, header.previous, header.released, header.output_end] = ends.map(U64::new);
    let header = header.sealed();
    let mut trailer = ManifestTrailer::new_zeroed();
    trailer.magic = <ManifestTrailer as Ends>::MAGIC;
    trailer.header_crc = header.crc;
    trailer.lists_crc = U32::new(crc32c::crc32c(&lists));
    trailer.total_len = U64::new((ManifestHeader::LEN + lists.len() + ManifestTrailer::LEN) as u64);
    [header.as_bytes(), &lists, trailer.sealed().as_bytes()].concat()
}

fn field_of_manifest(
    chains: &[(u64, u64)],
    members: &[u64],
    chunks: &[(u64, u64)],
    ends: [u64; 4],
) -> &'static str {
    let counts = [chains.len() as u64, members.len() as u64, chunks.len() as u64, 0];
    field(Manifest::parse(&manifest(chains, members, chunks, counts, ends)).map(drop))
}

#[test]
fn a_manifest_that_makes_no_sense_is_refused_by_field() {
    let fine = [9, 8, 10, 30];
    let (chains, members, chunks) = ([(0, 2), (5, 1)], [3, 9, 4], [(5, 10), (15, 15)]);
    Manifest::parse(&manifest(&chains, &members, &chunks, [2, 3, 2, 0], fine)).unwrap();
    let none: &[(u64, u64)] = &[];
    for (chains, members, expected) in [
        (&[(5, 1), (5, 1)][..], &[1, 1][..], "thread"),
        (&[(5, 1), (4, 1)], &[1, 1], "thread"),
        (&[(u64::MAX, 1), (0, 1)], &[1, 1], "thread"),
        (&[(0, 0)], &[1], "member_count"),
        (&[(0, 2)], &[1], "member_count"),
        (&[(0, u64::MAX)], &[1], "member_count"),
        (&[(0, 1)], &[1, 2], "members too many"),
        (&[(0, 2)], &[2, 2], "member sequence"),
        (&[(0, 1)], &[0], "member sequence"),
        (&[(0, 1)], &[10], "member sequence"),
        (&[(0, 2)], &[u64::MAX, u64::MAX], "member sequence"),
    ] {
        assert_eq!(
            field_of_manifest(chains, members, none, [9, 8, 0, 0]),
            expected,
            "{chains:?} {members:?}"
        );
    }
    for (chunks, ends, expected) in [
        (&[][..], [9, 9, 0, 0], "previous"),
        (&[], [0, 0, 0, 0], "sequence"),
        (&[], [9, 0, 2, 1], "released"),
        (&[], [9, 0, 0, 1], "end of chunks"),
        (&[(11, 1)], [9, 0, 10, 12], "chunk start"),
        (&[(5, 5), (11, 1)], [9, 0, 7, 12], "chunk start"),
        (&[(5, 5)], [9, 0, 7, 12], "end of chunks"),
        (&[(5, u64::MAX)], [9, 0, 7, 12], "chunk length"),
    ] {
        assert_eq!(field_of_manifest(&[], &[], chunks, ends), expected, "{chunks:?} {ends:?}");
    }
}

#[test]
fn a_chunk_that_ends_beyond_all_output_is_refused() {
    let world = crate::WorldId::from_bytes([0; 16]);
    let chunk = Chunk::new(world, crate::Generation::new(1), crate::Sequence::FIRST, u64::MAX - 2, b"four");
    let bytes = [chunk.header_bytes(), chunk.bytes.to_vec()].concat();
    assert_eq!(field(Chunk::parse(&bytes).map(drop)), "start");
    let mut header = ChunkHeader::new_zeroed();
    header.magic = <ChunkHeader as Starts>::MAGIC;
    header.version = U32::new(FORMAT_VERSION);
    header.len = U64::new(u64::MAX);
    let refused = Chunk::parse(header.sealed().as_bytes()).unwrap_err();
    assert!(
        matches!(refused, ImageError::Truncated { file: FileKind::Chunk, need_bytes: u64::MAX, .. }),
        "{refused}"
    );
}

fn wild() -> impl Strategy<Value = u64> {
    prop_oneof![
        0u64..6,
        any::<u64>(),
        Just(u64::MAX),
        Just(u64::MAX / 28),
        Just(u64::MAX - 4095),
        Just(1 << 52)
    ]
}

proptest! {
    #[test]
    fn sealed_nonsense_never_panics(
        counts in prop::array::uniform4(wild()), ends in prop::array::uniform4(wild()),
        chains in prop::collection::vec((wild(), wild()), 0..4), members in prop::collection::vec(wild(), 0..5),
        chunks in prop::collection::vec((wild(), wild()), 0..4), fits in any::<bool>(),
        pages in prop::collection::vec((wild(), any::<u32>(), 0u32..3), 0..5), data in 0usize..3,
    ) {
        let true_counts = [chains.len() as u64, members.len() as u64, chunks.len() as u64, 0];
        let counts = if fits { true_counts } else { counts };
        if let Ok(read) = Manifest::parse(&manifest(&chains, &members, &chunks, counts, ends)) {
            prop_assert_eq!(Manifest::parse(&read.to_bytes()).unwrap(), read);
        }
        let made = image(&pages, data, |header, trailer| {
            if !fits {
                header.base = U64::new(ends[0]);
                trailer.page_count = U64::new(ends[1]);
                trailer.stored_count = U64::new(ends[2]);
            }
        });
        if let Ok(image) = Image::parse(&made) {
            prop_assert_eq!(image.pages().count(), pages.len());
        }
    }
}
