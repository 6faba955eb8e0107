//! Crates outside this workspace, built and run as their users would.

use std::path::PathBuf;
use std::process::{Command, Output};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn cargo(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO"));
    command.args(args).envs(env.iter().copied()).current_dir(root());
    // What cargo sets for tests is not for the crate built here.
    for (name, _) in std::env::vars().filter(|(n, _)| n.starts_with("CARGO_") && n != "CARGO_HOME") {
        command.env_remove(name);
    }
    command.output().unwrap()
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
