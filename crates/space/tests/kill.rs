//! A member dies at every step that holds a lock or has changed something.
//!
//! A dry run of a history counts the steps of one member; then the history is run again once for each step, and the member
//! dies there: it unwinds out of the operation without cleaning up, as a killed process would leave it, and is never used
//! again. A survivor recovers. Then everything must hold: the records are those before the interrupted operation or those after it,
//! all pages of it alike; no frame is lost or shared; nodes, regions and spaces are as many as the records need; the survivors
//! can go on everywhere; and no stale translation reaches a frame that was used anew.

use peregrine_base::sync::{AtomicBool, Ordering};
use peregrine_space::model::{Delivery, HeapArena, ModelFrames, ModelMmu, Tables};
use peregrine_space::{
    AddressSpace, Backing, Change, Contents, Frames, Mapping, Member, MemberId, MemberSet, Mmu, PAGE_SIZE,
    PageCount, PageRange, Place, Protection, Sizes, SpaceId, Step, Stopped, VirtAddr,
};
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

thread_local! {
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    static SEEN: Cell<usize> = const { Cell::new(0) };
}

struct Killed;

fn count_down(_: Step) {
    SEEN.set(SEEN.get() + 1);
    match LEFT.get() {
        Some(0) => {
            LEFT.set(None);
            std::panic::resume_unwind(Box::new(Killed));
        }
        Some(n) => LEFT.set(Some(n - 1)),
        None => {}
    }
}

const SIZES: Sizes = Sizes { members: 3, spaces: 4, nodes: 200, regions: 20, frames: 600 };
/// All that the histories touch.
const PAGES: usize = 200;

fn addr(page: usize) -> VirtAddr {
    VirtAddr::new(page * PAGE_SIZE)
}

fn range(page: usize, count: usize) -> PageRange {
    PageRange::new(addr(page), PageCount::new(count))
}

type Space<'a> = AddressSpace<'a, &'a ModelMmu, &'a ModelFrames>;
/// What the dying member does, in steps that each have one effect.
type Part = for<'a> fn(&Space<'a>, &mut Member<'a>, &ModelFrames, &mut Option<SpaceId>);

fn map<'a>(space: &Space<'a>, m: &mut Member<'a>, page: usize, count: usize, backing: Backing) {
    let mapping = Mapping { backing, rights: Protection::ReadWrite };
    space.map(m, Place::Fixed(addr(page)), PageCount::new(count), &mapping).unwrap();
}

/// Whatever came of it: the pictures tell.
fn done<T>(_: T) {}

/// What is mapped, as anybody can see it: rights, backing and word of each page.
type Picture = Vec<Option<(Protection, Backing, u64)>>;

fn picture<'a>(space: &Space<'a>, m: &mut Member<'a>) -> Picture {
    (0..PAGES)
        .map(|page| {
            let entry = space.query(m, addr(page))?;
            let word = if entry.rights == Protection::None { 0 } else { space.load(m, addr(page)).unwrap() };
            Some((entry.rights, entry.backing, word))
        })
        .collect()
}

/// A history, cut where each operation ends.
const PARTS: &[Part] = &[
    |space, m, _, _| map(space, m, 3, 130, Backing::ObjectPrivate { object: 2, first: 5 }),
    |space, m, _, _| map(space, m, 60, 70, Backing::Anonymous),
    |space, m, _, _| done(space.store(m, addr(61), 1)),
    |space, m, _, _| done(space.store(m, addr(64), 2)),
    |space, m, _, _| done(space.store(m, addr(20), 3)),
    |space, m, _, _| done(space.load(m, addr(21))),
    |space, m, _, _| done(space.store(m, addr(21), 4)),
    |space, m, _, _| done(space.protect(m, range(58, 8), Protection::Read)),
    |_, m, frames, _| done(m.tick(frames)),
    |space, m, _, child| *child = Some(space.fork(m).unwrap()),
    |space, m, _, _| done(space.store(m, addr(20), 5)),
    |space, m, _, _| done(space.unmap(m, range(62, 20))),
    |_, m, frames, _| done(m.tick(frames)),
    |space, m, _, _| map(space, m, 70, 3, Backing::Home { object: 9 }),
    |space, m, _, _| done(space.store(m, addr(71), 6)),
    |space, m, _, _| done(space.unmap(m, range(0, PAGES))),
    |_, m, frames, _| done(m.tick(frames)),
    |_, m, frames, _| done(m.tick(frames)),
    |_, m, frames, _| done(m.tick(frames)),
    |_, m, frames, _| done(m.tick(frames)),
    |_, m, frames, _| done(m.tick(frames)),
    |_, m, frames, _| done(m.tick(frames)),
    |_, m, frames, _| done(m.tick(frames)),
    |_, m, frames, _| done(m.tick(frames)),
    |_, m, _, _| m.idle(),
];

