//! Whole Worlds are killed, and go on from disk.
//!
//! Each test runs an example program as a user would, kills its supervisor with SIGKILL (which ends every process of the World)
//! at some moment, resumes it, and compares what it wrote with an undisturbed run.

mod examples;

use examples::{as_built, example};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

struct Life<'a> {
    program: &'a Path,
    args: &'a [&'a str],
    env: &'a [(&'a str, &'a str)],
    nodes: &'a [&'a str],
    /// Limits on the address space of each process, one life after the other (`ulimit -v`).
    limits: &'a [&'a str],
    store: &'a Path,
    output: &'a Path,
}

impl Life<'_> {
    /// Starts life number `life`, with one number of nodes after the other.
    fn start(&self, variable: &str, life: usize) -> Child {
        let output = OpenOptions::new().create(true).append(true).open(self.output).expect("output file");
        let limit = self.limits[life % self.limits.len()];
        Command::new("sh")
            .args(["-c", &format!("ulimit -v {limit} && exec \"$0\" \"$@\"")])
            .arg(self.program)
            .args(self.args)
            .env(variable, self.store)
            .env("PEREGRINE_NODES", self.nodes[life % self.nodes.len()])
            .env("PEREGRINE_STORE_INTERVAL", "20")
            .env("PEREGRINE_MOVE_EVERY", "5")
            .envs(self.env.iter().copied())
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts")
    }
}

