//! Idle threads are packed by the node that they are on, by no other, and then leave their memory to the rest.

use peregrine::{Builder, JoinHandle, Receiver, Sender, StackKind, channel, packing, sleep};
use std::time::{Duration, Instant, SystemTime};

/// Holds bytes that can be compressed to nothing, until its message comes.
fn holds_much((bytes, woken): (usize, Receiver<u8>)) -> usize {
    let held = std::hint::black_box(vec![7u8; bytes]);
    woken.recv().unwrap();
    held.iter().filter(|byte| **byte == 7).count()
}

/// Together they hold twice the World's memory; packed, next to nothing. One after the other is packed, woken, and gone.
fn make_room(kind: StackKind) {
    const BYTES: usize = 128 << 10;
    for _ in 0..2 {
        let before = packing().packed;
        let all: Vec<_> = (0..256u64)
            .map(|i| {
                let (wake, woken) = channel();
                let h = Builder::new().kind(kind).spawn(holds_much, (BYTES, woken)).unwrap();
                // All but this one, which is in the only window.
                let begun = Instant::now();
                while packing().packed - before < i {
                    assert!(begun.elapsed() < Duration::from_secs(20), "thread {i} is not packed");
                    sleep(Duration::from_millis(1));
                }
                (h, wake)
            })
            .collect();
        for (h, wake) in all {
            wake.send(&1).unwrap();
            assert_eq!(h.join().unwrap(), BYTES);
        }
    }
}

#[peregrine::test(nodes = 1, windows = 1, pack_after_ms = 1, memory_mib = 16)]
fn alias_threads_that_are_packed_leave_the_worlds_memory_to_others() {
    make_room(StackKind::Alias);
}

#[peregrine::test(nodes = 1, windows = 1, pack_after_ms = 1, memory_mib = 16)]
fn copy_threads_that_are_packed_leave_the_worlds_memory_to_others() {
    make_room(StackKind::Copy);
}

/// Holds 200 bytes of its own until its message comes.
fn holds_little((seed, woken): (u8, Receiver<u8>)) -> u8 {
    let held = std::hint::black_box([seed; 200]);
    let got = woken.recv().unwrap();
    assert!(held.iter().all(|byte| *byte == seed));
    got
}

/// A thread that holds 200 bytes takes 1 KiB at most while it is idle, whatever else is on its stack.
fn take_little(kind: StackKind) {
    let (mut all, mut before) = (Vec::new(), packing());
    for i in 0..64u8 {
        let (wake, woken) = channel();
        all.push((Builder::new().kind(kind).spawn(holds_little, (i, woken)).unwrap(), wake));
        let begun = Instant::now();
        while packing().packed < u64::from(i) {
            assert!(begun.elapsed() < Duration::from_secs(20), "thread {i} is not packed");
            sleep(Duration::from_millis(1));
        }
        if i == 1 {
            // The first is what the others are told apart from.
            before = packing();
        }
    }
    let after = packing();
    let each = (after.packed_bytes - before.packed_bytes) / (after.packed - before.packed);
    println!("{each} bytes each");
    assert!(each <= 1024, "{kind:?}: {each} bytes each");
    for (i, (thread, wake)) in all.into_iter().enumerate() {
        wake.send(&(i as u8)).unwrap();
        assert_eq!(thread.join().unwrap(), i as u8);
    }
}

#[peregrine::test(nodes = 1, windows = 1, pack_after_ms = 1)]
fn an_idle_alias_thread_that_holds_200_bytes_takes_a_kibibyte_at_most() {
    take_little(StackKind::Alias);
}

#[peregrine::test(nodes = 1, windows = 1, pack_after_ms = 1)]
fn an_idle_copy_thread_that_holds_200_bytes_takes_a_kibibyte_at_most() {
    take_little(StackKind::Copy);
}

/// When they may be packed.
const AFTER: Duration = Duration::from_millis(100);

/// Holds bytes that take a while to be packed, until its message comes.
fn holds((seed, woken): (u64, Receiver<u8>)) -> bool {
    let word = |i: u64| {
        (seed << 32 | i)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29)
            .wrapping_mul(0xbf58_476d_1ce4_e5b9)
    };
    let held: Vec<u64> = (0..20 << 10).map(word).collect();
    woken.recv().unwrap();
    held.iter().zip(0..).all(|(found, i)| *found == word(i))
}

/// Threads wait, are moved as they do, and are due to be packed on two nodes at the same time: where they left a window, and where they are.
fn are_moved_as_they_wait(kind: StackKind) {
    const THREADS: u64 = 32;
    for _ in 0..10 {
        let before = packing().packed;
        let (all, wakes): (Vec<JoinHandle<bool>>, Vec<Sender<u8>>) = (0..THREADS)
            .map(|seed| {
                let (wake, woken) = channel();
                (Builder::new().kind(kind).spawn(holds, (seed, woken)).unwrap(), wake)
            })
            .unzip();
        sleep(AFTER / 2);
        // While these hold the nodes, nobody is packed; then whoever is due is. There are some on each, for they are moved as well.
        let until = SystemTime::now() + AFTER / 2 + Duration::from_millis(10);
        let holder = |until: SystemTime| while SystemTime::now() < until {};
        let holders: Vec<_> =
            (0..16).map(|i| Builder::new().node(i % 2).spawn(holder, until).unwrap()).collect();
        holders.into_iter().for_each(|h| h.join().unwrap());
        sleep(Duration::from_millis(10));
        let packed = packing().packed - before;
        assert!(packed <= THREADS, "{THREADS} threads were packed {packed} times");
        wakes.iter().for_each(|wake| wake.send(&1).unwrap());
        assert!(all.into_iter().all(|h| h.join().unwrap()), "a thread that was packed has other bytes");
    }
}

#[peregrine::test(
    nodes = 2,
    windows = 1,
    pack_after_ms = 100,
    slice_us = 1_000_000,
    move_every_ms = 1,
    least_moves = 50
)]
fn alias_threads_that_are_moved_as_they_wait_are_packed_where_they_are() {
    are_moved_as_they_wait(StackKind::Alias);
}

#[peregrine::test(
    nodes = 2,
    windows = 1,
    pack_after_ms = 100,
    slice_us = 1_000_000,
    move_every_ms = 1,
    least_moves = 50
)]
fn copy_threads_that_are_moved_as_they_wait_are_packed_where_they_are() {
    are_moved_as_they_wait(StackKind::Copy);
}
