//! A member is interrupted before each single access that an operation makes to shared memory, and stands still while another one goes on
//! without it: throws it out of the epoch, unmaps what it is looking at, frees the nodes and frames there and uses them anew elsewhere.
//! When it goes on, it must find out; nothing of another's may be changed, shown or lost. And whoever only looks meanwhile is told at once.
//!
//! The sources are the real ones with recording atomics behind them, whose hook runs the other member between any two accesses. How many
//! accesses an operation makes is not known here: they are counted off until there are no more.

use base_recorded::sync::record::before_each;
use space_recorded::model::{Delivery, HeapArena, ModelFrames, ModelMmu, Tables};
use space_recorded::{
    Access, AddressSpace, Backing, Mapping, Member, MemberId, PAGE_SIZE, PageCount, PageRange, Place,
    Protection, Sizes, VirtAddr,
};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

const SIZES: Sizes = Sizes { members: 2, spaces: 1, nodes: 60, regions: 4, frames: 40 };
/// Where the interrupted member works, in one node of 64 pages.
const HERE: usize = 64;
/// There too: home pages of one mapping, as many as a fault fills at once.
const BLOCK: usize = HERE + 32;
/// What the other one maps when it has freed all that was there: the same slots of other nodes, and others.
const ELSEWHERE: [usize; 3] = [(1 << 20) + 5, (2 << 20) + 9, (2 << 20) + 30];
const OBJECT: u64 = 2;
/// Pages of a slot of the root, and where one begins.
const WIDE: usize = 1 << 30;

type Space = AddressSpace<'static, &'static ModelMmu, &'static ModelFrames>;

struct Scene {
    space: Space,
    mmu: &'static ModelMmu,
    frames: &'static ModelFrames,
    name: MemberId,
    victim: RefCell<Member<'static>>,
    other: RefCell<Member<'static>>,
}

fn addr(page: usize) -> VirtAddr {
    VirtAddr::new(page * PAGE_SIZE)
}

fn range(page: usize, count: usize) -> PageRange {
    PageRange::new(addr(page), PageCount::new(count))
}

const ANONYMOUS: Backing = Backing::Anonymous;
const HOME: Backing = Backing::Home { object: 9 };
const COPIED: Backing = Backing::ObjectPrivate { object: OBJECT, first: 0 };

fn map(space: &Space, m: &mut Member<'static>, page: usize, backing: Backing, rights: Protection) {
    space.map(m, Place::Fixed(addr(page)), PageCount::new(1), &Mapping { backing, rights }).unwrap();
}

impl Scene {
    fn new() -> Rc<Self> {
        let arena: &'static HeapArena = Box::leak(Box::new(HeapArena::new(&SIZES)));
        let frames: &'static ModelFrames = Box::leak(Box::new(ModelFrames::new(SIZES.members, SIZES.frames)));
        let mmu = ModelMmu::new(frames, SIZES.members, Tables::Views, Delivery::Interrupt).with_patience(3);
        let mmu: &'static ModelMmu = Box::leak(Box::new(mmu));
        let (mut victim, mut other) = (arena.spaces().join().unwrap(), arena.spaces().join().unwrap());
        let space = AddressSpace::create(&mut other, mmu, frames).unwrap();
        // The node is there, and the victim's last walk ended in it.
        for page in [HERE + 6, HERE + 7] {
            map(&space, &mut victim, page, HOME, Protection::ReadWrite);
        }
        map(&space, &mut victim, HERE + 8, COPIED, Protection::ReadWrite);
        map(&space, &mut victim, HERE + 9, ANONYMOUS, Protection::ReadWrite);
        space.store(&mut victim, addr(HERE + 9), 99).unwrap();
        let home = Mapping { backing: HOME, rights: Protection::ReadWrite };
        space.map(&mut victim, Place::Fixed(addr(BLOCK)), PageCount::new(16), &home).unwrap();
        // The object's page is in the cache, and nobody has it.
        map(&space, &mut other, HERE + 50, COPIED, Protection::ReadWrite);
        space.load(&mut other, addr(HERE + 50)).unwrap();
        space.unmap(&mut other, range(HERE + 50, 1)).unwrap();
        let name = victim.id();
        Rc::new(Self { space, mmu, frames, name, victim: RefCell::new(victim), other: RefCell::new(other) })
    }

