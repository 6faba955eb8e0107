//! Sealed pages of the statics window: whoever writes to one keeps what it wrote, and nobody else sees it.
//!
//! Pages are sealed after every other switch here, so each write meets a sealed page as often as not.

use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_vm::region::{Answered, RawRegion, RawTraps};
use peregrine_world::{Builder, Config, Stats, yield_now};
use std::io::Read;
use std::time::Duration;
use testkit::{Outcome, skip};

const ROUNDS: u64 = 400;

static COUNTER: AtomicU64 = AtomicU64::new(7);
/// Several pages that are zero in the template.
static FAR: [AtomicU64; 4096] = [const { AtomicU64::new(0) }; 4096];

/// Runs `entry` in a World whose pages are sealed `every` so many compares.
fn in_world(every: u32, nodes: u32, entry: fn()) -> Stats {
    let config = Config {
        nodes,
        seal_every: every,
        move_every: (nodes > 1).then(|| Duration::from_millis(1)),
        image_interval: Some(Duration::from_millis(5)),
        ..Config::default()
    };
    let ended = peregrine_world::run(config, body, entry as usize, &[]).expect("a World");
    assert_eq!(ended.code, 0, "the threads found what they had written");
    ended.stats
}

fn body(entry: usize, _: Vec<u8>, _: Vec<u32>) -> Result<(Vec<u8>, Vec<u32>), String> {
    // SAFETY: `in_world` passes a `fn()`.
    let entry = unsafe { core::mem::transmute::<usize, fn()>(entry) };
    entry();
    Ok((vec![0], Vec::new()))
}

/// Yields often enough that pages are sealed again.
fn wait_a_little() {
    for _ in 0..6 {
        yield_now();
    }
}

fn writes_by_hand(me: u64) {
    for i in 0..ROUNDS {
        assert_eq!(COUNTER.load(Ordering::Relaxed), 7 + i * me);
        COUNTER.store(7 + (i + 1) * me, Ordering::Relaxed);
        let far = &FAR[(i as usize * 61) % FAR.len()];
        let before = far.load(Ordering::Relaxed);
        assert_eq!(before % me, 0, "nobody else writes here");
        far.store(before + me, Ordering::Relaxed);
        if i % 3 == 0 {
            wait_a_little();
        }
    }
    assert_eq!(FAR.iter().map(|f| f.load(Ordering::Relaxed)).sum::<u64>(), ROUNDS * me);
}

/// Has the kernel write into statics.
fn writes_by_system_call(me: u64) {
    let mut zeros = std::fs::File::open("/dev/zero").expect("a file of zeros");
    for i in 0..ROUNDS {
        let far = &FAR[(i as usize * 61) % FAR.len()];
        far.store(me, Ordering::Relaxed);
        wait_a_little();
        assert_eq!(far.load(Ordering::Relaxed), me);
        // SAFETY: eight bytes of this thread's own static, which nobody else refers to meanwhile.
        let bytes = unsafe { core::slice::from_raw_parts_mut(far.as_ptr().cast::<u8>(), 8) };
        zeros.read_exact(bytes).expect("a read into a static does not fail");
        assert_eq!(far.load(Ordering::Relaxed), 0);
        wait_a_little();
    }
}

fn reads(_: u64) {
    for _ in 0..ROUNDS * 8 {
        assert_eq!(COUNTER.load(Ordering::Relaxed), 7);
        assert_eq!(FAR[61].load(Ordering::Relaxed), 0);
        yield_now();
    }
}

fn all_together() {
    let mut handles = Vec::new();
    for i in 1..=3 {
        for entry in [writes_by_hand, writes_by_system_call, reads] {
            handles.push(Builder::new().spawn(entry, i * 1000).expect("a thread"));
        }
    }
    for h in handles {
        h.join().expect("all it wrote");
    }
}

fn may_seal() -> bool {
    let traps = RawTraps { answered: Answered::Pager, absent: false, writes: true, shared: false };
    RawRegion::open(traps).is_ok_and(|region| region.serves_system_calls())
}

fn what_is_written_to_sealed_pages_is_the_writers_alone() -> Outcome {
    if !may_seal() {
        skip!(
            "userfaultfd that serves the kernel's faults (CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1)"
        );
    }
    let stats = in_world(2, 1, all_together);
    assert!(stats.seal_faults > 5, "pages were sealed and written: {}", stats.seal_faults);
    Outcome::Passed
}

fn it_is_so_for_threads_that_move_and_are_imaged() -> Outcome {
    if !may_seal() {
        skip!(
            "userfaultfd that serves the kernel's faults (CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1)"
        );
    }
    let stats = in_world(2, 3, all_together);
    assert!(stats.seal_faults > 0 && stats.moves > 0, "{} faults, {} moves", stats.seal_faults, stats.moves);
    Outcome::Passed
}

fn without_seals_everything_is_compared() -> Outcome {
    assert_eq!(in_world(0, 2, all_together).seal_faults, 0);
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        what_is_written_to_sealed_pages_is_the_writers_alone,
        it_is_so_for_threads_that_move_and_are_imaged,
        without_seals_everything_is_compared,
    ])
}
