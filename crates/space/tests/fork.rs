//! Families of spaces against naive maps: what a fork shares, what it copies when it is written, and that no stale translation of a
//! parent's writer reaches what is its child's too. One object is a file that several mappings show: written in place by those that share
//! it, and read by those that copy it as long as they have not.

use peregrine_space::model::{Delivery, HeapArena, ModelFrames, ModelMmu, Tables};
use peregrine_space::{
    AddressSpace, Backing, FaultError, Mapping, Member, PAGE_SIZE, PageCount, PageRange, Place, Protection,
    Sizes, VirtAddr,
};
use proptest::prelude::*;
use std::collections::BTreeMap;

type Space<'a> = AddressSpace<'a, &'a ModelMmu, &'a ModelFrames>;

const MEMBERS: usize = 3;
const FAMILY: usize = 4;
const PAGES: u64 = 140;
/// The object that is a file, and its pages.
const FILE: u64 = 3;
const FILE_PAGES: u64 = 48;
const SIZES: Sizes = Sizes { members: MEMBERS, spaces: FAMILY + 1, nodes: 400, regions: 60, frames: 960 };

/// A page of one space, as anybody would write it down: `cell` says where its word is, so that pages which share it say the same.
#[derive(Clone, Copy, Debug)]
struct Page {
    rights: Protection,
    backing: Backing,
    cell: usize,
    touched: bool,
}

#[derive(Clone, Debug)]
enum Op {
    Map(u64, u64, Backing),
    Unmap(u64, u64),
    Protect(u64, Protection),
    Store(u64, u64),
    Load(u64),
    Fork,
    Destroy,
    Tick,
}

fn op() -> impl Strategy<Value = Op> {
    let page = || prop_oneof![0u64..8, 60u64..70, 0u64..PAGES];
    let backing = prop_oneof![
        3 => Just(Backing::Anonymous),
        2 => Just(Backing::AnonymousShared),
        1 => (1u64..3, 0u64..5).prop_map(|(object, first)| Backing::ObjectPrivate { object, first }),
        1 => Just(Backing::Home { object: 1 }),
        2 => (0u64..5).prop_map(|first| Backing::Object { object: FILE, first }),
        1 => (0u64..5).prop_map(|first| Backing::ObjectPrivate { object: FILE, first }),
    ];
    prop_oneof![
        3 => (page(), 1u64..40, backing).prop_map(|(p, n, b)| Op::Map(p, n.min(PAGES - p), b)),
        1 => (page(), 1u64..20).prop_map(|(p, n)| Op::Unmap(p, n)),
        1 => (page(), prop_oneof![Just(Protection::Read), Just(Protection::ReadWrite)])
            .prop_map(|(p, r)| Op::Protect(p, r)),
        8 => (page(), 1u64..1000).prop_map(|(p, v)| Op::Store(p, v)),
        4 => page().prop_map(Op::Load),
        2 => Just(Op::Fork),
        1 => Just(Op::Destroy),
        2 => Just(Op::Tick),
    ]
}

fn addr(page: u64) -> VirtAddr {
    VirtAddr::new(page as usize * PAGE_SIZE)
}

fn range(page: u64, count: u64) -> PageRange {
    PageRange::new(addr(page), PageCount::new(count as usize))
}

/// The words of all pages of all spaces.
#[derive(Default)]
struct Words(Vec<u64>);

impl Words {
    fn cell(&mut self, word: u64) -> usize {
        self.0.push(word);
        self.0.len() - 1
    }
}

struct Family<'a> {
    spaces: Vec<Option<(Space<'a>, BTreeMap<u64, Page>)>>,
    words: Words,
    /// The cells of home pages: one for each address, whatever the space.
    home: BTreeMap<u64, usize>,
    /// The cells of the file's pages.
    file: Vec<usize>,
}

