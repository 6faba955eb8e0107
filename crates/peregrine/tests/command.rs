//! The command as a user has it: what it prints, its exit codes, and what it leaves behind.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Long enough for a slow machine that does other things; no test measures speed.
const PATIENCE: Duration = Duration::from_secs(120);

/// A directory of its own for the control sockets of a test: it sees no other World, and no other test sees its.
struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a temporary directory") }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_peregrine"));
        c.args(args).env("XDG_RUNTIME_DIR", self.dir.path()).stdin(Stdio::null());
        for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("PEREGRINE_")) {
            c.env_remove(name);
        }
        c
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the command starts")
    }

    /// A World that runs for longer than any test: it waits for a kill that does not come.
    fn long_world(&self) -> World {
        let child = self
            .command(&["run", "cg", "--class", "B", "--threads", "3", "--quiet"])
            .args(["--kill-every", "1d", "--kills", "1"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the command starts");
        let world = World { child };
        wait_until("the World is seen and its threads run", || self.status().contains("\"rank 2\""));
        world
    }

    fn status(&self) -> String {
        text(&self.run(&["ps", "--json"]).stdout)
    }

    fn sockets(&self) -> Vec<PathBuf> {
        let dir = std::fs::read_dir(self.dir.path().join("peregrine"));
        dir.into_iter().flatten().flatten().map(|e| e.path()).collect()
    }
}

/// A running supervisor; killed at the end of the test at the latest.
struct World {
    child: Child,
}

impl World {
    /// The supervisor's processes: zygote and nodes.
    fn processes(&self) -> Vec<u32> {
        let me = self.child.id().to_string();
        let all = std::fs::read_dir("/proc").expect("/proc is mounted").flatten();
        all.filter_map(|e| e.file_name().to_str()?.parse().ok())
            .filter(|pid| parent(*pid) == Some(me.clone()))
            .collect()
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([name, &self.child.id().to_string()]).status();
        assert!(sent.expect("kill(1) is there").success());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// State and parent of a process, from `/proc/PID/stat`; `None` if it is gone or a zombie.
fn parent(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    (fields.next()? != "Z").then_some(())?;
    fields.next().map(str::to_owned)
}

fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !happened() {
        assert!(begun.elapsed() < PATIENCE, "it did not happen in {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn said(o: &Output) -> String {
    format!("{}\n{}", text(&o.stdout), text(&o.stderr))
}

#[test]
fn cg_is_verified_while_its_nodes_are_killed_and_its_threads_moved() {
    let o = Scene::new().run(&["run", "cg", "--class", "S", "--nodes", "2", "--kill-every", "50ms"]);
    let said = said(&o);
    assert!(o.status.success(), "{said}");
    for line in [
        "VERIFICATION SUCCESSFUL",
        "    iteration           ||r||                 zeta",
        " kills ",
        " moves ",
    ] {
        assert!(said.contains(line), "{line:?} is missing:\n{said}");
    }
    assert!(!said.contains("crashed"), "{said}");
}

#[test]
fn the_report_in_json_has_the_counts_that_the_exit_code_rests_on() {
    let o =
        Scene::new().run(&["run", "cg", "--class", "S", "--kill-every", "40ms", "--kills", "4", "--json"]);
    let said = said(&o);
    assert!(o.status.success(), "{said}");
    let report: serde_json::Value =
        serde_json::from_slice(&o.stdout).expect("one JSON object and nothing else");
    assert_eq!(report["verified"], true, "{said}");
    assert!(report["kills"].as_u64() >= Some(4), "{said}");
    assert!(report["kills_of_a_running_thread"].as_u64() >= Some(2), "{said}");
    assert!(report["moves"].as_u64() >= Some(50), "{said}");
    assert!(report["rollbacks"].as_u64() >= Some(4), "{said}");
    assert!(report["milliseconds"]["recovery_median"].as_f64() > Some(0.0), "{said}");
}

#[test]
fn too_few_kills_are_a_failure_that_says_what_is_missing() {
    let o = Scene::new().run(&[
        "run",
        "cg",
        "--class",
        "S",
        "--kill-every",
        "1h",
        "--kills",
        "1",
        "--moves",
        "0",
        "--most-runs",
        "1",
    ]);
    assert_eq!(o.status.code(), Some(1), "{}", said(&o));
    assert!(text(&o.stdout).contains("VERIFICATION SUCCESSFUL"), "{}", said(&o));
    assert!(text(&o.stderr).contains("verified, but only 0 of 1 kills"), "{}", said(&o));
}

#[test]
fn options_that_make_no_sense_are_refused_with_what_to_do() {
    let scene = Scene::new();
    for (args, expected) in [
        (&["run", "cg", "--class", "Z"][..], "use S, W, A or B"),
        (&["run", "cg", "--nodes", "0"], "1..=64"),
        (&["run", "cg", "--kill-every", "soon"], "50ms"),
        (&["run", "cg", "--kill-every", "10ms"], "make --image-interval the shorter one"),
        (&["run", "cg", "--kill-every", "50ms", "--image-interval", "0"], "give --image-interval"),
        (&["run", "cg", "--nodes", "1", "--move-every", "5ms"], "--nodes 2"),
    ] {
        let o = scene.run(args);
        assert_eq!(o.status.code(), Some(2), "{args:?}: {}", said(&o));
        assert!(text(&o.stderr).contains(expected), "{args:?}: {}", said(&o));
    }
}

#[test]
fn every_command_tells_its_options_and_refuses_others() {
    let scene = Scene::new();
    for command in ["run cg", "run js", "resume", "ps", "migrate", "checkpoint", "doctor"] {
        let with = |word| scene.run(&[command.split(' ').collect::<Vec<_>>(), vec![word]].concat());
        let o = with("--help");
        assert!(
            o.status.success() && text(&o.stdout).contains("Usage: peregrine"),
            "{command}: {}",
            said(&o)
        );
        let o = with("--no-such-option");
        assert_eq!(o.status.code(), Some(2), "{command}: {}", said(&o));
        assert!(
            text(&o.stderr).contains("unexpected argument '--no-such-option'"),
            "{command}: {}",
            said(&o)
        );
    }
}

/// Name and description of each variant of `enum Suite` in a source file.
fn suites_of(source: &Path) -> Vec<(String, String)> {
    let text = std::fs::read_to_string(source).expect("the workspace's own source");
    let (_, suites) = text.split_once("enum Suite {\n").expect("it has suites");
    let (suites, _) = suites.split_once("\n}").expect("they end");
    let mut found = Vec::new();
    let mut about = "";
    // The variants' own lines are indented by four; their options by more.
    for line in suites.lines().filter_map(|l| l.strip_prefix("    ")) {
        match line.strip_prefix("/// ") {
            Some(text) => about = text,
            None if line.starts_with(char::is_uppercase) => {
                let name = line.split(|c: char| !c.is_alphanumeric()).next().expect("a name");
                found.push((name.to_lowercase(), about.to_owned()));
            }
            None => {}
        }
    }
    found
}

#[test]
fn bench_and_soak_tell_what_they_offer_before_they_are_built() {
    let scene = Scene::new();
    // Alone in a directory: a build may have left the programs beside the command.
    let alone = scene.dir.path().join("peregrine-alone");
    std::fs::copy(env!("CARGO_BIN_EXE_peregrine"), &alone).expect("copied");
    let run = |args: &[&str]| Command::new(&alone).args(args).output().expect("it starts");
    for name in ["bench", "soak"] {
        let o = run(&[name, "--help"]);
        assert!(o.status.success(), "{}", said(&o));
        let help = text(&o.stdout);
        let own =
            suites_of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(name).join("src/main.rs"));
        assert!(own.len() >= 5, "{own:?}");
        let listed = help.lines().skip_while(|l| *l != "Suites:").skip(1).take_while(|l| !l.is_empty());
        let listed: Vec<_> = listed
            .filter_map(|l| l.trim().split_once(' '))
            .map(|(suite, about)| (suite.to_owned(), about.trim().to_owned()))
            .collect();
        assert_eq!(listed, own, "what `peregrine {name} --help` says and what {name} says");
        let o = run(&[name]);
        assert_eq!(o.status.code(), Some(2), "{}", said(&o));
        let o = run(&[name, "call"]);
        assert_eq!(o.status.code(), Some(70), "{}", said(&o));
        assert!(text(&o.stderr).contains(&format!("cargo run --release -p {name} -- call")), "{}", said(&o));
        let o = run(&[name, "no-such"]);
        assert_eq!(o.status.code(), Some(2), "{}", said(&o));
        assert!(text(&o.stderr).contains("has no suite"), "{}", said(&o));
    }
}

#[test]
fn doctor_finds_that_worlds_can_run_where_they_do() {
    let o = Scene::new().run(&["doctor"]);
    assert!(o.status.success(), "{}", said(&o));
    assert!(text(&o.stdout).contains("Worlds can run here."), "{}", said(&o));
    let o = Scene::new().run(&["doctor", "--json"]);
    let findings: serde_json::Value = serde_json::from_slice(&o.stdout).expect("JSON");
    assert!(findings.as_array().is_some_and(|f| f.len() > 5), "{}", said(&o));
}

#[test]
fn ps_migrate_and_checkpoint_reach_a_living_world() {
    let scene = Scene::new();
    let world = scene.long_world();
    let o = scene.run(&["ps"]);
    let table = text(&o.stdout);
    assert!(o.status.success() && table.contains(&format!("World {}", world.child.id())), "{}", said(&o));
    assert!(table.contains("main, waits for the end of thread"), "{table}");

    for node in ["1", "0", "1"] {
        let o = scene.run(&["migrate", "rank 1", node]);
        assert!(o.status.success(), "{}", said(&o));
        assert!(text(&o.stdout).contains(&format!("node {node}")), "{}", said(&o));
    }
    for (args, expected) in [
        (&["migrate", "rank 1", "9"][..], "nodes 0 to 1"),
        (&["migrate", "nobody", "0"], "no thread \"nobody\" is alive"),
        (&["checkpoint", "--world", "1"], "is no World of yours"),
    ] {
        let o = scene.run(args);
        assert_eq!(o.status.code(), Some(1), "{args:?}: {}", said(&o));
        assert!(text(&o.stderr).contains(expected), "{args:?}: {}", said(&o));
    }
    let o = scene.run(&["checkpoint"]);
    assert!(o.status.success() && text(&o.stdout).contains("is complete"), "{}", said(&o));
}

#[test]
fn a_client_that_neither_reads_nor_leaves_holds_up_nobody() {
    use std::io::Write;
    let scene = Scene::new();
    let world = scene.long_world();
    let path = scene.dir.path().join(format!("peregrine/{}.sock", world.child.id()));
    let stuck: Vec<_> = (0..40)
        .map(|_| {
            let mut s = std::os::unix::net::UnixStream::connect(&path).expect("it listens");
            for _ in 0..50 {
                let _ = s.write_all(b"{\"ask\":\"status\"}\n");
            }
            s
        })
        .collect();
    let o = scene.run(&["checkpoint"]);
    assert!(o.status.success(), "{}", said(&o));
    drop(stuck);
    // Too long, and not JSON.
    let mut s = std::os::unix::net::UnixStream::connect(&path).expect("it listens");
    let _ = s.write_all(&[b'x'; 100_000]);
    let mut s = std::os::unix::net::UnixStream::connect(&path).expect("it listens");
    s.write_all(b"{}\n").expect("it reads");
    let mut answer = String::new();
    BufReader::new(s).read_line(&mut answer).expect("it answers");
    assert!(answer.contains("refused"), "{answer}");
}

/// Ends a World with the signal; its processes and its socket's name.
fn end_by(scene: &Scene, signal: &str) -> (Vec<u32>, Option<i32>, Option<i32>) {
    let mut world = scene.long_world();
    let processes = world.processes();
    assert_eq!(processes.len(), 3, "a zygote and two nodes");
    world.signal(signal);
    let status = world.child.wait().expect("it ends");
    (processes, status.code(), status.signal())
}

#[test]
fn ctrl_c_and_sigterm_leave_no_process_and_no_name() {
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let scene = Scene::new();
        let (processes, ended, _) = end_by(&scene, signal);
        assert_eq!(ended, Some(code), "{signal}");
        wait_until("its processes are gone", || processes.iter().all(|p| parent(*p).is_none()));
        assert_eq!(scene.sockets(), Vec::<PathBuf>::new(), "{signal}");
    }
}

#[test]
fn killing_the_supervisor_leaves_no_process_and_the_next_command_removes_the_name() {
    let scene = Scene::new();
    let (processes, _, signal) = end_by(&scene, "-KILL");
    assert_eq!(signal, Some(9));
    wait_until("its processes are gone", || processes.iter().all(|p| parent(*p).is_none()));
    assert_eq!(scene.sockets().len(), 1, "nobody was left to remove the name");
    let o = scene.run(&["ps"]);
    assert!(o.status.success() && text(&o.stderr).contains("no World of yours runs"), "{}", said(&o));
    assert_eq!(scene.sockets(), Vec::<PathBuf>::new());
}

#[test]
fn a_directory_that_others_may_enter_is_not_used() {
    use std::os::unix::fs::PermissionsExt;
    let scene = Scene::new();
    let dir = scene.dir.path().join("peregrine");
    std::fs::create_dir(&dir).expect("made");
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o755)).expect("changed");
    let o = scene.run(&["ps"]);
    assert_eq!(o.status.code(), Some(70), "{}", said(&o));
    assert!(text(&o.stderr).contains("others may enter it"), "{}", said(&o));
}

