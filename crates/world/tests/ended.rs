//! A World that can't go on leaves nothing behind, and one that can is not kept waiting for ever.

use peregrine_sys::process;
use peregrine_sys::signal::{self, number};
use peregrine_world::{Config, WorldError, ZygoteError, migrate_to, tally};
use testkit::{Outcome, skip};

/// The children of process `pid`, the oldest first; `None` where the kernel does not list them.
fn children_of(pid: i32) -> Option<Vec<i32>> {
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    Some(list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect())
}

/// The supervisor's first child.
fn zygote() -> Result<i32, String> {
    Ok(children_of(process::parent_pid()).ok_or("no list of children")?[0])
}

type Ended = Result<(Vec<u8>, Vec<u32>), String>;

/// Kills the zygote, and then this node, which nobody can replace any more.
fn kills_the_zygote(_: usize, _: Vec<u8>, _: Vec<u32>) -> Ended {
    signal::kill(zygote()?, number::KILL).map_err(|e| e.to_string())?;
    process::kill_self()
}

fn a_world_that_fails_takes_its_processes_with_it() -> Outcome {
    if children_of(process::pid()).is_none() {
        skip!("/proc/PID/task/PID/children (CONFIG_PROC_CHILDREN)");
    }
    let ended = peregrine_world::run(Config { nodes: 3, ..Config::default() }, kills_the_zygote, 0, &[]);
    assert!(matches!(ended, Err(WorldError::Zygote(ZygoteError::Gone(_)))), "{ended:?}");
    assert_eq!(children_of(process::pid()), Some(vec![]), "nodes run on without a supervisor");
    Outcome::Passed
}

/// Stops the zygote, and kills this node; what goes on from the image ends.
fn stops_the_zygote(_: usize, _: Vec<u8>, _: Vec<u32>) -> Ended {
    if tally().rollbacks != 0 {
        return Ok((vec![0], vec![]));
    }
    signal::kill(zygote()?, number::STOP).map_err(|e| e.to_string())?;
    process::kill_self()
}

fn a_zygote_that_was_stopped_is_told_to_go_on() -> Outcome {
    if children_of(process::pid()).is_none() {
        skip!("/proc/PID/task/PID/children (CONFIG_PROC_CHILDREN)");
    }
    let ended = peregrine_world::run(Config { nodes: 2, ..Config::default() }, stops_the_zygote, 0, &[]);
    assert!(matches!(&ended, Ok(e) if e.code == 0 && e.stats.rollbacks >= 1), "{ended:?}");
    Outcome::Passed
}

unsafe extern "C" {
    fn ptrace(request: u32, pid: i32, address: usize, data: usize) -> i64;
}

/// What a thread returns where it may not hold another process.
const MAY_NOT: &[u8] = b"may not";

/// Holds the zygote as a debugger does, from node 1, and kills node 0.
fn holds_the_zygote(_: usize, _: Vec<u8>, _: Vec<u32>) -> Ended {
    const SEIZE: u32 = 0x4206;
    const INTERRUPT: u32 = 0x4207;
    migrate_to(0).map_err(|e| e.to_string())?;
    let node_0 = process::pid();
    migrate_to(1).map_err(|e| e.to_string())?;
    let zygote = zygote()?;
    // SAFETY: these requests read and write no memory of ours.
    unsafe {
        if ptrace(SEIZE, zygote, 0, 0) != 0 || ptrace(INTERRUPT, zygote, 0, 0) != 0 {
            return Ok(([&[0], MAY_NOT].concat(), vec![]));
        }
    }
    signal::kill(node_0, number::KILL).map_err(|e| e.to_string())?;
    loop {
        std::hint::spin_loop();
    }
}

fn a_zygote_that_a_debugger_holds_is_given_up_with_what_to_do() -> Outcome {
    if children_of(process::pid()).is_none() {
        skip!("/proc/PID/task/PID/children (CONFIG_PROC_CHILDREN)");
    }
    // The tracer is rolled back too, and would hold it again.
    let config = Config { nodes: 2, image_interval: None, ..Config::default() };
    match peregrine_world::run(config, holds_the_zygote, 0, &[]) {
        Ok(e) if e.result.ends_with(MAY_NOT) => skip!("ptrace"),
        Err(WorldError::Zygote(e @ ZygoteError::Held { .. })) => {
            let said = e.to_string();
            assert!(said.contains("held by a debugger") && said.contains("kill -CONT"), "{said}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(children_of(process::pid()), Some(vec![]), "nodes run on without a supervisor");
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        a_world_that_fails_takes_its_processes_with_it,
        a_zygote_that_was_stopped_is_told_to_go_on,
        a_zygote_that_a_debugger_holds_is_given_up_with_what_to_do,
    ])
}
