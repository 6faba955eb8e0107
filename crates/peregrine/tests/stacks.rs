//! Stacks of every size, deep in use, across moves and rollbacks.

use peregrine::{Builder, checkpoint, migrate_to, node_count, node_id, sleep};
use std::hint::black_box;
use std::time::Duration;

/// Bytes of a frame that are checked.
const FRAME: usize = 1 << 10;
/// More than a frame takes, unoptimised too.
const STEP: usize = 4 * FRAME;

/// Goes down, by less than so many bytes of stack, moves about there, and checks every frame on the way back.
#[inline(never)]
fn dive(bytes: usize) -> usize {
    let frame = black_box([bytes as u8; FRAME]);
    let frames = if bytes > STEP {
        dive(bytes - STEP)
    } else {
        for _ in 0..4 {
            migrate_to((node_id() + 1) % node_count()).unwrap();
            sleep(Duration::from_millis(2));
            checkpoint();
        }
        0
    };
    assert!(black_box(&frame).iter().all(|b| *b == bytes as u8), "a frame is not what it was");
    frames + 1
}

// A stack of more than 8 MiB lies elsewhere in its slot.
#[peregrine::test(nodes = 3, move_every_ms = 1, kill_every_ms = 60, least_kills = 2, least_moves = 20)]
fn stacks_of_every_size_are_whole_down_to_their_last_frames() {
    const SIZES: [usize; 5] = [64 << 10, 1 << 20, 8 << 20, (8 << 20) + 4096, 16 << 20];
    for _ in 0..4 {
        let all = SIZES.map(|size| {
            let used = size / 4 * 3 - (16 << 10);
            (used, Builder::new().stack_size(size).spawn(dive, used).unwrap())
        });
        for (used, thread) in all {
            assert_eq!(thread.join().unwrap(), used.div_ceil(STEP));
        }
    }
}
