//! What threads in windows took, and need no more, is given back: by who is packed, by who is unpacked, and at the end.

use peregrine::{Builder, Receiver, Sender, StackKind, channel, packing, sleep};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

/// Memory behind the World's files that bear `name`, in bytes.
fn behind(name: &str) -> u64 {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten().map(|entry| entry.path());
    let ours = open.filter(|path| {
        std::fs::read_link(path)
            .is_ok_and(|what| what.to_string_lossy().contains(&format!("peregrine-{name}")))
    });
    ours.filter_map(|path| std::fs::metadata(path).ok()).map(|m| m.blocks() * 512).sum()
}

/// Holds so many bytes that can't be compressed, until its message comes.
fn holds((seed, bytes, woken): (u64, usize, Receiver<u8>)) -> usize {
    let mut random = StdRng::seed_from_u64(seed);
    let held: Vec<u8> = (0..bytes).map(|_| random.random()).collect();
    woken.recv().unwrap();
    let mut again = StdRng::seed_from_u64(seed);
    held.iter().filter(|byte| **byte == again.random::<u8>()).count()
}

/// Has `threads` threads packed but for one, which stays in the only window; how much lies behind the frames then. Wakes and joins them: then
/// nothing does.
fn round(kind: StackKind, threads: u64, bytes: usize) -> u64 {
    let before = packing().packed;
    let all: Vec<_> = (0..threads)
        .map(|seed| {
            let (wake, woken) = channel();
            (Builder::new().kind(kind).spawn(holds, (seed, bytes, woken)).unwrap(), wake)
        })
        .collect();
    while packing().packed < before + threads - 1 {
        sleep(Duration::from_millis(2));
    }
    let frames = behind("frames");
    let (all, wakes): (Vec<_>, Vec<Sender<u8>>) = all.into_iter().unzip();
    wakes.iter().for_each(|wake| wake.send(&1).unwrap());
    assert!(all.into_iter().all(|h| h.join().unwrap() == bytes));
    // The last one's go a moment after its result is there.
    while behind("frames") > 0 {
        sleep(Duration::from_millis(1));
    }
    frames
}

fn is_given_back(kind: StackKind) {
    const THREADS: u64 = 24;
    // Small ones are packed into the archive, large ones into the arena.
    for (bytes, rounds) in [(1000, 60), (40_000, 8)] {
        let taken = || behind("archive") + behind("arena");
        for _ in 0..2 {
            round(kind, THREADS, bytes);
        }
        let before = taken();
        for _ in 0..rounds {
            let frames = round(kind, THREADS, bytes);
            // One thread, at most, is in its window.
            assert!(
                frames <= bytes as u64 + (128 << 10),
                "{frames} bytes of frames for threads that are packed"
            );
        }
        // A tenth of what all rounds took, and what lies about for lists and chunks.
        let most = before + 3 * THREADS * bytes as u64 + (256 << 10);
        let now = taken();
        assert!(now <= most, "{kind}, {bytes} bytes a thread: {before} before, {now} now, {most} at most");
    }
}

#[peregrine::test(nodes = 1, windows = 1, pack_after_ms = 1, image_interval_ms = 5)]
fn alias_threads_give_back_frames_and_blocks() {
    is_given_back(StackKind::Alias);
}

#[peregrine::test(nodes = 1, windows = 1, pack_after_ms = 1, image_interval_ms = 5)]
fn copy_threads_give_back_their_blocks() {
    is_given_back(StackKind::Copy);
}
