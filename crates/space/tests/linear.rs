//! Random histories of several members at once, each checked for linearizability.
//!
//! Every member is a thread that runs a short random program on a few pages and notes when each operation began, when it returned, and
//! what it returned. A search then looks for one order of all operations that agrees with real time and in which a naive
//! map would have returned the same. At every step of the real operations the thread may let another go first, so that a few
//! thousand short histories meet many interleavings. Loads and stores go through stale-prone TLBs, shootdowns wait until
//! the other member polls.

use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_space::model::{Delivery, HeapArena, ModelFrames, ModelMmu, Planted, Tables};
use peregrine_space::{
    AddressSpace, Backing, FaultError, Mapping, Member, PAGE_SIZE, PageCount, PageRange, Place, Protection,
    Sizes, Step, VirtAddr,
};
use std::cell::Cell;
use std::collections::HashSet;
use std::sync::Barrier;
use testkit::Rng;

const MEMBERS: usize = 3;
/// Pages 62..66 lie on both sides of a node's border.
const FIRST: usize = 62;
const PAGES: usize = 4;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Op {
    Map(usize, usize, Protection, bool),
    Unmap(usize, usize),
    Protect(usize, usize, Protection),
    Load(usize),
    Store(usize, u64),
    Query(usize),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Out {
    Done,
    Failed,
    Word(u64),
    Rights(Option<Protection>),
}

#[derive(Clone, Copy, Debug)]
struct Event {
    op: Op,
    out: Out,
    began: u64,
    ended: u64,
}

/// What is mapped, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum How {
    /// Frames of zeros.
    Anonymous,
    /// Frames at home, opened by `map_and_admit`: what was written to a page is there when it is mapped again.
    Home,
}

/// The naive map: rights and word of each page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
struct Naive {
    rights: [Option<Protection>; PAGES],
    words: [u64; PAGES],
}

fn apply(state: &mut Naive, op: Op, how: How) -> Out {
    match op {
        Op::Map(p, n, rights, replace) => {
            if !replace && state.rights[p..p + n].iter().any(Option::is_some) {
                return Out::Failed;
            }
            state.rights[p..p + n].fill(Some(rights));
            if how == How::Anonymous {
                state.words[p..p + n].fill(0);
            }
            Out::Done
        }
        Op::Unmap(p, n) => {
            state.rights[p..p + n].fill(None);
            Out::Done
        }
        Op::Protect(p, n, rights) => {
            if state.rights[p..p + n].iter().any(Option::is_none) {
                return Out::Failed;
            }
            state.rights[p..p + n].fill(Some(rights));
            Out::Done
        }
        Op::Load(p) => match state.rights[p] {
            Some(rights) if rights >= Protection::Read => Out::Word(state.words[p]),
            _ => Out::Failed,
        },
        Op::Store(p, v) => match state.rights[p] {
            Some(Protection::ReadWrite) => Out::Word(std::mem::replace(&mut state.words[p], v)),
            _ => Out::Failed,
        },
        Op::Query(p) => Out::Rights(state.rights[p]),
    }
}

/// Wing and Gong's search, with Lowe's memory of what was tried.
fn is_linearizable(history: &[Event], how: How) -> bool {
    fn search(
        history: &[Event],
        how: How,
        done: u32,
        state: Naive,
        tried: &mut HashSet<(u32, Naive)>,
    ) -> bool {
        if done.count_ones() as usize == history.len() {
            return true;
        }
        if !tried.insert((done, state)) {
            return false;
        }
        let open = |i: &usize| done & 1 << i == 0;
        // An operation may come next unless another one ended before it began.
        let first_end = (0..history.len()).filter(open).map(|i| history[i].ended).min().expect("one is open");
        (0..history.len()).filter(open).filter(|i| history[*i].began <= first_end).any(|i| {
            let mut next = state;
            apply(&mut next, history[i].op, how) == history[i].out
                && search(history, how, done | 1 << i, next, tried)
        })
    }
    assert!(history.len() <= 32);
    search(history, how, 0, Naive::default(), &mut HashSet::new())
}

fn random_op(rng: &mut Rng, next_word: &mut u64) -> Op {
    let rights = [Protection::None, Protection::Read, Protection::ReadWrite, Protection::ReadWrite];
    let p = rng.below(PAGES);
    let n = 1 + rng.below(PAGES - p);
    match rng.below(9) {
        0 | 1 => Op::Map(p, n, rights[1 + rng.below(3)], rng.below(2) == 0),
        2 => Op::Unmap(p, n),
        3 => Op::Protect(p, n, rights[rng.below(4)]),
        4 | 5 => Op::Load(p),
        6 | 7 => {
            *next_word += 1;
            Op::Store(p, *next_word)
        }
        _ => Op::Query(p),
    }
}