/// Runs the history; the first member dies after `die_after` steps. Returns the number of steps it took in all.
fn run(die_after: Option<usize>, tables: Tables) -> usize {
    let arena = HeapArena::new(&SIZES);
    let frames = ModelFrames::new(SIZES.members, SIZES.frames);
    let mmu = ModelMmu::new(&frames, SIZES.members, tables, Delivery::Interrupt);
    let spaces = arena.spaces();
    let mut victim = spaces.join().unwrap();
    let mut survivor = spaces.join().unwrap();
    let mut third = spaces.join().unwrap();
    let space = AddressSpace::create(&mut survivor, &mmu, &frames).unwrap();
    let mut child = None;
    // The others use what the victim's operations take away.
    map(&space, &mut survivor, 150, 8, Backing::Anonymous);
    space.store(&mut third, addr(151), 77).unwrap();
    SEEN.set(0);
    LEFT.set(die_after);
    victim.on_step(Some(count_down));
    for (number, part) in PARTS.iter().enumerate() {
        // What it was and would be, on a twin that nobody dies in.
        let result = catch_unwind(AssertUnwindSafe(|| part(&space, &mut victim, &frames, &mut child)));
        if let Err(cause) = result {
            assert!(cause.is::<Killed>(), "part {number} failed by itself");
            let dead = victim.id();
            let done = space.recover(&mut survivor, dead);
            let found = picture(&space, &mut survivor);
            let (before, after) = pictures(number, tables);
            assert!(
                found == before || found == after,
                "part {number}, step {die_after:?}, {done:?}: neither before nor after"
            );
            if done.finished {
                assert_eq!(found, after, "a committed operation is finished");
            }
            // The place is free, and all goes on.
            victim = spaces.join().unwrap();
            assert_eq!(victim.id(), dead);
            break;
        }
        // Others come by: they fill their views of what is there.
        if number == 10 {
            space.load(&mut third, addr(20)).unwrap();
            space.load(&mut third, addr(64)).unwrap();
        }
    }
    let steps = SEEN.get();
    LEFT.set(None);
    victim.on_step(None);
    // Everybody works everywhere.
    for (n, m) in [&mut victim, &mut survivor, &mut third].into_iter().enumerate() {
        map(&space, m, 10, 140, Backing::Anonymous);
        for page in [10, 63, 64, 149] {
            assert_eq!(space.store(m, addr(page), n as u64), Ok(0));
        }
        space.unmap(m, range(0, PAGES)).unwrap();
    }
    if let Some(id) = child {
        AddressSpace::open(spaces, id, &mmu, &frames).destroy(&mut third);
    }
    for _ in 0..40 {
        for m in [&mut victim, &mut survivor, &mut third] {
            m.tick(&frames);
        }
    }
    let left = (spaces.nodes_in_use(), spaces.regions_in_use(), frames.in_use(), mmu.violations());
    assert_eq!(left, (1, 0, 0, 0), "nodes, regions, frames, violations after step {die_after:?}");
    space.destroy(&mut third);
    for _ in 0..40 {
        for m in [&mut victim, &mut survivor, &mut third] {
            m.tick(&frames);
        }
    }
    assert_eq!(
        (spaces.nodes_in_use(), spaces.lines_in_use()),
        (0, 0),
        "nodes, lines after step {die_after:?}"
    );
    steps
}

/// What is mapped after so many parts, when nobody dies: it is the same whatever the tables are like.
static PICTURES: [OnceLock<Picture>; 64] = [const { OnceLock::new() }; 64];

