//! What the paper's text or its released code gets wrong, each as a small faithful model that fails, and what is here, which holds.
//!
//! Two more are in files of their own, for they need a model checker: the zero deltas of Refcache (`loom_refcache`) and folded values
//! freed under a reader (`loom_radix`).

use peregrine_space::model::{Delivery, HeapArena, ModelFrames, ModelMmu, Tables};
use peregrine_space::refcache::{Block, Counted, Epoch, Handle, Object, ObjectId, Reclaim, Refcache};
use peregrine_space::{
    Access, AddressSpace, Backing, Change, Contents, FrameId, Frames, Generation, MapError, Mapping, Member,
    MemberId, MemberSet, Mmu, PAGE_SIZE, PageCount, PageRange, Place, Protection, Sizes, SpaceId, VirtAddr,
};
use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::rc::Rc;

const SIZES: Sizes = Sizes { members: 3, spaces: 1, nodes: 2000, regions: 4, frames: 2 };
const PAGE: VirtAddr = VirtAddr::new(0x10_0000);
const ONE: PageRange = PageRange::new(PAGE, PageCount::new(1));

fn anonymous() -> Mapping {
    Mapping { backing: Backing::Anonymous, rights: Protection::ReadWrite }
}

/// A space as the published operations treat it: one page, its frame and set, and the steps in the order that is asked for.
struct Published<'a> {
    mmu: &'a ModelMmu,
    frames: &'a ModelFrames,
    id: SpaceId,
    frame: Option<FrameId>,
    set: MemberSet,
}

impl Published<'_> {
    fn fault(&mut self, m: MemberId) {
        let new = || self.frames.zeroed(self.id, m, PAGE).expect("a frame");
        let frame = self.frame.unwrap_or_else(new);
        self.frame = Some(frame);
        self.set.insert(m);
        let Ok(()) = self.mmu.fill(self.id, m, ONE, Contents::Frame(frame), Protection::ReadWrite);
    }
    /// Clears the metadata.
    fn unset(&mut self) -> (Option<FrameId>, MemberSet) {
        (self.frame.take(), std::mem::take(&mut self.set))
    }
    fn shoot(&self, by: MemberId, set: &MemberSet) {
        self.mmu.shootdown(self.id, by, ONE, set, Change::Drop);
    }
}

/// Runs `f` with hardware and the id of a space.
fn with_hardware(f: impl Fn(&ModelMmu, &ModelFrames, SpaceId)) -> u64 {
    let arena = HeapArena::new(&SIZES);
    let frames = ModelFrames::new(SIZES.members, SIZES.frames);
    let mmu = ModelMmu::new(&frames, SIZES.members, Tables::Views, Delivery::Interrupt);
    let mut m = arena.spaces().join().unwrap();
    let id = AddressSpace::create(&mut m, &mmu, &frames).unwrap().id();
    f(&mmu, &frames, id);
    mmu.violations()
}

