//! Shared regions: found by name on every node, and taken back with the threads that wrote them.

use peregrine::region::{self, RegionError};
use peregrine::{Builder, channel, node_count, sleep, spawn, yield_now};
use std::time::{Duration, Instant};

const CELLS: usize = 1000;

/// Adds one to random cells, again and again, here and there.
fn adds((me, rounds): (u32, u64)) -> u64 {
    let region = region::open("tally").unwrap();
    let cells = region.cells::<u64>();
    let mut seed = u64::from(me) + 1;
    for round in 0..rounds {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        cells.add((seed >> 33) as usize % CELLS, 1).unwrap();
        match round % 400 {
            0 => yield_now(),
            100 => sleep(Duration::from_micros(200)),
            200 if me % 2 == 0 => peregrine::migrate_to((me + round as u32) % node_count()).unwrap(),
            _ => {}
        }
    }
    rounds
}

/// All additions of all threads, each once: what a death undid in the region it undid in the thread, too.
fn counts_exactly(threads: u32, rounds: u64) {
    let tally = region::create("tally", CELLS * 8).unwrap();
    let handles: Vec<_> = (0..threads)
        .map(|me| Builder::new().node(me % node_count()).spawn(adds, (me, rounds)).unwrap())
        .collect();
    let added: u64 = handles.into_iter().map(|h| h.join().unwrap()).sum();
    let cells = tally.cells::<u64>();
    let counted: u64 = (0..CELLS).map(|i| cells.get(i).unwrap()).sum();
    assert_eq!(counted, added);
    assert_eq!(added, u64::from(threads) * rounds);
    drop(tally);
    region::remove("tally").unwrap();
}

#[peregrine::test(nodes = 3, move_every_ms = 1)]
fn additions_of_threads_on_several_nodes_are_all_counted() {
    counts_exactly(6, 20_000);
}

#[peregrine::test(nodes = 3, kill_every_ms = 15, move_every_ms = 2, least_kills = 5, timeout_s = 300)]
fn additions_are_counted_once_while_nodes_are_killed() {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1500) {
        counts_exactly(4, 20_000);
    }
}

#[peregrine::test(nodes = 2)]
fn a_region_is_found_by_name_and_starts_with_zeros() {
    let region = region::create("matrix", 10_000).unwrap();
    assert!((0..1250).all(|i| region.cells::<u64>().get(i) == Ok(0)));
    region.cells::<f64>().set(1249, 2.5).unwrap();
    region.write(1, b"bytes, wherever").unwrap();
    let there = Builder::new()
        .node(1)
        .spawn(
            |_: ()| {
                let region = region::open("matrix").unwrap();
                let mut bytes = [0; 5];
                region.read(1, &mut bytes).unwrap();
                (region.len_bytes(), region.cells::<f64>().get(1249).unwrap(), bytes.to_vec())
            },
            (),
        )
        .unwrap();
    assert_eq!(there.join().unwrap(), (10_000, 2.5, b"bytes".to_vec()));
    assert!(region.cells::<u64>().get(1250).is_err(), "beyond the region, though inside its last page");
    assert!(region.write(9_999, b"ab").is_err());
    assert_eq!(region.cells::<u32>().compare_exchange(500, 0, 7), Ok(Ok(0)));
    assert_eq!(region.cells::<u32>().compare_exchange(500, 0, 8), Ok(Err(7)));
    assert_eq!(region.cells::<i16>().add(2000, -3), Ok(0));
    assert_eq!(region.cells::<i16>().get(2000), Ok(-3));
    let halves = region.cells::<u16>();
    halves.write(4990, &[5, 6, 7]).unwrap();
    let mut back = [0; 4];
    halves.read(4989, &mut back).unwrap();
    assert_eq!(back, [0, 5, 6, 7]);
    assert!(halves.write(4998, &[8, 9, 10]).is_err(), "one too many");
    assert!(halves.read(usize::MAX, &mut back).is_err());
    assert_eq!(halves.get(4998), Ok(0), "nothing of what has no room");
    halves.write(5000, &[]).unwrap();
}

/// What the word at `i` of the region numbered `which` holds.
const fn word(which: u64, i: usize) -> u64 {
    (which << 32) + i as u64 + 1
}

