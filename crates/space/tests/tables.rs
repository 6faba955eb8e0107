//! What each kind of page tables costs, by counting: table pages in memory, fills, and cores interrupted.

use peregrine_space::model::{Counts, Delivery, HeapArena, ModelFrames, ModelMmu, Tables};
use peregrine_space::{
    AddressSpace, Backing, Mapping, Member, PAGE_SIZE, PageCount, PageRange, Place, Protection, Sizes,
    VirtAddr,
};

type Space<'a> = AddressSpace<'a, &'a ModelMmu, &'a ModelFrames>;

/// Pages that one table page describes.
const SPAN: usize = 512;
/// Where the tests' pages are: at the start of a table page.
const BASE: usize = 1 << 24;
const SHARE_AT: usize = 4;
const LIMIT: usize = 8;
const HYBRID: Tables = Tables::Hybrid { share_at: SHARE_AT, private_limit: LIMIT };

fn addr(page: usize) -> VirtAddr {
    VirtAddr::new((BASE + page) * PAGE_SIZE)
}

fn range(page: usize, count: usize) -> PageRange {
    PageRange::new(addr(page), PageCount::new(count))
}

/// Runs `f` on a space with a member for each core.
fn with(cores: usize, tables: Tables, f: impl for<'a> FnOnce(&Space<'a>, &mut [Member<'a>], &ModelMmu)) {
    let sizes = Sizes { members: cores, spaces: 1, nodes: cores * 32 + 256, regions: 8, frames: cores * 128 };
    let arena = HeapArena::new(&sizes);
    let frames = ModelFrames::new(cores, sizes.frames);
    let mmu = ModelMmu::new(&frames, cores, tables, Delivery::Interrupt);
    let mut members: Vec<_> = (0..cores).map(|_| arena.spaces().join().unwrap()).collect();
    let space = AddressSpace::create(&mut members[0], &mmu, &frames).unwrap();
    f(&space, &mut members, &mmu);
    assert_eq!(mmu.violations(), 0, "an access reached a frame that was another's");
}

fn map<'a>(space: &Space<'a>, member: &mut Member<'a>, page: usize, count: usize) {
    let mapping = Mapping { backing: Backing::Anonymous, rights: Protection::ReadWrite };
    space.map(member, Place::Fixed(addr(page)), PageCount::new(count), &mapping).expect("room");
}

/// Every core touches every page of a few table pages that the first one mapped.
fn widely_shared(cores: usize, tables: Tables) -> Counts {
    const TABLES: usize = 4;
    const TOUCHED: usize = 8;
    let mut counts = Counts::default();
    with(cores, tables, |space, members, mmu| {
        map(space, &mut members[0], 0, TABLES * SPAN);
        for (core, m) in members.iter_mut().enumerate() {
            for page in (0..TABLES * TOUCHED).map(|n| n / TOUCHED * SPAN + n % TOUCHED * (SPAN / TOUCHED)) {
                let before = space.store(m, addr(page), core as u64 + 1).expect("a frame");
                assert_eq!(before, core as u64, "what the last core wrote");
            }
        }
        counts = mmu.counts();
    });
    counts
}

#[test]
fn what_all_cores_use_takes_the_hybrid_no_more_table_pages_on_eighty_cores_than_on_a_few() {
    let few = widely_shared(SHARE_AT, HYBRID);
    for cores in [10, 40, 80] {
        let (views, shared) = (widely_shared(cores, Tables::Views), widely_shared(cores, Tables::Shared));
        let hybrid = widely_shared(cores, HYBRID);
        assert_eq!(views.table_pages, cores * shared.table_pages, "a view of its own for each core");
        // Those that came before the range was widely shared keep theirs, and one page is everybody's.
        assert!(hybrid.most_table_pages <= (SHARE_AT + 1) * shared.table_pages, "{cores} cores: {hybrid:?}");
        assert_eq!(hybrid.most_table_pages, few.most_table_pages, "{cores} cores: no growth");
        // A core that is linked to a shared page faults no more in it.
        assert!(hybrid.fills < views.fills / 2, "{cores} cores: {hybrid:?}, views {views:?}");
    }
}

