//! Programs that threads have started when a node is killed: they are the kernel's, no image holds them, and no rollback takes them back.

use peregrine::{Builder, checkpoint, node_id, sleep, tally};
use peregrine_sys::signal::{self, number};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ECHILD: Option<i32> = Some(10);
/// Long enough for a slow machine that does other things.
const PATIENCE: Duration = Duration::from_secs(120);

fn wait_until(what: &str, happened: impl Fn() -> bool) {
    let begun = Instant::now();
    while !happened() {
        assert!(begun.elapsed() < PATIENCE, "it did not happen in {PATIENCE:?}: {what}");
        sleep(Duration::from_millis(5));
    }
}

/// Ends that node's process, for the first life only: a rollback follows.
fn is_killed_in_the_first_life(node: u32) {
    if tally().rollbacks == 0 {
        signal::kill(node as i32, number::KILL).unwrap();
        sleep(PATIENCE);
    }
    assert_eq!(tally().rollbacks, 1);
}

/// The processes of both nodes.
fn both() -> [u32; 2] {
    let one = std::process::id();
    loop {
        // A node that has nothing to do may have taken the thread.
        let there = Builder::new().node(1 - node_id()).spawn(|_: ()| std::process::id(), ()).unwrap();
        let other = there.join().unwrap();
        if other != one {
            return [one, other];
        }
    }
}

/// The node that started the process, and the other one.
fn parent_and_other(child: u32, both: [u32; 2]) -> [u32; 2] {
    let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap();
    let parent = stat.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap().parse().unwrap();
    assert!(both.contains(&parent));
    [parent, if both[0] == parent { both[1] } else { both[0] }]
}

/// Whether the process runs: not gone, and no zombie.
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// Says what it hears.
fn echoes() -> Child {
    let mut command = Command::new("sh");
    command.args(["-c", "read word; echo heard $word"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

fn echo_of(child: &mut Child, word: &str) -> String {
    writeln!(child.stdin.take().unwrap(), "{word}").unwrap();
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    said
}

#[peregrine::test(nodes = 2, image_interval_ms = 3_600_000)]
fn a_child_of_a_dead_node_lives_on_and_who_waits_for_it_is_told_that_there_is_none() {
    let both = both();
    let mut child = echoes();
    let [parent, _] = parent_and_other(child.id(), both);
    checkpoint();
    is_killed_in_the_first_life(parent);
    // It is the same, and hears and is heard as before: the pipes are in the image.
    assert!(runs(child.id()));
    assert_eq!(child.try_wait().unwrap_err().raw_os_error(), ECHILD);
    assert_eq!(echo_of(&mut child, "on"), "heard on\n");
    wait_until("it ends, and somebody else buries it", || !runs(child.id()));
    // How it ended nobody knows.
    assert_eq!(child.wait().unwrap_err().raw_os_error(), ECHILD);
    assert!(Command::new("true").status().unwrap().success());
}

#[peregrine::test(nodes = 2, image_interval_ms = 3_600_000)]
fn a_child_of_a_node_that_lives_is_waited_for_after_a_rollback() {
    let both = both();
    let mut child = echoes();
    let [_, other] = parent_and_other(child.id(), both);
    checkpoint();
    is_killed_in_the_first_life(other);
    assert_eq!(child.try_wait().unwrap(), None);
    assert_eq!(echo_of(&mut child, "on"), "heard on\n");
    assert!(child.wait().unwrap().success());
}

#[peregrine::test(nodes = 2, image_interval_ms = 3_600_000)]
fn who_waited_for_a_child_since_the_image_can_not_do_so_again() {
    let both = both();
    let mut child = Command::new("true").spawn().unwrap();
    let [_, other] = parent_and_other(child.id(), both);
    checkpoint();
    if tally().rollbacks == 0 {
        assert!(child.wait().unwrap().success());
    }
    is_killed_in_the_first_life(other);
    assert_eq!(child.wait().unwrap_err().raw_os_error(), ECHILD);
}

fn numbers_in(file: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().map(|l| l.parse().unwrap()).collect()
}

#[peregrine::test(nodes = 2, image_interval_ms = 3_600_000)]
fn what_was_started_since_the_image_lives_on_and_is_started_again() {
    let file = std::env::temp_dir().join(format!("peregrine-again-{}", std::os::unix::process::parent_id()));
    checkpoint();
    let mut child =
        Command::new("sh").args(["-c", "echo $$ >> \"$0\"; exec sleep 600"]).arg(&file).spawn().unwrap();
    wait_until("it runs", || numbers_in(&file).contains(&child.id()));
    is_killed_in_the_first_life(std::process::id());
    let all = numbers_in(&file);
    assert_eq!((all.len(), all[1]), (2, child.id()));
    assert!(all.iter().all(|pid| runs(*pid)), "{all:?}");
    for pid in &all {
        signal::kill(*pid as i32, number::KILL).unwrap();
    }
    assert_eq!(child.wait().unwrap().signal(), Some(number::KILL));
    std::fs::remove_file(file).unwrap();
}