/// Waits no longer than `limit`; `None` if it still runs then.
fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return Some(status);
        }
        if begun.elapsed() > limit {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn undisturbed(program: &Path, args: &[&str]) -> Vec<u8> {
    let done =
        Command::new(program).args(args).env("PEREGRINE_NODES", "2").output().expect("the program runs");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    done.stdout
}

/// The names of the World's images that are whole.
fn images(store: &Path) -> BTreeSet<OsString> {
    std::fs::read_dir(store.join("world"))
        .map_or_else(|_| BTreeSet::new(), |all| all.filter_map(|e| Some(e.ok()?.file_name())).collect())
}

/// Waits until the store holds an image: before that there is nothing to resume.
fn wait_for_image(store: &Path) {
    let begun = Instant::now();
    while images(store).is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(60), "no image within a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until this life has written `count` images; its status if it ended before.
fn wait_for_images(child: &mut Child, store: &Path, count: usize) -> Option<ExitStatus> {
    let mut seen = images(store);
    let begun = Instant::now();
    let mut written = 0;
    while written < count {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return Some(status);
        }
        assert!(begun.elapsed() < Duration::from_secs(120), "no {count} images within two minutes");
        std::thread::sleep(Duration::from_millis(2));
        let now = images(store);
        written += now.difference(&seen).count();
        seen = now;
    }
    None
}

/// Kills each life some milliseconds after it has written an image, later ones after a few more, until one ends by itself. It goes
/// by images and not by the clock, so that each life gets on, on a machine of any speed.
fn kill_until_done(life: &Life<'_>) -> usize {
    let mut child = life.start("PEREGRINE_STORE", 0);
    for lives in 1..200 {
        let ended = wait_for_images(&mut child, life.store, 1 + lives / 4)
            .or_else(|| wait(&mut child, Duration::from_millis(lives as u64 * 7 % 20)));
        if let Some(status) = ended {
            let mut said = String::new();
            if let Some(mut err) = child.stderr.take() {
                let _ = std::io::Read::read_to_string(&mut err, &mut said);
            }
            assert!(status.success(), "life {lives} ended with {status}: {said}");
            return lives;
        }
        child.kill().expect("kill");
        child.wait().expect("wait");
        child = life.start("PEREGRINE_RESUME", lives);
    }
    panic!("no end in sight after 200 lives")
}

fn survives(program: &Path, args: &[&str], rounds: u32) {
    survives_on(&["2"], &[], program, args, rounds);
}

#[test]
fn what_a_pipe_is_shown_twice_is_said_and_nothing_is_left_out() {
    let program = example("steps");
    // As long as it takes to be killed in the middle, with a part of an image's output shown and the rest not.
    for rounds in [100, 200, 400, 800, 1600].map(|n| n.to_string()) {
        let expected = undisturbed(&program, &[&rounds]);
        let dir = tempfile::tempdir().expect("temporary directory");
        let store = dir.path().join("store");
        let start = |variable: &str, stdout: Stdio| {
            let mut c = Command::new(&program);
            c.arg(&rounds).env(variable, &store).env("PEREGRINE_NODES", "2").stdin(Stdio::null());
            c.env("PEREGRINE_STORE_INTERVAL", "20").stdout(stdout).stderr(Stdio::piped());
            c.spawn().expect("the program starts")
        };
        // It holds a page, and so one write; whoever reads one at a time is always behind.
        let (mut from, to) = std::io::pipe().expect("a pipe");
        peregrine_sys::rustix::pipe::fcntl_setpipe_size(&to, 4096).expect("a small pipe");
        let mut first = start("PEREGRINE_STORE", to.into());
        let mut ended = false;
        let mut shown = Vec::new();
        for _ in 0..4 {
            ended = ended || wait_for_images(&mut first, &store, 1).is_some();
            let mut buffer = [0; 4096];
            let n = from.read(&mut buffer).expect("it reads");
            shown.extend_from_slice(&buffer[..n]);
        }
        ended = ended || wait_for_images(&mut first, &store, 1).is_some();
        first.kill().expect("our own child");
        first.wait().expect("our own child");
        from.read_to_end(&mut shown).expect("it reads");
        assert!(expected.starts_with(&shown));
        if ended {
            continue;
        }
        let second = start("PEREGRINE_RESUME", Stdio::piped()).wait_with_output().expect("our own child");
        let said = String::from_utf8_lossy(&second.stderr);
        assert!(second.status.success() && expected.ends_with(&second.stdout), "{said}");
        let twice =
            (shown.len() + second.stdout.len()).checked_sub(expected.len()).expect("nothing is left out");
        let told = said.lines().find_map(|l| {
            l.strip_prefix("peregrine: the next ")?
                .strip_suffix(" bytes of output may have been shown before")
        });
        let told: usize = told.map_or(0, |n| n.parse().expect("a number"));
        assert!(twice <= told && told <= second.stdout.len(), "{twice} bytes were shown twice\n{said}");
        if twice > 0 {
            return;
        }
    }
    panic!("nothing was ever shown twice");
}

/// Lives fewer than these don't show that an image of a resumed life is resumed.
const LEAST_LIVES: usize = 3;

/// Kills everything again and again; the program works for so many `rounds`, its last argument, and for twice as many whenever
/// it has ended before it was killed twice.
fn survives_on(nodes: &[&str], env: &[(&str, &str)], program: &Path, args: &[&str], rounds: u32) {
    survives_under(&["unlimited"], nodes, env, program, args, rounds);
}

/// The same, under one limit on address space after the other.
fn survives_under(
    limits: &[&str],
    nodes: &[&str],
    env: &[(&str, &str)],
    program: &Path,
    args: &[&str],
    rounds: u32,
) {
    for rounds in (0..8).map(|times| (rounds << times).to_string()) {
        let args = &[args, &[rounds.as_str()]].concat();
        let expected = undisturbed(program, args);
        let dir = tempfile::tempdir().expect("temporary directory");
        let (store, output) = (dir.path().join("store"), dir.path().join("output"));
        let life = Life { program, args, env, nodes, limits, store: &store, output: &output };
        let lives = kill_until_done(&life);
        let found = std::fs::read(&output).expect("output");
        assert!(
            found == expected,
            "after {lives} lives the output differs:\n{}\nexpected:\n{}",
            String::from_utf8_lossy(&found),
            String::from_utf8_lossy(&expected)
        );
        println!("{lives} lives with {rounds} rounds");
        if lives >= LEAST_LIVES {
            return;
        }
    }
    panic!("the program ends too soon to be killed");
}

#[test]
fn output_in_a_file_is_exactly_that_of_an_undisturbed_run_after_many_kills_of_everything() {
    survives(&example("steps"), &[], 120);
}

#[test]
fn every_kind_of_value_is_held_through_kills_of_everything() {
    survives(&example("keeps"), &[], 300);
}

#[test]
fn a_thread_on_a_carried_call_goes_on_in_its_domain_with_any_number_of_nodes() {
    survives_on(&["2", "3", "1"], &[], &example("carried"), &[], 150);
}

#[test]
fn threads_of_all_kinds_go_on_after_kills_of_everything_in_windows_and_packed() {
    let (program, nodes) = (example("kinds"), ["2", "3", "1"]);
    for pack_after in ["0", "5", "86400000"] {
        let env = [("PEREGRINE_WINDOWS", "2"), ("PEREGRINE_PACK_AFTER", pack_after)];
        survives_on(&nodes, &env, &program, &[], 150);
    }
}

#[test]
fn a_program_goes_on_after_kills_of_everything_whatever_kind_its_threads_are() {
    for kind in ["alias", "copy"] {
        let env = [("PEREGRINE_STACK_KIND", kind), ("PEREGRINE_WINDOWS", "1"), ("PEREGRINE_WINDOW", "8192")];
        survives_on(&["2"], &env, &example("steps"), &[], 120);
    }
}

/// Under a limit the slot of `main` is smaller, and tables are shorter: what lies in them does not change by it.
#[test]
fn a_world_goes_on_under_a_tighter_limit_on_address_space_and_under_a_wider_one() {
    let limits = ["1572864", "unlimited", "2097152"];
    let env = [
        ("PEREGRINE_SLOTS", "1"),
        ("PEREGRINE_STACK_KIND", "alias"),
        ("PEREGRINE_WINDOWS", "8"),
        ("PEREGRINE_WINDOW", "8192"),
    ];
    survives_under(&limits, &["2", "3"], &env, &example("steps"), &[], 120);
    // `main` alone, and domains.
    survives_under(&limits, &["2", "3"], &env[..1], &example("carried"), &[], 150);
}

#[test]
fn other_windows_than_those_of_the_image_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (store, output) = (dir.path().join("store"), dir.path().join("output"));
    let program = example("kinds");
    let env = [("PEREGRINE_WINDOWS", "2")];
    let life = Life {
        program: &program,
        args: &["100000"],
        env: &env,
        nodes: &["2"],
        limits: &["unlimited"],
        store: &store,
        output: &output,
    };
    let mut first = life.start("PEREGRINE_STORE", 0);
    wait_for_image(&store);
    first.kill().expect("kill");
    first.wait().expect("wait");
    let done = Command::new(&program)
        .env("PEREGRINE_RESUME", &store)
        .env("PEREGRINE_WINDOWS", "4")
        .output()
        .expect("the program runs");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(!done.status.success() && said.contains("PEREGRINE_WINDOWS"), "{said}");
}

