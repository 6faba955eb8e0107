//! Random files against naive models, and random bytes against nothing but "no panic, no wild allocation".

use peregrine_base::{PAGE_SIZE, VirtAddr};
use peregrine_image::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn sequence() -> impl Strategy<Value = Sequence> {
    (2..=u64::MAX).prop_map(|n| Sequence::new(n).unwrap())
}

fn info() -> impl Strategy<Value = ImageInfo> {
    (any::<[u8; 32]>(), any::<[u8; 16]>(), any::<u64>(), any::<u64>(), sequence(), any::<bool>()).prop_map(
        |(build, world, thread, generation, sequence, delta)| ImageInfo {
            build: BuildId::from_bytes(build),
            world: WorldId::from_bytes(world),
            thread: ThreadId::new(thread),
            generation: Generation::new(generation),
            sequence,
            base: if delta { Sequence::new(sequence.get() / 2) } else { None },
        },
    )
}

fn pages() -> impl Strategy<Value = BTreeMap<usize, u8>> {
    prop::collection::btree_map(
        prop_oneof![0..40usize, 0..usize::MAX >> 12],
        prop_oneof![Just(0), any::<u8>()],
        0..20,
    )
}

fn write(info: &ImageInfo, pages: &BTreeMap<usize, u8>) -> Vec<u8> {
    let mut writer = ImageWriter::new(Vec::new(), info).unwrap();
    for (page, fill) in pages {
        writer.page(VirtAddr::new(page << 12), &[*fill; PAGE_SIZE]).unwrap();
    }
    let (bytes, written) = writer.finish().unwrap();
    assert_eq!(written.len_bytes, bytes.len() as u64);
    bytes
}

proptest! {
    #[test]
    fn an_image_gives_back_its_pages(info in info(), pages in pages()) {
        let bytes = write(&info, &pages);
        let image = Image::parse(&bytes).unwrap();
        prop_assert_eq!(image.info(), &info);
        let read: BTreeMap<_, _> = image.pages().map(|page| {
            let (address, page) = page.unwrap();
            assert!(page.iter().all(|byte| *byte == page[0]));
            (address.as_usize() >> 12, page[0])
        }).collect();
        prop_assert_eq!(read, pages);
    }

    #[test]
    fn random_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..1500)) {
        prop_assert!(Image::parse(&bytes).is_err());
        prop_assert!(Manifest::parse(&bytes).is_err());
        prop_assert!(Chunk::parse(&bytes).is_err());
        prop_assert!(Mark::parse(&bytes).is_err());
    }

    #[test]
    fn an_image_with_overwritten_bytes_is_refused_or_the_same(
        info in info(), pages in pages(), at in any::<prop::sample::Index>(), with in prop::collection::vec(any::<u8>(), 1..40),
    ) {
        let mut bytes = write(&info, &pages);
        let before = bytes.clone();
        let at = at.index(bytes.len());
        let end = (at + with.len()).min(bytes.len());
        bytes[at..end].copy_from_slice(&with[..end - at]);
        let whole = Image::parse(&bytes).and_then(|image| image.pages().try_for_each(|page| page.map(drop)));
        prop_assert_eq!(whole.is_ok(), bytes == before);
    }

    #[test]
    fn pages_out_of_order_are_refused(first in 0usize..1000, second in 0usize..1000, offset in 1usize..PAGE_SIZE) {
        let info = ImageInfo { build: BuildId::from_bytes([0; 32]), world: WorldId::from_bytes([0; 16]),
            thread: ThreadId::new(0), generation: Generation::new(1), sequence: Sequence::FIRST, base: None };
        let mut writer = ImageWriter::new(Vec::new(), &info).unwrap();
        writer.page(VirtAddr::new(first << 12), &ZERO_PAGE).unwrap();
        let refused = writer.page(VirtAddr::new(second << 12), &ZERO_PAGE).is_err();
        prop_assert_eq!(refused, second <= first);
        let is_unaligned = matches!(writer.page(VirtAddr::new((2000 << 12) + offset), &ZERO_PAGE), Err(WriteError::Unaligned { .. }));
        prop_assert!(is_unaligned);
    }
}
