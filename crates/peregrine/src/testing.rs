//! Tests in Worlds of their own: what `#[peregrine::test]` rests on, for tests that look at a whole program from outside.
//!
//! ```text
//!   cargo test ── test harness ── #[test] fn ──starts──▶ the same executable, PEREGRINE_TEST_CHILD=name
//!                                     │                   └─ before main: the World, whose `main` is the function
//!                                     └── waits (time-out: kills the process group), shows output if it failed
//!                                          an OS thread of its own, for the child is killed when who started it is gone: Ctrl-C of
//!                                          `cargo test` reaches the test harness, and not the child's group
//! ```
//!
//! One process per test, because a World has fixed addresses and must start from a process with one thread.

use std::fmt;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Names the function that a child runs.
pub(crate) const CHILD: &str = "PEREGRINE_TEST_CHILD";

/// A function that runs as `main` of a World in a child process: what `#[peregrine::test(program)]` makes.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Module path and name.
    pub name: &'static str,
    /// Environment variables for it, unless set already.
    pub settings: &'static [(&'static str, &'static str)],
}

/// How a child ended, and what it printed.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The program.
    pub name: String,
    /// Exit code, if it ended by itself.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Whether it was killed because it took too long.
    pub timed_out: Option<Duration>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Settings that it ran with.
    pub settings: Vec<(String, String)>,
}

impl Outcome {
    /// Whether the program ended by itself with exit code 0.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.timed_out, self.code, self.signal) {
            (Some(limit), ..) => write!(f, "{} was still running after {limit:?} and was killed", self.name)?,
            (_, Some(code), _) => write!(f, "{} ended with exit code {code}", self.name)?,
            (_, _, signal) => write!(f, "{} was ended by signal {}", self.name, signal.unwrap_or(0))?,
        }
        write!(f, "\nagain: ")?;
        for (name, value) in &self.settings {
            write!(f, "{name}={value} ")?;
        }
        write!(f, "{CHILD}={} {}", self.name, std::env::current_exe().unwrap_or_default().display())?;
        write!(f, "\n---- its standard output\n{}\n---- its standard error\n{}", self.stdout, self.stderr)
    }
}

/// A child that runs.
#[derive(Debug)]
pub struct Running {
    pid: i32,
    name: &'static str,
    settings: Vec<(String, String)>,
    /// Its status, and the limit if it took longer.
    ended: JoinHandle<(Option<ExitStatus>, Option<Duration>)>,
    out: JoinHandle<String>,
    err: JoinHandle<String>,
}

impl Program {
    /// Runs it to its end.
    ///
    /// # Panics
    /// If no process can be started.
    pub fn run(self) -> Outcome {
        self.start(&[]).wait()
    }

    /// Runs it with more environment variables.
    ///
    /// # Panics
    /// If no process can be started.
    pub fn run_with(self, env: &[(&str, &str)]) -> Outcome {
        self.start(env).wait()
    }

    /// The command that runs it: to be changed and passed to [`Program::start_command`].
    pub fn command(self) -> Command {
        let mut command = Command::new(std::env::current_exe().expect("the test has an executable"));
        command.env(CHILD, self.name);
        command
    }

    /// Starts it with more environment variables.
    ///
    /// # Panics
    /// If no process can be started.
    pub fn start(self, env: &[(&str, &str)]) -> Running {
        let mut command = self.command();
        command.envs(env.iter().copied());
        self.start_command(command)
    }

    /// Starts a command that [`Program::command`] made.
    ///
    /// # Panics
    /// If no process can be started.
    pub fn start_command(self, mut command: Command) -> Running {
        let mut settings: Vec<(String, String)> = Vec::new();
        for (name, value) in self.settings {
            let given = command.get_envs().any(|(n, _)| n == *name);
            if !given && std::env::var_os(name).is_none() {
                command.env(name, value);
            }
        }
        for (name, value) in command.get_envs() {
            let (name, value) = (
                name.to_string_lossy().into_owned(),
                value.unwrap_or_default().to_string_lossy().into_owned(),
            );
            if name != CHILD {
                settings.push((name, value));
            }
        }
        let limit = settings
            .iter()
            .find(|s| s.0 == "PEREGRINE_TEST_TIMEOUT")
            .map(|s| s.1.clone())
            .or_else(|| std::env::var("PEREGRINE_TEST_TIMEOUT").ok())
            .and_then(|v| v.parse().ok())
            .map_or(Duration::from_secs(120), Duration::from_secs);
        // A group of its own, nodes included, so that a time-out leaves nothing behind.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let parent = std::process::id();
        // SAFETY: two system calls, nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                peregrine_sys::process::die_with_parent();
                let orphan = std::os::unix::process::parent_id() != parent;
                if orphan { Err(std::io::ErrorKind::Other.into()) } else { Ok(()) }
            });
        }
        let (started, child) = std::sync::mpsc::channel();
        // The kernel counts as the parent the OS thread that started it, so that is the one that waits.
        let ended = std::thread::spawn(move || {
            let mut child = command.spawn().expect("the test's executable starts again");
            let pipes = (child.id() as i32, child.stdout.take(), child.stderr.take());
            started.send(pipes).expect("the starter waits");
            end_of(child, limit)
        });
        let (pid, out, err) = child.recv().expect("the test's executable starts again");
        Running { pid, name: self.name, settings, ended, out: read_all(out), err: read_all(err) }
    }
}

/// Waits for its end, or kills its process group when its time is over.
fn end_of(mut child: Child, limit: Duration) -> (Option<ExitStatus>, Option<Duration>) {
    let begun = Instant::now();
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return (Some(status), None);
        }
        if begun.elapsed() > limit {
            let _ = peregrine_sys::signal::kill(-(child.id() as i32), peregrine_sys::signal::number::KILL);
            return (child.wait().ok(), Some(limit));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn read_all(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

impl Running {
    /// Its process id: the supervisor's.
    pub const fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits for its end, or until its process group was killed because its time was over.
    pub fn wait(self) -> Outcome {
        let (status, timed_out) = self.ended.join().unwrap_or_default();
        Outcome {
            name: self.name.to_owned(),
            code: status.and_then(|s| s.code()),
            signal: status.and_then(|s| s.signal()),
            timed_out,
            stdout: self.out.join().unwrap_or_default(),
            stderr: self.err.join().unwrap_or_default(),
            settings: self.settings,
        }
    }
}