/// What is mapped before and after a part, when nobody dies.
fn pictures(part: usize, tables: Tables) -> (Picture, Picture) {
    let play = |parts: usize| {
        let arena = HeapArena::new(&SIZES);
        let frames = ModelFrames::new(SIZES.members, SIZES.frames);
        let mmu = ModelMmu::new(&frames, SIZES.members, tables, Delivery::Interrupt);
        let mut m = arena.spaces().join().unwrap();
        let mut other = arena.spaces().join().unwrap();
        let space = AddressSpace::create(&mut other, &mmu, &frames).unwrap();
        map(&space, &mut other, 150, 8, Backing::Anonymous);
        space.store(&mut other, addr(151), 77).unwrap();
        let mut child = None;
        for part in &PARTS[..parts] {
            part(&space, &mut m, &frames, &mut child);
        }
        picture(&space, &mut other)
    };
    let picture = |parts: usize| PICTURES[parts].get_or_init(|| play(parts)).clone();
    (picture(part), picture(part + 1))
}

/// A death at every `stride`th step, from a different first one each time.
fn at_steps(tables: Tables, stride: usize) {
    let steps = run(None, tables);
    let first = std::process::id() as usize % stride;
    println!("{tables:?}: {steps} steps, a death at every {stride} from {first} on");
    assert!(steps > 500, "the history has steps: {steps}");
    for step in (first..steps).step_by(stride) {
        run(Some(step), tables);
    }
}

#[test]
fn a_death_at_any_step_leaves_the_space_before_or_after_the_operation_and_loses_nothing() {
    at_steps(Tables::Views, 1);
}

#[test]
fn a_death_at_any_step_is_mended_with_shared_pages_too() {
    at_steps(Tables::Hybrid { share_at: 2, private_limit: 2 }, 7);
}

#[test]
fn a_recovery_whose_member_dies_is_taken_over() {
    let steps = run(None, Tables::Views);
    for step in (0..steps).step_by(61) {
        run_with_two_deaths(step);
    }
}

fn run_with_two_deaths(first: usize) {
    for second in 0.. {
        let arena = HeapArena::new(&SIZES);
        let frames = ModelFrames::new(SIZES.members, SIZES.frames);
        let mmu = ModelMmu::new(&frames, SIZES.members, Tables::Views, Delivery::Interrupt);
        let spaces = arena.spaces();
        let mut victim = spaces.join().unwrap();
        let mut survivor = spaces.join().unwrap();
        let mut third = spaces.join().unwrap();
        let space = AddressSpace::create(&mut survivor, &mmu, &frames).unwrap();
        map(&space, &mut survivor, 150, 8, Backing::Anonymous);
        let mut child = None;
        LEFT.set(Some(first));
        victim.on_step(Some(count_down));
        let died = PARTS.iter().any(|part| {
            catch_unwind(AssertUnwindSafe(|| part(&space, &mut victim, &frames, &mut child))).is_err()
        });
        LEFT.set(None);
        if !died {
            return;
        }
        // Deaths among the first steps of the recovery, and then at growing distances.
        LEFT.set(Some(second * second));
        survivor.on_step(Some(count_down));
        let dead = victim.id();
        let recovered = catch_unwind(AssertUnwindSafe(|| space.recover(&mut survivor, dead)));
        LEFT.set(None);
        if recovered.is_err() {
            // Either may be recovered first: the other is found dead on the way.
            mmu.set_dead(dead, true);
            mmu.set_dead(survivor.id(), true);
            let order = if second % 2 == 0 { [survivor.id(), dead] } else { [dead, survivor.id()] };
            let first = space.recover(&mut third, order[0]);
            if !first.dead.contains(order[1]) {
                space.recover(&mut third, order[1]);
            }
        }
        if recovered.is_ok() {
            // It lives, but does nothing more: nobody should wait for it.
            survivor.on_step(None);
            survivor.idle();
        }
        space.unmap(&mut third, range(0, PAGES)).unwrap();
        if let Some(id) = child {
            AddressSpace::open(spaces, id, &mmu, &frames).destroy(&mut third);
        }
        for _ in 0..40 {
            third.tick(&frames);
        }
        let left = (spaces.nodes_in_use(), spaces.regions_in_use(), frames.in_use(), mmu.violations());
        assert_eq!(left, (1, 0, 0, 0), "deaths at {first} and {}", second * second);
        if recovered.is_ok() {
            return;
        }
    }
}

