//! Operations on disjoint ranges share no written cache line: proved by counting, on the real sources with recording atomics.
//!
//! Each simulated core's operations run under its number; a line that one core wrote and another touched is a conflict. The
//! allowed cases of the paper (a node is made or freed, the epoch's upkeep) are kept out by warming up and by ticking
//! outside the recording, and are counted by themselves in `bench space`.

use base_recorded::sync::record::{Access, as_core, note, shared_lines, take};
use space_recorded::model::{Delivery, HeapArena, ModelFrames, ModelMmu, Tables};
use space_recorded::{
    AddressSpace, Backing, Mapping, Member, Mmu, PAGE_SIZE, PageCount, PageRange, Place, Protection, Sizes,
    VirtAddr,
};

type Space<'a> = AddressSpace<'a, &'a ModelMmu, &'a ModelFrames>;

const ANONYMOUS: Mapping = Mapping { backing: Backing::Anonymous, rights: Protection::ReadWrite };

fn addr(page: usize) -> VirtAddr {
    VirtAddr::new(page * PAGE_SIZE)
}

fn range(page: usize, count: usize) -> PageRange {
    PageRange::new(addr(page), PageCount::new(count))
}

/// Runs `f` on a space with a member for each core.
fn with(cores: usize, tables: Tables, f: impl for<'a> FnOnce(&Space<'a>, &mut [Member<'a>])) {
    let sizes = Sizes { members: cores, spaces: 1, nodes: cores * 32 + 64, regions: 8, frames: cores * 64 };
    let arena = HeapArena::new(&sizes);
    let frames = ModelFrames::new(cores, sizes.frames);
    let mmu = ModelMmu::new(&frames, cores, tables, Delivery::Interrupt);
    let mut members: Vec<_> = (0..cores).map(|_| arena.spaces().join().unwrap()).collect();
    let space = AddressSpace::create(&mut members[0], &mmu, &frames).unwrap();
    f(&space, &mut members);
}

/// The result does not matter, only that there is one.
fn ok<T>(_: T) {}

type Step = for<'a> fn(&Space<'a>, &mut Member<'a>, usize);

/// An operation of each core on a page of its own, as a cycle that ends where it began.
const CYCLE: &[(&str, Step)] = &[
    ("map", |s, m, page| ok(s.map(m, Place::Fixed(addr(page)), PageCount::new(1), &ANONYMOUS).unwrap())),
    ("fault", |s, m, page| ok(s.store(m, addr(page), 1).unwrap())),
    ("lookup", |s, m, page| ok(s.query(m, addr(page)).unwrap())),
    ("protect", |s, m, page| s.protect(m, range(page, 1), Protection::Read).unwrap()),
    ("raise", |s, m, page| s.protect(m, range(page, 1), Protection::ReadWrite).unwrap()),
    ("unmap", |s, m, page| s.unmap(m, range(page, 1)).unwrap()),
];

fn conflicts(cores: usize, page_of: impl Fn(usize) -> usize, tables: Tables) -> Vec<(&'static str, usize)> {
    let mut found = Vec::new();
    with(cores, tables, |space, members| {
        // Twice round without recording: nodes are made, frames and tables come to their cores.
        for _ in 0..2 {
            for (_, step) in CYCLE {
                for (core, m) in members.iter_mut().enumerate() {
                    step(space, m, page_of(core));
                }
            }
        }
        for (name, step) in CYCLE {
            take();
            for (core, m) in members.iter_mut().enumerate() {
                as_core(core as u32, || step(space, m, page_of(core)));
            }
            found.push((*name, shared_lines(&take()).len()));
        }
    });
    found
}

fn all_zero(found: &[(&str, usize)]) {
    assert!(found.iter().all(|(_, n)| *n == 0), "written lines that cores share: {found:?}");
}

#[test]
fn operations_on_neighbouring_pages_share_no_written_line() {
    for cores in [1, 10, 40, 64] {
        all_zero(&conflicts(cores, |core| 64 * 1000 + core, Tables::Views));
    }
}

fn run_of_three<'a>(space: &Space<'a>, member: &mut Member<'a>, page: usize) {
    let home = Mapping { backing: Backing::Home { object: 1 }, rights: Protection::ReadWrite };
    let place = Place::FixedNoReplace(addr(page));
    space.map_and_admit(member, place, PageCount::new(3), &home).unwrap();
    space.unmap(member, range(page, 3)).unwrap();
}

