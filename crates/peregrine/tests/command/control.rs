//! What can be asked of a World that runs, how it is stopped, and what is left of it.

use super::examples::example;
use super::scene::{Scene, World, parent, said, text, wait_until};
use peregrine_sys::signal::{self, number};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};

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

#[test]
fn ps_says_so_if_a_blocked_node_does_not_even_answer() {
    let scene = Scene::new();
    let mut command = Command::new(example("blocks"));
    command.arg("deaf").env("XDG_RUNTIME_DIR", scene.dir.path()).env("PEREGRINE_NODES", "2");
    command.env("PEREGRINE_END_PATIENCE", "3600000").stdout(Stdio::null()).stderr(Stdio::null());
    let _world = World { child: command.spawn().expect("cargo test builds the examples") };
    wait_until("the node counts as blocked", || scene.status().contains("\"blocked\""));
    let table = text(&scene.run(&["ps"]).stdout);
    assert!(table.contains("node 1 is blocked: thread 1"), "{table}");
    assert!(table.contains("it does not answer a signal either"), "{table}");
    // The kernel's word on where it waits.
    let wchan = table.split("(see ").nth(1).and_then(|t| t.split(')').next()).expect("a path");
    assert!(std::fs::read_to_string(wchan).is_ok(), "{table}");
}

/// What `ps --json` says of the one World.
pub(super) fn told(scene: &Scene) -> serde_json::Value {
    serde_json::from_str(&scene.status()).expect("one World, one object")
}

/// What it says of the thread of that name.
pub(super) fn of_thread(world: &serde_json::Value, name: &str) -> serde_json::Value {
    let all = world["threads"].as_array().expect("threads");
    all.iter().find(|t| t["name"] == name).unwrap_or_else(|| panic!("no {name}: {world}")).clone()
}

#[test]
fn ps_tells_the_truth_about_nodes_threads_and_images() {
    let scene = Scene::new();
    let world = scene.long_world();
    let first = told(&scene);
    assert_eq!(first["pid"], world.child.id(), "{first}");
    assert!(first["program"].as_str().is_some_and(|p| p.contains("run cg --class B")), "{first}");
    let nodes = first["nodes"].as_array().expect("nodes");
    assert_eq!(nodes.len(), 2, "{first}");
    for node in nodes {
        let pid = node["pid"].as_u64().expect("a process") as u32;
        assert_eq!(parent(pid), Some(world.child.id().to_string()), "{first}");
        assert!(["running", "idle", "blocked"].iter().any(|s| node["state"] == *s), "{first}");
    }
    let names: Vec<_> =
        first["threads"].as_array().expect("threads").iter().map(|t| t["name"].clone()).collect();
    assert_eq!(names, ["main", "rank 0", "rank 1", "rank 2"], "{first}");
    let main = of_thread(&first, "main");
    assert_eq!(main["state"], "waiting", "{first}");
    assert!(main["waits_for"].as_str().is_some_and(|w| w.starts_with("the end of thread ")), "{first}");
    let stack = main["stack_bytes"].as_u64().expect("known, for it is suspended");
    assert!((64..8 << 20).contains(&stack), "{first}");

    // The nodes work on, and take images: what is counted grows.
    let begun = of_thread(&first, "rank 1");
    wait_until("there are more switches and images", || {
        let now = told(&scene);
        let switches = |w: &serde_json::Value| {
            w["nodes"]
                .as_array()
                .expect("nodes")
                .iter()
                .map(|n| n["switches"].as_u64().expect("a number"))
                .sum::<u64>()
        };
        switches(&now) > switches(&first)
            && now["image"].as_u64() > first["image"].as_u64()
            && now["images"].as_u64() > first["images"].as_u64()
            && now["image_age_ms"].as_f64() > Some(0.0)
            && now["seconds"].as_f64() > first["seconds"].as_f64()
    });
    assert!(first["store"].is_null(), "{first}");
    // Balance may take a thread back at any time: so again, until it is seen where it was sent.
    for node in [1, 0, 1] {
        wait_until("the thread is shown where it was sent", || {
            let o = scene.run(&["migrate", "rank 1", &node.to_string()]);
            assert!(o.status.success(), "{}", said(&o));
            of_thread(&told(&scene), "rank 1")["node"] == node
        });
    }
    let now = told(&scene);
    let rank = of_thread(&now, "rank 1");
    assert!(rank["moves"].as_u64() >= begun["moves"].as_u64().map(|m| m + 2), "{begun} {rank}");
    // Of the matrix of class B, which has 13 million elements, each of three has a third, once it is made.
    wait_until("its memory is told", || {
        let now = told(&scene);
        let bytes = of_thread(&now, "rank 1")["memory_bytes"].as_u64();
        let [used, limit] = [0, 1].map(|i| now["memory"][i].as_u64().expect("bytes"));
        assert!(used <= limit, "{now}");
        bytes > Some(10 << 20) && used > 30 << 20
    });
    let o = scene.run(&["checkpoint"]);
    assert!(o.status.success(), "{}", said(&o));
    let held = of_thread(&told(&scene), "rank 1");
    assert!(held["image_age_ms"].as_f64().is_some_and(|ms| (0.0..60_000.0).contains(&ms)), "{held}");
}