/// A runtime goes back to an earlier state: a member is at an operation's n-th step when it drops it for good, and lives on with the
/// view that it has. Returns whether it came to that step.
fn drop_at(step: usize, killed: bool) -> bool {
    let arena = HeapArena::new(&SIZES);
    let frames = ModelFrames::new(SIZES.members, SIZES.frames);
    let mmu = ModelMmu::new(&frames, SIZES.members, Tables::Views, Delivery::Interrupt);
    let spaces = arena.spaces();
    let mut who = spaces.join().unwrap();
    let mut survivor = spaces.join().unwrap();
    let space = AddressSpace::create(&mut survivor, &mmu, &frames).unwrap();
    map(&space, &mut survivor, 10, 8, Backing::Anonymous);
    space.store(&mut who, addr(11), 5).unwrap();
    LEFT.set(Some(step));
    who.on_step(Some(count_down));
    let dropped = catch_unwind(AssertUnwindSafe(|| {
        map(&space, &mut who, 60, 70, Backing::Anonymous);
        space.store(&mut who, addr(64), 2).unwrap();
        space.unmap(&mut who, range(62, 20)).unwrap();
        // A whole block of home pages, and a part of one.
        for (first, count) in [(144, 16), (163, 5)] {
            map(&space, &mut who, first, count, Backing::Home { object: 1 });
            space.store(&mut who, addr(first + 2), 3).unwrap();
        }
        who.tick(&frames);
    }))
    .is_err();
    LEFT.set(None);
    let only = MemberSet::only(who.id());
    let stopped = if killed {
        Stopped { killed: only, views_are_gone: true, ..Stopped::default() }
    } else {
        Stopped { reset: only, ..Stopped::default() }
    };
    assert!(space.recover_all(&mut survivor, stopped).dead.contains(who.id()));
    let expected = if killed { MemberSet::EMPTY } else { only };
    assert_eq!(space.viewers(&mut survivor, addr(11)), expected, "step {step}");
    let mut again = spaces.join_at(who.id()).unwrap();
    let before = mmu.counts().shootdowns;
    space.unmap(&mut survivor, range(10, 8)).unwrap();
    assert_eq!(mmu.counts().shootdowns - before, u64::from(!killed), "step {step}");
    // It has lost what was unmapped, and goes on.
    assert!(space.load(&mut again, addr(11)).is_err());
    for page in 0..PAGES {
        // Each by itself: who has a neighbour in view is not asked for its sake.
        space.unmap(&mut again, range(page, 1)).unwrap();
        let found = mmu.access(&frames, space.id(), again.id(), addr(page), None);
        assert!(found.is_err(), "page {page} is in view still, step {step}");
    }
    for _ in 0..40 {
        survivor.tick(&frames);
        again.tick(&frames);
    }
    let left = (spaces.nodes_in_use(), spaces.regions_in_use(), frames.in_use(), mmu.violations());
    assert_eq!(left, (1, 0, 0, 0), "step {step}");
    space.destroy(&mut again);
    for _ in 0..40 {
        survivor.tick(&frames);
        again.tick(&frames);
    }
    assert_eq!((spaces.nodes_in_use(), spaces.lines_in_use()), (0, 0), "nodes, lines at step {step}");
    dropped
}

#[test]
fn a_member_that_drops_an_operation_and_lives_keeps_its_view_and_loses_it_to_an_unmap() {
    let steps = (0..).take_while(|step| drop_at(*step, false)).count();
    assert!(steps > 50, "the history has steps: {steps}");
}

#[test]
fn a_killed_process_leaves_all_sets_and_is_asked_nothing_more() {
    assert!((0..).take_while(|step| drop_at(*step, true)).count() > 50);
}

/// `who` is not heard of any more, with a lock held.
fn dies_in_the_middle<'a>(space: &Space<'a>, who: &mut Member<'a>) {
    LEFT.set(Some(3));
    who.on_step(Some(count_down));
    let died = catch_unwind(AssertUnwindSafe(|| map(space, who, 60, 8, Backing::Anonymous))).is_err();
    LEFT.set(None);
    assert!(died && space.at_work().any(|holder| holder.member == who.id()));
}