/// Runs `f` with a space of this crate.
fn with_space(
    f: impl for<'a> Fn(&AddressSpace<'a, &'a ModelMmu, &'a ModelFrames>, &mut [Member<'a>]),
) -> u64 {
    let arena = HeapArena::new(&SIZES);
    let frames = ModelFrames::new(SIZES.members, SIZES.frames);
    let mmu = ModelMmu::new(&frames, SIZES.members, Tables::Views, Delivery::Interrupt);
    let mut members: Vec<_> = (0..SIZES.members).map(|_| arena.spaces().join().unwrap()).collect();
    let space = AddressSpace::create(&mut members[0], &mmu, &frames).unwrap();
    f(&space, &mut members);
    mmu.violations()
}

fn tick_all(members: &mut [Member<'_>], frames: &ModelFrames) {
    for _ in 0..10 {
        members.iter_mut().for_each(|m| {
            m.tick(frames);
        });
    }
}

const A: MemberId = MemberId::new(0);
const B: MemberId = MemberId::new(1);

#[test]
fn a_shootdown_after_the_lock_is_released_leaves_a_remapped_page_reachable_through_a_stale_entry() {
    let published = with_hardware(|mmu, frames, id| {
        let mut p = Published { mmu, frames, id, frame: None, set: MemberSet::EMPTY };
        p.fault(B);
        mmu.access(frames, id, B, PAGE, Some(1)).unwrap();
        // A unmaps and unlocks; its shootdown is still to come.
        let (old, targets) = p.unset();
        // C maps the page again: its set is empty now, so nothing is shot down. And C unmaps it again.
        p.fault(MemberId::new(2));
        p.unset();
        frames.release(A, old.unwrap());
        // B was told nothing, and its write reaches the old frame after two unmaps have gone by, one of them complete.
        let _ = mmu.access(frames, id, B, PAGE, Some(2));
        p.shoot(A, &targets);
    });
    assert!(published > 0, "the published order fails");
    let here = with_space(|space, m| {
        space.map(&mut m[0], Place::Fixed(PAGE), PageCount::new(1), &anonymous()).unwrap();
        space.store(&mut m[1], PAGE, 1).unwrap();
        space.map(&mut m[0], Place::Fixed(PAGE), PageCount::new(1), &anonymous()).unwrap();
        // B's entry went before the operation was over.
        assert_eq!(space.store(&mut m[1], PAGE, 2), Ok(0));
        space.unmap(&mut m[2], ONE).unwrap();
        assert!(space.store(&mut m[1], PAGE, 3).is_err());
    });
    assert_eq!(here, 0);
}

/// Hardware in the middle of whose next shootdown somebody comes by, before any view is emptied.
struct Crossed {
    mmu: ModelMmu,
    comes_by: RefCell<Option<Box<dyn FnOnce()>>>,
}

impl Mmu for &'static Crossed {
    type Error = Infallible;
    fn fill(
        &self,
        space: SpaceId,
        member: MemberId,
        range: PageRange,
        contents: Contents,
        rights: Protection,
    ) -> Result<(), Infallible> {
        self.mmu.fill(space, member, range, contents, rights)
    }
    fn shootdown(&self, space: SpaceId, by: MemberId, range: PageRange, targets: &MemberSet, change: Change) {
        if let Some(comes_by) = self.comes_by.take() {
            comes_by();
        }
        self.mmu.shootdown(space, by, range, targets, change);
    }
    fn wait(&self, member: MemberId, owner: MemberId) {
        self.mmu.wait(member, owner);
    }
    fn gives_up(&self, _: MemberId, _: MemberId, _: u32) -> bool {
        true
    }
}

type CrossedSpace = AddressSpace<'static, &'static Crossed, &'static ModelFrames>;

/// A faults in a few pages, and B has them in view; A begins `operation`, and C comes by when views are about to be emptied: it tries to map
/// one of the pages anew, looks at it, and has as many epochs go by as a frame takes to be given away.
fn cross(what: &str, operation: fn(&CrossedSpace, &mut Member<'static>)) {
    cross_after(what, |_, _, _| (), operation);
}

/// The same, after something else.
fn cross_after(
    what: &str,
    prepare: fn(&CrossedSpace, &mut Member<'static>, &mut Member<'static>),
    operation: fn(&CrossedSpace, &mut Member<'static>),
) {
    let sizes = Sizes { spaces: 2, frames: 60, ..SIZES };
    let arena: &'static HeapArena = Box::leak(Box::new(HeapArena::new(&sizes)));
    let frames: &'static ModelFrames = Box::leak(Box::new(ModelFrames::new(SIZES.members, sizes.frames)));
    let mmu = ModelMmu::new(frames, SIZES.members, Tables::Views, Delivery::Interrupt);
    let crossed: &'static Crossed = Box::leak(Box::new(Crossed { mmu, comes_by: RefCell::default() }));
    let [mut a, mut b, mut c] = [(); 3].map(|()| arena.spaces().join().unwrap());
    let space: &'static CrossedSpace =
        Box::leak(Box::new(AddressSpace::create(&mut a, crossed, frames).unwrap()));
    let access = |m: MemberId, value| crossed.mmu.access(frames, space.id(), m, PAGE, value);
    for (page, count) in [(PAGE, 4), (VirtAddr::new(PAGE.as_usize() + 9 * PAGE_SIZE), 1)] {
        space.map(&mut a, Place::Fixed(page), PageCount::new(count), &anonymous()).unwrap();
        space.fault(&mut a, page, Access::Write).unwrap();
        space.fault(&mut b, page, Access::Write).unwrap();
    }
    access(B, Some(7)).unwrap();
    prepare(space, &mut a, &mut b);
    let (before, used, violations) = (space.query(&mut b, PAGE), frames.in_use(), crossed.mmu.violations());
    let found = Rc::new(RefCell::new(None));
    let seen = found.clone();
    *crossed.comes_by.borrow_mut() = Some(Box::new(move || {
        let mapped = space.map(&mut c, Place::Fixed(PAGE), PageCount::new(1), &anonymous());
        for _ in 0..10 {
            // They stand still.
            let _ = (c.expel(A), c.expel(B));
            c.tick(frames);
        }
        *seen.borrow_mut() = Some((mapped, space.query(&mut c, PAGE), frames.in_use()));
        assert!(crossed.mmu.access(frames, space.id(), B, PAGE, None).is_ok(), "its view is what it was");
    }));
    operation(space, &mut a);
    let (mapped, looked, in_use) = found.take().unwrap_or_else(|| panic!("{what}: nobody was shot down"));
    assert!(matches!(mapped, Err(MapError::Held(holder)) if holder.member == A), "{what}: {mapped:?}");
    assert_eq!(looked, before, "{what}: takes effect after the shootdown");
    assert!(in_use >= used, "{what}: frames are in use until after it");
    assert_eq!(crossed.mmu.violations(), violations, "{what}");
    assert!(access(B, Some(8)).is_err(), "{what}: its view has lost what was taken");
}

#[test]
fn whoever_comes_while_views_are_emptied_finds_the_range_locked_its_records_as_they_were_and_its_frames() {
    cross("unmap a page", |space, m| space.unmap(m, ONE).unwrap());
    cross("unmap many", |space, m| space.unmap(m, PageRange::new(PAGE, PageCount::new(200))).unwrap());
    cross("unmap a run", |space, m| space.unmap(m, PageRange::new(PAGE, PageCount::new(4))).unwrap());
    cross("map", |space, m| {
        space.map(m, Place::Fixed(PAGE), PageCount::new(4), &anonymous()).unwrap();
    });
    cross("map and admit", |space, m| {
        let home = Mapping { backing: Backing::Home { object: 1 }, rights: Protection::ReadWrite };
        space.map_and_admit(m, Place::Fixed(PAGE), PageCount::new(4), &home).unwrap();
    });
    cross("protect", |space, m| space.protect(m, ONE, Protection::Read).unwrap());
    cross("fork", |space, m| {
        space.fork(m).unwrap();
    });
    let shares = |space: &CrossedSpace, a: &mut Member<'static>, b: &mut Member<'static>| {
        space.fork(a).unwrap();
        space.fault(b, PAGE, Access::Read).unwrap();
    };
    cross_after("write to what is copied then", shares, |space, m| {
        space.fault(m, PAGE, Access::Write).unwrap();
    });
}

#[test]
fn shrinking_a_heap_without_a_shootdown_leaves_its_pages_reachable() {
    let published = with_hardware(|mmu, frames, id| {
        let mut p = Published { mmu, frames, id, frame: None, set: MemberSet::EMPTY };
        p.fault(B);
        mmu.access(frames, id, B, PAGE, Some(1)).unwrap();
        // sbrk(-4096): the metadata go, and the frame with them.
        let (old, _) = p.unset();
        frames.release(A, old.unwrap());
        assert!(mmu.access(frames, id, B, PAGE, Some(2)).is_ok(), "the released code lets B go on");
    });
    assert!(published > 0);
    let here = with_space(|space, m| {
        let heap = PageRange::new(PAGE, PageCount::new(4));
        space.map(&mut m[0], Place::Fixed(heap.start()), heap.pages(), &anonymous()).unwrap();
        let last = VirtAddr::new(PAGE.as_usize() + 3 * PAGE_SIZE);
        space.store(&mut m[1], last, 1).unwrap();
        // A heap shrinks by unmapping its end: there is no second way to lose a page.
        space.unmap(&mut m[0], PageRange::new(last, PageCount::new(1))).unwrap();
        assert!(space.store(&mut m[1], last, 2).is_err());
        assert_eq!(space.store(&mut m[1], PAGE, 2), Ok(0));
    });
    assert_eq!(here, 0);
}

#[test]
fn a_frame_is_not_reused_before_its_shootdown() {
    // The order that the text warns of: references dropped as the records are cleared.
    let wrong = with_hardware(|mmu, frames, id| {
        let mut p = Published { mmu, frames, id, frame: None, set: MemberSet::EMPTY };
        p.fault(B);
        mmu.access(frames, id, B, PAGE, Some(1)).unwrap();
        let (old, targets) = p.unset();
        frames.release(A, old.unwrap());
        let _ = mmu.access(frames, id, B, PAGE, None);
        p.shoot(A, &targets);
    });
    assert!(wrong > 0);
    let here = with_space(|space, m| {
        for round in 0..50 {
            space.map(&mut m[0], Place::Fixed(PAGE), PageCount::new(1), &anonymous()).unwrap();
            // Two frames in all: each is soon the next page's.
            assert_eq!(space.store(&mut m[1], PAGE, round), Ok(0), "zeroed between owners");
            assert_eq!(space.load(&mut m[2], PAGE), Ok(round));
            space.unmap(&mut m[0], ONE).unwrap();
            tick_all(m, space.frames());
        }
    });
    assert_eq!(here, 0);
}

/// The released radix array in little: leaves of 64 bits under a root. "Re-joining nodes" is a note in its source.
#[derive(Default)]
struct Unjoined(std::collections::BTreeMap<u64, u64>);

impl Unjoined {
    fn set(&mut self, page: u64, used: bool) {
        let leaf = self.0.entry(page / 64).or_default();
        let bit = 1 << (page % 64);
        *leaf = if used { *leaf | bit } else { *leaf & !bit };
    }
}

#[test]
fn nodes_return_to_the_floor_after_any_churn_where_the_released_code_keeps_them() {
    let mut published = Unjoined::default();
    for round in 0..200 {
        published.set(round * 64, true);
        published.set(round * 64, false);
    }
    assert_eq!(published.0.len(), 200, "the released code keeps a leaf for each page that ever had a record");
    with_space(|space, m| {
        let spaces = m[0].spaces();
        let floor = spaces.nodes_in_use();
        for round in 0..200usize {
            let page = VirtAddr::new(round * 64 * PAGE_SIZE);
            space.map(&mut m[round % 3], Place::Fixed(page), PageCount::new(1), &anonymous()).unwrap();
            space.unmap(&mut m[(round + 1) % 3], PageRange::new(page, PageCount::new(1))).unwrap();
            m.iter_mut().for_each(|m| {
                m.tick(space.frames());
            });
            assert!(spaces.nodes_in_use() < floor + 60, "bounded while it goes on");
        }
        tick_all(m, space.frames());
        tick_all(m, space.frames());
        assert_eq!(spaces.nodes_in_use(), floor);
    });
}

#[test]
fn rapid_mapping_and_unmapping_does_not_free_and_make_a_node_each_time() {
    with_space(|space, m| {
        let spaces = m[0].spaces();
        let mut most = 0;
        let mut made = 0;
        let mut before = spaces.nodes_in_use();
        for _ in 0..100 {
            space.map(&mut m[0], Place::Fixed(PAGE), PageCount::new(1), &anonymous()).unwrap();
            made += spaces.nodes_in_use().saturating_sub(before);
            before = spaces.nodes_in_use();
            most = most.max(before);
            space.unmap(&mut m[0], ONE).unwrap();
            m.iter_mut().for_each(|m| {
                m.tick(space.frames());
            });
        }
        assert!(made <= 5, "a path of nodes is made once and revived: {made} made");
        assert_eq!(most, 6);
    });
}

/// What another member does meanwhile.
type Disturbance<'a> = &'a dyn Fn(&Object);

/// One counted object. While it is looked up, another member may do something: the moment between a sum's reading of the
/// caches and its reading of the object.
struct Disturbed<'a> {
    object: Object,
    next: Cell<Option<Disturbance<'a>>>,
}

impl Counted for Disturbed<'_> {
    fn object(&self, _: ObjectId) -> &Object {
        if let Some(disturb) = self.next.take() {
            disturb(&self.object);
        }
        &self.object
    }
}

struct Quiet<'a>(&'a Object);

