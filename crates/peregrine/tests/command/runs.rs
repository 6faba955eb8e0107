//! Programs from their start to their end, killed and resumed.

use super::scene::{Scene, World, said, text, wait_until};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;

#[cfg(feature = "js")]
use std::os::unix::process::ExitStatusExt;

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
    let mut lines = BufReader::new(world.child.stderr.take().expect("piped")).lines();
    let line = lines.next().expect("it speaks").expect("text");
    let kept = kept(&line);
    assert!(kept > 0.0, "{line}");
    wait_until("its threads run again", || scene.status().contains("\"rank 1\""));
    let o = scene.run(&["checkpoint"]);
    assert!(text(&o.stdout).contains("on disk"), "{}", said(&o));
    // Stopped, it tells how to go on.
    world.signal("-INT");
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    assert_eq!(world.child.wait().expect("it ends").code(), Some(130), "{rest:?}");
    assert!(rest.iter().any(|l| l.contains(&format!("`peregrine resume {store}` goes on"))), "{rest:?}");

    // What both lives have done is kept.
    let child = scene.command(&["resume", store]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut world = World { child: child.expect("it starts") };
    let mut line = String::new();
    BufReader::new(world.child.stderr.take().expect("piped")).read_line(&mut line).expect("it speaks");
    assert!(self::kept(&line) > kept, "{line}");
}

/// Seconds of work that a resume says are kept.
fn kept(line: &str) -> f64 {
    assert!(line.contains("going on with image"), "{line}");
    let words: Vec<&str> = line.split(' ').collect();
    let unit = words.windows(5).position(|w| w.join(" ") == "s of work are kept;").expect("it says so");
    words[unit - 1].parse().expect("a number")
}

/// Changes a byte in the middle of each file, and back.
fn flip(files: &[PathBuf]) {
    for file in files {
        let mut bytes = std::fs::read(file).expect("a file of the store");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(file, bytes).expect("written");
    }
}

#[test]
fn a_damaged_image_is_named_and_the_one_before_is_gone_back_to_when_asked() {
    let scene = Scene::new();
    let store = scene.dir.path().join("store");
    let dir = store.to_str().expect("a plain path");
    let mut args = vec!["run", "cg", "--class", "B", "--threads", "2", "--quiet", "--store", dir];
    args.extend(["--kill-every", "1d", "--kills", "1"]);
    let child = scene.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    let world = World { child };
    wait_until("its threads run", || scene.status().contains("\"rank 1\""));
    for _ in 0..2 {
        let o = scene.run(&["checkpoint"]);
        assert!(text(&o.stdout).contains("on disk"), "{}", said(&o));
    }
    world.signal("-KILL");
    drop(world);
    // Its processes may still be ending, and one of them may hold the lock.
    let refused = |args: &[&str]| {
        let mut o = scene.run(args);
        wait_until("the store is free", || {
            let busy = said(&o).contains("in use by");
            if busy {
                o = scene.run(args);
            }
            !busy
        });
        assert_eq!(o.status.code(), Some(70), "{}", said(&o));
        text(&o.stderr)
    };
    let names = std::fs::read_dir(store.join("world")).expect("images");
    let mut images: Vec<PathBuf> = names.map(|e| e.expect("an image").path()).collect();
    images.sort();
    let number =
        |path: &Path| -> u64 { path.file_name().and_then(|n| n.to_str()?.parse().ok()).expect("a number") };
    let [.., before, latest] = &images[..] else { panic!("{images:?}") };
    let (before, latest) = (number(before).to_string(), latest.clone());
    let number = number(&latest);
    assert!(refused(&["resume", dir, "--image", &before]).contains("has a successor"), "the latest is whole");

    // The manifest; and, that being whole, the pages of its threads.
    let pages: Vec<PathBuf> = std::fs::read_dir(store.join("threads"))
        .expect("threads")
        .flat_map(|t| std::fs::read_dir(t.expect("a thread").path()).expect("its images"))
        .map(|e| e.expect("an image").path())
        .filter(|p| p.to_str().is_some_and(|p| p.ends_with(&format!(".{number:016}"))))
        .collect();
    assert!(!pages.is_empty(), "the latest image has pages of its own");
    for damaged in [vec![latest], pages] {
        flip(&damaged);
        let said = refused(&["resume", dir]);
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains(&format!("the latest image {number} is damaged")), "{said}");
        assert!(said.contains(&format!("--image {before}")), "{said}");
        if damaged.len() == 1 {
            flip(&damaged);
        }
    }
    let child = scene
        .command(&["resume", dir, "--image", &before])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut world = World { child: child.expect("it starts") };
    let mut line = String::new();
    let stderr = world.child.stderr.take().expect("piped");
    BufReader::new(stderr).read_line(&mut line).expect("it speaks");
    assert!(line.contains(&format!("going on with image {before} ")), "{line}");
    wait_until("its threads run again", || scene.status().contains("\"rank 1\""));
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
