//! Kill -9 of the supervisor, and with it of the whole World, at every step that it takes; then a resume must go on.
//!
//! ```text
//!   count ──▶ every place by name, and how often it is passed
//!   for each: run, killed there ──▶ resume (or a new beginning, if no image had been stored) ──▶ the exact output
//!   for each place of a resume: run, killed late ──▶ resume, killed there ──▶ resume ──▶ the exact output
//! ```
//!
//! `PEREGRINE_TIMES` (1): how many passes of each place are tried; `PEREGRINE_SEED` chooses them.

mod program;

use peregrine_world::{Config, Ended, WorldError, resume, run_with};
use program::{Plan, oracle};
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::Duration;
use testkit::{Outcome, Rng};

const DIR: &str = "PEREGRINE_SUPERVISED_DIR";
const RESUME: &str = "PEREGRINE_SUPERVISED_RESUME";
const KILL: &str = "PEREGRINE_KILL_SUPERVISOR";
const ROUNDS: u64 = 5;

/// In a child: one life of the World whose store lies in `dir`.
fn life(dir: &Path) -> ExitCode {
    let config = Config {
        nodes: 2,
        image_interval: Some(Duration::from_millis(4)),
        store: Some(dir.join("store")),
        store_interval: Duration::from_millis(8),
        output: Some(dir.join("output")),
        move_every: Some(Duration::from_millis(3)),
        // So that recovery is among the steps.
        kill_every: Some(Duration::from_millis(90)),
        seed: std::env::var("PEREGRINE_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1),
        ..program::config()
    };
    let plan = Plan { rounds: (ROUNDS, ROUNDS), seconds: 60.0, more: false };
    let ended: Result<Ended, WorldError> = if std::env::var_os(RESUME).is_some() {
        resume(config, |r| eprintln!("resumed image {} as life {}", r.sequence, r.generation))
    } else {
        run_with(config, program::main, &plan)
    };
    match ended {
        Ok(e) => ExitCode::from(e.code as u8),
        Err(e) => {
            eprintln!("{e}");
            ExitCode::from(70)
        }
    }
}

/// How a life ended: whether it was killed, its exit code, what it said.
struct Life {
    killed: bool,
    code: Option<i32>,
    said: String,
}

fn live(dir: &Path, resumed: bool, kill: &str) -> Life {
    let mut c = Command::new(std::env::current_exe().expect("known"));
    c.env(DIR, dir).env(KILL, kill).env_remove("TESTKIT_CHILD").stdin(Stdio::null());
    if resumed {
        c.env(RESUME, "1");
    }
    let o = c.output().expect("this program can be run again");
    let said = String::from_utf8_lossy(&o.stderr).into_owned();
    assert!(!said.contains("not as in the image"), "{said}");
    Life { killed: o.status.signal() == Some(9), code: o.status.code(), said }
}

/// Lives on from the store until the program ends, and compares the output.
fn end_well(dir: &Path, what: &str, thoroughly: bool) {
    let images = || std::fs::read_dir(dir.join("store/world")).map_or(0, Iterator::count);
    if images() == 0 {
        // Killed before there was anything to resume: a resume says so, and the user begins again.
        let refused = live(dir, true, "");
        assert!(refused.code == Some(70), "{what}: {}", refused.said);
        let _ = std::fs::remove_dir_all(dir.join("store"));
    }
    let last = live(dir, images() != 0, "");
    assert_eq!(last.code, Some(0), "{what}: {}", last.said);
    let found = std::fs::read_to_string(dir.join("output")).expect("the output");
    assert!(found == oracle(ROUNDS), "{what}: the output differs:\n{found}");
    if !thoroughly {
        return;
    }
    // The end is an image as well: who resumes it hears the same end, and writes nothing twice.
    let again = live(dir, true, "");
    assert_eq!(again.code, Some(0), "{what}, resumed after its end: {}", again.said);
    assert_eq!(std::fs::read_to_string(dir.join("output")).expect("the output"), found, "{what}");
}

/// How often each place is passed in this life.
fn places(dir: &Path, resumed: bool) -> BTreeMap<String, u64> {
    let counted = live(dir, resumed, "count");
    assert_eq!(counted.code, Some(0), "{}", counted.said);
    let mut places = BTreeMap::new();
    for line in counted.said.lines() {
        if let Some(name) = line.strip_prefix("supervisor at ") {
            *places.entry(name.to_owned()).or_default() += 1;
        }
    }
    places
}

fn seed() -> u64 {
    let seed = std::env::var("PEREGRINE_SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("seed {seed}");
    seed
}

/// Does `work` for each of `list`, two at a time.
fn two_by_two<T: Send>(list: Vec<T>, work: impl Fn(T) + Sync) {
    let list = Mutex::new(list.into_iter());
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while let Some(item) = { list.lock().expect("no panic with the lock").next() } {
                    work(item);
                }
            });
        }
    });
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn a_world_killed_at_any_step_of_its_supervisor_goes_on_from_its_store() -> Outcome {
    let mut rng = Rng::new(seed());
    let times = std::env::var("PEREGRINE_TIMES").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let dir = scratch();
    let places = places(dir.path(), false);
    let mut tries = Vec::new();
    for (name, passes) in &places {
        for _ in 0..times {
            // Half of what was counted: another run may take fewer images.
            tries.push(format!("{name}:{}", 1 + rng.below((*passes as usize).div_ceil(2))));
        }
    }
    let missed = Mutex::new(Vec::new());
    let total = tries.len();
    two_by_two(tries, |kill| {
        let dir = scratch();
        let first = live(dir.path(), false, &kill);
        if first.killed {
            end_well(dir.path(), &kill, kill.len().is_multiple_of(4));
        } else {
            assert_eq!(first.code, Some(0), "{kill}: {}", first.said);
            missed.lock().expect("no panic with the lock").push(kill);
        }
    });
    let missed = missed.into_inner().expect("no panic with the lock");
    println!("{} places, {} kills, not reached this time: {missed:?}", places.len(), total - missed.len());
    assert!(missed.len() * 4 <= total, "too few were reached");
    Outcome::Passed
}

