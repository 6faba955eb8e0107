//! Mappings that do not say where: in the range asked for, at or above the hint if there is room, and different members apart.

use peregrine_space::model::{Delivery, HeapArena, ModelFrames, ModelMmu, Tables};
use peregrine_space::{
    AddressSpace, Backing, MapError, Mapping, Member, PAGE_SIZE, PageCount, PageRange, Place, Protection,
    Sizes, VirtAddr,
};

type Space<'a> = AddressSpace<'a, &'a ModelMmu, &'a ModelFrames>;

const ANONYMOUS: Mapping = Mapping { backing: Backing::Anonymous, rights: Protection::ReadWrite };

fn addr(page: usize) -> VirtAddr {
    VirtAddr::new(page * PAGE_SIZE)
}

fn range(page: usize, count: usize) -> PageRange {
    PageRange::new(addr(page), PageCount::new(count))
}

fn with(members: usize, f: impl for<'a> FnOnce(&Space<'a>, &mut [Member<'a>])) {
    let sizes = Sizes { members, spaces: 1, nodes: 2000, regions: 4, frames: 4 };
    let arena = HeapArena::new(&sizes);
    let frames = ModelFrames::new(members, sizes.frames);
    let mmu = ModelMmu::new(&frames, members, Tables::Views, Delivery::Interrupt);
    let mut members: Vec<_> = (0..members).map(|_| arena.spaces().join().unwrap()).collect();
    let space = AddressSpace::create(&mut members[0], &mmu, &frames).unwrap();
    f(&space, &mut members);
}

fn hole<'a>(
    space: &Space<'a>,
    m: &mut Member<'a>,
    within: PageRange,
    hint: Option<usize>,
    pages: usize,
) -> Result<PageRange, MapError> {
    let place = Place::Hole { within, hint: hint.map(addr) };
    space.map(m, place, PageCount::new(pages), &ANONYMOUS)
}

#[test]
fn a_mapping_lies_at_its_hint_or_in_the_first_gap_above_it_or_else_below() {
    with(1, |space, m| {
        let (m, within) = (&mut m[0], range(1000, 100));
        assert_eq!(hole(space, m, within, Some(1040), 10), Ok(range(1040, 10)));
        // The hint is taken: the first gap above it that is large enough.
        assert_eq!(hole(space, m, within, Some(1040), 20), Ok(range(1050, 20)));
        assert_eq!(hole(space, m, within, Some(1045), 30), Ok(range(1070, 30)));
        // Nothing is left above.
        assert_eq!(hole(space, m, within, Some(1045), 25), Ok(range(1000, 25)));
        assert_eq!(hole(space, m, within, Some(1099), 15), Ok(range(1025, 15)));
        assert_eq!(hole(space, m, within, None, 1), Err(MapError::NoHole { pages: 1, within }));
        // A gap between two, as large as what is wanted.
        space.unmap(m, range(1047, 7)).unwrap();
        assert_eq!(hole(space, m, within, Some(1000), 8), Err(MapError::NoHole { pages: 8, within }));
        assert_eq!(hole(space, m, within, Some(1000), 7), Ok(range(1047, 7)));
    });
}

#[test]
fn a_hint_outside_is_cut_to_the_range_and_nothing_lies_beyond_it() {
    with(1, |space, m| {
        let (m, within) = (&mut m[0], range(1000, 100));
        assert_eq!(hole(space, m, within, Some(3), 10), Ok(range(1000, 10)));
        assert_eq!(hole(space, m, within, Some(5000), 10), Ok(range(1010, 10)));
        assert_eq!(
            hole(space, m, within, None, 81),
            Err(MapError::NoHole { pages: 81, within }),
            "free pages behind the range do not count"
        );
        assert_eq!(hole(space, m, within, None, 80), Ok(range(1020, 80)));
    });
}

#[test]
fn without_a_hint_a_member_goes_on_behind_its_last_mapping_and_members_stay_apart() {
    const MEMBERS: usize = 4;
    with(MEMBERS, |space, members| {
        let within = range(0, 1 << 30);
        let share = (1 << 30) / MEMBERS;
        for round in 0..20 {
            for (i, m) in members.iter_mut().enumerate() {
                let found = hole(space, m, within, None, 3).unwrap();
                assert_eq!(found, range(i * share + 3 * round, 3), "member {i}, mapping {round}");
            }
        }
    });
}

#[test]
fn who_looks_behind_a_used_span_keeps_its_distance_so_that_members_share_no_node() {
    with(2, |space, members| {
        let within = range(0, 1 << 30);
        let begun = hole(space, &mut members[0], within, Some(0), 100).unwrap();
        let behind = hole(space, &mut members[1], within, Some(0), 1).unwrap();
        let gap = (behind.start().as_usize() - begun.end().as_usize()) / PAGE_SIZE;
        // 4 GiB behind the first record of the span.
        assert!(((1 << 20) - 100..=1 << 20).contains(&gap), "{gap} pages");
        // Where there is no room for that, any gap will do.
        let small = range(1 << 31, 200);
        hole(space, &mut members[0], small, Some(1 << 31), 100).unwrap();
        hole(space, &mut members[1], small, Some(1 << 31), 100).unwrap();
    });
}
