//! What the command offers, and what it refuses, before any World runs.

use super::scene::{Scene, said, text};
use std::path::Path;
use std::process::Command;

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

/// What doctor says where a container's filter forbids a system call: its exit code, and the lines of a finding.
fn doctor_without(call: u32, what: &str) -> (Option<i32>, String, String) {
    use peregrine_sys::process::forbid_call;
    use std::os::unix::process::CommandExt;
    let scene = Scene::new();
    let mut c = scene.command(&["doctor"]);
    // SAFETY: two system calls, nothing is allocated.
    unsafe { c.pre_exec(move || forbid_call(call).map_err(|e| std::io::Error::from_raw_os_error(e.0))) };
    let o = c.output().expect("it starts");
    let all = text(&o.stdout);
    let finding = all.lines().skip_while(|l| l.split_whitespace().nth(1) != Some(what)).take(2);
    let finding = finding.collect::<Vec<_>>().join("\n");
    (o.status.code(), finding, said(&o))
}

#[test]
fn doctor_says_what_is_missing_what_is_used_instead_and_what_to_change() {
    use peregrine_sys::linux_raw_sys::general::{__NR_memfd_create, __NR_personality};
    use peregrine_sys::process::CALL_MADVISE;
    for (call, what, verdict, code, words) in [
        (
            __NR_personality,
            "personality",
            "instead",
            0,
            [
                "personality(2) is refused",
                "can't be stored and resumed",
                "allow personality in the container's",
            ],
        ),
        (
            CALL_MADVISE,
            "guard-shared",
            "instead",
            0,
            ["on a memfd: EPERM", "guards are made by page protection", "to change it: a seccomp filter"],
        ),
        (
            __NR_memfd_create,
            "memfd",
            "FATAL",
            1,
            ["memfd_create: EPERM", "nothing runs without", "to change it: a seccomp filter"],
        ),
    ] {
        let (ended, finding, all) = doctor_without(call, what);
        assert_eq!(ended, Some(code), "{what}: {all}");
        assert!(finding.starts_with(verdict), "{what}: {all}");
        for word in words {
            assert!(finding.contains(word), "{what}, {word:?}: {all}");
        }
        assert_eq!(all.contains("No World can run here."), code != 0, "{what}: {all}");
    }
}

#[test]
fn doctor_tells_how_many_files_may_be_open_and_what_a_world_does_about_it() {
    let scene = Scene::new();
    for (limits, verdict, code, words) in [
        ("ulimit -Sn 1000 && ulimit -Hn 4096", "good", 0, ["1000 a process", "no more than 4096"]),
        (
            "ulimit -Sn 256 && ulimit -Hn 4096",
            "instead",
            0,
            ["256 a process", "a World raises its own to 1024"],
        ),
        (
            "ulimit -Sn 256 && ulimit -Hn 900",
            "instead",
            0,
            ["no more than 900", "a World raises its own to 900"],
        ),
        ("ulimit -n 256", "FATAL", 1, ["a World needs 801", "ulimit -Hn 1024"]),
    ] {
        let doctor = scene.command(&["doctor"]);
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{limits} && exec \"$0\" \"$@\"")]);
        shell.arg(doctor.get_program()).args(doctor.get_args()).env("XDG_RUNTIME_DIR", scene.dir.path());
        let o = shell.output().expect("a shell");
        let all = text(&o.stdout);
        let finding: Vec<_> = all.lines().skip_while(|l| !l.contains("  open files")).take(2).collect();
        let finding = finding.join("\n");
        assert_eq!(o.status.code(), Some(code), "{limits}: {}", said(&o));
        assert!(finding.starts_with(verdict), "{limits}: {}", said(&o));
        for word in words {
            assert!(finding.contains(word), "{limits}, {word:?}: {}", said(&o));
        }
    }
}