fn addr(page: usize) -> VirtAddr {
    VirtAddr::new((FIRST + page) * PAGE_SIZE)
}

type Space<'a> = AddressSpace<'a, &'a ModelMmu, &'a ModelFrames>;

fn run<'a>(space: &Space<'a>, member: &mut Member<'a>, op: Op, how: How) -> Out {
    let range = |p: usize, n: usize| PageRange::new(addr(p), PageCount::new(n));
    let word = |result: Result<u64, FaultError<std::convert::Infallible>>| match result {
        Ok(word) => Out::Word(word),
        Err(FaultError::Unmapped(_) | FaultError::Denied { .. }) => Out::Failed,
        Err(other) => panic!("{other}"),
    };
    match op {
        Op::Map(p, n, rights, replace) => {
            let at = if replace { Place::Fixed(addr(p)) } else { Place::FixedNoReplace(addr(p)) };
            let done = if how == How::Home {
                let mapping = Mapping { backing: Backing::Home { object: 0 }, rights };
                space.map_and_admit(member, at, PageCount::new(n), &mapping).is_ok()
            } else {
                let mapping = Mapping { backing: Backing::Anonymous, rights };
                space.map(member, at, PageCount::new(n), &mapping).is_ok()
            };
            if done { Out::Done } else { Out::Failed }
        }
        Op::Unmap(p, n) => space.unmap(member, range(p, n)).map(|()| Out::Done).unwrap(),
        Op::Protect(p, n, rights) => {
            space.protect(member, range(p, n), rights).map_or(Out::Failed, |()| Out::Done)
        }
        Op::Load(p) => word(space.load(member, addr(p))),
        Op::Store(p, v) => word(space.store(member, addr(p), v)),
        Op::Query(p) => Out::Rights(space.query(member, addr(p)).map(|e| e.rights)),
    }
}

thread_local! {
    static CHANCE: Cell<u64> = const { Cell::new(0) };
}

/// At one step in four, another thread goes first.
fn maybe_yield(_: Step) {
    CHANCE.with(|c| {
        let mut rng = Rng::new(c.get());
        let n = rng.next_u64();
        c.set(n);
        if n.is_multiple_of(4) {
            std::thread::yield_now();
        }
    });
}

fn histories(seed: u64, rounds: usize, tables: Tables, how: How) {
    if let Err(what) = try_histories(seed, rounds, tables, how, None) {
        panic!("{what}");
    }
}

