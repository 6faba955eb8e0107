//! Members that do not move hold up nobody.

use peregrine_space::model::{Delivery, HeapArena, ModelFrames, ModelMmu, Tables};
use peregrine_space::{
    AddressSpace, Backing, Mapping, Member, PAGE_SIZE, PageCount, PageRange, Place, Protection, Sizes, Step,
    VirtAddr,
};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

const SIZES: Sizes = Sizes { members: 2, spaces: 1, nodes: 100, regions: 4, frames: 20 };
const PAGE: VirtAddr = VirtAddr::new(0x10_0000);
const ONE: PageRange = PageRange::new(PAGE, PageCount::new(1));
const ANONYMOUS: Mapping = Mapping { backing: Backing::Anonymous, rights: Protection::ReadWrite };

type Space<'a> = AddressSpace<'a, &'a ModelMmu, &'a ModelFrames>;

fn with(f: impl for<'a> FnOnce(&Space<'a>, Member<'a>, Member<'a>)) {
    let arena = HeapArena::new(&SIZES);
    let frames = ModelFrames::new(SIZES.members, SIZES.frames);
    let mmu = ModelMmu::new(&frames, SIZES.members, Tables::Views, Delivery::Interrupt);
    let (mut a, b) = (arena.spaces().join().unwrap(), arena.spaces().join().unwrap());
    let space = AddressSpace::create(&mut a, &mmu, &frames).unwrap();
    f(&space, a, b);
}

fn use_page<'a>(space: &Space<'a>, m: &mut Member<'a>) {
    space.map(m, Place::Fixed(PAGE), PageCount::new(1), &ANONYMOUS).unwrap();
    space.store(m, PAGE, 1).unwrap();
    space.unmap(m, ONE).unwrap();
}

#[test]
fn frames_and_nodes_come_back_although_a_member_in_the_epoch_never_ticks_again() {
    with(|space, mut a, mut stopped| {
        use_page(space, &mut stopped);
        use_page(space, &mut a);
        for _ in 0..150 {
            a.tick(space.frames());
        }
        assert_eq!((space.frames().in_use(), a.spaces().nodes_in_use()), (0, 1));
        // It wakes, and goes on as if nothing had been.
        use_page(space, &mut stopped);
        assert_eq!(space.store(&mut stopped, PAGE, 1).map_err(drop), Err(()));
    });
}

#[test]
fn what_an_idle_member_has_under_review_is_taken_over() {
    with(|space, mut a, mut idle| {
        use_page(space, &mut idle);
        idle.idle();
        a.tick(space.frames());
        for _ in 0..30 {
            a.tick(space.frames());
        }
        assert_eq!((space.frames().in_use(), a.spaces().nodes_in_use()), (0, 1));
    });
}

thread_local! {
    static LEFT: Cell<usize> = const { Cell::new(0) };
}

struct Stopped;

fn stop_after(_: Step) {
    match LEFT.get() {
        0 => std::panic::resume_unwind(Box::new(Stopped)),
        n => LEFT.set(n - 1),
    }
}

/// A member that is stopped in the middle of a flush has deltas in its hands. It is thrown out of the epoch there too, and the
/// objects it holds deltas of live on.
#[test]
fn a_member_stopped_at_any_step_of_a_tick_does_not_stall_the_epoch_and_loses_no_live_object() {
    for stop_at in 0.. {
        let mut finished = false;
        with(|space, mut a, mut b| {
            // A page that stays, with its frame's count split over the two members.
            space.map(&mut a, Place::Fixed(PAGE), PageCount::new(1), &ANONYMOUS).unwrap();
            space.store(&mut b, PAGE, 7).unwrap();
            b.on_step(Some(stop_after));
            LEFT.set(stop_at);
            let ticks = catch_unwind(AssertUnwindSafe(|| {
                for _ in 0..3 {
                    b.tick(space.frames());
                }
            }));
            finished = ticks.is_ok();
            let before = a.epoch();
            for _ in 0..200 {
                a.tick(space.frames());
            }
            assert!(a.epoch() > before + 4, "stopped after {stop_at} steps");
            assert_eq!(space.load(&mut a, PAGE), Ok(7), "stopped after {stop_at} steps");
            assert_eq!(space.frames().in_use(), 1);
        });
        if finished {
            assert!(stop_at > 5, "a tick has steps: {stop_at}");
            return;
        }
    }
}

/// The model's cache of an object's pages has no references: it leads to frames that nobody has any more, and that are freed when their
/// review is due. Whoever finds one just then has it in the delta cache, which the review does not see.
#[test]
fn a_frame_that_is_found_in_a_cache_is_not_freed_under_its_finder() {
    let object =
        Mapping { backing: Backing::ObjectPrivate { object: 2, first: 0 }, rights: Protection::ReadWrite };
    for rounds in 0..12 {
        with(|space, mut finder, mut other| {
            let frames = *space.frames();
            let place = |page: usize| Place::Fixed(VirtAddr::new(page * PAGE_SIZE));
            space.map(&mut other, place(1), PageCount::new(1), &object).unwrap();
            // Copied from the object's frame, which nobody has then.
            space.store(&mut other, VirtAddr::new(PAGE_SIZE), 1).unwrap();
            for _ in 0..rounds {
                other.tick(frames);
                finder.tick(frames);
            }
            space.map(&mut finder, place(7), PageCount::new(1), &object).unwrap();
            assert_eq!(space.load(&mut finder, VirtAddr::new(7 * PAGE_SIZE)), Ok(2000));
            for _ in 0..12 {
                // Who reviews is not the one who knows.
                other.tick(frames);
                space.map(&mut other, place(200), PageCount::new(1), &ANONYMOUS).unwrap();
                space.store(&mut other, VirtAddr::new(200 * PAGE_SIZE), 77).unwrap();
                assert_eq!(
                    space.load(&mut finder, VirtAddr::new(7 * PAGE_SIZE)),
                    Ok(2000),
                    "{rounds} rounds"
                );
                finder.tick(frames);
            }
        });
    }
}
