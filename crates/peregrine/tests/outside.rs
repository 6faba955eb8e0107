//! Crates outside this workspace, built and run as their users would.

use std::path::PathBuf;
use std::process::{Command, Output};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO"));
    command.args(args).current_dir(root());
    // What cargo sets for tests is not for the crate built here.
    for (name, _) in std::env::vars().filter(|(n, _)| n.starts_with("CARGO_") && n != "CARGO_HOME") {
        command.env_remove(name);
    }
    command
}

fn cargo(args: &[&str], env: &[(&str, &str)]) -> Output {
    command(args).envs(env.iter().copied()).output().unwrap()
}

fn check(output: &Output) {
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{err}");
    let expected = "800 transfers asked for\n30000 cents before the books are closed\n803 requests handled, nothing lost\n";
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{err}");
}

#[test]
fn a_crate_of_its_own_runs_with_plain_cargo_run() {
    let run = |env: &[(&str, &str)]| {
        let args =
            ["run", "--quiet", "--offline", "--locked", "--manifest-path", "examples/ledger/Cargo.toml"];
        cargo(&[&args[..], &["--target-dir", "target/outside"]].concat(), env)
    };
    check(&run(&[]));
    check(&run(&[("PEREGRINE_NODES", "3"), ("PEREGRINE_KILL_EVERY", "20"), ("PEREGRINE_MOVE_EVERY", "2")]));
}

/// The `n`th block of the README that is marked so.
fn readme_block(mark: &str, n: usize) -> String {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let rest =
        readme.split(&format!("```{mark}\n")).nth(n + 1).unwrap_or_else(|| panic!("no block {n} of {mark}"));
    rest.split("```").next().unwrap().to_owned()
}

#[test]
fn the_readmes_program_is_made_as_it_says_and_prints_what_it_says() {
    let commands = readme_block("sh", 2);
    let (new, add) = commands.trim_end().split_once('\n').unwrap();
    assert_eq!(new, "cargo new trip && cd trip");
    let add: Vec<&str> = add.split_whitespace().collect();
    let ["cargo", "add", "--path", "../peregrine/crates/peregrine", "--no-default-features"] = add[..] else {
        panic!("{add:?}")
    };
    // The clone lies elsewhere here, so that what the other crate needs is not built again.
    let clone = root().join("crates/peregrine");
    let add = ["add", "--path", clone.to_str().unwrap(), add[4]];
    let beside = tempfile::tempdir().unwrap();
    let trip = beside.path().join("trip");
    let at = |dir: &PathBuf, args: &[&str]| {
        let mut c = command(args);
        let o = c.current_dir(dir).env("PEREGRINE_NODES", "2").output().unwrap();
        assert!(o.status.success(), "{args:?}: {}", String::from_utf8_lossy(&o.stderr));
        String::from_utf8_lossy(&o.stdout).into_owned()
    };
    at(&beside.path().to_owned(), &["new", "--quiet", "--vcs", "none", "trip"]);
    at(&trip, &[&add[..], &["--quiet", "--offline"]].concat());
    std::fs::write(trip.join("src/main.rs"), readme_block("rust,no_run", 0)).unwrap();
    // The same versions of everything, so that nothing need be fetched.
    std::fs::copy(root().join("examples/ledger/Cargo.lock"), trip.join("Cargo.lock")).unwrap();
    let target = root().join("target/outside");
    let printed = at(&trip, &["run", "--quiet", "--offline", "--target-dir", target.to_str().unwrap()]);
    assert_eq!(printed, readme_block("text", 1));
}

#[test]
#[ignore = "the long form: builds everything a second time"]
fn a_static_executable_at_a_fixed_address_runs_too() {
    let target = "x86_64-unknown-linux-gnu";
    let args =
        ["rustc", "--quiet", "--offline", "--release", "--manifest-path", "examples/ledger/Cargo.toml"];
    let more = ["--target-dir", "target/outside", "--target", target, "--"];
    let flags = ["-C", "relocation-model=static", "-C", "target-feature=+crt-static"];
    let built = cargo(&[&args[..], &more[..], &flags[..]].concat(), &[]);
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let exe = root().join("target/outside").join(target).join("release/ledger");
    let run = |env: &[(&str, &str)]| Command::new(&exe).envs(env.iter().copied()).output().unwrap();
    check(&run(&[]));
    check(&run(&[("PEREGRINE_NODES", "3"), ("PEREGRINE_KILL_EVERY", "20"), ("PEREGRINE_MOVE_EVERY", "2")]));
}
