//! Kill -9 before every single step that touches the disk, and look at what is left.
//!
//! A first child runs to the end and counts the steps. Then for each step a child is started on a fresh copy of the
//! store and kills itself there. What the child was told is durable it has said on its standard output; so the oracle
//! is: the store opens, its latest image is whole and is the last that was acknowledged or the one in the making, every
//! file is intact, and the next life commits.
//!
//! The child is this same test, started again with the variables below.

mod scene;

use peregrine_store::{Result, Store, StoreError, step};
use peregrine_sys::rustix::process::{Signal, getpid, kill_process};
use scene::*;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::env;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};

const DIR: &str = "PEREGRINE_TEST_DIR";
const KILL_AT: &str = "PEREGRINE_TEST_KILL_AT";

/// Says something to the parent, around the test harness's capture.
fn say(what: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\nchild: {what}").unwrap();
    out.flush().unwrap();
}

/// In the child: runs `life` on the store, killed at the step that the parent names.
fn child(life: fn(&Path) -> Result<()>) -> bool {
    let Ok(dir) = env::var(DIR) else { return false };
    let kill_at: u64 = env::var(KILL_AT).unwrap().parse().unwrap();
    let steps = Rc::new(Cell::new(0));
    let counted = steps.clone();
    let _watching = step::watch(move |step| {
        if counted.get() == kill_at {
            say(&format!("dies before {} {}", step.name, step.path.display()));
            kill_process(getpid(), Signal::KILL).unwrap();
        }
        counted.set(counted.get() + 1);
        Ok(())
    });
    life(Path::new(&dir)).unwrap();
    say(&format!("steps {}", steps.get()));
    true
}

/// In the parent: what the child said, and whether it was killed.
fn run(test: &str, dir: &Path, kill_at: u64) -> (Vec<String>, bool) {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(DIR, dir)
        .env(KILL_AT, kill_at.to_string())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = text.lines().filter_map(|line| line.strip_prefix("child: ")).map(str::to_owned).collect();
    let was_killed = output.status.signal() == Some(Signal::KILL.as_raw());
    assert!(was_killed || output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    (said, was_killed)
}

fn acknowledged(said: &[String]) -> Option<u64> {
    said.iter().filter_map(|line| line.strip_prefix("acknowledged ")?.parse().ok()).next_back()
}

/// Kills `test`'s child at each of its steps. `start` makes the directory that it starts from; `after` checks what is left,
/// given the last image that was acknowledged.
fn kill_at_every_step(test: &str, start: &Path, after: impl Fn(&Path, Option<u64>)) {
    // One at a time: a child that another test is starting holds, until its exec, what this process has open, and
    // with it the lock of a store that this test has just closed.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let scratch = scratch();
    let dir = scratch.path().join("store");
    let prepare = || {
        let _ = std::fs::remove_dir_all(&dir);
        copy(start, &dir);
    };
    prepare();
    let (said, _) = run(test, &dir, u64::MAX);
    let steps: u64 = said.iter().find_map(|line| line.strip_prefix("steps ")).unwrap().parse().unwrap();
    after(&dir, acknowledged(&said));
    let mut places = BTreeMap::<String, u64>::new();
    for kill_at in 0..steps {
        prepare();
        let (said, was_killed) = run(test, &dir, kill_at);
        assert!(was_killed, "step {kill_at} of {steps} was not reached: {said:?}");
        let place = said.iter().find_map(|line| line.strip_prefix("dies before ")).unwrap();
        *places.entry(place.rsplit_once(' ').unwrap().0.to_owned()).or_default() += 1;
        println!("killed before {place}");
        after(&dir, acknowledged(&said));
    }
    println!("{steps} kill points: {places:?}");
    assert!(steps > 5);
}

#[test]
fn a_life_killed_anywhere_leaves_the_old_image_or_the_new_one_whole() {
    if child(|dir| {
        let (mut store, generation, _) = go_on(dir)?;
        store.set_max_deltas(2);
        for _ in 0..2 {
            let committed = commit_next(&mut store, generation)?;
            say(&format!("acknowledged {}", committed.sequence));
            store.mark_released(committed.output_end - 2)?;
        }
        store.prune()?;
        Ok(())
    }) {
        return;
    }
    let scratch = scratch();
    let start = store_with(scratch.path(), 3);
    kill_at_every_step(
        "a_life_killed_anywhere_leaves_the_old_image_or_the_new_one_whole",
        &start,
        |dir, acknowledged| {
            let acknowledged = acknowledged.unwrap_or(3);
            let found = check_store(dir).unwrap();
            assert!(
                found == acknowledged || found == acknowledged + 1,
                "{acknowledged} acknowledged, {found} found"
            );
            assert!(files(&dir.join("tmp")).is_empty(), "what the dead life left unfinished is gone");
            let (mut store, generation, _) = go_on(dir).unwrap();
            assert_eq!(commit_next(&mut store, generation).unwrap().sequence, seq(found + 1));
            store.prune().unwrap();
            drop(store);
            assert_eq!(check_store(dir).unwrap(), found + 1);
        },
    );
}

#[test]
fn a_creation_killed_anywhere_leaves_a_store_or_a_place_for_one() {
    if child(|dir| {
        let mut store = create(dir.parent().unwrap(), dir)?;
        store.claim_generation(None)?;
        Ok(())
    }) {
        return;
    }
    let scratch = scratch();
    kill_at_every_step(
        "a_creation_killed_anywhere_leaves_a_store_or_a_place_for_one",
        scratch.path(),
        |dir, _| {
            match Store::open(dir) {
                Ok(store) => drop(store),
                Err(StoreError::NotAStore { .. }) => drop(create(dir.parent().unwrap(), dir).unwrap()),
                Err(other) => panic!("{other}"),
            }
            let (mut store, generation, from) = go_on(dir).unwrap();
            assert_eq!(from, 0);
            commit_next(&mut store, generation).unwrap();
            drop(store);
            assert_eq!(check_store(dir).unwrap(), 1);
        },
    );
}
