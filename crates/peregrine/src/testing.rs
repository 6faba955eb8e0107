//! Tests in Worlds of their own: what `#[peregrine::test]` rests on, for tests that look at a whole program from outside.
//!
//! ```text
//!   cargo test ── test harness ── #[test] fn ──starts──▶ the same executable, PEREGRINE_TEST_CHILD=name
//!                                     │                   └─ before main: the World, whose `main` is the function
//!                                     └── waits (time-out: kills the process group), shows output if it failed
//! ```
//!
//! One process per test, because a World has fixed addresses and must start from a process with one thread.

use std::fmt;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
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
    child: Child,
    name: &'static str,
    limit: Duration,
    begun: Instant,
    settings: Vec<(String, String)>,
    out: std::thread::JoinHandle<String>,
    err: std::thread::JoinHandle<String>,
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
        let mut child = command.spawn().expect("the test's executable starts again");
        let out = read_all(child.stdout.take());
        let err = read_all(child.stderr.take());
        Running { child, name: self.name, limit, begun: Instant::now(), settings, out, err }
    }
}

fn read_all(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
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
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits for its end, or kills its process group when its time is over.
    pub fn wait(mut self) -> Outcome {
        let mut timed_out = None;
        let status = loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                break Some(status);
            }
            if self.begun.elapsed() > self.limit {
                timed_out = Some(self.limit);
                let _ = peregrine_sys::signal::kill(-self.pid(), peregrine_sys::signal::number::KILL);
                break self.child.wait().ok();
            }
            std::thread::sleep(Duration::from_millis(5));
        };
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
