//! A World that can't go on leaves nothing behind.

use peregrine_sys::process;
use peregrine_sys::signal::{self, number};
use peregrine_world::{Config, WorldError};
use testkit::{Outcome, skip};

/// The children of process `pid`, the oldest first; `None` where the kernel does not list them.
fn children_of(pid: i32) -> Option<Vec<i32>> {
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    Some(list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect())
}

/// Kills the zygote, the supervisor's first child, and then this node, which nobody can replace any more.
fn body(_: usize, _: Vec<u8>, _: Vec<u32>) -> Result<(Vec<u8>, Vec<u32>), String> {
    let zygote = children_of(process::parent_pid()).ok_or("no list of children")?[0];
    signal::kill(zygote, number::KILL).map_err(|e| e.to_string())?;
    process::kill_self()
}

fn a_world_that_fails_takes_its_processes_with_it() -> Outcome {
    if children_of(process::pid()).is_none() {
        skip!("/proc/PID/task/PID/children (CONFIG_PROC_CHILDREN)");
    }
    let ended = peregrine_world::run(Config { nodes: 3, ..Config::default() }, body, 0, &[]);
    assert!(matches!(ended, Err(WorldError::Zygote(_))), "{ended:?}");
    assert_eq!(children_of(process::pid()), Some(vec![]), "nodes run on without a supervisor");
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![a_world_that_fails_takes_its_processes_with_it])
}