/// What was mapped while one member alone worked in the node lies packed, and must not stay so.
#[test]
fn runs_of_a_node_to_which_a_second_member_came_share_no_written_line() {
    with(2, Tables::Views, |space, members| {
        let pages = [64 * 1000, 64 * 1000 + 3];
        for _ in 0..2 {
            run_of_three(space, &mut members[0], pages[0]);
        }
        // And then once each, in which slots get lines of their own.
        for _ in 0..2 {
            (0..2).for_each(|core| run_of_three(space, &mut members[core], pages[core]));
        }
        take();
        for core in [0, 1] {
            as_core(core as u32, || run_of_three(space, &mut members[core], pages[core]));
        }
        let found = shared_lines(&take());
        assert!(found.is_empty(), "written lines that cores share: {found:?}");
    });
}

/// Who maps a page by itself meets nobody there, however near: what else the block may hold is not touched.
#[test]
fn faults_on_home_pages_of_one_block_with_holes_between_share_no_written_line() {
    const CORES: usize = <ModelMmu as Mmu>::BLOCK_PAGES / 4;
    let home = Mapping { backing: Backing::Home { object: 1 }, rights: Protection::ReadWrite };
    let page_of = |core: usize| 64 * 1000 + core * 4;
    with(CORES, Tables::Views, |space, members| {
        for (core, m) in members.iter_mut().enumerate() {
            space.map(m, Place::Fixed(addr(page_of(core))), PageCount::new(2), &home).unwrap();
        }
        let mut fault = || {
            for (core, m) in members.iter_mut().enumerate() {
                as_core(core as u32, || {
                    let filled = space.fault(m, addr(page_of(core)), space_recorded::Access::Write).unwrap();
                    assert_eq!(filled.range, range(page_of(core), 2));
                });
            }
        };
        (0..2).for_each(|_| fault());
        take();
        fault();
        let found = shared_lines(&take());
        assert!(found.is_empty(), "written lines that cores share: {found:?}");
    });
}

/// A fault on a page that is home locks what it fills of the block, or the one record that stands for more: who wants to be alone there
/// keeps to blocks of its own, and maps them by itself.
#[test]
fn faults_on_home_pages_share_a_written_line_with_those_of_their_block_and_of_their_record_only() {
    const BLOCK: usize = <ModelMmu as Mmu>::BLOCK_PAGES;
    const CORES: usize = 64 / BLOCK;
    let home = Mapping { backing: Backing::Home { object: 1 }, rights: Protection::ReadWrite };
    let count = |pages_at_once: usize, page_of: fn(usize) -> usize| {
        let mut found = 0;
        with(CORES, Tables::Views, |space, members| {
            for first in (0..64).step_by(pages_at_once) {
                let place = Place::Fixed(addr(64 * 1000 + first));
                space.map(&mut members[first / BLOCK], place, PageCount::new(pages_at_once), &home).unwrap();
            }
            let mut fault = || {
                for (core, m) in members.iter_mut().enumerate() {
                    as_core(core as u32, || {
                        let at = addr(64 * 1000 + page_of(core));
                        let filled = space.fault(m, at, space_recorded::Access::Write).unwrap();
                        assert_eq!(filled.range.pages().get(), BLOCK);
                    });
                }
            };
            (0..2).for_each(|_| fault());
            take();
            fault();
            found = shared_lines(&take()).len();
        });
        found
    };
    for pages_at_once in [1, BLOCK] {
        assert_eq!(count(pages_at_once, |core| core * BLOCK + 5), 0, "blocks of their own");
        assert!(count(pages_at_once, |core| BLOCK + core) >= BLOCK, "the locks of one block");
    }
    // One slot stands for all 64 pages, and whoever fills a part of them locks it.
    assert!((1..4).contains(&count(64, |core| core * BLOCK + 5)), "one lock");
}

#[test]
fn operations_far_apart_share_no_written_line_on_eighty_cores() {
    for cores in [10, 80] {
        all_zero(&conflicts(cores, |core| (core + 1) << 20, Tables::Views));
    }
}

#[test]
fn one_table_for_all_shares_lines_and_the_count_shows_it() {
    let found = conflicts(10, |core| 64 * 1000 + core, Tables::Shared);
    let fault = found.iter().find(|(name, _)| *name == "fault").unwrap();
    assert!(fault.1 > 0, "neighbouring entries of one table lie in one line: {found:?}");
}

