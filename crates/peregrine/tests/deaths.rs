//! What a death leaves behind: no process, no descriptor, no memory, of a node or of the supervisor.

use peregrine::{Builder, checkpoint, sleep, spawn};
use std::time::{Duration, Instant};

unsafe extern "C" {
    fn kill(pid: i32, signo: i32) -> i32;
    fn ptrace(request: u32, pid: i32, address: usize, data: usize) -> i64;
}

/// For a slow machine that does other things.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until it has happened; how long that took.
fn wait_until(what: &str, mut happened: impl FnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !happened() {
        assert!(begun.elapsed() < PATIENCE, "it did not happen in {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    begun.elapsed()
}

fn computes(ms: u64) {
    let begun = Instant::now();
    let mut x = 1u64;
    while begun.elapsed() < Duration::from_millis(ms) {
        for i in 0..20_000u64 {
            x = std::hint::black_box(x.wrapping_mul(i | 1));
        }
    }
}

/// Has its own node killed at a chosen point, once. The mark that tells is made by who kills, outside of the World: were it made
/// here, an image could fall between the look at it and the kill, and every life from that image would end at once.
fn dies_once(mark: String) -> u32 {
    let kill = format!("[ -e {mark} ] || {{ : > {mark} && kill -9 $PPID; }}");
    // Nothing is redirected: a descriptor opened for that would stay open if the node died before it was closed.
    let _ = std::process::Command::new("sh").args(["-c", &kill]).status();
    1
}

#[peregrine::test(nodes = 2, timeout_s = 300)]
fn thirty_deaths_leak_no_process_and_no_descriptor() {
    let supervisor = std::os::unix::process::parent_id();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let held = || std::fs::read_dir(format!("/proc/{supervisor}/fd")).unwrap().count();
    let children = || {
        std::fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"))
            .unwrap()
            .split_whitespace()
            .count()
    };
    let marks = std::env::temp_dir().join(format!("peregrine-dies-{supervisor}"));
    std::fs::create_dir_all(&marks).unwrap();
    let mark = |i: u32| marks.join(i.to_string()).display().to_string();
    spawn(dies_once, mark(1000)).join().unwrap();
    let before = (descriptors(), held(), children());
    for i in 0..30 {
        spawn(dies_once, mark(i)).join().unwrap();
    }
    checkpoint();
    let _ = std::fs::remove_dir_all(&marks);
    // Nodes may be being replaced at this very moment. One or two either way are what the supervisor has open for a moment; thirty
    // deaths would show.
    let few = |a: usize, b: usize| a <= b + 2;
    let begun = Instant::now();
    loop {
        let after = (descriptors(), held(), children());
        if few(after.0, before.0) && few(after.1, before.1) && after.2 == before.2 {
            break;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "descriptors of the nodes, of the supervisor, and its children: {after:?} after {before:?}"
        );
        sleep(Duration::from_millis(10));
    }
}

// Nothing is due for an hour.
#[peregrine::test(program, nodes = 2, image_interval_ms = 3_600_000, timeout_s = 60)]
fn loses_five_nodes() {
    let marks = std::env::var("XDG_RUNTIME_DIR").unwrap();
    for i in 0..5 {
        spawn(dies_once, format!("{marks}/{i}")).join().unwrap();
    }
    println!("{} times back", peregrine::tally().rollbacks);
}

#[test]
fn a_dead_node_is_replaced_at_once_not_when_something_else_is_due() {
    // In a directory of its own: other Worlds look for all that there are, and would wake this one.
    let dir = tempfile::tempdir().unwrap();
    let outcome = loses_five_nodes().run_with(&[("XDG_RUNTIME_DIR", dir.path().to_str().unwrap())]);
    assert!(outcome.success(), "{outcome}");
    assert_eq!(outcome.stdout, "5 times back\n", "{outcome}");
}

#[peregrine::test(program, nodes = 3)]
fn runs_for_minutes() {
    let hogs: Vec<_> = (0..3).map(|i| Builder::new().node(i).spawn(computes, 600_000).unwrap()).collect();
    for h in hogs {
        h.join().unwrap();
    }
}

#[peregrine::test(program, nodes = 2, kill_every_ms = 50, image_interval_ms = 0)]
fn is_killed_once_without_images() {
    let mark =
        std::env::temp_dir().join(format!("peregrine-announced-{}", std::os::unix::process::parent_id()));
    if !mark.exists() {
        std::fs::write(&mark, b"").unwrap();
        computes(10_000);
    }
    let _ = std::fs::remove_file(&mark);
}

#[test]
fn without_images_a_death_is_announced_as_a_way_back_to_the_start() {
    let outcome = is_killed_once_without_images().run();
    assert!(outcome.success(), "{outcome}");
    assert!(outcome.stderr.contains("the program goes back to its start"), "{outcome}");
}

fn processes_of_group(group: i32) -> Vec<String> {
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|e| std::fs::read_to_string(e.ok()?.path().join("stat")).ok())
        .filter(|stat| {
            let after = stat.rsplit(')').next().unwrap_or("");
            let mut fields = after.split_whitespace();
            let state = fields.next().unwrap_or("");
            fields.nth(1).and_then(|g| g.parse().ok()) == Some(group) && state != "Z"
        })
        .collect()
}

// Within a second on a machine that has the time. How long it takes is printed; asserted is only that nothing hangs (`PATIENCE`).
#[test]
fn no_process_is_left_after_the_supervisor_is_killed() {
    let running = runs_for_minutes().start(&[]);
    let pid = running.pid();
    wait_until("supervisor, zygote and three nodes are up", || processes_of_group(pid).len() == 5);
    // SAFETY: only numbers are passed.
    unsafe { kill(pid, 9) };
    let took = wait_until("all processes are gone", || processes_of_group(pid).is_empty());
    println!("gone after {took:?}");
    assert_eq!(running.wait().signal, Some(9));
}

/// Processes of the group with these letters for their state.
fn in_state(group: i32, state: &str) -> usize {
    let is = |stat: &String| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(state));
    processes_of_group(group).iter().filter(|stat| is(stat)).count()
}