impl<'a> Family<'a> {
    fn run(&mut self, member: &mut Member<'a>, which: usize, op: &Op) {
        let Some(which) = (0..FAMILY).map(|i| (which + i) % FAMILY).find(|i| self.spaces[*i].is_some())
        else {
            return;
        };
        let free = self.spaces.iter().position(Option::is_none);
        let several = self.spaces.iter().flatten().count() > 1;
        let (space, naive) = self.spaces[which].as_mut().unwrap();
        match *op {
            Op::Map(p, n, backing) => {
                let mapping = Mapping { backing, rights: Protection::ReadWrite };
                space.map(member, Place::Fixed(addr(p)), PageCount::new(n as usize), &mapping).unwrap();
                for i in 0..n {
                    let cell = match backing {
                        Backing::Object { first, .. } | Backing::ObjectPrivate { object: FILE, first } => {
                            self.file[(first + i) as usize]
                        }
                        Backing::ObjectPrivate { object, first } => {
                            self.words.cell(object * 1000 + first + i)
                        }
                        Backing::Home { .. } => *self.home.entry(p + i).or_insert_with(|| self.words.cell(0)),
                        _ => self.words.cell(0),
                    };
                    let page = Page { rights: Protection::ReadWrite, backing, cell, touched: false };
                    naive.insert(p + i, page);
                }
            }
            Op::Unmap(p, n) => {
                space.unmap(member, range(p, n)).unwrap();
                naive.retain(|page, _| !(p..p + n).contains(page));
            }
            Op::Protect(p, rights) => {
                assert_eq!(space.protect(member, range(p, 1), rights).is_ok(), naive.contains_key(&p));
                naive.entry(p).and_modify(|page| page.rights = rights);
            }
            Op::Store(p, v) => {
                let result = space.store(member, addr(p), v);
                match naive.get_mut(&p) {
                    None => assert!(matches!(result, Err(FaultError::Unmapped(_))), "{result:?}"),
                    Some(page) if page.rights == Protection::ReadWrite => {
                        assert_eq!(result, Ok(self.words.0[page.cell]), "space {which}, page {p}");
                        let copies = matches!(page.backing, Backing::ObjectPrivate { .. });
                        if copies && self.file.contains(&page.cell) {
                            page.cell = self.words.cell(v);
                        }
                        self.words.0[page.cell] = v;
                        page.touched = true;
                    }
                    Some(_) => assert!(matches!(result, Err(FaultError::Denied { .. })), "{result:?}"),
                }
            }
            Op::Load(p) => {
                let result = space.load(member, addr(p));
                match naive.get_mut(&p) {
                    None => assert!(matches!(result, Err(FaultError::Unmapped(_))), "{result:?}"),
                    Some(page) => {
                        assert_eq!(result, Ok(self.words.0[page.cell]), "space {which}, page {p}");
                        page.touched = true;
                    }
                }
            }
            Op::Fork => {
                let Some(free) = free else { return };
                let id = space.fork(member).unwrap();
                let child = AddressSpace::open(member.spaces(), id, *space.mmu(), *space.frames());
                let mut copy = naive.clone();
                for page in copy.values_mut() {
                    // Shared are the frames that there are.
                    let shares = match page.backing {
                        Backing::Home { .. } => true,
                        Backing::Object { .. } | Backing::ObjectPrivate { object: FILE, .. } => {
                            self.file.contains(&page.cell)
                        }
                        Backing::AnonymousShared => page.touched,
                        _ => false,
                    };
                    if !shares {
                        page.cell = self.words.cell(self.words.0[page.cell]);
                    }
                }
                self.spaces[free] = Some((child, copy));
            }
            Op::Destroy => {
                if several {
                    let (space, _) = self.spaces[which].take().unwrap();
                    space.destroy(member);
                }
            }
            Op::Tick => {
                member.tick(space.frames());
            }
        }
    }

    /// Every page of every space holds what the naive maps say, as any core sees it.
    fn compare(&mut self, member: &mut Member<'a>) {
        for (space, naive) in self.spaces.iter_mut().flatten() {
            for p in 0..PAGES {
                let entry = space.query(member, addr(p));
                assert_eq!(entry.map(|e| e.rights), naive.get(&p).map(|page| page.rights), "page {p}");
                if let Some(page) = naive.get_mut(&p) {
                    assert_eq!(space.load(member, addr(p)), Ok(self.words.0[page.cell]), "page {p}");
                    page.touched = true;
                }
            }
        }
    }
}

