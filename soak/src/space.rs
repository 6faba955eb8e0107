//! The address space over processes: no write reaches an old frame while members are stopped at random, and members are killed
//! at every step and between any two instructions, thousands of times.

// The very code that the tests run, so that the two can't differ.
#[path = "../../crates/space/tests/killed/mod.rs"]
mod killed;
#[path = "../../crates/space/tests/revoke/mod.rs"]
mod revoke;

use killed::{Scene, at_every_step, at_random_instructions};
use peregrine_space::process::Filling;
use peregrine_sys::process::{ChildEnd, ForkFlags, Forked, exit_now, fork_with, wait_for};
use revoke::{Plan, never_reached_again};
use std::time::{Duration, Instant};
use testkit::Rng;

/// Half the time for revoking while members are stopped, half for killing, or all for the one that is wanted; a failure panics with
/// its seed.
pub fn run(seed: u64, seconds: u64, [revoking, killing]: [bool; 2]) {
    println!("soak space: seed {seed}, {seconds} s");
    let mut rng = Rng::new(seed);
    let begun = Instant::now();
    let whole = Duration::from_secs(seconds);
    let first = match (revoking, killing) {
        (true, true) => whole / 2,
        (true, false) => whole,
        _ => Duration::ZERO,
    };
    let (mut unmaps, mut writes, mut cut_off) = (0, 0, 0);
    while begun.elapsed() < first {
        for filling in [Filling::Kernel, Filling::KernelTracked, Filling::Trap] {
            let plan = Plan { seed: rng.next_u64(), time: Duration::from_secs(10).min(whole), filling };
            let outcome = never_reached_again(plan);
            unmaps += outcome.unmaps;
            writes += outcome.writes;
            cut_off += outcome.overdue;
            println!(
                "{filling:?}: {unmaps} unmaps and {writes} writes so far, {cut_off} stopped members cut off; last: {} locks held by \
                 stopped members, the longest unmap {:?}",
                outcome.skipped, outcome.longest
            );
        }
    }
    let mut kills = 0;
    while killing && begun.elapsed() < whole {
        for filling in [Filling::Kernel, Filling::Trap] {
            kills += alone(|| at_every_step(&mut Scene::new(filling)));
            let seed = rng.next_u64();
            kills += alone(|| at_random_instructions(&mut Scene::new(filling), &mut Rng::new(seed), 200));
            println!("{filling:?}: {kills} kills so far");
        }
    }
    println!("no write reached an old frame in {unmaps} unmaps; everything held in {kills} kills");
}

/// Each scene in a process of its own: it leaks its space.
fn alone(f: impl FnOnce() -> u64) -> u64 {
    let counted = peregrine_vm::Mapping::memfd(peregrine_base::PageCount::new(1)).expect("memory");
    // SAFETY: this program has one thread.
    match unsafe { fork_with(ForkFlags::default()) }.expect("fork") {
        Forked::Child => {
            let kills = f();
            counted.bytes().store_u64(0, kills).expect("in bounds");
            exit_now(0);
        }
        Forked::Parent(pid) => {
            assert_eq!(wait_for(pid), Ok(ChildEnd::Exited(0)), "see above");
            counted.bytes().load_u64(0).expect("in bounds")
        }
    }
}
