//! Storms of moves and kills: whatever a thread computes, it is what one process alone would have.

use peregrine::{checkpoint, migrate_to, node_count, node_id, sleep, spawn};
use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

static TABLE: LazyLock<Mutex<Vec<String>>> = LazyLock::new(|| Mutex::new(vec!["first".into()]));
thread_local! {
    static PLAIN: Cell<u64> = const { Cell::new(7) };
}

/// To the next node.
fn hop() {
    migrate_to((node_id() + 1) % node_count()).unwrap();
}

/// A bit of everything, with a checksum that one process alone would give.
fn everything(seed: u64, pause: impl Fn(u64)) -> u64 {
    let mut x = seed | 1;
    let mut step = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let mut map: HashMap<u64, Rc<String>> = HashMap::new();
    let mut list: Vec<Box<dyn Fn(u64) -> u64>> = Vec::new();
    let mut sum = 0u64;
    let mut f = 1.0f64;
    for i in 0..300u64 {
        let r = step();
        map.insert(r % 50, Rc::new(format!("{r} {i}")));
        list.push(Box::new(move |y| y.rotate_left((r % 63) as u32) ^ r));
        if list.len() > 20 {
            drop(list.swap_remove((r % 20) as usize));
        }
        f = (f * 1.000_1 + (r % 7) as f64).sin() + 2.0;
        TABLE.lock().unwrap().push(format!("{i}"));
        PLAIN.set(PLAIN.get().wrapping_mul(31).wrapping_add(r));
        let caught =
            std::panic::catch_unwind(
                || if r % 5 == 0 { std::panic::resume_unwind(Box::new(r)) } else { r + 1 },
            );
        sum = sum.wrapping_add(caught.unwrap_or_else(|p| *p.downcast::<u64>().unwrap()));
        sum = list.iter().fold(sum, |s, g| g(s));
        for _ in 0..20 {
            let part: String = map.get(&(step() % 50)).map_or(String::new(), |s| s.chars().rev().collect());
            sum = sum.wrapping_add(part.bytes().map(u64::from).sum::<u64>());
        }
        pause(i);
    }
    let keys: u64 = map.iter().fold(0, |a, (k, v)| a ^ k.wrapping_mul(v.len() as u64));
    sum ^ keys ^ f.to_bits() ^ PLAIN.get() ^ TABLE.lock().unwrap().len() as u64
}

fn moved(seed: u64) -> u64 {
    everything(seed, |i| {
        if i % 3 == 0 {
            hop();
        }
    })
}
fn left_alone(seed: u64) -> u64 {
    everything(seed, |_| ())
}

/// Runs threads in pairs, one that moves itself and is moved, one that is only preempted and moved; both must agree with
/// `left_alone` in one more thread.
fn storm(rounds: u64, with: u64) {
    for round in 0..rounds {
        let seeds: Vec<u64> = (0..with).map(|k| round * 1000 + k + 1).collect();
        let a: Vec<_> = seeds.iter().map(|s| spawn(moved, *s)).collect();
        let b: Vec<_> = seeds.iter().map(|s| spawn(left_alone, *s)).collect();
        for ((a, b), seed) in a.into_iter().zip(b).zip(seeds) {
            let (a, b) = (a.join().unwrap(), b.join().unwrap());
            assert_eq!(a, b, "seed {seed}");
        }
    }
}

#[peregrine::test(nodes = 3, move_every_ms = 1, slice_us = 300, least_moves = 1000, least_preemptions = 20)]
fn a_thousand_moves_change_no_result() {
    storm(3, 6);
}

#[peregrine::test(nodes = 3, move_every_ms = 1, slice_us = 300, least_moves = 10_000, timeout_s = 900)]
#[ignore = "the long form: cargo test --release -- --ignored"]
fn ten_thousand_moves_change_no_result() {
    storm(20, 8);
}

#[peregrine::test(
    nodes = 3,
    move_every_ms = 1,
    kill_every_ms = 30,
    slice_us = 300,
    least_kills = 5,
    timeout_s = 300
)]
fn kills_in_a_storm_of_moves_change_no_result() {
    storm(3, 6);
    checkpoint();
}

#[peregrine::test(nodes = 8, move_every_ms = 1, slice_us = 300, least_moves = 100)]
fn eight_nodes_on_few_processors_work() {
    storm(1, 8);
}

#[peregrine::test(
    nodes = 3,
    move_every_ms = 1,
    kill_every_ms = 30,
    track = 0,
    least_kills = 2,
    timeout_s = 300
)]
fn without_the_kernels_write_tracking_everything_is_compared() {
    storm(1, 4);
}

#[peregrine::test(nodes = 2, kill_every_ms = 150, image_interval_ms = 0, least_kills = 1)]
fn without_an_image_interval_a_killed_node_takes_the_program_back_to_its_start() {
    // A file is not rolled back: it tells the second life from the first.
    let mark =
        std::env::temp_dir().join(format!("peregrine-second-life-{}", std::os::unix::process::parent_id()));
    if !mark.exists() {
        std::fs::write(&mark, b"").unwrap();
        let h = spawn(left_alone, 5);
        sleep(Duration::from_secs(100));
        h.join().unwrap();
        panic!("nobody was killed");
    }
    std::fs::remove_file(&mark).unwrap();
}
