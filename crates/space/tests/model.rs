//! The address space against a naive map of pages, on a model of hardware that keeps stale translations.

use peregrine_space::model::{Delivery, HeapArena, ModelFrames, ModelMmu, Tables};
use peregrine_space::{
    AddressSpace, Backing, FaultError, MapAdmitError, MapError, Mapping, Member, PAGE_SIZE, PageCount,
    PageRange, Place, ProtectError, Protection, Sizes, VirtAddr,
};
use proptest::prelude::*;
use std::collections::BTreeMap;

const SIZES: Sizes = Sizes { members: 3, spaces: 4, nodes: 400, regions: 40, frames: 600 };

/// What a page is, as anybody would write it down.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Page {
    rights: Protection,
    backing: Backing,
    word: u64,
}

type Naive = BTreeMap<u64, Page>;

#[derive(Clone, Debug)]
enum Op {
    /// With `admit`, the member's view is filled at once if it can be.
    Map {
        p: u64,
        n: u64,
        mapping: Mapping,
        replace: bool,
        admit: bool,
    },
    Unmap(u64, u64),
    Protect(u64, u64, Protection),
    Store(u64, u64),
    Load(u64),
    Query(u64),
    Tick,
    Idle,
}

fn rights() -> impl Strategy<Value = Protection> {
    prop_oneof![Just(Protection::None), Just(Protection::Read), Just(Protection::ReadWrite)]
}

/// Pages around a boundary of leaf nodes and one of the level above, and far away.
fn page() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..200, 4000u64..4200, (1u64 << 30)..(1u64 << 30) + 70]
}

