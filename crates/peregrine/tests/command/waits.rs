//! What `peregrine ps` says of waits that are not for another thread: for output, an image, a reply, a domain, and of who is inside one.

use super::control::{of_thread, told};
use super::examples::example;
use super::scene::{Scene, World, said, text, wait_until};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::time::Duration;

/// The example `waits`. What it writes nobody reads; no image is taken unless one is asked for.
fn waits(scene: &Scene, args: &[&str], nodes: &str) -> World {
    let mut command = Command::new(example("waits"));
    command.args(args).env("XDG_RUNTIME_DIR", scene.dir.path()).env("PEREGRINE_NODES", nodes);
    let child = command.env("PEREGRINE_IMAGE_INTERVAL", "3600000").stdout(Stdio::piped()).spawn();
    World { child: child.expect("cargo test builds the examples") }
}

/// Waits until the thread is told to wait for that, in JSON and in the table.
fn is_told_to_wait(scene: &Scene, name: &str, what: &str) {
    let waits = |now: &serde_json::Value| {
        let thread = of_thread(now, name);
        thread["state"] == "waiting" && thread["waits_for"] == what
    };
    wait_until(&format!("{name} waits for {what}"), || {
        scene.status().contains(&format!("\"{name}\"")) && waits(&told(scene))
    });
    let line = format!("{name}, waits for {what}");
    wait_until(&line, || {
        let table = text(&scene.run(&["ps"]).stdout);
        table.lines().any(|l| l.ends_with(&line) && l.split_whitespace().nth(1) == Some("waiting"))
    });
}

#[test]
fn ps_tells_who_waits_for_room_for_output_and_who_for_an_image() {
    let scene = Scene::new();
    let _world = waits(&scene, &["output"], "1");
    is_told_to_wait(&scene, "writes", "room for output");
    is_told_to_wait(&scene, "asks", "an image");
    let now = told(&scene);
    let main = of_thread(&now, "main");
    assert_eq!(main["state"], "sleeping", "{now}");
    assert!(main["waits_for"].as_str().is_some_and(|w| w.ends_with(" ms to pass")), "{now}");
}

#[test]
fn ps_tells_who_waits_for_the_reply_to_a_call() {
    let scene = Scene::new();
    let socket = scene.dir.path().join("silent");
    // Whoever connects is never answered.
    let _silent = UnixListener::bind(&socket).expect("a socket");
    let _world = waits(&scene, &["call", socket.to_str().expect("a plain path")], "1");
    is_told_to_wait(&scene, "calls", "the reply to a call");
}

#[test]
fn ps_tells_which_domain_all_threads_wait_for_and_then_who_is_inside() {
    let scene = Scene::new();
    let file = scene.dir.path().join("go");
    let world = waits(&scene, &["domain", file.to_str().expect("a plain path")], "1");
    is_told_to_wait(&scene, "enters", "the process of a domain");
    let now = told(&scene);
    let domain = &now["nodes"][1];
    assert_eq!((&domain["state"], &domain["domain"]), (&"starting".into(), &"slow".into()), "{now}");
    let pid = domain["pid"].as_u64().expect("it is there, and not up") as u32;
    assert!(world.processes().contains(&pid), "{now}");
    let row = |state: &str| {
        let table = text(&scene.run(&["ps"]).stdout);
        table.lines().any(|l| l.split_whitespace().nth(2) == Some(state) && l.ends_with("  domain slow"))
    };
    assert!(row("starting"));
    // Who stands still for it is not told to be blocked, and nothing else is begun meanwhile.
    assert!(now["nodes"].as_array().is_some_and(|all| all.iter().all(|n| n["state"] != "blocked")), "{now}");
    for args in [&["checkpoint"][..], &["migrate", "enters", "0"]] {
        let o = scene.run(args);
        assert_eq!(o.status.code(), Some(1), "{}", said(&o));
        assert!(text(&o.stderr).contains("all threads wait for the set-up of domain 'slow'"), "{}", said(&o));
    }
    std::fs::write(&file, "").expect("a file");
    wait_until("the thread runs inside the domain", || {
        let now = told(&scene);
        let (thread, domain) = (of_thread(&now, "enters"), &now["nodes"][1]);
        thread["state"] == "running"
            && thread["node"] == 1
            && thread["waits_for"].is_null()
            && domain["state"] == "running"
            && domain["runs"] == thread["id"]
    });
    wait_until("the table says so", || row("running"));
}

#[test]
fn what_was_asked_for_just_before_a_long_set_up_is_told_what_it_waits_for() {
    let scene = Scene::new();
    let [go, open] = ["go", "open"].map(|name| scene.dir.path().join(name));
    let paths = [&go, &open].map(|path| path.to_str().expect("a plain path"));
    let world = waits(&scene, &["domain", paths[0], paths[1]], "1");
    wait_until("the thread is there", || scene.status().contains("\"enters\""));
    // All that comes meanwhile is found at once: first what the command asks for, then what the thread does.
    world.signal("-STOP");
    let mut command = scene.command(&["checkpoint"]);
    let asks = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command starts");
    std::thread::sleep(Duration::from_millis(500));
    std::fs::write(&open, "").expect("a file");
    std::thread::sleep(Duration::from_millis(500));
    world.signal("-CONT");
    let o = asks.wait_with_output().expect("it ends");
    assert_eq!(o.status.code(), Some(1), "{}", said(&o));
    assert!(text(&o.stderr).contains("all threads wait for the set-up of domain 'slow'"), "{}", said(&o));
}

#[test]
fn ps_tells_that_a_node_is_being_made() {
    let scene = Scene::new();
    let file = scene.dir.path().join("go");
    std::fs::write(&file, "").expect("a file");
    let _world = waits(&scene, &["domain", file.to_str().expect("a plain path")], "1");
    let inside = |now: &serde_json::Value| now["nodes"][1]["state"] == "running";
    wait_until("the thread is inside", || scene.status().contains("\"enters\"") && inside(&told(&scene)));
    // The domain is killed, and its next process waits in its set-up: a rollback that takes long.
    std::fs::remove_file(&file).expect("it is there");
    let died = told(&scene)["nodes"][1]["pid"].as_u64().expect("a process") as i32;
    peregrine_sys::signal::kill(died, peregrine_sys::signal::number::KILL).expect("it runs");
    wait_until("its next process is starting", || {
        let now = told(&scene);
        let domain = &now["nodes"][1];
        domain["state"] == "starting" && domain["pid"] != died && now["nodes"][0]["state"] != "blocked"
    });
    std::thread::sleep(Duration::from_millis(50));
    std::fs::write(&file, "").expect("a file");
    wait_until("the thread is inside again", || inside(&told(&scene)));
}