#[test]
fn an_unmodified_javascript_engine_goes_on_after_kills_of_everything() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../js/scripts/identity.js");
    survives(&example("script"), &[script], 4);
}

/// Two scripts, one after the other on the same nodes, preempted all the time and moved every millisecond, in an executable at a
/// fixed address: no randomisation is turned off for it, and nothing is executed twice.
fn crossings(count: u64) {
    let Some(program) = fixed("crossings") else { return };
    let script = |name: &str| format!("{}/../js/scripts/{name}.js", env!("CARGO_MANIFEST_DIR"));
    let (two, identity) = (script("two"), script("identity"));
    let run = |count: u64, store: Option<&Path>| {
        let mut c = Command::new(&program);
        c.args([&count.to_string(), &two, "1", &identity, "2"]).stdin(Stdio::null());
        c.env("PEREGRINE_NODES", "2").env("PEREGRINE_SLICE", "100");
        if let Some(store) = store {
            c.env("PEREGRINE_STORE", store).env("PEREGRINE_MOVE_EVERY", "1");
        }
        let o = c.output().expect("the program runs");
        let said = String::from_utf8_lossy(&o.stderr).into_owned();
        assert!(o.status.success(), "{said}");
        (o.stdout, said)
    };
    let (once, _) = run(0, None);
    let dir = tempfile::tempdir().expect("temporary directory");
    let (all, said) = run(count, Some(&dir.path().join("store")));
    println!("{said}");
    let word = |line: &str| said.lines().find(|l| l.contains(line)).unwrap_or_default().to_owned();
    let numbers: Vec<u64> = word("crossings").split_whitespace().filter_map(|w| w.parse().ok()).collect();
    let [crossed, rounds] = numbers[..] else { panic!("{said}") };
    assert!(crossed >= count, "{said}");
    assert!(said.contains("executed again: false, personality 00000000"), "{said}");
    assert!(
        all == once.repeat(rounds as usize),
        "a script's output changed: {}",
        String::from_utf8_lossy(&all)
    );
}

