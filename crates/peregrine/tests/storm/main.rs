//! Storms of moves and kills: whatever a thread computes, it is what one process alone would have.

mod values;

use peregrine::{checkpoint, migrate_to, node_count, node_id, sleep, spawn};
use std::time::Duration;
use values::everything;

/// To the next node.
fn hop() {
    migrate_to((node_id() + 1) % node_count()).unwrap();
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

#[peregrine::test(
    nodes = 3,
    move_every_ms = 1,
    slice_us = 300,
    least_moves = 1000,
    least_preempted_moves = 100
)]
fn a_thousand_moves_change_no_result() {
    storm(3, 6);
}

#[peregrine::test(
    nodes = 3,
    move_every_ms = 1,
    slice_us = 300,
    least_moves = 10_000,
    least_preempted_moves = 5_000,
    timeout_s = 900
)]
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