impl Counted for Quiet<'_> {
    fn object(&self, _: ObjectId) -> &Object {
        self.0
    }
}

#[test]
fn a_sum_that_was_disturbed_is_made_again_where_the_released_code_only_skips_the_rest_of_one_member() {
    const X: ObjectId = ObjectId(0);
    let epoch = Epoch::new();
    let blocks = [Block::new(), Block::new(), Block::new()];
    let refcache = Refcache::new(&epoch, &blocks);
    // Counted once in the object, and once in the cache of `two`, who flushes that in the middle of the sum.
    let count_twice = |sum: &dyn Fn(&Disturbed<'_>, &Cell<u32>) -> i64| {
        let two = Handle::new(MemberId::new(2), Generation::default());
        let changes = Cell::new(0);
        let flush = |object: &Object| {
            refcache.leave(&two, &Quiet(object));
            changes.set(changes.get() + 1);
        };
        let shared = Disturbed { object: Object::new(1), next: Cell::new(None) };
        refcache.add(&two, &Quiet(&shared.object), X, 1);
        assert_eq!(refcache.held_back(two.id(), X), 1);
        shared.next.set(Some(&flush));
        sum(&shared, &changes)
    };
    // Sees that a cache has changed since it was read, and goes on with the next one: `continue` in the inner loop.
    let published = |shared: &Disturbed<'_>, changes: &Cell<u32>| {
        let members = (0..3).map(MemberId::new);
        let read: Vec<_> = members.map(|m| (changes.get(), refcache.held_back(m, X))).collect();
        let mut sum = i64::from(shared.object(X).global());
        for (version, delta) in &read {
            sum += i64::from(*delta);
            if *version != changes.get() {
                continue;
            }
        }
        sum
    };
    assert_eq!(count_twice(&published), 3, "the reference under way is counted twice");
    assert_eq!(count_twice(&|shared, _| refcache.sum(shared, X)), 2);
}