#[test]
fn scripts_that_cross_a_hundred_times_print_what_they_print_alone() {
    crossings(100);
}

#[test]
#[ignore = "the long form: cargo test --release -- --ignored"]
fn scripts_that_cross_a_thousand_times_print_what_they_print_alone() {
    crossings(1000);
}

/// The example, built as an executable at a fixed address; `None` if that can't be had here.
fn fixed(name: &str) -> Option<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args(["rustc", "--quiet", "--example", name]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    cargo.args(["--", "-C", "relocation-model=static", "-C", "target-feature=+crt-static"]);
    let built = cargo.output().expect("cargo runs");
    if !built.status.success() {
        let said = String::from_utf8_lossy(&built.stderr).into_owned();
        assert!(said.contains("cannot find -lc") || said.contains("unable to find library"), "{said}");
        println!("SKIPPED: the C library is not there for static linking (Debian: libc6-dev)");
        return None;
    }
    let program = as_built(name);
    // The second half of an ELF header's type: 2 is an executable at a fixed address.
    assert_eq!(std::fs::read(&program).expect("the program")[16], 2);
    Some(program)
}

#[test]
fn an_executable_at_a_fixed_address_is_resumed_with_randomisation_on() {
    let Some(program) = fixed("fixed") else { return };
    survives(&program, &[], 120);
}

#[test]
fn an_executable_at_a_fixed_address_starts_children_while_its_threads_are_preempted_and_moved() {
    let Some(program) = fixed("children") else { return };
    let mut child = Command::new(program)
        .envs([("PEREGRINE_NODES", "2"), ("PEREGRINE_SLICE", "100"), ("PEREGRINE_MOVE_EVERY", "1")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let status = wait(&mut child, Duration::from_secs(120));
    let _ = child.kill();
    let done = child.wait_with_output().expect("what it said");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(status.is_some_and(|s| s.success()), "{status:?}: {said}");
    // A thread that is moved away from the stack that libc has mapped for its child crashes its node, and is taken back.
    assert!(!said.contains("crashed"), "{said}");
    assert_eq!(String::from_utf8_lossy(&done.stdout), "600 children\n");
}

#[test]
fn a_store_in_use_another_build_and_a_second_beginning_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (store, output) = (dir.path().join("store"), dir.path().join("output"));
    let program = example("steps");
    let life = Life {
        program: &program,
        args: &["100000"],
        env: &[],
        nodes: &["2"],
        limits: &["unlimited"],
        store: &store,
        output: &output,
    };
    let mut first = life.start("PEREGRINE_STORE", 0);
    wait_for_image(&store);
    let said_to = |program: &Path, variable: &str| {
        let done = Command::new(program)
            .env(variable, &store)
            .stdout(File::create(dir.path().join("other")).expect("file"))
            .stderr(Stdio::piped())
            .output()
            .expect("the program runs");
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(!done.status.success(), "{said}");
        said
    };
    let refused = |program: &Path, variable: &str, word: &str| {
        let said = said_to(program, variable);
        assert!(said.contains(word), "{said}");
    };
    refused(&program, "PEREGRINE_RESUME", "in use by");
    first.kill().expect("kill");
    first.wait().expect("wait");
    // The last of its processes may still be ending.
    let begun = Instant::now();
    while said_to(&program, "PEREGRINE_STORE").contains("in use by") {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "the store is still in use a minute after the kill"
        );
    }
    refused(&program, "PEREGRINE_STORE", "is a store already");
    let said = said_to(&example("demo"), "PEREGRINE_RESUME");
    assert!(said.contains("was written by build") && said.trim_end().lines().count() == 1, "{said}");
    // It names the executable to run instead, which the store keeps.
    let mut bin = std::fs::read_dir(store.join("bin")).expect("the store keeps executables");
    let kept = bin.next().expect("one").expect("its name").path();
    assert!(said.contains(&format!("run {} instead", kept.display())), "{said}");
    let mut again = Life { program: &kept, ..life }.start("PEREGRINE_RESUME", 0);
    assert_eq!(wait_for_images(&mut again, &store, 1), None, "it goes on");
    again.kill().expect("kill");
    again.wait().expect("wait");
}