fn backing() -> impl Strategy<Value = Backing> {
    prop_oneof![
        3 => Just(Backing::Anonymous),
        1 => Just(Backing::AnonymousShared),
        1 => (1u64..3, 0u64..5).prop_map(|(object, first)| Backing::ObjectPrivate { object, first }),
        1 => (0u64..3).prop_map(|object| Backing::Home { object }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let count = prop_oneof![1u64..4, 50u64..80, Just(64u64), Just(5000u64)];
    prop_oneof![
        4 => (page(), count.clone(), backing(), rights(), any::<bool>(), any::<bool>()).prop_map(
            |(p, n, backing, rights, replace, admit)| {
                Op::Map { p, n, mapping: Mapping { backing, rights }, replace, admit }
            }
        ),
        3 => (page(), count.clone()).prop_map(|(p, n)| Op::Unmap(p, n)),
        2 => (page(), 1u64..6, rights()).prop_map(|(p, n, r)| Op::Protect(p, n, r)),
        6 => (page(), any::<u64>()).prop_map(|(p, v)| Op::Store(p, v)),
        4 => page().prop_map(Op::Load),
        4 => page().prop_map(Op::Query),
        4 => Just(Op::Tick),
        1 => Just(Op::Idle),
    ]
}

fn addr(page: u64) -> VirtAddr {
    VirtAddr::new(page as usize * PAGE_SIZE)
}

fn range(page: u64, count: u64) -> PageRange {
    PageRange::new(addr(page), PageCount::new(count as usize))
}

/// What an object's page holds before it is written, by the model's rule.
fn initial(backing: Backing, offset: u64, home: &BTreeMap<u64, u64>, page: u64) -> u64 {
    match backing {
        Backing::ObjectPrivate { object, first } => object * 1000 + first + offset,
        Backing::Home { .. } => home.get(&page).copied().unwrap_or(0),
        _ => 0,
    }
}

struct Scene<'a> {
    space: AddressSpace<'a, &'a ModelMmu, &'a ModelFrames>,
    naive: Naive,
    home: BTreeMap<u64, u64>,
}

impl<'a> Scene<'a> {
    fn run(&mut self, member: &mut Member<'a>, op: &Op) {
        match *op {
            Op::Map { p, n, mapping, replace, admit } => {
                let place = if replace { Place::Fixed(addr(p)) } else { Place::FixedNoReplace(addr(p)) };
                let taken = self.naive.range(p..p + n).next().map(|(page, _)| *page);
                let count = PageCount::new(n as usize);
                let result = if admit {
                    self.space.map_and_admit(member, place, count, &mapping).map_err(|e| match e {
                        MapAdmitError::Map(e) => e,
                        MapAdmitError::Mmu { .. } => unreachable!("the model fills every view"),
                    })
                } else {
                    self.space.map(member, place, count, &mapping)
                };
                match (replace, taken) {
                    (false, Some(page)) => {
                        assert_eq!(
                            result,
                            Err(MapError::Occupied { wanted: range(p, n), taken: addr(page) })
                        );
                    }
                    _ => {
                        assert_eq!(result, Ok(range(p, n)));
                        for i in 0..n {
                            let word = initial(mapping.backing, i, &self.home, p + i);
                            let backing = match mapping.backing {
                                Backing::ObjectPrivate { object, first } => {
                                    Backing::ObjectPrivate { object, first: first + i }
                                }
                                other => other,
                            };
                            self.naive.insert(p + i, Page { rights: mapping.rights, backing, word });
                        }
                    }
                }
            }
            Op::Unmap(p, n) => {
                self.space.unmap(member, range(p, n)).unwrap();
                self.naive.retain(|page, _| !(p..p + n).contains(page));
            }
            Op::Protect(p, n, rights) => {
                let hole = (p..p + n).find(|page| !self.naive.contains_key(page));
                let result = self.space.protect(member, range(p, n), rights);
                match hole {
                    Some(page) => assert_eq!(
                        result,
                        Err(ProtectError::Unmapped { range: range(p, n), first_hole: addr(page) })
                    ),
                    None => {
                        assert_eq!(result, Ok(()));
                        for page in p..p + n {
                            self.naive.get_mut(&page).unwrap().rights = rights;
                        }
                    }
                }
            }
            Op::Store(p, v) => {
                let result = self.space.store(member, addr(p), v);
                match self.naive.get_mut(&p) {
                    None => assert!(matches!(result, Err(FaultError::Unmapped(_))), "{result:?}"),
                    Some(page) if page.rights == Protection::ReadWrite => {
                        assert_eq!(result, Ok(page.word));
                        page.word = v;
                        if matches!(page.backing, Backing::Home { .. }) {
                            self.home.insert(p, v);
                        }
                    }
                    Some(_) => assert!(matches!(result, Err(FaultError::Denied { .. })), "{result:?}"),
                }
            }
            Op::Load(p) => {
                let result = self.space.load(member, addr(p));
                match self.naive.get(&p) {
                    None => assert!(matches!(result, Err(FaultError::Unmapped(_))), "{result:?}"),
                    Some(page) if page.rights >= Protection::Read => assert_eq!(result, Ok(page.word)),
                    Some(_) => assert!(matches!(result, Err(FaultError::Denied { .. })), "{result:?}"),
                }
            }
            Op::Query(p) => {
                let entry = self.space.query(member, addr(p));
                let expected = self.naive.get(&p);
                assert_eq!(entry.map(|e| e.rights), expected.map(|p| p.rights));
                assert_eq!(entry.map(|e| e.backing), expected.map(|p| p.backing));
            }
            Op::Tick => {
                member.tick(self.space.frames());
            }
            Op::Idle => member.idle(),
        }
    }
}

/// Runs a history of members on a new space, compares everything at the end, and takes it all down.
fn check(history: &[(usize, Op)], tables: Tables) {
    let arena = HeapArena::new(&SIZES);
    let frames = ModelFrames::new(SIZES.members, SIZES.frames);
    let mmu = ModelMmu::new(&frames, SIZES.members, tables, Delivery::Interrupt);
    let spaces = arena.spaces();
    let mut members: Vec<Member<'_>> = (0..SIZES.members).map(|_| spaces.join().unwrap()).collect();
    let space = AddressSpace::create(&mut members[0], &mmu, &frames).unwrap();
    let floor = spaces.nodes_in_use();
    let mut scene = Scene { space, naive: Naive::new(), home: BTreeMap::new() };
    for (who, op) in history {
        scene.run(&mut members[*who], op);
    }
    let whole = range(0, 1 << 36);
    let mut seen = Naive::new();
    for entry in scene.space.entries(&mut members[0], whole) {
        let start = (entry.range.start().as_usize() / PAGE_SIZE) as u64;
        for i in 0..entry.range.pages().get() as u64 {
            let backing = match entry.backing {
                Backing::ObjectPrivate { object, first } => {
                    Backing::ObjectPrivate { object, first: first + i }
                }
                other => other,
            };
            let word = scene.naive.get(&(start + i)).map_or(0, |p| p.word);
            seen.insert(start + i, Page { rights: entry.rights, backing, word });
        }
    }
    assert_eq!(seen, scene.naive, "an iteration finds every record and nothing else");
    scene.space.unmap(&mut members[1], whole).unwrap();
    for _ in 0..40 {
        for member in &mut members {
            member.tick(&frames);
        }
    }
    assert_eq!(spaces.nodes_in_use(), floor, "nodes return to the floor");
    assert_eq!(spaces.regions_in_use(), 0, "regions are freed");
    assert_eq!(frames.in_use(), 0, "frames are freed");
    assert_eq!(mmu.violations(), 0, "no access reached a frame that was no longer the page's");
    scene.space.destroy(&mut members[2]);
    for _ in 0..40 {
        members.iter_mut().for_each(|member| {
            member.tick(&frames);
        });
    }
    assert_eq!((spaces.nodes_in_use(), spaces.lines_in_use()), (0, 0), "lines go with their nodes");
}

#[test]
fn whoever_has_a_page_of_a_run_in_view_loses_it_though_nobody_has_its_neighbours() {
    let arena = HeapArena::new(&SIZES);
    let frames = ModelFrames::new(1, SIZES.frames);
    let mmu = ModelMmu::new(&frames, 1, Tables::Views, Delivery::Interrupt);
    let mut member = arena.spaces().join().unwrap();
    let space = AddressSpace::create(&mut member, &mmu, &frames).unwrap();
    let mapping = Mapping { backing: Backing::Anonymous, rights: Protection::ReadWrite };
    for touched in 10..13 {
        space.map(&mut member, Place::FixedNoReplace(addr(10)), PageCount::new(3), &mapping).unwrap();
        space.store(&mut member, addr(touched), 7).unwrap();
        space.unmap(&mut member, range(10, 3)).unwrap();
        let found = mmu.access(&frames, space.id(), member.id(), addr(touched), None);
        assert!(found.is_err(), "page {touched} is in view still: {found:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_leaves_what_a_naive_map_holds(
        history in prop::collection::vec((0..SIZES.members, op()), 1..120),
        tables in prop_oneof![
            Just(Tables::Views),
            Just(Tables::Shared),
            Just(Tables::Hybrid { share_at: 2, private_limit: 3 }),
        ],
    ) {
        check(&history, tables);
    }
}