#[test]
fn a_planted_common_counter_is_caught() {
    let common = 0u64;
    for core in 0..2 {
        as_core(core, || note(&raw const common, true));
    }
    let found = shared_lines(&take());
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].writers.as_slice(), found[0].cores.as_slice()), (&[0, 1][..], &[0, 1][..]));
    let reads: Vec<Access> = (0..2).map(|core| Access { core, addr: 64, write: false }).collect();
    assert!(shared_lines(&reads).is_empty(), "readers don't make each other wait");
}

/// Operations of the commuter, on two neighbouring pages. Pairs that commute must share no written line if their pages are disjoint, if one
/// of them hits its own view, and if both only ask; others on one page take its lock, by design.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Op {
    Map(usize, usize, Protection, bool),
    Unmap(usize, usize),
    Protect(usize, usize, Protection),
    Load(usize),
    Store(usize),
    Query(usize),
}

impl Op {
    const fn pages(self) -> (usize, usize) {
        match self {
            Self::Map(p, n, ..) | Self::Unmap(p, n) | Self::Protect(p, n, _) => (p, p + n),
            Self::Load(p) | Self::Store(p) | Self::Query(p) => (p, p + 1),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Out {
    Done,
    Failed,
    Word(u64),
    Rights(Option<Protection>),
}

type Naive = [Option<(Protection, u64)>; 2];

fn naive(state: &mut Naive, op: Op, core: u64) -> Out {
    match op {
        Op::Map(p, n, r, replace) => {
            if !replace && state[p..p + n].iter().any(Option::is_some) {
                return Out::Failed;
            }
            state[p..p + n].fill(Some((r, 0)));
            Out::Done
        }
        Op::Unmap(p, n) => {
            state[p..p + n].fill(None);
            Out::Done
        }
        Op::Protect(p, n, r) => {
            if state[p..p + n].iter().any(Option::is_none) {
                return Out::Failed;
            }
            state[p..p + n].iter_mut().flatten().for_each(|page| page.0 = r);
            Out::Done
        }
        Op::Load(p) => match state[p] {
            Some((r, w)) if r >= Protection::Read => Out::Word(w),
            _ => Out::Failed,
        },
        Op::Store(p) => match &mut state[p] {
            Some((Protection::ReadWrite, w)) => Out::Word(std::mem::replace(w, core + 1)),
            _ => Out::Failed,
        },
        Op::Query(p) => Out::Rights(state[p].map(|page| page.0)),
    }
}

/// What a core certainly has in view: rights by page and core. A core may have more, for a fault fills as much as the record allows.
type Seen = [[Protection; 2]; 2];

fn see(seen: &mut Seen, op: Op, core: usize, out: Out) {
    let (first, end) = op.pages();
    for views in &mut seen[first..end] {
        match (op, out) {
            (_, Out::Failed) | (Op::Query(_), _) => {}
            (Op::Map(..) | Op::Unmap(..), _) => *views = [Protection::None; 2],
            (Op::Protect(_, _, rights), _) => *views = views.map(|view| view.min(rights)),
            (Op::Load(_), _) => views[core] = views[core].max(Protection::Read),
            (Op::Store(_), _) => views[core] = Protection::ReadWrite,
        }
    }
}

/// Whether the access needs no fault.
fn hits(seen: &Seen, op: Op, core: usize) -> bool {
    match op {
        Op::Load(p) => seen[p][core] >= Protection::Read,
        Op::Store(p) => seen[p][core] == Protection::ReadWrite,
        _ => false,
    }
}

fn real<'a>(space: &Space<'a>, m: &mut Member<'a>, op: Op) -> Out {
    let base = 64 * 500 + 8;
    let core = m.id().index() as u64;
    match op {
        Op::Map(p, n, rights, replace) => {
            let at = addr(base + p);
            let place = if replace { Place::Fixed(at) } else { Place::FixedNoReplace(at) };
            let mapping = Mapping { rights, ..ANONYMOUS };
            space.map(m, place, PageCount::new(n), &mapping).map_or(Out::Failed, |_| Out::Done)
        }
        Op::Unmap(p, n) => space.unmap(m, range(base + p, n)).map(|()| Out::Done).unwrap(),
        Op::Protect(p, n, r) => space.protect(m, range(base + p, n), r).map_or(Out::Failed, |()| Out::Done),
        Op::Load(p) => space.load(m, addr(base + p)).map_or(Out::Failed, Out::Word),
        Op::Store(p) => space.store(m, addr(base + p), core + 1).map_or(Out::Failed, Out::Word),
        Op::Query(p) => Out::Rights(space.query(m, addr(base + p)).map(|e| e.rights)),
    }
}

const RIGHTS: [Protection; 3] = [Protection::None, Protection::Read, Protection::ReadWrite];

fn operations() -> Vec<Op> {
    let mut all = Vec::new();
    for (p, n) in [(0, 1), (1, 1), (0, 2)] {
        all.extend([Op::Map(p, n, Protection::ReadWrite, true), Op::Map(p, n, Protection::Read, false)]);
        all.push(Op::Map(p, n, Protection::None, true));
        all.push(Op::Unmap(p, n));
        all.extend(RIGHTS.map(|rights| Op::Protect(p, n, rights)));
    }
    (0..2).for_each(|p| all.extend([Op::Load(p), Op::Store(p), Op::Query(p)]));
    all
}

type OnPage = fn(usize) -> Op;

/// How a page can be before the pair: what was done to it, and by which core.
const BEFORE: &[&[(usize, OnPage)]] = &[
    &[],
    &[(0, |p| Op::Map(p, 1, Protection::ReadWrite, true))],
    &[(0, |p| Op::Map(p, 1, Protection::ReadWrite, true)), (0, Op::Store)],
    &[(0, |p| Op::Map(p, 1, Protection::ReadWrite, true)), (1, Op::Store)],
    &[(1, |p| Op::Map(p, 1, Protection::Read, true)), (0, Op::Load)],
];

#[test]
fn every_commuting_pair_that_can_shares_no_written_line() {
    let (mut disjoint, mut overlapping, mut sharing, mut free) = (0, 0, 0, 0);
    let ops = operations();
    for before in BEFORE.iter().flat_map(|a| BEFORE.iter().map(move |b| [a, b])) {
        with(2, Tables::Views, |space, members| {
            // The node stays: a page beside the two is mapped, and all three have been used before.
            for page in 0..3 {
                let at = Place::Fixed(addr(64 * 500 + 8 + page));
                space.map(&mut members[0], at, PageCount::new(1), &ANONYMOUS).unwrap();
                for m in members.iter_mut() {
                    space.store(m, addr(64 * 500 + 8 + page), 0).unwrap();
                }
            }
            for (first, second) in ops.iter().flat_map(|a| ops.iter().map(move |b| (*a, *b))) {
                let (mut start, mut seen): (Naive, Seen) = ([None; 2], [[Protection::None; 2]; 2]);
                for (page, steps) in before.iter().enumerate() {
                    for (core, op) in steps.iter() {
                        let out = naive(&mut start, op(page), *core as u64);
                        see(&mut seen, op(page), *core, out);
                    }
                }
                let (mut one, mut two) = (start, start);
                let outs = (naive(&mut one, first, 0), naive(&mut one, second, 1));
                let (b, a) = (naive(&mut two, second, 1), naive(&mut two, first, 0));
                if (a, b) != outs || one != two {
                    continue;
                }
                let mut seen_by_second = seen;
                see(&mut seen_by_second, first, 0, outs.0);
                members.iter_mut().for_each(|m| ok(m.tick(space.frames())));
                real(space, &mut members[0], Op::Unmap(0, 2));
                for (page, steps) in before.iter().enumerate() {
                    steps.iter().for_each(|(core, op)| ok(real(space, &mut members[*core], op(page))));
                }
                take();
                let [x, y] = &mut members[..2] else { unreachable!("two members") };
                let found = (as_core(0, || real(space, x, first)), as_core(1, || real(space, y, second)));
                assert_eq!(found, outs, "{first:?} and {second:?} after {start:?}");
                let shared = shared_lines(&take());
                let ((a, b), (c, d)) = (first.pages(), second.pages());
                if b <= c || d <= a {
                    disjoint += 1;
                    assert!(shared.is_empty(), "{first:?} and {second:?} after {start:?} share {shared:x?}");
                } else {
                    overlapping += 1;
                    sharing += usize::from(!shared.is_empty());
                    // A hit in one's own view is nobody else's business, and questions are in nobody's way.
                    let questions = matches!((first, second), (Op::Query(_), Op::Query(_)));
                    if questions || hits(&seen, first, 0) || hits(&seen_by_second, second, 1) {
                        free += 1;
                        assert!(
                            shared.is_empty(),
                            "{first:?} and {second:?} after {start:?} share {shared:x?}"
                        );
                    }
                }
            }
        });
    }
    println!(
        "commuting pairs: {disjoint} on disjoint pages, none shares a written line; {overlapping} on the same pages: \
         {free} that hit their view or only ask share none, {sharing} do (they lock the page)"
    );
    assert!(disjoint > 3000 && free > 300);
}
