//! What the tests of the command share: a place of their own for the sockets, Worlds that run for as long as they are wanted.

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Long enough for a slow machine that does other things; no test measures speed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// A directory of its own for the control sockets of a test: it sees no other World, and no other test sees its.
pub(crate) struct Scene {
    pub(crate) dir: tempfile::TempDir,
}

impl Scene {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a temporary directory") }
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut c = Command::new(env!("CARGO_BIN_EXE_peregrine"));
        c.args(args).env("XDG_RUNTIME_DIR", self.dir.path()).stdin(Stdio::null());
        for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("PEREGRINE_")) {
            c.env_remove(name);
        }
        c
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the command starts")
    }

    /// A World that runs for longer than any test: it waits for a kill that does not come.
    pub(crate) fn long_world(&self) -> World {
        self.long_world_of(3, &[])
    }

    /// The same with so many threads, and with more arguments.
    pub(crate) fn long_world_of(&self, threads: u32, more: &[&str]) -> World {
        let child = self
            .command(&["run", "cg", "--class", "B", "--threads", &threads.to_string(), "--quiet"])
            .args(["--kill-every", "1d", "--kills", "1"])
            .args(more)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the command starts");
        let world = World { child };
        wait_until("the World is seen and its threads run", || {
            self.status().contains(&format!("\"rank {}\"", threads - 1))
        });
        world
    }

    pub(crate) fn status(&self) -> String {
        text(&self.run(&["ps", "--json"]).stdout)
    }

    pub(crate) fn sockets(&self) -> Vec<PathBuf> {
        let dir = std::fs::read_dir(self.dir.path().join("peregrine"));
        dir.into_iter().flatten().flatten().map(|e| e.path()).collect()
    }
}

/// A running supervisor; killed at the end of the test at the latest.
pub(crate) struct World {
    pub(crate) child: Child,
}

impl World {
    /// The supervisor's processes: zygote and nodes.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let me = self.child.id().to_string();
        let all = std::fs::read_dir("/proc").expect("/proc is mounted").flatten();
        all.filter_map(|e| e.file_name().to_str()?.parse().ok())
            .filter(|pid| parent(*pid) == Some(me.clone()))
            .collect()
    }

    pub(crate) fn signal(&self, name: &str) {
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
pub(crate) fn parent(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    (fields.next()? != "Z").then_some(())?;
    fields.next().map(str::to_owned)
}

pub(crate) fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !happened() {
        assert!(begun.elapsed() < PATIENCE, "it did not happen in {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn said(o: &Output) -> String {
    format!("{}\n{}", text(&o.stdout), text(&o.stderr))
}