fn check(history: &[(usize, usize, Op)], tables: Tables) {
    let arena = HeapArena::new(&SIZES);
    let frames = ModelFrames::new(MEMBERS, SIZES.frames);
    let mmu = ModelMmu::new(&frames, MEMBERS, tables, Delivery::Interrupt);
    let spaces = arena.spaces();
    let mut members: Vec<Member<'_>> = (0..MEMBERS).map(|_| spaces.join().unwrap()).collect();
    let first = AddressSpace::create(&mut members[0], &mmu, &frames).unwrap();
    // The model's cache forgets what nobody has, and with it what was written: somebody always has the file.
    let keeper = AddressSpace::create(&mut members[0], &mmu, &frames).unwrap();
    let whole = Mapping { backing: Backing::Object { object: FILE, first: 0 }, rights: Protection::Read };
    let pages = PageCount::new(FILE_PAGES as usize);
    keeper.map(&mut members[0], Place::Fixed(addr(0)), pages, &whole).unwrap();
    let mut words = Words::default();
    for p in 0..FILE_PAGES {
        assert_eq!(keeper.load(&mut members[0], addr(p)), Ok(FILE * 1000 + p));
        words.cell(FILE * 1000 + p);
    }
    let mut family = Family {
        spaces: std::iter::once(Some((first, BTreeMap::new())))
            .chain(std::iter::repeat_with(|| None))
            .take(FAMILY)
            .collect(),
        words,
        home: BTreeMap::new(),
        file: (0..FILE_PAGES as usize).collect(),
    };
    for (who, which, op) in history {
        family.run(&mut members[*who], *which, op);
    }
    family.compare(&mut members[0]);
    for p in 0..FILE_PAGES {
        let found = keeper.load(&mut members[1], addr(p));
        assert_eq!(found, Ok(family.words.0[family.file[p as usize]]), "page {p} of the file");
    }
    assert_eq!(mmu.violations(), 0, "no access reached a frame that was no longer the page's");
    for (space, _) in family.spaces.into_iter().flatten() {
        space.destroy(&mut members[1]);
    }
    keeper.destroy(&mut members[2]);
    for _ in 0..60 {
        members.iter_mut().for_each(|member| {
            member.tick(&frames);
        });
    }
    assert_eq!((spaces.nodes_in_use(), spaces.regions_in_use(), frames.in_use()), (0, 0, 0), "all is freed");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_family_of_spaces_holds_what_naive_maps_hold(
        history in prop::collection::vec((0..MEMBERS, 0..FAMILY, op()), 1..150),
        tables in prop_oneof![
            Just(Tables::Views),
            Just(Tables::Shared),
            Just(Tables::Hybrid { share_at: 2, private_limit: 3 }),
        ],
    ) {
        check(&history, tables);
    }
}

/// The case that a fork is about: both cores have the page in their TLBs for writing when it is forked.
#[test]
fn a_writer_with_a_stale_translation_writes_its_own_copy_after_a_fork() {
    use Op::{Fork, Load, Map, Store};
    let history = [
        (0, 0, Map(0, 3, Backing::Anonymous)),
        (0, 0, Store(1, 10)),
        (1, 0, Store(1, 11)),
        (2, 0, Load(1)),
        (0, 0, Fork),
        (1, 0, Store(1, 12)),
        (2, 0, Load(1)),
        (2, 1, Load(1)),
        (0, 1, Store(1, 13)),
        (2, 1, Load(1)),
        (2, 0, Load(1)),
    ];
    for tables in [Tables::Views, Tables::Shared, Tables::Hybrid { share_at: 2, private_limit: 3 }] {
        check(&history, tables);
    }
}

#[test]
fn what_is_written_to_an_object_is_seen_where_it_is_shared_and_where_it_is_copied_until_it_is_written_there()
{
    use Op::{Fork, Load, Map, Store};
    let shared = |first| Backing::Object { object: FILE, first };
    let private = Backing::ObjectPrivate { object: FILE, first: 1 };
    let history = [
        // The object's page 2 at two addresses, and to be copied at a third.
        (0, 0, Map(0, 4, shared(0))),
        (1, 0, Map(60, 4, shared(2))),
        (2, 0, Map(100, 4, private)),
        (0, 0, Store(2, 10)),
        (1, 0, Load(60)),
        (2, 0, Load(101)),
        (1, 0, Store(60, 11)),
        (2, 0, Load(101)),
        (0, 0, Load(2)),
        // Read and then written, by who shares the object's page with nobody but the object.
        (1, 0, Map(110, 2, private)),
        (1, 0, Load(110)),
        (1, 0, Store(110, 15)),
        (0, 0, Load(1)),
        (0, 0, Fork),
        (1, 1, Store(2, 12)),
        (0, 0, Load(60)),
        (2, 0, Store(101, 13)),
        (1, 1, Load(101)),
        (2, 0, Store(60, 14)),
        (1, 1, Load(101)),
        (1, 0, Load(101)),
    ];
    for tables in [Tables::Views, Tables::Shared, Tables::Hybrid { share_at: 2, private_limit: 3 }] {
        check(&history, tables);
    }
}
