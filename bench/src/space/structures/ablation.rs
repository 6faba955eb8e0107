//! The paper's ablations in shape (item 3). Two processors can't show eighty: times are of what there is, counts of simulated cores.

use super::plain::counters::{Cached, Counter, Sharded, Shared, Snzi};
use super::plain::scene::{ANONYMOUS, addr, arena, arena_of, nodes_for, open, range, sizes};
use super::plain::space::model::{Delivery, ModelMmu, Tables};
use super::plain::space::{Member, PageCount, Place, Sizes};
use crate::measure::{Options, Rng, Samples};
use crate::report::Report;
use peregrine_base::sync::{AtomicBool, AtomicI64, Ordering};
use std::collections::BTreeMap;
use std::sync::{Barrier, RwLock};
use std::time::Instant;

pub fn run(report: &mut Report, options: &Options) {
    counters(report, options);
    lookups(report, options);
    tables(report);
}

const TURNS: usize = 200_000;

/// Million references taken and dropped a second, by all threads together.
fn rate(counter: &dyn Counter, threads: usize, upkeep: &(dyn Fn(usize) + Sync)) -> f64 {
    let barrier = Barrier::new(threads);
    // From the first one's begin to the last one's end, by their own clocks: whoever only watched would have to be scheduled for it.
    let spans: Vec<(Instant, Instant)> = std::thread::scope(|scope| {
        let work = |core: usize| {
            let barrier = &barrier;
            move || {
                barrier.wait();
                let begun = Instant::now();
                for turn in 0..TURNS {
                    counter.take_and_drop(core);
                    // About every 10 ms, as the paper's cores do.
                    if turn % 100_000 == 0 {
                        upkeep(core);
                    }
                }
                (begun, Instant::now())
            }
        };
        let workers: Vec<_> = (0..threads).map(|core| scope.spawn(work(core))).collect();
        workers.into_iter().map(|worker| worker.join().expect("it only counts")).collect()
    });
    let begun = spans.iter().map(|(begun, _)| *begun).min().expect("a thread");
    let ended = spans.iter().map(|(_, ended)| *ended).max().expect("a thread");
    let seconds = (ended - begun).as_secs_f64();
    (threads * TURNS) as f64 / seconds / 1e6
}

fn counters(report: &mut Report, options: &Options) {
    report.section("Ablation: counting references to one page (million taken and dropped a second)");
    let nothing = |_: usize| {};
    for threads in [1, 2] {
        let cached = Cached::new(threads);
        let (snzi, sharded) = (Snzi::new(threads), Sharded::new(threads));
        let shared = Shared(AtomicI64::new(1));
        let tick = |core: usize| cached.tick(core);
        let baselines: [(&str, &dyn Counter); 3] =
            [("shared atomic", &shared), ("SNZI", &snzi), ("a count a core", &sharded)];
        for (name, baseline) in baselines {
            let pair = crate::measure::versus(
                options.rounds(15),
                || rate(&cached, threads, &tick),
                || rate(baseline, threads, &nothing),
            );
            let case = format!("ablation: Refcache, {threads} threads");
            report.pair(&case, "references", "M/s", name, threads * TURNS, &pair);
        }
    }
}

const REGIONS: usize = 1000;

/// Lookups a second of the reader's own processor time, with this many threads that insert and remove beside it.
fn lookup_rate(
    writers: usize,
    look: &mut dyn FnMut(usize),
    write: &(dyn Fn(usize, &AtomicBool) + Sync),
) -> f64 {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for writer in 0..writers {
            let stop = &stop;
            scope.spawn(move || write(writer, stop));
        }
        let mut rng = Rng(7);
        let begun = peregrine_sys::timer::thread_cpu_ns();
        for _ in 0..TURNS {
            look(rng.next_u64() as usize % REGIONS);
        }
        let ns = peregrine_sys::timer::thread_cpu_ns() - begun;
        stop.store(true, Ordering::Relaxed);
        TURNS as f64 / ns as f64 * 1e3
    })
}