    /// All that another member can do to what the victim was looking at.
    fn go_on_without_the_victim(&self) {
        let (space, mut other) = (&self.space, self.other.borrow_mut());
        // Unless it is out already.
        let _ = other.expel(self.name);
        // What the victim has locked stays: this gives up there, and nothing has changed.
        for page in HERE + 3..HERE + 24 {
            let _ = space.unmap(&mut other, range(page, 1));
        }
        let _ = space.unmap(&mut other, range(BLOCK, 16));
        for _ in 0..40 {
            if other.spaces().nodes_in_use() == 1 && self.frames.in_use() == 0 {
                break;
            }
            other.tick(self.frames);
        }
        for page in ELSEWHERE {
            map(space, &mut other, page, ANONYMOUS, Protection::ReadWrite);
            space.store(&mut other, addr(page), page as u64).unwrap();
        }
    }

    /// What the other one mapped elsewhere is what there is outside of the victim's place; nothing is lost, and nothing was reached that
    /// was another's.
    fn check(&self, what: &str) {
        let (space, mut other, mut victim) = (&self.space, self.other.borrow_mut(), self.victim.borrow_mut());
        let mut found: Vec<_> = space.entries(&mut other, range(0, 1 << 36)).collect();
        found.retain(|entry| !range(HERE, 64).contains(entry.range.start()));
        if space.query(&mut other, addr(HERE + 8)).is_some_and(|e| e.backing == COPIED) {
            assert_eq!(space.load(&mut victim, addr(HERE + 8)), Ok(OBJECT * 1000), "{what}");
        }
        let pages: Vec<_> = found.iter().map(|e| (e.range, e.backing, e.rights)).collect();
        let expected = ELSEWHERE.map(|page| (range(page, 1), ANONYMOUS, Protection::ReadWrite));
        assert_eq!(pages, expected, "{what}");
        for page in ELSEWHERE {
            assert_eq!(space.load(&mut other, addr(page)), Ok(page as u64), "{what}");
            space.unmap(&mut victim, range(page, 1)).unwrap();
        }
        space.unmap(&mut victim, range(HERE, 64)).unwrap();
        for _ in 0..40 {
            other.tick(self.frames);
            victim.tick(self.frames);
        }
        let left = (other.spaces().nodes_in_use(), other.spaces().regions_in_use(), self.frames.in_use());
        assert_eq!(left, (1, 0, 0), "nodes, regions, frames: {what}");
        assert_eq!(self.mmu.violations(), 0, "{what}");
    }
}

