//! The radix array under a model checker: a tree of two levels and four pages, two members.

use loom::sync::Arc;
use space_loom::model::HeapArena;
use space_loom::{
    AddressSpace, Backing, Mapping, Member, NoViews, PAGE_SIZE, PageCount, PageRange, Place, Protection,
    Sizes, VirtAddr,
};

fn check(preemptions: usize, f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 50_000;
    builder.check(f);
}

const SIZES: Sizes = Sizes { members: 2, spaces: 1, nodes: 4, regions: 1, frames: 1 };

fn addr(page: usize) -> VirtAddr {
    VirtAddr::new(page * PAGE_SIZE)
}

fn range(pages: std::ops::Range<usize>) -> PageRange {
    PageRange::new(addr(pages.start), PageCount::new(pages.end - pages.start))
}

fn home(rights: Protection) -> Mapping {
    Mapping { backing: Backing::Home { object: 0 }, rights }
}

type Space = AddressSpace<'static, NoViews, NoViews>;
type Part = fn(&Space, &mut Member<'static>);

/// Runs one part in each of two members, between a beginning and an end.
fn two(preemptions: usize, begin: Part, first: Part, second: Part, end: Part) {
    check(preemptions, move || {
        let arena: &'static HeapArena = Box::leak(Box::new(HeapArena::new(&SIZES)));
        let spaces = arena.spaces();
        let (mut a, mut b) = (spaces.join().unwrap(), spaces.join().unwrap());
        let space = Arc::new(AddressSpace::create(&mut a, NoViews, NoViews).unwrap());
        begin(&space, &mut a);
        let other = {
            let space = space.clone();
            loom::thread::spawn(move || second(&space, &mut b))
        };
        first(&space, &mut a);
        other.join().unwrap();
        end(&space, &mut a);
    });
}

fn nothing(_: &Space, _: &mut Member<'static>) {}

fn rights(space: &Space, m: &mut Member<'static>, page: usize) -> Option<Protection> {
    space.query(m, addr(page)).map(|e| e.rights)
}

fn map(space: &Space, m: &mut Member<'static>, pages: std::ops::Range<usize>, r: Protection) {
    space.map(m, Place::Fixed(addr(pages.start)), PageCount::new(pages.len()), &home(r)).unwrap();
}

#[test]
fn mappings_that_overlap_come_one_after_the_other() {
    two(
        2,
        nothing,
        |space, m| map(space, m, 0..3, Protection::Read),
        |space, m| map(space, m, 1..4, Protection::ReadWrite),
        |space, m| {
            let found: Vec<_> = (0..4).map(|p| rights(space, m, p)).collect();
            let (r, w) = (Some(Protection::Read), Some(Protection::ReadWrite));
            assert!(found == [r, r, r, w] || found == [r, w, w, w], "{found:?}");
        },
    );
}

#[test]
fn mappings_side_by_side_in_one_slot_are_both_there() {
    two(
        2,
        nothing,
        |space, m| map(space, m, 0..1, Protection::Read),
        |space, m| map(space, m, 1..2, Protection::ReadWrite),
        |space, m| {
            assert_eq!(rights(space, m, 0), Some(Protection::Read));
            assert_eq!(rights(space, m, 1), Some(Protection::ReadWrite));
        },
    );
}

#[test]
fn an_operation_on_many_pages_takes_effect_at_once_for_lookups_without_locks() {
    two(
        3,
        |space, m| map(space, m, 0..2, Protection::Read),
        |space, m| map(space, m, 0..2, Protection::ReadWrite),
        |space, m| {
            let (first, second) = (rights(space, m, 0), rights(space, m, 1));
            assert!(first.is_some() && second.is_some(), "a replaced mapping is never seen as a hole");
            assert!(first <= second, "what was seen of page 0 was still so, or more, at page 1");
        },
        nothing,
    );
}

#[test]
fn a_lookup_meets_no_torn_or_freed_record_while_slots_are_split_and_joined() {
    two(
        1,
        |space, m| map(space, m, 0..4, Protection::Read),
        |space, m| {
            space.unmap(m, range(1..2)).unwrap();
            space.unmap(m, range(0..2)).unwrap();
            for _ in 0..2 {
                m.tick(&NoViews);
            }
        },
        |space, m| {
            assert!(matches!(rights(space, m, 0), None | Some(Protection::Read)));
            assert_eq!(rights(space, m, 2), Some(Protection::Read));
        },
        |space, m| assert_eq!(rights(space, m, 3), Some(Protection::Read)),
    );
}

#[test]
fn a_node_that_is_filled_again_while_it_dies_lives() {
    two(
        2,
        |space, m| {
            // An empty node, marked, one tick before it is cut.
            map(space, m, 0..1, Protection::Read);
            space.unmap(m, range(0..1)).unwrap();
            for _ in 0..3 {
                m.tick(&NoViews);
            }
        },
        |_, m| {
            for _ in 0..3 {
                m.tick(&NoViews);
            }
        },
        |space, m| map(space, m, 1..2, Protection::ReadWrite),
        |space, m| {
            assert_eq!(rights(space, m, 1), Some(Protection::ReadWrite), "the mapping outlives the review");
            assert_eq!(rights(space, m, 0), None);
        },
    );
}

/// Folded values as the released code keeps them: a slot points to a value on the heap, which is freed as soon as the slot points
/// elsewhere ("unsafe without RCU", says a note there).
mod published {
    use base_loom::sync::{AtomicBool, AtomicUsize, Ordering};

    pub struct Values {
        pub slot: AtomicUsize,
        pub freed: [AtomicBool; 2],
    }

    impl Values {
        pub fn new() -> Self {
            Self { slot: AtomicUsize::new(0), freed: [AtomicBool::new(false), AtomicBool::new(false)] }
        }
        /// Tells whether it read a value that was freed.
        pub fn look(&self) -> bool {
            let value = self.slot.load(Ordering::Acquire);
            self.freed[value].load(Ordering::Acquire)
        }
        pub fn replace(&self) {
            let old = self.slot.swap(1, Ordering::AcqRel);
            self.freed[old].store(true, Ordering::Release);
        }
    }
}

#[test]
fn folded_values_that_are_freed_at_once_are_read_after_that_as_published() {
    let seen = std::sync::Arc::new(std::sync::Mutex::new(false));
    let found = seen.clone();
    check(2, move || {
        let values = Arc::new(published::Values::new());
        let writer = {
            let values = values.clone();
            loom::thread::spawn(move || values.replace())
        };
        if values.look() {
            *found.lock().unwrap() = true;
        }
        writer.join().unwrap();
    });
    assert!(*seen.lock().unwrap(), "some interleaving reads a freed value; here values lie in the slots");
}

#[test]
fn the_description_of_an_objects_mapping_is_not_used_anew_under_a_reader() {
    two(
        2,
        |space, m| {
            let mapping =
                Mapping { backing: Backing::Object { object: 7, first: 0 }, rights: Protection::Read };
            space.map(m, Place::Fixed(addr(0)), PageCount::new(2), &mapping).unwrap();
        },
        |space, m| {
            // The only region there is goes, and is taken again.
            space.unmap(m, range(0..2)).unwrap();
            for _ in 0..5 {
                m.tick(&NoViews);
            }
            let mapping =
                Mapping { backing: Backing::Object { object: 8, first: 3 }, rights: Protection::Read };
            let _ = space.map(m, Place::Fixed(addr(0)), PageCount::new(2), &mapping);
        },
        |space, m| {
            let found = space.query(m, addr(1)).map(|e| e.backing);
            let (old, new) =
                (Backing::Object { object: 7, first: 1 }, Backing::Object { object: 8, first: 4 });
            assert!(found.is_none() || found == Some(old) || found == Some(new), "{found:?}");
        },
        nothing,
    );
}
