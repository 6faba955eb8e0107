//! A domain in a process of its own, forked from the test before it has threads.

#![allow(dead_code)]

use peregrine_base::sync::{AtomicBool, Ordering};
use peregrine_call::{CallError, Client, Domain, DomainBuilder};
use peregrine_sys::process::{self, ForkFlags, Forked};
use peregrine_sys::rustix;
use rustix::process::{Pid, Signal, WaitOptions, waitpid};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A domain's process, killed at the end.
pub struct Served {
    pub pid: i32,
    dir: tempfile::TempDir,
    reaped: AtomicBool,
}

/// Forks a process that serves what `build` makes. The caller has one thread yet.
pub fn serve(build: impl FnOnce(DomainBuilder) -> DomainBuilder) -> Served {
    serve_with(build, |_| {})
}

/// As [`serve`], with the path that it will be served at.
pub fn serve_at(build: impl FnOnce(DomainBuilder, &Path) -> DomainBuilder) -> Served {
    start(build, |_| {})
}

/// As [`serve`]; `before` runs in the new process first.
pub fn serve_with(build: impl FnOnce(DomainBuilder) -> DomainBuilder, before: impl FnOnce(&Path)) -> Served {
    start(|d, _| build(d), before)
}

/// Kills a process, and reaps it if it is ours.
pub fn kill(pid: i32) {
    let pid = Pid::from_raw(pid).unwrap();
    let _ = rustix::process::kill_process(pid, Signal::KILL);
    let _ = waitpid(Some(pid), WaitOptions::empty());
}

fn start(build: impl FnOnce(DomainBuilder, &Path) -> DomainBuilder, before: impl FnOnce(&Path)) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("domain");
    // SAFETY: a test's process has one thread until it makes another, which it does after its domains.
    match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
        Forked::Child => {
            process::die_with_parent();
            before(&path);
            let domain = build(Domain::builder(), &path).serve(&path);
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
            let served = Served { pid, dir, reaped: AtomicBool::new(false) };
            let begun = Instant::now();
            while !served.path().exists()
                || Client::connect(served.path()).is_err_and(|e| matches!(e, CallError::Unreachable { .. }))
            {
                if served.has_ended() {
                    break;
                }
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
        if !self.reaped.swap(true, Ordering::Relaxed) {
            let pid = Pid::from_raw(self.pid).unwrap();
            let _ = rustix::process::kill_process(pid, Signal::KILL);
            let _ = waitpid(Some(pid), WaitOptions::empty());
        }
    }

    /// Stops it: when this returns, none of its threads runs.
    pub fn stop(&self) {
        rustix::process::kill_process(Pid::from_raw(self.pid).unwrap(), Signal::STOP).unwrap();
        let stopped = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
            stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
        };
        while !std::fs::read_dir(format!("/proc/{}/task", self.pid)).unwrap().all(stopped) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Lets it go on.
    pub fn go_on(&self) {
        rustix::process::kill_process(Pid::from_raw(self.pid).unwrap(), Signal::CONT).unwrap();
    }

    /// Whether it ended by itself, or was killed by itself.
    pub fn has_ended(&self) -> bool {
        if !self.reaped.load(Ordering::Relaxed)
            && let Some((_, status)) = waitpid(Pid::from_raw(self.pid), WaitOptions::NOHANG).unwrap()
        {
            eprintln!("the domain ended: {status:?}");
            self.reaped.store(true, Ordering::Relaxed);
        }
        self.reaped.load(Ordering::Relaxed)
    }

    /// How it ended, if it did so by itself.
    pub fn wait(&self) -> Option<rustix::process::WaitStatus> {
        if self.reaped.swap(true, Ordering::Relaxed) {
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

    /// Resident memory of the process.
    pub fn resident_bytes(&self) -> usize {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.pid)).unwrap();
        statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
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

/// Waits for a child; its exit code, or `None` if a signal ended it.
pub fn reap(pid: i32) -> Option<i32> {
    let status = waitpid(Some(Pid::from_raw(pid).unwrap()), WaitOptions::empty()).unwrap().unwrap().1;
    status.exit_status()
}

/// Waits until there is a file at `path`.
pub fn wait_for(path: &Path) {
    while !path.exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
}