/// The example `poses`, with so many nodes and threads that compute, and more settings.
fn poses(scene: &Scene, nodes: &str, workers: &str, more: &[(&str, &str)]) -> World {
    let mut command = Command::new(example("poses"));
    command.arg(workers).env("XDG_RUNTIME_DIR", scene.dir.path()).env("PEREGRINE_NODES", nodes);
    let child = command.envs(more.iter().copied()).spawn().expect("cargo test builds the examples");
    let world = World { child };
    wait_until("the World is seen", || scene.status().contains("\"sleeps\""));
    world
}

#[test]
fn ps_tells_who_runs_who_is_queued_and_what_the_others_wait_for() {
    let scene = Scene::new();
    let store = scene.dir.path().join("store");
    let store = store.to_str().expect("a plain path");
    let _world = poses(&scene, "1", "3", &[("PEREGRINE_STORE", store)]);
    let state = |w: &serde_json::Value, name: &str| of_thread(w, name)["state"].clone();
    wait_until("one runs, two are queued, one has ended, the others wait", || {
        let now = told(&scene);
        let node = &now["nodes"][0];
        let mut works: Vec<_> = (0..3).map(|i| state(&now, &format!("works {i}")).to_string()).collect();
        works.sort();
        node["state"] == "running"
            && node["queued"] == 2
            && state(&now, "ended") == "ended"
            && works == ["\"ready\"", "\"ready\"", "\"running\""]
            && now["threads"]
                .as_array()
                .is_some_and(|all| all.iter().any(|t| t["state"] == "running" && t["id"] == node["runs"]))
    });
    let now = told(&scene);
    assert_eq!(now["store"], store, "{now}");
    let (hears, sleeps) = (of_thread(&now, "hears"), of_thread(&now, "sleeps"));
    assert_eq!((&hears["state"], &sleeps["state"]), (&"waiting".into(), &"sleeping".into()), "{now}");
    let number = |t: &serde_json::Value, before: &str, after: &str| -> Option<u64> {
        t["waits_for"].as_str()?.strip_prefix(before)?.strip_suffix(after)?.parse().ok()
    };
    assert!(number(&hears, "a message on channel ", "").is_some(), "{hears}");
    // An hour, less what has passed.
    let left = number(&sleeps, "", " ms to pass").expect("how long");
    assert!((1..=3_600_000).contains(&left), "{sleeps}");
    let o = scene.run(&["ps"]);
    let table = text(&o.stdout);
    assert!(table.contains(&format!("(store {store})")), "{table}");
    assert!(table.contains("hears, waits for a message on channel "), "{table}");
    assert!(table.lines().any(|l| l.contains("sleeps, waits for ") && l.ends_with(" ms to pass")), "{table}");
}

#[test]
fn ps_tells_which_node_has_nothing_to_do() {
    let scene = Scene::new();
    let _world = poses(&scene, "2", "1", &[]);
    wait_until("one node runs a thread, the other none", || {
        let now = told(&scene);
        let works = of_thread(&now, "works 0");
        let at = works["node"].as_u64().expect("a number") as usize;
        let (its, other) = (&now["nodes"][at], &now["nodes"][1 - at]);
        its["state"] == "running"
            && its["runs"] == works["id"]
            && its["queued"] == 0
            && other["state"] == "idle"
            && other["runs"].is_null()
            && other["queued"] == 0
    });
    wait_until("the table says so too", || {
        let table = text(&scene.run(&["ps"]).stdout);
        let rows = table.lines().skip_while(|l| !l.contains("NODE")).skip(1).take(2);
        let mut states: Vec<_> = rows.filter_map(|l| l.split_whitespace().nth(2)).collect();
        states.sort_unstable();
        states == ["idle", "running"]
    });
}