#[test]
fn a_world_that_was_killed_as_a_whole_goes_on_from_its_store() {
    let scene = Scene::new();
    let store = scene.dir.path().join("store");
    let store = store.to_str().expect("a plain path");
    let mut args = vec!["run", "cg", "--class", "B", "--threads", "2", "--quiet", "--store", store];
    // It runs until it is killed, however fast the machine is.
    args.extend(["--kill-every", "1d", "--kills", "1"]);
    let child = scene.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    let world = World { child };
    wait_until("its threads run", || scene.status().contains("\"rank 1\""));
    let o = scene.run(&["checkpoint"]);
    assert!(text(&o.stdout).contains("on disk"), "{}", said(&o));
    world.signal("-KILL");
    drop(world);

    let child = scene.command(&["resume", store]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut world = World { child: child.expect("it starts") };
    let mut line = String::new();
    let stderr = world.child.stderr.take().expect("piped");
    BufReader::new(stderr).read_line(&mut line).expect("it speaks");
    assert!(line.contains("going on with image"), "{line}");
    wait_until("its threads run again", || scene.status().contains("\"rank 1\""));
    assert!(Path::new(store).is_dir());
}

#[test]
fn a_resumed_benchmark_ends_without_being_killed_again() {
    let scene = Scene::new();
    let store = scene.dir.path().join("store");
    let store = store.to_str().expect("a plain path");
    let args =
        ["run", "cg", "--class", "S", "--kill-every", "60ms", "--kills", "500", "--quiet", "--store", store];
    let child = scene.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    let world = World { child };
    wait_until("its threads run", || scene.status().contains("\"rank 1\""));
    let o = scene.run(&["checkpoint"]);
    assert!(text(&o.stdout).contains("on disk"), "{}", said(&o));
    world.signal("-KILL");
    drop(world);
    let o = scene.run(&["resume", store]);
    assert!(o.status.success(), "{}", said(&o));
    assert!(said(&o).contains(" run in "), "{}", said(&o));
}

/// The example of that name. `cargo test` builds it beside the tests; `cargo test --test command` alone does not.
fn example(name: &str) -> PathBuf {
    let tests = std::env::current_exe().expect("known");
    let profile = tests.ancestors().nth(2).expect("target/PROFILE/deps");
    let path = profile.join("examples").join(name);
    if !path.exists() {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--example", name]).current_dir(env!("CARGO_MANIFEST_DIR"));
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        assert!(cargo.status().expect("cargo is there").success());
    }
    path
}

#[test]
fn ps_shows_what_a_thread_does_that_blocks_its_node() {
    let scene = Scene::new();
    let mut command = Command::new(example("blocks"));
    command.env("XDG_RUNTIME_DIR", scene.dir.path()).env("PEREGRINE_NODES", "2").stderr(Stdio::null());
    let _world = World { child: command.spawn().expect("cargo test builds the examples") };
    wait_until("the node counts as blocked", || scene.status().contains("\"blocked\""));
    let o = scene.run(&["ps"]);
    let table = text(&o.stdout);
    assert!(table.contains("node 1 is blocked: thread 1"), "{table}");
    assert!(table.contains("stay_in_the_runtime"), "{table}");
}

/// A script that prints for a few seconds; killed as a whole twice, it must come to the file that an undisturbed run writes.
#[cfg(feature = "js")]
#[test]
fn a_script_that_was_killed_twice_writes_what_an_undisturbed_run_writes() {
    let scene = Scene::new();
    let at = |name: &str| scene.dir.path().join(name).to_str().expect("a plain path").to_owned();
    // Long enough for two kills on this machine, whatever that is.
    for rounds in [400, 1600, 6400, 25_600, 102_400] {
        let file = |name: &str| at(&format!("{rounds}-{name}"));
        let (script, store, out, alone) = (file("s.js"), file("store"), file("out.txt"), file("alone.txt"));
        let source = format!(
            "const k = Symbol('k'); const m = new Map([[k, 0]]); \
             for (let i = 0; i < {rounds}; i++) {{ let x = i; for (let j = 0; j < 20000; j++) x = (x * 31 + j) % 65521; \
             m.set(k, (m.get(k) + x) % 65521); console.log(i, m.get(k)); }}"
        );
        std::fs::write(&script, source).expect("written");
        let lines = || std::fs::read_to_string(&out).map_or(0, |t| t.lines().count());
        let spawn = |args: &[&str]| World {
            child: scene.command(args).stderr(Stdio::null()).spawn().expect("it starts"),
        };
        let mut world = spawn(&["run", "js", &script, "--store", &store, "--out", &out]);
        let mut kills = 0;
        for goal in [50, 150] {
            let mut ended = false;
            wait_until("some lines are out", || {
                ended = world.child.try_wait().is_ok_and(|s| s.is_some());
                ended || lines() >= goal
            });
            if ended {
                break;
            }
            world.signal("-KILL");
            kills += u32::from(world.child.wait().expect("it ends").signal() == Some(9));
            world = spawn(&["resume", &store]);
        }
        assert!(world.child.wait().expect("it ends").success());
        let o = scene.run(&["run", "js", &script, "--out", &alone]);
        assert!(o.status.success(), "{}", said(&o));
        let (is, expected) = (std::fs::read_to_string(&out), std::fs::read_to_string(&alone));
        assert!(
            is.expect("there") == expected.expect("there"),
            "the output differs: see {}",
            scene.dir.path().display()
        );
        if kills == 2 {
            return;
        }
    }
    panic!("it was never killed twice");
}
