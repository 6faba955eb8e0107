//! Threads under every trouble at once: CG with nodes killed and threads moved, again and again, each run with a seed of its
//! own; then the same benchmark and a JavaScript program whose whole Worlds are killed at random moments and resumed until they end.
//!
//! The programs are the ones that a user runs, built by cargo in release form. A run that is not verified, or an output that
//! differs from an undisturbed one, ends the soak with the seed that led to it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    cargo
}

/// Builds the command and the examples; where they lie.
fn build() -> PathBuf {
    let built =
        cargo().args(["build", "--release", "--quiet", "-p", "peregrine", "--bins", "--examples"]).status();
    assert!(built.is_ok_and(|s| s.success()), "the programs can't be built");
    let me = std::env::current_exe().expect("a program knows its own path");
    me.parent().expect("it lies in a directory").to_path_buf()
}

/// Runs for about `seconds`; `false` after the first failure.
pub fn run(seed: u64, seconds: u64) -> bool {
    println!("soak thread: seed {seed}, {seconds} s");
    let programs = build();
    let mut random = Random(seed | 1);
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut computations, mut scripts, mut lives) = (0, 0, 0);
    while Instant::now() < end {
        let seed = random.below(1 << 32);
        let kill_ms = 10 + random.below(50);
        let image_ms = 3 + random.below(kill_ms - 5);
        let move_ms = 1 + random.below(10);
        let nodes = 2 + random.below(3);
        let run = Command::new(programs.join("peregrine"))
            .args(["run", "cg", "--class", ["S", "W"][random.below(2) as usize], "--quiet", "--kills", "40"])
            .args(["--nodes", &nodes.to_string(), "--seed", &seed.to_string()])
            .args(["--kill-every", &format!("{kill_ms}ms"), "--image-interval", &format!("{image_ms}ms")])
            .args(["--move-every", &format!("{move_ms}ms"), "--moves", "50"])
            .output()
            .expect("the command starts");
        let said = String::from_utf8_lossy(&run.stderr);
        if !run.status.success() || said.contains("crashed") {
            println!(
                "FAILED: seed {seed}, {nodes} nodes, kill {kill_ms} ms, image {image_ms} ms, move {move_ms} ms\n{said}"
            );
            return false;
        }
        computations += 1;
        if computations % 5 == 0 {
            if !script(&programs, &mut random) {
                println!("FAILED: the script's output differs (seed of the soak {})", random.0);
                return false;
            }
            scripts += 1;
            match computation_in_lives(&programs, &mut random) {
                Ok(n) => lives += n,
                Err(said) => {
                    println!("FAILED: CG in several lives (seed of the soak {})\n{said}", random.0);
                    return false;
                }
            }
        }
        println!(
            "{computations} computations verified, {scripts} scripts exact, as many computations verified in {lives} lives"
        );
    }
    true
}

/// One CG of class A whose supervisor, and so everything, is killed at random moments, and whose nodes are killed besides: the
/// number of lives that it took, or what the one said that was not verified.
fn computation_in_lives(programs: &Path, random: &mut Random) -> Result<u64, String> {
    let dir = std::env::temp_dir().join(format!("peregrine-soak-cg-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    let command = programs.join("peregrine");
    let mut first = Command::new(&command);
    first.args(["run", "cg", "--class", "A", "--nodes", "2", "--kills", "0", "--moves", "0"]);
    first.args(["--kill-every", "70ms", "--seed", &random.below(1 << 32).to_string(), "--store"]).arg(&dir);
    let mut next = Command::new(&command);
    next.arg("resume").arg(&dir);
    let mut lives = 1;
    let outcome = loop {
        let c = if lives == 1 { &mut first } else { &mut next };
        let mut child = c.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command starts");
        while lives == 1
            && std::fs::read_dir(dir.join("world")).map_or(0, Iterator::count) == 0
            && child.try_wait().is_ok_and(|s| s.is_none())
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(300 + random.below(500)));
        let killed = child.try_wait().is_ok_and(|s| s.is_none());
        if killed {
            let _ = child.kill();
        }
        let ended = child.wait_with_output().expect("a child can be waited for");
        if killed && !ended.status.success() {
            lives += 1;
            if lives < 200 {
                continue;
            }
        }
        let said =
            format!("{}{}", String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
        let verified = ended.status.success() && said.contains("VERIFICATION SUCCESSFUL");
        break if verified { Ok(lives) } else { Err(said) };
    };
    let _ = std::fs::remove_dir_all(&dir);
    outcome
}

/// One JavaScript program, killed as a whole at random moments.
fn script(programs: &Path, random: &mut Random) -> bool {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/js/scripts/identity.js");
    let program = programs.join("examples/script");
    let expected = Command::new(&program).args([file, "30"]).output().expect("the script runs").stdout;
    let dir = std::env::temp_dir().join(format!("peregrine-soak-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("a temporary directory");
    let start = |variable: &str| -> Child {
        let output =
            std::fs::OpenOptions::new().create(true).append(true).open(dir.join("output")).expect("output");
        Command::new(&program)
            .args([file, "30"])
            .env(variable, dir.join("store"))
            .env("PEREGRINE_NODES", "2")
            .env("PEREGRINE_MOVE_EVERY", "2")
            .env("PEREGRINE_KILL_EVERY", "70")
            .stdout(output)
            .stderr(Stdio::null())
            .spawn()
            .expect("the script starts")
    };
    let mut child = start("PEREGRINE_STORE");
    std::thread::sleep(Duration::from_millis(200));
    let mut ended = false;
    for _ in 0..500 {
        let until = Instant::now() + Duration::from_millis(200 + random.below(600));
        while Instant::now() < until && !ended {
            ended = child.try_wait().expect("a child can be waited for").is_some();
            std::thread::sleep(Duration::from_millis(5));
        }
        if ended {
            break;
        }
        let _ = child.kill();
        let _ = child.wait();
        child = start("PEREGRINE_RESUME");
    }
    let found = std::fs::read(dir.join("output")).unwrap_or_default();
    let _ = std::fs::remove_dir_all(&dir);
    ended && found == expected
}
