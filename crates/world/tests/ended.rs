//! A World that can't go on leaves nothing behind, and one that can is not kept waiting for ever.

use peregrine_sys::process;
use peregrine_sys::signal::{self, number};
use peregrine_world::{Config, TrustedDomain, WorldError, ZygoteError, checkpoint, migrate_to, tally};
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

/// A set-up that never ends, and has the World told to end.
fn never_ends() {
    let _ = signal::kill(process::parent_pid(), number::TERM);
    loop {
        std::thread::park();
    }
}

fn opens(_: usize, _: Vec<u8>, _: Vec<u32>) -> Ended {
    match TrustedDomain::open("endless", never_ends) {
        Ok(_) => Err("a set-up that never ends was done".into()),
        Err(e) => Err(e.to_string()),
    }
}

fn a_world_that_waits_for_a_set_up_is_ended_by_a_signal() -> Outcome {
    let ended =
        peregrine_world::run(Config { nodes: 2, ..Config::default() }, opens, 0, &[]).expect("a World");
    assert_eq!(ended.stopped_by, Some(number::TERM));
    Outcome::Passed
}

/// Where it is noted that set-ups are not to end from now on: outside of the World, which goes back.
fn hangs() -> std::path::PathBuf {
    std::env::temp_dir().join(format!("peregrine-hangs-{}", process::parent_pid()))
}

fn never_ends_once_told() {
    if hangs().exists() {
        let _ = std::fs::remove_file(hangs());
        never_ends();
    }
}

/// Has the process of a domain replaced by one whose set-up never ends.
fn loses_a_domain(_: usize, _: Vec<u8>, _: Vec<u32>) -> Ended {
    let domain = TrustedDomain::open("endless", never_ends_once_told).map_err(|e| e.to_string())?;
    checkpoint();
    std::fs::write(hangs(), "").map_err(|e| e.to_string())?;
    domain.run(|| process::kill_self()).map_err(|e| e.to_string())
}

fn a_world_that_goes_back_and_waits_for_a_set_up_is_ended_by_a_signal() -> Outcome {
    let config = Config { nodes: 2, ..Config::default() };
    let ended = peregrine_world::run(config, loses_a_domain, 0, &[]).expect("a World");
    assert_eq!(ended.stopped_by, Some(number::TERM));
    Outcome::Passed
}

/// Opens a domain, stores that, and has the World told to end.
fn stores_a_domain(_: usize, _: Vec<u8>, _: Vec<u32>) -> Ended {
    TrustedDomain::open("kept", || {}).map_err(|e| e.to_string())?;
    checkpoint();
    let _ = signal::kill(process::parent_pid(), number::TERM);
    loop {
        std::hint::spin_loop();
    }
}

/// So long that it is told of, and not so long that it is ended: in haste as in ordinary time.
fn takes_its_time() {
    std::thread::sleep(std::time::Duration::from_secs(1));
}

fn never_returns() {
    loop {
        std::thread::park();
    }
}

/// Opens a domain whose set-up is slow, one whose set-up never ends, and, when that has been given up, one that is as it should be.
fn opens_three(_: usize, _: Vec<u8>, _: Vec<u32>) -> Ended {
    let opened = [("slow", takes_its_time as fn()), ("endless", never_returns), ("well", || ())]
        .map(|(name, setup)| TrustedDomain::open(name, setup).and_then(|d| d.run(|| name.to_owned())));
    let [slow, endless, well] = opened;
    let text = format!("{slow:?} {endless:?} {well:?} {}", tally().rollbacks);
    Ok(([&[0], text.as_bytes()].concat(), vec![]))
}

/// In a process of its own: limits of a wait come [`HASTE`] times as fast.
const HASTY: &str = "PEREGRINE_ENDED_HASTY";
const HASTE: &str = "24";