/// Says which history no order explains, if there is one.
fn try_histories(
    seed: u64,
    rounds: usize,
    tables: Tables,
    how: How,
    planted: Option<Planted>,
) -> Result<(), String> {
    println!("seed {seed:#x}, {tables:?}, {how:?}, {planted:?}");
    let mut seeds = Rng::new(seed);
    let sizes = Sizes { members: MEMBERS, spaces: 1, nodes: 200, regions: 4, frames: 200 };
    let arena = HeapArena::new(&sizes);
    let frames = ModelFrames::new(MEMBERS, sizes.frames);
    let sound = ModelMmu::new(&frames, MEMBERS, tables, Delivery::Polled);
    let mmu = match planted {
        Some(fault) => sound.with_fault(fault),
        None => sound,
    };
    let spaces = arena.spaces();
    let mut members: Vec<Member<'_>> = (0..MEMBERS).map(|_| spaces.join().unwrap()).collect();
    let space = AddressSpace::create(&mut members[0], &mmu, &frames).unwrap();
    let clock = AtomicU64::new(0);
    for round in 0..rounds {
        let barrier = Barrier::new(MEMBERS);
        let per_member: Vec<Vec<Event>> = std::thread::scope(|scope| {
            let threads: Vec<_> = members
                .iter_mut()
                .map(|member| {
                    let seed = seeds.next_u64();
                    let (space, mmu, frames) = (&space, &mmu, &frames);
                    let (clock, barrier) = (&clock, &barrier);
                    scope.spawn(move || {
                        CHANCE.set(seed);
                        member.on_step(Some(maybe_yield));
                        let mut rng = Rng::new(seed);
                        let mut word = (round * 100 + member.id().index() * 10_000_000) as u64;
                        mmu.run(member.id(), true);
                        barrier.wait();
                        let mut events = Vec::new();
                        for _ in 0..6 {
                            let op = random_op(&mut rng, &mut word);
                            let began = clock.fetch_add(1, Ordering::SeqCst);
                            let out = run(space, member, op, how);
                            let ended = clock.fetch_add(1, Ordering::SeqCst);
                            events.push(Event { op, out, began, ended });
                            if rng.below(3) == 0 {
                                member.tick(frames);
                            }
                        }
                        mmu.run(member.id(), false);
                        events
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let history: Vec<Event> = per_member.into_iter().flatten().collect();
        if !is_linearizable(&history, how) {
            return Err(format!("seed {seed:#x}, round {round}: no order explains {history:#?}"));
        }
        let all = PageRange::new(addr(0), PageCount::new(PAGES));
        let someone = &mut members[round % MEMBERS];
        if how == How::Home {
            // The next round begins with zeros, too.
            run(&space, someone, Op::Map(0, PAGES, Protection::ReadWrite, true), how);
            mmu.run(someone.id(), true);
            (0..PAGES)
                .for_each(|p| assert!(matches!(run(&space, someone, Op::Store(p, 0), how), Out::Word(_))));
            mmu.run(someone.id(), false);
        }
        space.unmap(someone, all).unwrap();
    }
    for _ in 0..40 {
        members.iter_mut().for_each(|m| {
            m.tick(&frames);
        });
    }
    assert_eq!((spaces.nodes_in_use(), frames.in_use(), mmu.violations()), (1, 0, 0));
    Ok(())
}

fn seed() -> u64 {
    std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x5eed)
}

/// `ROUNDS=100000 SEED=1 cargo test --release …` for a long run.
fn rounds(usual: usize) -> usize {
    std::env::var("ROUNDS").ok().and_then(|s| s.parse().ok()).unwrap_or(usual)
}

#[test]
fn every_history_on_views_is_linearizable() {
    histories(seed(), rounds(800), Tables::Views, How::Anonymous);
}

#[test]
fn every_history_on_a_shared_table_is_linearizable() {
    histories(seed() + 1, rounds(400), Tables::Shared, How::Anonymous);
}

#[test]
fn every_history_on_hybrid_tables_is_linearizable() {
    histories(seed() + 2, rounds(400), Tables::Hybrid { share_at: 2, private_limit: 1 }, How::Anonymous);
}

#[test]
fn every_history_of_mappings_that_are_opened_as_they_are_made_is_linearizable() {
    for (n, tables) in [Tables::Views, Tables::Shared].into_iter().enumerate() {
        histories(seed() + 3 + n as u64, rounds(400), tables, How::Home);
    }
}

/// The histories must be able to tell: with hardware that does not do what it is asked, some history has no order.
fn is_found_out(planted: Planted, tables: Tables) {
    // Seeds one after the other: which history shows it depends on how the threads met.
    let found = (0..50).find_map(|n| try_histories(seed() + n, 400, tables, How::Home, Some(planted)).err());
    let what = found.expect("a history that no order explains");
    assert!(what.contains("no order explains"), "{what}");
}

#[test]
fn an_unmap_that_leaves_others_their_views_is_found_out() {
    for tables in [Tables::Views, Tables::Hybrid { share_at: 2, private_limit: 1 }] {
        is_found_out(Planted::LostDrops, tables);
    }
}

#[test]
fn a_protect_that_leaves_others_their_rights_is_found_out() {
    is_found_out(Planted::LostRestrictions, Tables::Views);
}

#[test]
fn the_search_refuses_a_history_that_no_order_explains() {
    let event = |op, out, began, ended| Event { op, out, began, ended };
    let mapped = event(Op::Map(0, 2, Protection::Read, true), Out::Done, 0, 9);
    // Page 0 was seen mapped, and later page 1 unmapped: but they are mapped at once.
    let torn = [
        mapped,
        event(Op::Query(0), Out::Rights(Some(Protection::Read)), 1, 2),
        event(Op::Query(1), Out::Rights(None), 3, 4),
    ];
    assert!(!is_linearizable(&torn, How::Anonymous));
    let fine = [mapped, event(Op::Query(1), Out::Rights(None), 1, 2), torn[1]];
    assert!(is_linearizable(&fine[..2], How::Anonymous));
}