#[peregrine::test(nodes = 2)]
fn each_name_is_memory_of_its_own() {
    // As long as a name can be, and alike but for the last byte; lengths around the end of a page.
    let name = |which: usize| format!("{}{which}", "n".repeat(47));
    let words = |which: usize| 511 + which;
    let regions: Vec<_> = (0..4).map(|n| region::create(&name(n), words(n) * 8).unwrap()).collect();
    for (which, region) in regions.iter().enumerate() {
        let cells = region.cells::<u64>();
        (0..cells.len()).for_each(|i| cells.set(i, word(which as u64, i)).unwrap());
    }
    let reads = |_: ()| {
        let regions = (0..4).map(|n| region::open(&format!("{}{n}", "n".repeat(47))).unwrap());
        regions.map(|r| (0..r.cells::<u64>().len()).map(|i| r.cells().get(i).unwrap()).collect()).collect()
    };
    let there: Vec<Vec<u64>> = Builder::new().node(1).spawn(reads, ()).unwrap().join().unwrap();
    for (which, seen) in there.iter().enumerate() {
        let written: Vec<u64> = (0..words(which)).map(|i| word(which as u64, i)).collect();
        assert!(*seen == written, "what region {which} holds is another's");
    }
    drop(regions);
    (0..4).for_each(|n| region::remove(&name(n)).unwrap());
}

/// Makes a region, has it written and read on other nodes, and removes it, again and again.
fn comes_and_goes((me, rounds): (u64, u64)) -> u64 {
    let name = format!("of {me}");
    for round in 0..rounds {
        let pages = 1 + (me + round) as usize % 5;
        let made = region::create(&name, pages * 4096).unwrap();
        let cells = made.cells::<u64>();
        for i in (0..cells.len()).step_by(64) {
            assert_eq!(cells.get(i), Ok(0), "thread {me}, round {round}, word {i}");
            cells.set(i, word(me, i)).unwrap();
        }
        peregrine::migrate_to((me + round) as u32 % node_count()).unwrap();
        let found = region::open(&name).unwrap();
        for i in (0..cells.len()).step_by(64) {
            assert_eq!(found.cells().get(i), Ok(word(me, i)), "thread {me}, round {round}, word {i}");
        }
        drop((made, found));
        region::remove(&name).unwrap();
    }
    rounds
}

/// A death takes names, contents and the records of their pages back together: what was made since is free again.
#[peregrine::test(nodes = 3, kill_every_ms = 15, least_kills = 5, timeout_s = 300)]
fn names_come_and_go_while_nodes_are_killed() {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1500) {
        let threads: Vec<_> = (0..4u64).map(|me| spawn(comes_and_goes, (me, 50))).collect();
        threads.into_iter().for_each(|t| assert_eq!(t.join().unwrap(), 50));
    }
}

#[peregrine::test(nodes = 2)]
fn errors_say_what_is_wrong_with_numbers() {
    let first = region::create("one", 100).unwrap();
    assert_eq!(
        region::create("one", 5).err(),
        Some(RegionError::Exists { name: "one".into(), len_bytes: 100 })
    );
    assert!(matches!(region::open("two"), Err(RegionError::NotFound { .. })));
    assert!(matches!(region::open_or_create("one", 7), Err(RegionError::Size { len_bytes: 100, .. })));
    assert!(matches!(region::create("none", 0), Err(RegionError::Empty { .. })));
    let second = first.clone();
    assert!(matches!(region::remove("one"), Err(RegionError::InUse { handles: 2, .. })));
    drop((first, second));
    region::remove("one").unwrap();
    assert!(matches!(region::open("one"), Err(RegionError::NotFound { .. })));
}

#[peregrine::test(nodes = 2)]
fn memory_is_zeroed_between_owners() {
    for round in 0..20u64 {
        let region = region::create("again", 64 << 10).unwrap();
        let cells = region.cells::<u64>();
        assert!((0..cells.len()).all(|i| cells.get(i) == Ok(0)), "round {round}");
        (0..cells.len()).for_each(|i| cells.set(i, round + 1).unwrap());
        drop(region);
        region::remove("again").unwrap();
    }
}

#[peregrine::test(nodes = 3, kill_every_ms = 20, least_kills = 3, timeout_s = 300)]
fn what_a_message_tells_of_a_region_is_there_when_it_comes() {
    let begun = Instant::now();
    let region = region::create("letters", 4096).unwrap();
    while begun.elapsed() < Duration::from_millis(800) {
        let (tx, rx) = channel::<u64>();
        let writer = spawn(
            |tx: peregrine::Sender<u64>| {
                let region = region::open("letters").unwrap();
                for n in 1..=300u64 {
                    region.cells::<u64>().set(n as usize % 512, n).unwrap();
                    tx.send(&n).unwrap();
                    if n % 16 == 0 {
                        yield_now();
                    }
                }
            },
            tx,
        );
        let mut last = 0;
        while let Ok(n) = rx.recv() {
            assert_eq!(n, last + 1);
            last = n;
            // The writer may be ahead, never behind.
            assert!(region.cells::<u64>().get(n as usize % 512).unwrap() >= n);
        }
        assert_eq!(last, 300);
        writer.join().unwrap();
        (0..512).for_each(|i| region.cells::<u64>().set(i, 0).unwrap());
    }
    drop(region);
    region::remove("letters").unwrap();
}
