//! Mappings that are a few slots, however large; and the parts of them that are changed by themselves.

use peregrine_space::model::{Delivery, HeapArena, ModelFrames, ModelMmu, Tables};
use peregrine_space::{
    AddressSpace, Backing, Mapping, Member, PAGE_SIZE, PageCount, PageRange, Place, Protection, Sizes,
    VirtAddr,
};

type Space<'a> = AddressSpace<'a, &'a ModelMmu, &'a ModelFrames>;

/// Pages of a slot in each kind of node, from the lowest.
const SPANS: [usize; 6] = [1, 1 << 6, 1 << 12, 1 << 18, 1 << 24, 1 << 30];
/// Where the tests' pages are: at the start of a slot of the root.
const BASE: usize = 3 * SPANS[5];

fn addr(page: usize) -> VirtAddr {
    VirtAddr::new((BASE + page) * PAGE_SIZE)
}

fn range(page: usize, count: usize) -> PageRange {
    PageRange::new(addr(page), PageCount::new(count))
}

fn with(members: usize, f: impl for<'a> FnOnce(&Space<'a>, &mut [Member<'a>], &ModelMmu)) {
    let sizes = Sizes { members, spaces: 1, nodes: 400, regions: 4, frames: 20 };
    let arena = HeapArena::new(&sizes);
    let frames = ModelFrames::new(members, sizes.frames);
    let mmu = ModelMmu::new(&frames, members, Tables::Views, Delivery::Interrupt);
    let mut members: Vec<_> = (0..members).map(|_| arena.spaces().join().unwrap()).collect();
    let space = AddressSpace::create(&mut members[0], &mmu, &frames).unwrap();
    f(&space, &mut members, &mmu);
    assert_eq!(mmu.violations(), 0, "an access reached a frame that was another's");
}

#[test]
fn a_mapping_takes_the_nodes_at_its_edges_alone_however_large_it_is_and_a_touched_page_those_of_its_path() {
    for backing in [
        Backing::Anonymous,
        Backing::AnonymousShared,
        Backing::Object { object: 1, first: 7 },
        Backing::ObjectPrivate { object: 1, first: 7 },
        Backing::Home { object: 1 },
    ] {
        let mapping = Mapping { backing, rights: Protection::ReadWrite };
        // How far an edge lies inside a slot, by the lowest level whose slots begin there.
        for (level, span) in SPANS.into_iter().enumerate() {
            with(1, |space, m, _| {
                let (spaces, m) = (m[0].spaces(), &mut m[0]);
                // More than a terabyte: three slots of the root, or parts of them.
                let (first, count) = (SPANS[5] - span, SPANS[5] + 2 * span);
                space.map(m, Place::Fixed(addr(first)), PageCount::new(count), &mapping).unwrap();
                let edges = 2 * (5 - level);
                assert_eq!(spaces.nodes_in_use(), 1 + edges, "{backing:?}, edges at level {level}");
                let middle = SPANS[5] + 12_345_678;
                space.load(m, addr(middle)).unwrap();
                let path = if matches!(backing, Backing::Home { .. }) { 0 } else { 5 };
                assert_eq!(spaces.nodes_in_use(), 1 + edges + path, "{backing:?}: its page has a frame");
                let other = space.query(m, addr(middle + 1)).map(|e| (e.backing, e.rights));
                let expected = match backing {
                    Backing::Object { object, first: 7 } => {
                        Backing::Object { object, first: 7 + (middle + 1 - first) as u64 }
                    }
                    Backing::ObjectPrivate { object, first: 7 } => {
                        Backing::ObjectPrivate { object, first: 7 + (middle + 1 - first) as u64 }
                    }
                    other => other,
                };
                assert_eq!(other, Some((expected, Protection::ReadWrite)), "its neighbour is what it was");
            });
        }
    }
}

/// The slots that a part is split into have in view what the slot had.
#[test]
fn who_has_a_large_mapping_in_view_loses_the_part_that_is_taken_and_no_more() {
    let home = Mapping { backing: Backing::Home { object: 1 }, rights: Protection::ReadWrite };
    for (viewers, pages) in [(1, SPANS[1]), (3, SPANS[1]), (1, SPANS[2]), (3, SPANS[2])] {
        with(5, |space, members, mmu| {
            let spaces = members[0].spaces();
            let (viewing, rest) = members.split_at_mut(viewers);
            let other = &mut rest[0];
            space.map(other, Place::Fixed(addr(0)), PageCount::new(pages), &home).unwrap();
            let folded = spaces.nodes_in_use();
            viewing.iter_mut().for_each(|m| space.admit(m, range(0, pages)).unwrap());
            assert_eq!(spaces.nodes_in_use(), folded, "its records stay as coarse as they are");
            let sees = |m: &Member<'_>, page: usize| {
                mmu.access(space.frames(), space.id(), m.id(), addr(page), Some(1)).is_ok()
            };
            let mut gone = Vec::new();
            for (n, (page, count)) in [(5, 1), (20, 9), (63, 1), (40, 2)].into_iter().enumerate() {
                let before = mmu.counts().shootdowns;
                if n == 3 {
                    space.protect(other, range(page, count), Protection::Read).unwrap();
                } else {
                    space.unmap(other, range(page, count)).unwrap();
                }
                assert_eq!(mmu.counts().shootdowns - before, viewers as u64, "{count} pages at {page}");
                gone.extend(page..page + count);
                for m in viewing.iter() {
                    for page in 0..pages {
                        assert_eq!(sees(m, page), !gone.contains(&page), "page {page} after {gone:?}");
                    }
                }
            }
        });
    }
}