/// State and parent of a process.
fn stat(pid: u32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut words = stat.rsplit_once(") ")?.1.split(' ');
    Some((words.next()?.chars().next()?, words.next()?.parse().ok()?))
}

fn children(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|p| p.parse().expect("a number")).collect()
}

/// The child of one of the World's nodes that waits, for as long as this looks several times, and its node.
fn waiting_child(world: u32) -> (u32, u32) {
    let begun = Instant::now();
    let mut seen = (0, (0, 0));
    while seen.0 < 10 {
        assert!(begun.elapsed() < Duration::from_secs(120), "no child waits");
        std::thread::sleep(Duration::from_millis(5));
        let mut of_nodes =
            children(world).into_iter().flat_map(|node| children(node).into_iter().map(move |c| (c, node)));
        let waits = of_nodes.find(|(c, _)| stat(*c).is_some_and(|(state, _)| state == 'S'));
        seen = match waits {
            Some(found) if found == seen.1 => (seen.0 + 1, found),
            Some(found) => (1, found),
            None => (0, (0, 0)),
        };
    }
    seen.1
}

#[test]
fn a_child_that_has_not_become_its_program_goes_with_the_node_that_is_killed() {
    let Some(program) = fixed("between") else { return };
    let dir = tempfile::tempdir().expect("temporary directory");
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo is there").success());
    let mut world = Command::new(program)
        .arg(&fifo)
        .env("PEREGRINE_NODES", "2")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let (child, node) = waiting_child(world.id());
    // It is still this program, in its node's memory.
    let exe = |pid: u32| std::fs::read_link(format!("/proc/{pid}/exe")).ok();
    assert_eq!(exe(child), exe(world.id()));
    peregrine_sys::signal::kill(node as i32, peregrine_sys::signal::number::KILL).expect("a node");
    let begun = Instant::now();
    // Killed, it may be left unburied: by an init that waits for nobody.
    while stat(child).is_some_and(|(state, _)| state != 'Z') {
        assert!(begun.elapsed() < Duration::from_secs(60), "it lives on, on a stack that was taken back");
        std::thread::sleep(Duration::from_millis(5));
    }
    // The thread has gone back and starts another, which becomes its program when the pipe is opened.
    let (again, its_node) = waiting_child(world.id());
    assert!(again != child && its_node != node);
    drop(OpenOptions::new().write(true).open(&fifo).expect("somebody reads"));
    let status = wait(&mut world, Duration::from_secs(120));
    let _ = world.kill();
    let done = world.wait_with_output().expect("what it said");
    assert!(status.is_some_and(|s| s.success()), "{status:?}: {}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(String::from_utf8_lossy(&done.stdout), "status 0\n");
}

#[test]
fn a_child_that_has_not_become_its_program_goes_with_the_supervisor() {
    let Some(program) = fixed("between") else { return };
    let dir = tempfile::tempdir().expect("temporary directory");
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo is there").success());
    use peregrine_sys::signal::number::{KILL, STOP, TERM};
    // Stopped, a zygote still does what it has to.
    for (signal, stops_zygote) in [(TERM, false), (KILL, false), (KILL, true)] {
        let mut world = Command::new(&program)
            .arg(&fifo)
            .env("PEREGRINE_NODES", "2")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program starts");
        let (child, _) = waiting_child(world.id());
        let all: Vec<u32> = [children(world.id()), vec![child]].concat();
        // It was forked first.
        let zygote = *all.iter().min().expect("a zygote and nodes");
        if stops_zygote {
            peregrine_sys::signal::kill(zygote as i32, STOP).expect("a zygote");
        }
        peregrine_sys::signal::kill(world.id() as i32, signal).expect("our own child");
        world.wait().expect("our own child");
        let begun = Instant::now();
        for pid in all {
            while stat(pid).is_some_and(|(state, _)| state != 'Z') {
                assert!(begun.elapsed() < Duration::from_secs(60), "{pid} lives on (the child is {child})");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        println!("all gone {:?} after signal {signal}", begun.elapsed());
    }
}