#[test]
fn what_few_cores_use_is_shot_down_by_the_hybrid_as_precisely_as_by_views() {
    let shot = |tables| {
        let mut shot = 0;
        with(40, tables, |space, members, mmu| {
            // A range that all use, so that the hybrid has a shared table page: it is nobody's business elsewhere.
            map(space, &mut members[0], 100 * SPAN, 1);
            for m in members.iter_mut() {
                space.store(m, addr(100 * SPAN), 1).expect("a frame");
            }
            for (core, m) in members.iter_mut().enumerate() {
                map(space, m, core * SPAN, 1);
                space.store(m, addr(core * SPAN), 1).expect("a frame");
            }
            for (core, m) in members.iter_mut().enumerate() {
                space.unmap(m, range(core * SPAN, 1)).expect("a range");
            }
            // A page that one hands to the next.
            for core in 0..40 {
                map(space, &mut members[core], core * SPAN + 7, 1);
                space.store(&mut members[core], addr(core * SPAN + 7), 1).expect("a frame");
                let next = &mut members[(core + 1) % 40];
                space.load(next, addr(core * SPAN + 7)).expect("mapped");
                space.unmap(next, range(core * SPAN + 7, 1)).expect("a range");
            }
            shot = mmu.counts().shootdowns;
        });
        shot
    };
    assert_eq!(shot(Tables::Views), 40, "none for what one core used, one for each page handed on");
    assert_eq!(shot(HYBRID), 40);
    assert!(shot(Tables::Shared) > 40, "all that use the table: {}", shot(Tables::Shared));
}

#[test]
fn a_core_of_the_hybrid_over_its_limit_drops_tables_and_loses_nothing_else() {
    for cores in [1, 3] {
        with(cores, HYBRID, |space, members, mmu| {
            for (core, m) in members.iter_mut().enumerate() {
                let base = core * 4 * LIMIT * SPAN;
                map(space, m, base, 4 * LIMIT * SPAN);
                for table in 0..4 * LIMIT {
                    space.store(m, addr(base + table * SPAN), table as u64 + 1).expect("a frame");
                    assert!(mmu.counts().table_pages <= (core + 1) * LIMIT, "{:?}", mmu.counts());
                }
                let fills = mmu.counts().fills;
                for table in 0..4 * LIMIT {
                    assert_eq!(space.load(m, addr(base + table * SPAN)), Ok(table as u64 + 1));
                }
                assert!(mmu.counts().fills > fills, "what was dropped is filled anew");
            }
            assert!(mmu.counts().most_table_pages <= cores * LIMIT);
        });
    }
}

/// Rights that views lack are found by a fault, so raising them is nobody's business; lowering them is the business of those who
/// have the page in view.
#[test]
fn raised_rights_interrupt_nobody_and_lowered_ones_who_has_the_page_in_view() {
    with(6, Tables::Views, |space, members, mmu| {
        map(space, &mut members[0], 0, 4);
        for core in [1, 3, 4] {
            space.store(&mut members[core], addr(2), core as u64).expect("a frame");
        }
        let shot = |f: &mut dyn FnMut()| {
            let before = mmu.counts().shootdowns;
            f();
            mmu.counts().shootdowns - before
        };
        let all = range(0, 4);
        let mut protect =
            |member: usize, rights| shot(&mut || space.protect(&mut members[member], all, rights).unwrap());
        assert_eq!(protect(0, Protection::Read), 3, "all that wrote it");
        assert_eq!(protect(0, Protection::ReadWrite), 0, "raised");
        assert_eq!(protect(0, Protection::ReadWrite), 0, "the same");
        assert_eq!(protect(3, Protection::None), 2, "its own view is no interrupt");
        assert_eq!(protect(3, Protection::Read), 0, "raised");
        assert_eq!(protect(5, Protection::ReadWrite), 0, "raised");
        assert_eq!(space.store(&mut members[1], addr(2), 9), Ok(4), "found by a fault");
    });
}

#[test]
fn who_had_a_page_in_view_before_it_was_unmapped_is_not_asked_about_the_next_one_there() {
    // One page, which is unmapped with its slot in hand, and several.
    for count in [1, 3] {
        with(4, Tables::Views, |space, members, mmu| {
            map(space, &mut members[0], 0, count);
            for m in &mut *members {
                space.store(m, addr(0), 1).expect("a frame");
            }
            space.unmap(&mut members[0], range(0, count)).unwrap();
            let before = mmu.counts().shootdowns;
            assert_eq!(before, 3, "all others had it");
            map(space, &mut members[0], 0, count);
            space.store(&mut members[0], addr(0), 2).expect("a frame");
            space.unmap(&mut members[0], range(0, count)).unwrap();
            assert_eq!(mmu.counts().shootdowns, before, "{count} pages: nobody else has it");
        });
    }
}
