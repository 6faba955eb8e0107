//! A domain in a process of its own, forked from the test before it has threads.

#![allow(dead_code)]

use peregrine_call::{Client, Domain, DomainBuilder};
use peregrine_sys::process::{self, ForkFlags, Forked};
use peregrine_sys::rustix;
use rustix::process::{Pid, Signal, WaitOptions, waitpid};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Tests that start their domain as another program say so here.
pub fn child() -> Option<std::process::ExitCode> {
    None
}

/// A domain's process, killed at the end.
pub struct Served {
    pub pid: i32,
    dir: tempfile::TempDir,
    reaped: Cell<bool>,
}

/// Forks a process that serves what `build` makes. The caller has one thread yet.
pub fn serve(build: impl FnOnce(DomainBuilder) -> DomainBuilder) -> Served {
    serve_with(build, |_| {})
}

/// As [`serve`]; `before` runs in the new process first.
pub fn serve_with(build: impl FnOnce(DomainBuilder) -> DomainBuilder, before: impl FnOnce(&Path)) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("domain");
    // SAFETY: a test's process has one thread until it makes another, which it does after its domains.
    match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
        Forked::Child => {
            process::die_with_parent();
            before(&path);
            let domain = build(Domain::builder()).serve(&path);
            match domain {
                Ok(_domain) => loop {
                    std::thread::park();
                },
                Err(e) => {
                    eprintln!("domain: {e}");
                    process::exit_now(1);
                }
            }
        }
        Forked::Parent(pid) => {
            let served = Served { pid, dir, reaped: Cell::new(false) };
            let begun = Instant::now();
            while Client::connect(served.path())
                .is_err_and(|e| matches!(e, peregrine_call::CallError::Unreachable { .. }))
            {
                assert!(begun.elapsed() < Duration::from_secs(10), "the domain did not come up");
                std::thread::sleep(Duration::from_millis(1));
            }
            served
        }
    }
}

impl Served {
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("domain")
    }

    pub fn connect(&self) -> Client {
        Client::connect(self.path()).unwrap()
    }

    pub fn kill(&self) {
        if !self.reaped.replace(true) {
            let pid = Pid::from_raw(self.pid).unwrap();
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            let _ = waitpid(Some(pid), WaitOptions::empty());
        }
    }

    /// How it ended, if it did so by itself.
    pub fn wait(&self) -> Option<rustix::process::WaitStatus> {
        if self.reaped.replace(true) {
            return None;
        }
        waitpid(Some(Pid::from_raw(self.pid).unwrap()), WaitOptions::empty())
            .unwrap()
            .map(|(_, status)| status)
    }

    /// Processor time of the whole process so far, by the kernel's count.
    pub fn cpu_ns(&self) -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid)).unwrap();
        tasks
            .map(|t| std::fs::read_to_string(t.unwrap().path().join("schedstat")).unwrap())
            .map(|s| s.split(' ').next().unwrap().parse::<u64>().unwrap())
            .sum()
    }

    /// Descriptors, mappings and threads of the process.
    pub fn holdings(&self) -> (usize, usize, usize) {
        let count = |what: &str| std::fs::read_dir(format!("/proc/{}/{what}", self.pid)).unwrap().count();
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid)).unwrap();
        let lines = maps.lines().filter(|l| l.contains("peregrine-")).count();
        (count("fd"), lines, count("task"))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.kill();
    }
}