fn a_set_up_is_told_of_when_it_takes_long_and_ended_when_it_takes_too_long() -> Outcome {
    let mut c = std::process::Command::new(std::env::current_exe().expect("known"));
    c.env(HASTY, "1").env("PEREGRINE_HASTE", HASTE).env_remove("TESTKIT_CHILD");
    let o = c.output().expect("this program can be run again");
    let [said, done] = [&o.stderr, &o.stdout].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(o.status.success(), "{:?}: {said}", o.status);
    let failed = r#"Err(SetupFailed { name: "endless" })"#;
    assert_eq!(done, format!(r#"Ok("slow") {failed} Ok("well") 0"#), "{said}");
    let told =
        |name: &str| said.matches(&format!("all threads wait for the set-up of domain '{name}'")).count();
    // Once for each process of it.
    assert_eq!((told("slow"), told("endless"), told("well")), (1, 3, 0), "{said}");
    assert!(said.contains("; it is ended after 2.5s\n"), "a minute, in haste: {said}");
    assert!(said.contains("domain 'endless' ended its process 3 times; it is given up"), "{said}");
    Outcome::Passed
}

const STORE: &str = "PEREGRINE_ENDED_STORE";

/// In a process of its own: the World that [`stores_a_domain`], or what becomes of its resuming with too many nodes.
fn life(store: std::ffi::OsString) -> std::process::ExitCode {
    let resumes = std::env::var_os("PEREGRINE_ENDED_RESUMES").is_some();
    let nodes = if resumes { 64 } else { 1 };
    let config = Config { nodes, store: Some(store.into()), ..Config::default() };
    let ended = match resumes {
        true => peregrine_world::resume(config, |_| {}),
        false => peregrine_world::run(config, stores_a_domain, 0, &[]),
    };
    match ended {
        Ok(ended) => std::process::ExitCode::from(ended.code as u8),
        Err(e) => {
            eprintln!("{e}");
            std::process::ExitCode::from(70)
        }
    }
}

fn an_image_with_domains_is_not_resumed_with_more_nodes_than_leave_room_for_them() -> Outcome {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let live = |resumes: bool| {
        let mut c = std::process::Command::new(std::env::current_exe().expect("known"));
        c.env(STORE, dir.path().join("store")).env_remove("TESTKIT_CHILD");
        if resumes {
            c.env("PEREGRINE_ENDED_RESUMES", "1");
        }
        let o = c.output().expect("this program can be run again");
        (o.status.code(), String::from_utf8_lossy(&o.stderr).into_owned())
    };
    let (code, said) = live(false);
    assert_eq!(code, Some(128 + number::TERM), "{said}");
    let (code, said) = live(true);
    assert_eq!(code, Some(70), "{said}");
    assert!(said.contains("64 nodes and the 1 domains") && said.contains("PEREGRINE_NODES"), "{said}");
    Outcome::Passed
}

/// In a process of its own: the World that [`opens_three`], and what came of it.
fn hasty() -> std::process::ExitCode {
    let ended = peregrine_world::run(Config { nodes: 2, ..Config::default() }, opens_three, 0, &[]);
    let ended = ended.expect("a World");
    print!("{}", String::from_utf8_lossy(&ended.result[1..]));
    std::process::ExitCode::from(ended.code as u8)
}

fn main() -> std::process::ExitCode {
    if std::env::var_os(HASTY).is_some() {
        return hasty();
    }
    if let Some(store) = std::env::var_os(STORE) {
        return life(store);
    }
    testkit::main(testkit::tests![
        a_world_that_fails_takes_its_processes_with_it,
        a_zygote_that_was_stopped_is_told_to_go_on,
        a_zygote_that_a_debugger_holds_is_given_up_with_what_to_do,
        a_world_that_waits_for_a_set_up_is_ended_by_a_signal,
        a_world_that_goes_back_and_waits_for_a_set_up_is_ended_by_a_signal,
        a_set_up_is_told_of_when_it_takes_long_and_ended_when_it_takes_too_long,
        an_image_with_domains_is_not_resumed_with_more_nodes_than_leave_room_for_them,
    ])
}