/// What was free before a death is free after it: nodes, lines and descriptions.
#[test]
fn any_number_of_deaths_uses_up_nothing() {
    let sizes = Sizes { members: 3, spaces: 1, nodes: 40, regions: 8, frames: 60 };
    let arena = HeapArena::new(&sizes);
    let frames = ModelFrames::new(sizes.members, sizes.frames);
    let mmu = ModelMmu::new(&frames, sizes.members, Tables::Views, Delivery::Interrupt);
    let spaces = arena.spaces();
    let (mut survivor, mut third) = (spaces.join().unwrap(), spaces.join().unwrap());
    let space = AddressSpace::create(&mut survivor, &mmu, &frames).unwrap();
    // Many times as much as the arena has. (Who finds no line waits for one, for there is one for each slot: a test that never ends has
    // lost some.)
    for death in 0..300 {
        let mut victim = spaces.join().unwrap();
        LEFT.set(Some(10 + death % 70));
        victim.on_step(Some(count_down));
        let died = catch_unwind(AssertUnwindSafe(|| {
            for first in [10, 60, 120] {
                map(&space, &mut victim, first, 8, Backing::Object { object: 1, first: 0 });
                space.store(&mut victim, addr(first + 1), 1).unwrap();
                space.unmap(&mut victim, range(first, 8)).unwrap();
            }
        }))
        .is_err();
        LEFT.set(None);
        assert!(died, "death {death}: there are more steps than that");
        space.recover(&mut survivor, victim.id());
        // Two at work side by side take lines, and both descriptions are there to be had.
        for (n, m) in [&mut survivor, &mut third].into_iter().enumerate() {
            map(&space, m, 100 + 20 * n, 20, Backing::Object { object: 2, first: 0 });
            space.store(m, addr(101), 1).unwrap();
            space.store(m, addr(121 - n), 1).map_or_else(done, done);
        }
        space.unmap(&mut third, range(0, PAGES)).unwrap();
        for _ in 0..40 {
            survivor.tick(&frames);
            third.tick(&frames);
        }
        let left = (spaces.nodes_in_use(), spaces.regions_in_use(), spaces.lines_in_use(), frames.in_use());
        assert_eq!(left, (1, 0, 0, 0), "nodes, regions, lines, frames after death {death}");
    }
}

#[test]
fn who_comes_to_mend_a_member_that_was_mended_already_leaves_its_successor_alone() {
    let arena = HeapArena::new(&SIZES);
    let frames = ModelFrames::new(SIZES.members, SIZES.frames);
    let mmu = ModelMmu::new(&frames, SIZES.members, Tables::Views, Delivery::Interrupt);
    let spaces = arena.spaces();
    let (mut victim, mut survivor) = (spaces.join().unwrap(), spaces.join().unwrap());
    let mut late = spaces.join().unwrap();
    let space = AddressSpace::create(&mut survivor, &mmu, &frames).unwrap();
    dies_in_the_middle(&space, &mut victim);
    let dead = victim.id();
    mmu.set_dead(dead, true);
    assert!(space.recover_dead(&mut survivor, dead).dead.contains(dead));
    // Its place is another's, who lives, and is in the middle of an operation, when the second comes who saw the death.
    mmu.set_dead(dead, false);
    let mut successor = spaces.join_at(dead).unwrap();
    dies_in_the_middle(&space, &mut successor);
    assert_eq!(space.recover_dead(&mut late, dead), Default::default());
    assert!(space.at_work().any(|holder| holder.member == dead), "it is still at work");
    // Now it is dead, too.
    mmu.set_dead(dead, true);
    assert!(space.recover_dead(&mut late, dead).dead.contains(dead));
    assert_eq!(space.at_work().count(), 0);
    space.unmap(&mut late, range(0, PAGES)).unwrap();
}