fn lookups(report: &mut Report, options: &Options) {
    report.section("Ablation: lookups among 1000 regions beside writers (million a second of the reader's processor time)");
    let page_of = |region: usize| (region + 1) << 10;
    for writers in [0, 1, 10, 40] {
        // A node for each region, one above for every fourth, and as many for what is inserted between them: a writer's nodes
        // come back two epochs after it left them, and threads that share a processor are slow to go through epochs.
        let nodes = nodes_for(writers + 1) + 4 * REGIONS + writers * 1024;
        let (ours, frames) = arena_of(&Sizes { nodes, ..sizes(writers + 1, 64) });
        let mmu = ModelMmu::new(&frames, writers + 1, Tables::Views, Delivery::Interrupt);
        let (space, mut members) = open(&ours, &mmu, &frames, writers + 1);
        for region in 0..REGIONS {
            let at = Place::Fixed(addr(page_of(region)));
            space.map(&mut members[0], at, PageCount::new(1), &ANONYMOUS).expect("room");
        }
        let (reader, others) = members.split_at_mut(1);
        let others: Vec<std::sync::Mutex<&mut Member<'_>>> =
            others.iter_mut().map(std::sync::Mutex::new).collect();
        let write_ours = |writer: usize, stop: &AtomicBool| {
            let mut m = others[writer].lock().expect("its own");
            let mut turn = 0;
            while !stop.load(Ordering::Relaxed) {
                // Its own keys, between the regions: the paper's writers insert and delete.
                let page = page_of(turn * 7 % REGIONS) + 64 * (1 + writer % 14);
                space.map(&mut m, Place::Fixed(addr(page)), PageCount::new(1), &ANONYMOUS).expect("room");
                space.unmap(&mut m, range(page, 1)).expect("a range");
                turn += 1;
                if turn % 64 == 0 {
                    m.tick(&frames);
                }
            }
            m.idle();
        };
        let list = crossbeam_skiplist::SkipMap::new();
        let tree = RwLock::new(BTreeMap::new());
        for region in 0..REGIONS {
            list.insert(page_of(region), region);
            tree.write().expect("nobody panics").insert(page_of(region), region);
        }
        let write_list = |writer: usize, stop: &AtomicBool| {
            let mut turn = 0;
            while !stop.load(Ordering::Relaxed) {
                let page = page_of(turn * 7 % REGIONS) + 64 * (1 + writer % 14);
                list.insert(page, writer);
                list.remove(&page);
                turn += 1;
            }
        };
        let write_tree = |writer: usize, stop: &AtomicBool| {
            let mut turn = 0;
            while !stop.load(Ordering::Relaxed) {
                let page = page_of(turn * 7 % REGIONS) + 64 * (1 + writer % 14);
                tree.write().expect("nobody panics").insert(page, writer);
                tree.write().expect("nobody panics").remove(&page);
                turn += 1;
            }
        };
        let rounds = options.rounds(15);
        let (mut radix, mut skip, mut locked) = (Samples::default(), Samples::default(), Samples::default());
        let reader = &mut reader[0];
        for _ in 0..rounds {
            let mut look = |region: usize| assert!(space.query(reader, addr(page_of(region))).is_some());
            radix.push(lookup_rate(writers, &mut look, &write_ours));
            let mut look = |region: usize| assert!(list.get(&page_of(region)).is_some());
            skip.push(lookup_rate(writers, &mut look, &write_list));
            let mut look =
                |region: usize| assert!(tree.read().expect("nobody panics").contains_key(&page_of(region)));
            locked.push(lookup_rate(writers, &mut look, &write_tree));
        }
        for (name, baseline) in [("crossbeam skip list", &skip), ("RwLock<BTreeMap>", &locked)] {
            let pair = crate::measure::Pair::of(&radix, baseline);
            let case = format!("ablation: radix lookup, {writers} writers");
            report.pair(&case, "lookups", "M/s", name, TURNS, &pair);
        }
    }
    report.note("two processors: with more than one writer the reader's caches are cold after each turn of the others");
}

/// Shootdowns and table pages of the paper's three programs on simulated cores.
fn tables(report: &mut Report) {
    report.section("Ablation: page tables on simulated cores (baseline: one shared table)");
    const PAGES: usize = 16;
    let hybrid = Tables::Hybrid { share_at: 4, private_limit: 64 };
    for cores in [1, 10, 40, 80] {
        let run = |tables: Tables| {
            let (arena, frames) = arena(cores, cores * 64);
            let mmu = ModelMmu::new(&frames, cores, tables, Delivery::Interrupt);
            let (space, mut members) = open(&arena, &mmu, &frames, cores);
            let mut shot = Vec::new();
            let mut before = 0;
            let mut note = |mmu: &ModelMmu, operations: usize| {
                let now = mmu.counts().shootdowns;
                shot.push((now - before) as f64 / operations as f64);
                before = now;
            };
            // global: each maps 64 KiB of one region, all touch all of it, each unmaps its part. First, for its tables are the floor.
            let region = 1 << 24;
            for (core, m) in members.iter_mut().enumerate() {
                let at = Place::Fixed(addr(region + core * PAGES));
                space.map(m, at, PageCount::new(PAGES), &ANONYMOUS).expect("room");
            }
            for m in &mut members {
                (0..cores * PAGES).for_each(|p| {
                    space.store(m, addr(region + p), 1).expect("a frame");
                });
            }
            let most = mmu.counts().most_table_pages;
            for (core, m) in members.iter_mut().enumerate() {
                space.unmap(m, range(region + core * PAGES, PAGES)).expect("a range");
            }
            note(&mmu, cores);
            // local: each maps, touches and unmaps a page of its own, 4 GiB from the next one.
            for (core, m) in members.iter_mut().enumerate() {
                let page = (core + 100) << 20;
                space.map(m, Place::Fixed(addr(page)), PageCount::new(1), &ANONYMOUS).expect("room");
                space.store(m, addr(page), 1).expect("a frame");
                space.unmap(m, range(page, 1)).expect("a range");
            }
            note(&mmu, cores);
            // pipeline: each maps and touches a page, the next one touches and unmaps it.
            for core in 0..cores {
                let page = (core + 300) << 20;
                let m = &mut members[core];
                space.map(m, Place::Fixed(addr(page)), PageCount::new(1), &ANONYMOUS).expect("room");
                space.store(m, addr(page), 1).expect("a frame");
                let next = &mut members[(core + 1) % cores];
                space.load(next, addr(page)).expect("mapped");
                space.unmap(next, range(page, 1)).expect("a range");
            }
            note(&mmu, cores);
            (shot, most)
        };
        let (shared, shared_pages) = run(Tables::Shared);
        for (name, tables) in [("views", Tables::Views), ("hybrid", hybrid)] {
            let (shot, pages) = run(tables);
            for (i, program) in ["global", "local", "pipeline"].iter().enumerate() {
                report.value(
                    &format!("ablation, {name}: {program}, {cores} cores"),
                    "shootdowns",
                    "/op",
                    shot[i],
                    Some(("shared table", shared[i])),
                );
            }
            report.value(
                &format!("ablation, {name}: global, {cores} cores"),
                "table pages",
                "",
                pages as f64,
                Some(("shared table", shared_pages as f64)),
            );
        }
    }
    report.note("the paper's per-core tables grew 45-fold from 1 to 80 cores; the rows `table pages` are that growth here");
}