/// One object, and two members of which one drops the last reference that the object knows of while the other holds a new one in its
/// cache; told is whether it dies all the same. `is_due` is the review's test, of the member's epoch and the object's.
fn dies_although_it_is_held(is_due: impl Fn(u64, u64) -> bool) -> bool {
    let (mut global, held_back, mut epoch) = (1, 1, 5);
    // One flushes its -1. Its review comes at once.
    global -= 1;
    let due = epoch + 2;
    if is_due(epoch, due) && global == 0 {
        return true;
    }
    // No epoch ends before the other one has flushed, too.
    global += held_back;
    epoch += 2;
    is_due(epoch, due) && global == 0
}

/// One counted object, and how often it died.
struct Mortal(Object, Cell<u32>);

impl Counted for Mortal {
    fn object(&self, _: ObjectId) -> &Object {
        &self.0
    }
}

impl Reclaim for Mortal {
    fn dead(&self, _: &Handle, _: ObjectId) {
        self.1.set(self.1.get() + 1);
    }
}

#[test]
fn a_review_is_due_from_its_epoch_on_and_not_up_to_it_as_a_comment_of_the_released_code_has_it() {
    assert!(dies_although_it_is_held(|epoch, due| epoch <= due), "as the comment says");
    assert!(!dies_although_it_is_held(|epoch, due| epoch >= due), "as the code does");

    const X: ObjectId = ObjectId(0);
    let epoch = Epoch::new();
    let blocks = [Block::new(), Block::new()];
    let refcache = Refcache::new(&epoch, &blocks);
    let [one, two] = [0, 1].map(|n| Handle::new(MemberId::new(n), Generation::default()));
    let object = Mortal(Object::new(1), Cell::new(0));
    refcache.add(&two, &object, X, 1);
    refcache.add(&one, &object, X, -1);
    for _ in 0..10 {
        refcache.tick(&one, &object);
        assert_eq!(object.1.get(), 0, "two holds it, and has not flushed");
    }
    let tick_both = || {
        for _ in 0..10 {
            refcache.tick(&two, &object);
            refcache.tick(&one, &object);
        }
        object.1.get()
    };
    assert_eq!(tick_both(), 0, "two has flushed: it is counted");
    refcache.add(&two, &object, X, -1);
    assert_eq!(tick_both(), 1, "due, and dead");
}