#[test]
fn a_zygote_that_a_debugger_holds_outlives_the_supervisor_only_until_it_is_let_go() {
    const SEIZE: u32 = 0x4206;
    const INTERRUPT: u32 = 0x4207;
    const DETACH: u32 = 17;
    let running = runs_for_minutes().start(&[]);
    let pid = running.pid();
    wait_until("supervisor, zygote and three nodes are up", || processes_of_group(pid).len() == 5);
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    // It was forked first.
    let zygote: Option<i32> = children.split_whitespace().filter_map(|p| p.parse().ok()).min();
    // SAFETY: these requests read and write no memory of ours.
    let held = zygote.filter(|zygote| unsafe {
        ptrace(SEIZE, *zygote, 0, 0) == 0 && ptrace(INTERRUPT, *zygote, 0, 0) == 0
    });
    if held.is_some() {
        wait_until("it is held", || in_state(pid, "t") == 1);
    }
    // SAFETY: only numbers are passed.
    unsafe { kill(pid, 9) };
    if let Some(zygote) = held {
        wait_until("the others are gone", || processes_of_group(pid).len() == 1);
        assert_eq!(in_state(pid, "t"), 1);
        // SAFETY: as above.
        assert_eq!(unsafe { ptrace(DETACH, zygote, 0, 0) }, 0);
    } else {
        println!("SKIPPED: needs ptrace, and the kernel's list of children (CONFIG_PROC_CHILDREN)");
    }
    wait_until("all processes are gone", || processes_of_group(pid).is_empty());
    running.wait();
}

#[test]
#[ignore = "waits for minutes, unless the next test kills it"]
fn a_harness_that_waits() {
    let running = runs_for_minutes().start(&[]);
    println!("World {}", running.pid());
    running.wait();
}

#[test]
fn no_process_is_left_after_the_test_harness_is_killed() {
    use std::io::{BufRead, BufReader};
    let mut harness = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_harness_that_waits", "--ignored", "--nocapture"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(harness.stdout.take().unwrap()).lines();
    let mut worlds =
        lines.map_while(Result::ok).filter_map(|l| l.split_once("World ")?.1.trim().parse().ok());
    let world: i32 = worlds.next().expect("it tells the World's process");
    wait_until("supervisor, zygote and three nodes are up", || processes_of_group(world).len() == 5);
    harness.kill().unwrap();
    harness.wait().unwrap();
    wait_until("all processes are gone", || processes_of_group(world).is_empty());
}

#[peregrine::test(program, nodes = 2, image_interval_ms = 100)]
fn holds_memory_for_minutes() {
    let held = vec![7u8; 400 << 20];
    checkpoint();
    println!("held");
    sleep(Duration::from_secs(600));
    assert_eq!(held[12345], 7);
}

/// Shared memory in use on this machine, in MiB.
fn shared_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|l| l.starts_with("Shmem:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
fn no_memory_is_left_after_the_supervisor_is_killed() {
    // Other tests use some meanwhile, and give it back; this World has 800 MiB, its image in memory included.
    let mut before = shared_memory();
    let running = holds_memory_for_minutes().start(&[]);
    wait_until("it has its memory", || {
        before = before.min(shared_memory());
        shared_memory() >= before + 700
    });
    let during = shared_memory();
    // SAFETY: only numbers are passed.
    unsafe { kill(running.pid(), 9) };
    let took = wait_until("its memory is given back", || shared_memory() + 400 < during);
    println!("{before} MiB before, {during} MiB during, given back after {took:?}");
    running.wait();
}

#[test]
fn a_request_to_terminate_stops_everything() {
    let running = runs_for_minutes().start(&[]);
    let pid = running.pid();
    wait_until("supervisor, zygote and three nodes are up", || processes_of_group(pid).len() == 5);
    // SAFETY: only numbers are passed.
    unsafe { kill(pid, 15) };
    let outcome = running.wait();
    assert_eq!(outcome.code, Some(128 + 15), "{outcome}");
    assert_eq!(processes_of_group(pid), Vec::<String>::new());
}