/// Interrupts `operation` before every `stride`th of its accesses in turn; tells how many there are.
fn interrupt_everywhere(what: &str, stride: usize, operation: fn(&Space, &mut Member<'static>)) -> usize {
    for at in (0..).step_by(stride) {
        let scene = Scene::new();
        let (left, came) = (Cell::new(at), Rc::new(Cell::new(false)));
        let (others, seen) = (scene.clone(), came.clone());
        let hook = move || match left.get() {
            _ if seen.get() => {}
            0 => {
                seen.set(true);
                others.go_on_without_the_victim();
            }
            n => left.set(n - 1),
        };
        before_each(hook, || operation(&scene.space, &mut scene.victim.borrow_mut()));
        if !came.get() {
            return at;
        }
        scene.check(&format!("{what}, interrupted before access {at}"));
    }
    unreachable!()
}

fn check(what: &str, operation: fn(&Space, &mut Member<'static>)) {
    check_every(1, what, operation);
}

fn check_every(stride: usize, what: &str, operation: fn(&Space, &mut Member<'static>)) {
    let accesses = interrupt_everywhere(what, stride, operation);
    println!("{what}: {accesses} accesses");
    assert!(accesses > 5, "{what} touches shared memory: {accesses}");
}

/// It is done or not, by the time it came to it.
fn done<T>(_: T) {}

#[test]
fn a_range_lock_is_not_taken_in_a_node_that_was_used_anew() {
    check("map", |space, m| map(space, m, HERE + 5, HOME, Protection::Read));
    check("map over", |space, m| map(space, m, HERE + 9, HOME, Protection::Read));
    check("map many", |space, m| {
        let mapping = Mapping { backing: HOME, rights: Protection::Read };
        space.map(m, Place::Fixed(addr(HERE + 3)), PageCount::new(20), &mapping).unwrap();
    });
    check("unmap many", |space, m| done(space.unmap(m, range(HERE + 3, 20))));
    check("protect", |space, m| done(space.protect(m, range(HERE + 9, 1), Protection::Read)));
}

fn map_and_admit(space: &Space, m: &mut Member<'static>, page: usize, pages: usize) {
    let mapping = Mapping { backing: HOME, rights: Protection::Read };
    done(space.map_and_admit(m, Place::FixedNoReplace(addr(page)), PageCount::new(pages), &mapping));
}

#[test]
fn no_run_is_mapped_or_unmapped_in_a_node_that_was_used_anew() {
    check("map and admit a page", |space, m| map_and_admit(space, m, HERE + 5, 1));
    check("map and admit a run", |space, m| map_and_admit(space, m, HERE + 20, 4));
    check("map and admit a run that is taken in part", |space, m| map_and_admit(space, m, HERE + 4, 4));
    check("unmap a page", |space, m| done(space.unmap(m, range(HERE + 9, 1))));
    check("unmap a run of every kind", |space, m| done(space.unmap(m, range(HERE + 6, 4))));
    check("unmap a run that is mapped in part", |space, m| done(space.unmap(m, range(HERE + 8, 4))));
}

#[test]
fn a_fault_fills_no_record_and_no_view_of_what_was_used_anew() {
    check("a write's", |space, m| done(space.fault(m, addr(HERE + 8), Access::Write)));
    check("a block's", |space, m| done(space.fault(m, addr(BLOCK + 3), Access::Write)));
    check("admit", |space, m| done(space.admit(m, range(HERE, 64))));
    // The frame that the cache told of may be another's by the time it is counted.
    check("a read's of an object's page", |space, m| done(space.fault(m, addr(HERE + 8), Access::Read)));
}

#[test]
fn a_lookup_tells_nothing_of_what_was_used_anew() {
    check("query", |space, m| {
        if let Some(entry) = space.query(m, addr(HERE + 5)) {
            panic!("nothing was ever mapped there: {entry:?}");
        }
    });
    check("query of a page that goes", |space, m| {
        let found = space.query(m, addr(HERE + 9));
        assert!(found.is_none_or(|e| e.backing == ANONYMOUS && e.range == range(HERE + 9, 1)), "{found:?}");
    });
}

/// What can be seen of the victim's pages, with a lookup for each and by one walk: rights and backing, page by page.
fn picture(space: &Space, m: &mut Member<'static>) -> Vec<Option<(Protection, Backing)>> {
    let all = range(HERE, 64);
    let seen: Vec<_> =
        (HERE..HERE + 64).map(|page| space.query(m, addr(page)).map(|e| (e.rights, e.backing))).collect();
    let entries: Vec<_> = space.entries(m, all).map(|e| e.range).collect();
    for (page, seen) in (HERE..).zip(&seen) {
        assert_eq!(
            entries.iter().any(|e| e.contains(addr(page))),
            seen.is_some(),
            "page {page}: {entries:?}"
        );
    }
    seen
}

/// Accesses that a picture may take: about seven for each level and page, and twice that.
const ENOUGH: usize = 64 * 2 * 6 * 14;

/// Interrupts `operation` before each of its accesses in turn, by somebody who looks at what it changes, and finds all of that before or
/// after the change, in so many steps.
fn look_everywhere(what: &str, operation: fn(&Space, &mut Member<'static>)) {
    let twin = Scene::new();
    let before = picture(&twin.space, &mut twin.other.borrow_mut());
    operation(&twin.space, &mut twin.victim.borrow_mut());
    let after = picture(&twin.space, &mut twin.other.borrow_mut());
    for at in 0.. {
        let scene = Scene::new();
        let (left, enough) = (Cell::new(at), Cell::new(ENOUGH));
        let found = Rc::new(RefCell::new(None));
        let (others, seen) = (scene.clone(), found.clone());
        let said = what.to_owned();
        let hook = move || match left.get() {
            0 if enough.get() == ENOUGH => {
                enough.set(ENOUGH - 1);
                let picture = picture(&others.space, &mut others.other.borrow_mut());
                *seen.borrow_mut() = Some(picture);
                enough.set(usize::MAX);
            }
            0 if enough.get() == usize::MAX => {}
            0 => {
                enough.set(enough.get() - 1);
                assert!(enough.get() > 0, "{said}: who looks waits for one that stands before access {at}");
            }
            n => left.set(n - 1),
        };
        before_each(hook, || operation(&scene.space, &mut scene.victim.borrow_mut()));
        let Some(found) = found.take() else {
            assert!(at > 5, "{what} touches shared memory: {at}");
            return;
        };
        assert!(found == before || found == after, "{what}, before access {at}: half done: {found:?}");
    }
}

#[test]
fn whoever_looks_waits_for_nobody_and_sees_all_of_an_operation_or_nothing_of_it() {
    look_everywhere("map many", |space, m| {
        let mapping = Mapping { backing: HOME, rights: Protection::Read };
        space.map(m, Place::Fixed(addr(HERE + 3)), PageCount::new(20), &mapping).unwrap();
    });
    look_everywhere("map and admit many", |space, m| {
        let mapping = Mapping { backing: HOME, rights: Protection::Read };
        space.map_and_admit(m, Place::Fixed(addr(HERE + 3)), PageCount::new(20), &mapping).unwrap();
    });
    look_everywhere("map and admit a run", |space, m| map_and_admit(space, m, HERE + 20, 4));
    look_everywhere("unmap many", |space, m| space.unmap(m, range(HERE + 3, 20)).unwrap());
    look_everywhere("unmap a run", |space, m| space.unmap(m, range(HERE + 6, 4)).unwrap());
    look_everywhere("protect", |space, m| space.protect(m, range(HERE + 6, 4), Protection::None).unwrap());
    look_everywhere("a fault", |space, m| done(space.fault(m, addr(HERE + 8), Access::Write).unwrap()));
}

/// Somebody who is not thrown out of the epoch, and comes through a link just before it is cut: the node stays what it was for as long as the
/// epoch waits for them, though nobody else finds it any more.
fn come_through_while_it_goes(what: &str, operation: fn(&Space, &mut Member<'static>)) {
    let mut nodes = BTreeSet::new();
    for rounds in 0..10 {
        for at in 0.. {
            let scene = Scene::new();
            scene.space.unmap(&mut scene.victim.borrow_mut(), range(HERE, 64)).unwrap();
            // The first tick of all flushes nothing, so the other one has the nodes under review: the victim can't cut a link while it
            // stands still. And the epoch does not wait for the victim yet.
            scene.victim.borrow_mut().tick(scene.frames);
            for _ in 0..rounds {
                scene.other.borrow_mut().tick(scene.frames);
                scene.victim.borrow_mut().tick(scene.frames);
            }
            nodes.insert(scene.other.borrow().spaces().nodes_in_use());
            let (left, came) = (Cell::new(at), Rc::new(Cell::new(false)));
            let (others, seen) = (scene.clone(), came.clone());
            let hook = move || match left.get() {
                _ if seen.get() => {}
                0 => {
                    seen.set(true);
                    let mut other = others.other.borrow_mut();
                    for _ in 0..3 {
                        other.tick(others.frames);
                    }
                    // Nodes full of records, at every level.
                    let wide = Mapping { backing: HOME, rights: Protection::Read };
                    let (first, count) = (addr(WIDE), PageCount::new(WIDE));
                    others.space.map(&mut other, Place::Fixed(first), count, &wide).unwrap();
                    others.space.unmap(&mut other, range(2 * WIDE - 1, 1)).unwrap();
                }
                n => left.set(n - 1),
            };
            before_each(hook, || operation(&scene.space, &mut scene.victim.borrow_mut()));
            if !came.get() {
                break;
            }
            let (space, mut other) = (&scene.space, scene.other.borrow_mut());
            let elsewhere = space.entries(&mut other, range(WIDE, WIDE));
            let pages: usize = elsewhere.map(|e| e.range.pages().get()).sum();
            assert_eq!(pages, WIDE - 1, "{what}, {rounds} ticks, before access {at}");
        }
    }
    assert!(nodes.len() > 1, "{what}: no node went in so many ticks: {nodes:?}");
}

#[test]
fn whoever_is_in_a_node_when_its_link_is_cut_finds_what_it_was() {
    come_through_while_it_goes("query", |space, m| {
        let found = space.query(m, addr(HERE + 5));
        assert!(found.is_none(), "nothing is mapped there: {found:?}");
    });
    come_through_while_it_goes("map", |space, m| {
        map(space, m, HERE + 5, HOME, Protection::Read);
        assert!(space.query(m, addr(HERE + 5)).is_some(), "it was mapped just now");
    });
}

#[test]
fn upkeep_that_is_interrupted_loses_nothing() {
    check("tick", |space, m| {
        m.tick(space.frames());
    });
    // Each way of the delta cache is looked at, and nearly all are empty.
    check_every(7, "ticks", |space, m| {
        for _ in 0..4 {
            m.tick(space.frames());
        }
    });
    check_every(7, "idle", |_, m| m.idle());
}
