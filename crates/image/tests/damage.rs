//! Every way to damage a small file of each kind: each bit flipped, each length cut, bytes appended.
//!
//! The oracle is the simplest one: a damaged file is refused, an intact one gives back what was written.

use peregrine_base::{PAGE_SIZE, VirtAddr};
use peregrine_image::*;

const WORLD: WorldId = WorldId::from_bytes([0x77; 16]);
const BUILD: BuildId = BuildId::from_bytes([0xb1; 32]);

fn info() -> ImageInfo {
    ImageInfo {
        build: BUILD,
        world: WORLD,
        thread: ThreadId::new(3),
        generation: Generation::new(2),
        sequence: Sequence::new(9).unwrap(),
        base: Sequence::new(7),
    }
}

/// Two stored pages with a zero page between them.
fn image() -> Vec<u8> {
    let mut writer = ImageWriter::new(Vec::new(), &info()).unwrap();
    let mut page = [0; PAGE_SIZE];
    page[17] = 1;
    writer.page(VirtAddr::new(0x5000), &page).unwrap();
    writer.page(VirtAddr::new(0x6000), &[0; PAGE_SIZE]).unwrap();
    writer.page(VirtAddr::new(0x7fff_0000_0000), &[0xff; PAGE_SIZE]).unwrap();
    writer.finish().unwrap().0
}

fn manifest() -> Manifest {
    let seq = |n| Sequence::new(n).unwrap();
    let member = |n| Member { generation: Generation::new(1), sequence: seq(n), len_bytes: 140, seal: 5 };
    Manifest {
        build: BUILD,
        world: WORLD,
        generation: Generation::new(2),
        sequence: seq(9),
        previous: Sequence::new(8),
        released: 10,
        output_end: 30,
        chains: vec![
            Chain { thread: ThreadId::new(0), members: vec![member(1), member(9)] },
            Chain { thread: ThreadId::new(u64::MAX), members: vec![member(4)] },
        ],
        chunks: [(5, 6, 7), (11, 19, 9)]
            .map(|(start, len_bytes, n)| ChunkRef {
                start,
                len_bytes,
                generation: Generation::new(1),
                sequence: seq(n),
                body_crc: 3,
            })
            .to_vec(),
        control: b"run queues, mailboxes, timers".to_vec(),
    }
}

fn read_image(bytes: &[u8]) -> Result<Vec<(VirtAddr, Vec<u8>)>, ImageError> {
    Image::parse(bytes)?.pages().map(|page| page.map(|(address, page)| (address, page.to_vec()))).collect()
}

type Read = fn(&[u8]) -> Result<(), ImageError>;

fn every_kind() -> Vec<(FileKind, Vec<u8>, Read)> {
    let chunk = Chunk::new(WORLD, Generation::new(1), Sequence::FIRST, 12, b"hello\n");
    let chunk_bytes = [chunk.header_bytes(), chunk.bytes.to_vec()].concat();
    let mark = Mark { world: WORLD, count: 4, released: 99 };
    vec![
        (FileKind::Image, image(), |bytes| read_image(bytes).map(drop)),
        (FileKind::Manifest, manifest().to_bytes(), |bytes| Manifest::parse(bytes).map(drop)),
        (FileKind::Chunk, chunk_bytes, |bytes| Chunk::parse(bytes).map(drop)),
        (FileKind::Mark, mark.to_file(), |bytes| {
            let [left, right] = Mark::parse_slots(bytes)?;
            left.and(right).map(drop)
        }),
    ]
}

#[test]
fn what_was_written_is_read_back() {
    let pages = read_image(&image()).unwrap();
    let firsts: Vec<_> = pages.iter().map(|(address, page)| (address.as_usize(), page[17])).collect();
    assert_eq!(firsts, [(0x5000, 1), (0x6000, 0), (0x7fff_0000_0000, 0xff)]);
    assert_eq!(*Image::parse(&image()).unwrap().info(), info());
    assert_eq!(Manifest::parse(&manifest().to_bytes()).unwrap(), manifest());
}