fn a_resume_killed_at_any_of_its_steps_can_be_resumed() -> Outcome {
    let mut rng = Rng::new(seed());
    let killed = |rng: &mut Rng| {
        let dir = scratch();
        let first = live(dir.path(), false, &format!("output noted:{}", 1 + rng.below(3)));
        assert!(first.killed, "{}", first.said);
        dir
    };
    let dir = killed(&mut rng);
    let places = places(dir.path(), true);
    let names: Vec<String> = places.into_keys().collect();
    let total = names.len();
    // One life after the other is killed, each at the next place: a resume of a resume of a resume.
    let chains: Vec<_> = names.chunks(6).map(|names| (killed(&mut rng), names.to_vec())).collect();
    let hit = Mutex::new(0);
    two_by_two(chains, |(dir, names)| {
        for name in &names {
            let second = live(dir.path(), true, &format!("{name}:1"));
            assert!(second.killed || second.code == Some(0), "{name}: {}", second.said);
            *hit.lock().expect("no panic with the lock") += u32::from(second.killed);
        }
        end_well(dir.path(), &names.join(", "), true);
    });
    let hit = hit.into_inner().expect("no panic with the lock");
    println!("{total} places of a resume, killed at {hit}");
    assert!(hit as usize * 4 >= total * 3, "too few were reached");
    Outcome::Passed
}

fn an_image_is_resumed_after_twenty_kills_each_before_the_next_image() -> Outcome {
    let mut rng = Rng::new(seed());
    let dir = scratch();
    let first = live(dir.path(), false, &format!("output noted:{}", 1 + rng.below(3)));
    assert!(first.killed, "{}", first.said);
    let images = || std::fs::read_dir(dir.path().join("store/world")).expect("the store").count();
    let before = images();
    for n in 0..20 {
        let life = live(dir.path(), true, "first image in memory:1");
        assert!(life.killed, "kill {n}: {}", life.said);
        assert_eq!(images(), before, "kill {n} came after an image");
    }
    end_well(dir.path(), "twenty kills", true);
    Outcome::Passed
}

fn an_image_of_another_processor_is_refused_with_what_to_do() -> Outcome {
    let dir = scratch();
    // SAFETY: tests of this binary run in processes of their own, with one thread.
    unsafe { std::env::set_var("PEREGRINE_PRETEND_CPU", "1") };
    let first = live(dir.path(), false, "output noted:1");
    assert!(first.killed, "{}", first.said);
    // SAFETY: as above.
    unsafe { std::env::remove_var("PEREGRINE_PRETEND_CPU") };
    let refused = live(dir.path(), true, "");
    assert_eq!(refused.code, Some(70), "{}", refused.said);
    assert_eq!(refused.said.trim().lines().count(), 1, "{}", refused.said);
    assert!(refused.said.contains("the processor was"), "{}", refused.said);
    assert!(
        refused.said.contains("resume on a machine with the same processor features"),
        "{}",
        refused.said
    );
    Outcome::Passed
}

fn main() -> ExitCode {
    if let Some(dir) = std::env::var_os(DIR) {
        return life(Path::new(&dir));
    }
    testkit::main(testkit::tests![
        a_world_killed_at_any_step_of_its_supervisor_goes_on_from_its_store,
        a_resume_killed_at_any_of_its_steps_can_be_resumed,
        an_image_is_resumed_after_twenty_kills_each_before_the_next_image,
        an_image_of_another_processor_is_refused_with_what_to_do,
    ])
}