#[test]
fn nodes_are_processes_of_one_thread_over_memory_that_is_this_users_alone() {
    use std::os::unix::fs::PermissionsExt;
    let scene = Scene::new();
    let world = scene.long_world();
    let processes = world.processes();
    assert_eq!(processes.len(), 3, "a zygote and two nodes");
    for pid in processes {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs").count();
        assert_eq!(tasks, 1, "process {pid}");
    }
    let held = std::fs::read_dir(format!("/proc/{}/fd", world.child.id())).expect("the supervisor's");
    let mut names = Vec::new();
    for fd in held.flatten() {
        let target = std::fs::read_link(fd.path()).unwrap_or_default();
        let Some(name) = target.to_str().and_then(|t| t.strip_prefix("/memfd:")) else { continue };
        let mode = std::fs::metadata(fd.path()).expect("it is open").permissions().mode();
        assert_eq!(mode & 0o7777, 0o600, "{name}");
        names.push(name.trim_end_matches(" (deleted)").to_owned());
    }
    for part in ["control", "arena", "template", "slots", "archive", "frames"] {
        assert!(names.contains(&format!("peregrine-{part}")), "the supervisor holds {names:?}");
    }
}

#[test]
fn a_move_that_is_said_to_be_done_is_done() {
    let scene = Scene::new();
    // One thread that computes, and that nobody else moves: a node gives away only what waits for its turn.
    let _world = scene.long_world_of(1, &["--move-every", "0"]);
    for node in [1, 0, 1, 0] {
        let o = scene.run(&["migrate", "rank 0", &node.to_string()]);
        assert!(o.status.success(), "{}", said(&o));
        let now = told(&scene);
        assert_eq!(of_thread(&now, "rank 0")["node"], node, "{now}");
    }
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
fn a_terminals_ctrl_c_which_every_process_hears_is_the_supervisors_business_alone() {
    let scene = Scene::new();
    let args = ["run", "cg", "--class", "B", "--quiet", "--kill-every", "1d", "--kills", "1"];
    let mut command = scene.command(&args);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    let mut world = World { child: command.spawn().expect("it starts") };
    wait_until("its threads run", || scene.status().contains("\"rank 0\""));
    let processes = world.processes();
    assert_eq!(processes.len(), 3, "a zygote and two nodes");
    for pid in &processes {
        for signal in [number::INT, number::TERM, number::HUP, number::QUIT] {
            signal::kill(*pid as i32, signal).expect("it runs");
        }
    }
    let o = scene.run(&["checkpoint"]);
    assert!(o.status.success(), "all nodes paused: {}", said(&o));
    assert_eq!(world.processes(), processes, "none has ended");
    assert_eq!(told(&scene)["rollbacks"], 0);

    signal::kill(-(world.child.id() as i32), number::INT).expect("its group");
    let mut stderr = String::new();
    world.child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("text");
    assert_eq!(world.child.wait().expect("it ends").code(), Some(130), "{stderr}");
    assert!(!stderr.contains("crashed") && !stderr.contains("gone"), "{stderr}");
    wait_until("its processes are gone", || processes.iter().all(|p| parent(*p).is_none()));
    assert_eq!(scene.sockets(), Vec::<PathBuf>::new());
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
fn names_that_the_killed_left_are_inert_and_whatever_command_comes_next_removes_them() {
    let scene = Scene::new();
    for (args, code) in [
        (&["ps"][..], 0),
        (&["migrate", "main", "0"], 1),
        (&["checkpoint"], 1),
        (&["doctor"], 0),
        (&["run", "cg", "--class", "S", "--quiet"], 0),
    ] {
        // Beyond the largest number that a process can have: one that listened, and one that had not begun to.
        let dir = scene.dir.path().join("peregrine");
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).expect("made");
        drop(UnixListener::bind(dir.join("4194305.sock")).expect("a socket"));
        drop(UnixListener::bind(dir.join(".4194305")).expect("a socket"));
        let o = scene.run(args);
        assert_eq!(o.status.code(), Some(code), "{args:?}: {}", said(&o));
        assert!(!said(&o).contains("4194305"), "{args:?}: {}", said(&o));
        assert_eq!(scene.sockets(), Vec::<PathBuf>::new(), "{args:?}");
    }
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