#[test]
fn a_flip_of_any_bit_is_refused() {
    for (kind, bytes, read) in every_kind() {
        read(&bytes).unwrap();
        let mut damaged = bytes.clone();
        for bit in 0..bytes.len() * 8 {
            damaged[bit / 8] ^= 1 << (bit % 8);
            let found = read(&damaged);
            assert!(found.is_err(), "{kind}: bit {bit} of {} flipped and not found", bytes.len() * 8);
            damaged[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

#[test]
fn a_cut_at_any_byte_is_refused_and_so_is_a_tail() {
    for (kind, bytes, read) in every_kind() {
        for len in 0..bytes.len() {
            assert!(read(&bytes[..len]).is_err(), "{kind}: cut to {len} of {} and not found", bytes.len());
        }
        for tail in [&b"\0"[..], &bytes, &bytes[..1], &bytes[bytes.len() - 44..]] {
            assert!(
                read(&[&bytes, tail].concat()).is_err(),
                "{kind}: {} bytes more and not found",
                tail.len()
            );
        }
    }
}

/// The byte ranges of [`image`]'s parts, and what an error about a flip there must name.
#[test]
fn the_error_names_the_part_that_is_damaged() {
    let bytes = image();
    let table = 96 + 2 * PAGE_SIZE;
    let trailer = table + 3 * 16;
    assert_eq!(bytes.len(), trailer + 44);
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x40;
        let expected = match at {
            0..96 => Part::Header,
            _ if at < 96 + PAGE_SIZE => Part::Page(VirtAddr::new(0x5000)),
            _ if at < table => Part::Page(VirtAddr::new(0x7fff_0000_0000)),
            _ if at < trailer => Part::PageTable,
            _ => Part::Trailer,
        };
        match read_image(&damaged) {
            Err(ImageError::Damaged { part, file: FileKind::Image, .. }) => {
                assert_eq!(part, expected, "byte {at}")
            }
            other => panic!("byte {at}: {other:?}"),
        }
    }
}

#[test]
fn an_image_is_not_read_as_a_manifest_and_another_version_is_told_from_damage() {
    assert!(matches!(Manifest::parse(&image()), Err(ImageError::NotOne { file: FileKind::Manifest, .. })));
    let mut newer = image();
    newer[8..16].copy_from_slice(&[2, 0, 0, 0, 1, 2, 3, 4]);
    let error = Image::parse(&newer).unwrap_err();
    assert!(matches!(error, ImageError::Version { found: 2, supported: 1, .. }), "{error}");
    assert!(error.to_string().contains("use the build that wrote it"), "{error}");
}

#[test]
fn the_front_of_one_image_does_not_fit_the_end_of_another() {
    let other = {
        let mut writer = ImageWriter::new(Vec::new(), &ImageInfo { base: None, ..info() }).unwrap();
        writer.page(VirtAddr::new(0x5000), &[1; PAGE_SIZE]).unwrap();
        writer.page(VirtAddr::new(0x6000), &[0; PAGE_SIZE]).unwrap();
        writer.page(VirtAddr::new(0x7000), &[2; PAGE_SIZE]).unwrap();
        writer.finish().unwrap().0
    };
    let spliced = [&image()[..96], &other[96..]].concat();
    assert!(matches!(Image::parse(&spliced), Err(ImageError::Inconsistent { field: "header_crc", .. })));
}

#[test]
fn a_mark_with_one_damaged_slot_is_read_from_the_other() {
    let mark = Mark { world: WORLD, count: 4, released: 99 };
    let mut bytes = mark.to_file();
    let (at, slot) = Mark { count: 6, released: 120, ..mark }.to_slot();
    bytes[at as usize..][..Mark::SLOT_LEN].copy_from_slice(&slot);
    assert_eq!(Mark::parse(&bytes).unwrap().released, 120);
    bytes[at as usize + 45] ^= 1;
    assert_eq!(Mark::parse(&bytes).unwrap().released, 99);
    bytes[Mark::SLOT_LEN - at as usize + 45] ^= 1;
    assert!(Mark::parse(&bytes).is_err());
}