/// Notes in which order views were filled and pages vacated. A member may die before and after each.
#[derive(Default)]
struct Diary(RefCell<Vec<&'static str>>);

impl Diary {
    fn note(&self, what: &'static str, step: Step) {
        count_down(step);
        self.0.borrow_mut().push(what);
        count_down(step);
    }

    fn tells(&self, what: &str) -> bool {
        self.0.borrow().contains(&what)
    }
}

impl Mmu for &Diary {
    type Error = std::convert::Infallible;
    fn fill(
        &self,
        _: SpaceId,
        _: MemberId,
        _: PageRange,
        _: Contents,
        _: Protection,
    ) -> Result<(), Self::Error> {
        self.note("filled", Step::Filled);
        Ok(())
    }
    fn shootdown(&self, _: SpaceId, _: MemberId, _: PageRange, _: &MemberSet, _: Change) {
        self.note("shot down", Step::ShotDown);
    }
    fn wait(&self, _: MemberId, _: MemberId) {}
}

impl Frames for &Diary {
    fn vacated(&self, _: SpaceId, _: MemberId, _: PageRange) {
        self.note("vacated", Step::Committed);
    }
}

/// A member that is replacing a mapping, and opening what it maps, drops the operation at its n-th step, and lives.
fn drop_while_admitting(step: usize) -> bool {
    let arena = HeapArena::new(&SIZES);
    let diary = Diary::default();
    let spaces = arena.spaces();
    let (mut who, mut other) = (spaces.join().unwrap(), spaces.join().unwrap());
    let space = AddressSpace::create(&mut other, &diary, &diary).unwrap();
    let home = |object| Mapping { backing: Backing::Home { object }, rights: Protection::ReadWrite };
    let (place, pages) = (Place::Fixed(addr(60)), PageCount::new(8));
    space.map_and_admit(&mut other, place, pages, &home(1)).unwrap();
    diary.0.borrow_mut().clear();
    LEFT.set(Some(step));
    who.on_step(Some(count_down));
    let result = catch_unwind(AssertUnwindSafe(|| {
        space.map_and_admit(&mut who, place, pages, &home(1)).unwrap();
    }));
    LEFT.set(None);
    let before_recovery = diary.0.borrow().len();
    let stopped = Stopped { reset: MemberSet::only(who.id()), ..Stopped::default() };
    space.recover_all(&mut other, stopped);
    let diary = diary.0.borrow();
    let filled = diary.iter().position(|d| *d == "filled");
    if let Some(filled) = filled {
        // It may write there from then on: nobody may take the frames for an earlier owner's.
        assert!(!diary[filled..].contains(&"vacated"), "step {step}: {diary:?}");
        assert_eq!(space.viewers(&mut other, addr(60)), MemberSet::only(who.id()), "step {step}");
    }
    if diary[before_recovery..].contains(&"vacated") {
        assert!(filled.is_none(), "step {step}: {diary:?}");
    }
    for page in 60..68 {
        assert!(space.query(&mut other, addr(page)).is_some(), "one mapping or the other, step {step}");
    }
    result.is_err()
}

#[test]
fn a_mapping_whose_view_is_filled_when_its_member_drops_it_is_not_vacated_by_the_recovery() {
    let steps = (0..).take_while(|step| drop_while_admitting(*step)).count();
    assert!(steps > 20, "{steps} steps");
}

/// Some pages, mapped and unmapped where the member's last walk ended, which is a path of its own (`space/run.rs`). The member is dropped
/// at its n-th step, `killed` or not.
fn drop_at_a_run(step: usize, pages: usize, unmap: bool, killed: bool) -> bool {
    let arena = HeapArena::new(&SIZES);
    let diary = Diary::default();
    let spaces = arena.spaces();
    let (mut who, mut other) = (spaces.join().unwrap(), spaces.join().unwrap());
    let space = AddressSpace::create(&mut other, &diary, &diary).unwrap();
    let home = Mapping { backing: Backing::Home { object: 1 }, rights: Protection::ReadWrite };
    let place = |page| Place::FixedNoReplace(addr(page));
    let (held, free) = (101, 110);
    for (page, pages) in [(100, 1), (held, pages)] {
        space.map_and_admit(&mut who, place(page), PageCount::new(pages), &home).unwrap();
    }
    diary.0.borrow_mut().clear();
    LEFT.set(Some(step));
    who.on_step(Some(count_down));
    let dropped = catch_unwind(AssertUnwindSafe(|| match unmap {
        true => space.unmap(&mut who, range(held, pages)).unwrap(),
        false => {
            space.map_and_admit(&mut who, place(free), PageCount::new(pages), &home).unwrap();
        }
    }))
    .is_err();
    LEFT.set(None);
    let only = MemberSet::only(who.id());
    let stopped = match killed {
        true => Stopped { killed: only, views_are_gone: true, ..Stopped::default() },
        false => Stopped { reset: only, ..Stopped::default() },
    };
    space.recover_all(&mut other, stopped);
    let what =
        format!("step {step}, {pages} pages, unmap: {unmap}, killed: {killed}, {:?}", diary.0.borrow());
    let mut all_mapped = |first| {
        let is_mapped = space.query(&mut other, addr(first)).is_some();
        for page in first..first + pages {
            assert_eq!(space.query(&mut other, addr(page)).is_some(), is_mapped, "all or nothing: {what}");
        }
        is_mapped
    };
    if unmap {
        let is_mapped = all_mapped(held);
        assert_eq!(
            diary.tells("vacated"),
            !is_mapped,
            "zeroed before its next owner, and not before: {what}"
        );
        assert!(is_mapped || diary.tells("shot down"), "{what}");
    } else {
        assert!(!diary.tells("vacated"), "nothing was there: {what}");
        let is_mapped = all_mapped(free);
        assert!(is_mapped || !diary.tells("filled") && dropped, "{what}");
        if diary.tells("filled") && !killed {
            for page in free..free + pages {
                assert_eq!(space.viewers(&mut other, addr(page)), only, "{what}");
            }
        }
    }
    // Whoever comes next has it alone.
    space.unmap(&mut other, range(100, 20)).unwrap();
    for page in 100..120 {
        space.map(&mut other, place(page), PageCount::new(1), &home).unwrap();
        assert_eq!(space.viewers(&mut other, addr(page)), MemberSet::EMPTY, "{what}");
    }
    space.unmap(&mut other, range(0, PAGES)).unwrap();
    for _ in 0..40 {
        other.tick(&&diary);
    }
    assert_eq!(spaces.nodes_in_use(), 1, "{what}");
    dropped
}

#[test]
fn a_death_at_any_step_of_mapping_or_unmapping_a_few_pages_leaves_all_of_them_before_or_after() {
    for (pages, unmap) in [(1, false), (1, true), (5, false), (5, true)] {
        for killed in [false, true] {
            let steps = (0..).take_while(|step| drop_at_a_run(*step, pages, unmap, killed)).count();
            assert!(steps > 5 + pages, "{steps} steps");
        }
    }
}

/// Where a member stands still in the middle of an operation, until somebody waits for it.
#[derive(Default)]
struct Gate {
    stands: AtomicBool,
    waited_for: AtomicBool,
}

static GATE: Gate = Gate { stands: AtomicBool::new(false), waited_for: AtomicBool::new(false) };

fn stand_at_the_gate(step: Step) {
    if step == Step::Committed {
        GATE.stands.store(true, Ordering::SeqCst);
        while !GATE.waited_for.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    }
}

impl Mmu for &Gate {
    type Error = std::convert::Infallible;
    fn fill(
        &self,
        _: SpaceId,
        _: MemberId,
        _: PageRange,
        _: Contents,
        _: Protection,
    ) -> Result<(), Self::Error> {
        Ok(())
    }
    fn shootdown(&self, _: SpaceId, _: MemberId, _: PageRange, _: &MemberSet, _: Change) {}
    fn wait(&self, _: MemberId, _: MemberId) {
        self.waited_for.store(true, Ordering::SeqCst);
    }
}

impl Frames for &Gate {}

#[test]
fn a_recovery_waits_for_whoever_lives_and_is_in_the_middle_of_an_operation() {
    let arena = HeapArena::new(&SIZES);
    let spaces = arena.spaces();
    let (dead, mut worker) = (spaces.join().unwrap(), spaces.join().unwrap());
    let mut survivor = spaces.join().unwrap();
    let space = AddressSpace::create(&mut survivor, &GATE, &GATE).unwrap();
    let waited = std::thread::scope(|scope| {
        let space = &space;
        scope.spawn(move || {
            worker.on_step(Some(stand_at_the_gate));
            let home = Mapping { backing: Backing::Home { object: 1 }, rights: Protection::ReadWrite };
            space.map(&mut worker, Place::Fixed(addr(5)), PageCount::new(1), &home).unwrap();
        });
        while !GATE.stands.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        space.recover(&mut survivor, dead.id());
        // Lets it go, if nobody has waited.
        GATE.waited_for.swap(true, Ordering::SeqCst)
    });
    assert!(waited, "what it has changed was not complete when all was counted");
    assert!(space.query(&mut survivor, addr(5)).is_some());
    space.unmap(&mut survivor, range(5, 1)).unwrap();
}
