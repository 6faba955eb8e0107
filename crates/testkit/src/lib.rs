//! One process per test, and skips that are printed.
//!
//! Signal handlers, fixed addresses, users and forks are properties of a process, so tests of them must not share one.
//! A test binary with `harness = false` calls [`main`], which runs itself again once for each test, in a child, and
//! reads the outcome: the child ended well, it printed [`SKIP`], or it failed. So plain `cargo test` is all it takes.
//!
//! ```no_run
//! fn arithmetic_holds() -> testkit::Outcome {
//!     assert_eq!(1 + 1, 2);
//!     testkit::Outcome::Passed
//! }
//!
//! fn main() -> std::process::ExitCode {
//!     testkit::main(testkit::tests![arithmetic_holds])
//! }
//! ```

mod slow;

pub use slow::lingering;

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// What a test says about itself when it returns; a panic or a signal is a failure.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// What it promises holds.
    Passed,
    /// It could not be tried, and why: name the missing capability.
    Skipped(String),
}

/// Ends a test as skipped, with a formatted reason.
#[macro_export]
macro_rules! skip {
    ($($arg:tt)*) => { return $crate::Outcome::Skipped(format!($($arg)*)) };
}

/// A test: its name is the promise.
pub struct Test {
    /// The name.
    pub name: String,
    /// The body, run in a process of its own.
    pub body: Box<dyn Fn() -> Outcome + Sync + Send>,
}

/// The functions named, as tests.
#[macro_export]
macro_rules! tests {
    ($($name:path),* $(,)?) => {
        vec![$($crate::Test {
            name: stringify!($name).rsplit("::").next().unwrap_or_default().trim().to_owned(),
            body: Box::new($name),
        }),*]
    };
}

/// The variable by which a child learns which test it is.
pub const CHILD: &str = "TESTKIT_CHILD";
/// What a child prints before the reason of a skip.
pub const SKIP: &str = "testkit-skip:";
/// A test that takes longer is killed and counts as failed: a trap that is never answered would hang for ever. Long runs set
/// `TESTKIT_LIMIT`, in seconds.
fn limit() -> Duration {
    let seconds = std::env::var("TESTKIT_LIMIT").ok().and_then(|s| s.parse().ok());
    Duration::from_secs(seconds.unwrap_or(120))
}
const HELPER_LIMIT: Duration = Duration::from_secs(20);

/// Runs the tests whose names contain the first argument, or all; each in a process of its own.
pub fn main(tests: Vec<Test>) -> ExitCode {
    if let Ok(name) = std::env::var(CHILD) {
        let test = tests.iter().find(|t| t.name == name).unwrap_or_else(|| panic!("no test {name}"));
        if let Outcome::Skipped(why) = (test.body)() {
            println!("{SKIP}{}", why.replace('\n', " "));
        }
        return ExitCode::SUCCESS;
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let exact = arguments.iter().any(|a| a == "--exact");
    let nocapture = arguments.iter().any(|a| a == "--nocapture");
    let filters: Vec<&String> = arguments.iter().filter(|a| !a.starts_with('-')).collect();
    let chosen: Vec<&Test> = tests
        .iter()
        .filter(|t| !t.name.starts_with("helper_"))
        .filter(|t| {
            filters.is_empty()
                || filters.iter().any(|f| if exact { t.name == **f } else { t.name.contains(f.as_str()) })
        })
        .collect();
    if arguments.iter().any(|a| a == "--list") {
        for test in &chosen {
            println!("{}: test", test.name);
        }
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", chosen.len());
    let next = Mutex::new(chosen.iter());
    let (send, results) = mpsc::channel();
    let workers = std::thread::available_parallelism().map_or(2, |n| n.get()).min(4);
    let begun = Instant::now();
    let (mut passed, mut skipped, mut failed) = (0, Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let (send, next) = (send.clone(), &next);
            scope.spawn(move || {
                loop {
                    let Some(test) = next.lock().expect("no worker panics").next() else { return };
                    let _ = send.send((test.name.clone(), run(&test.name)));
                }
            });
        }
        drop(send);
        for (name, (verdict, output)) in results {
            match verdict {
                Verdict::Passed => {
                    passed += 1;
                    println!("test {name} ... ok");
                }
                Verdict::Skipped(why) => {
                    println!("test {name} ... SKIPPED: {why}");
                    skipped.push(name.clone());
                }
                Verdict::Failed(why) => {
                    println!("test {name} ... FAILED: {why}\n{output}");
                    failed.push(name.clone());
                }
            }
            if nocapture {
                println!("---- {name}\n{output}");
            }
        }
    });
    println!(
        "\ntest result: {}. {passed} passed; {} failed; {} ignored; 0 measured; {} filtered out; finished in {:.2?}\n",
        if failed.is_empty() { "ok" } else { "FAILED" },
        failed.len(),
        skipped.len(),
        tests.iter().filter(|t| !t.name.starts_with("helper_")).count() - chosen.len(),
        begun.elapsed(),
    );
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// How a helper ended, and what it printed.
#[derive(Debug)]
pub struct Ended {
    /// The exit status, with the signal if one killed it; `None` if it was killed for taking too long.
    pub status: Option<std::process::ExitStatus>,
    /// Standard output and standard error.
    pub output: String,
}

/// Runs the test called `helper` (a name that begins with `helper_`, which [`main`] does not run by itself) in a child: for
/// promises about how a process dies.
pub fn run_helper(helper: &str) -> Ended {
    let (status, _, output) = run_child(helper, HELPER_LIMIT);
    Ended { status, output }
}

enum Verdict {
    Passed,
    Skipped(String),
    Failed(String),
}

fn run(name: &str) -> (Verdict, String) {
    let (status, out, output) = run_child(name, limit());
    let verdict = match status {
        None => Verdict::Failed(format!("killed after {:?}", limit())),
        Some(s) if !s.success() => Verdict::Failed(s.to_string()),
        Some(_) => match out.lines().find_map(|l| l.strip_prefix(SKIP)) {
            Some(why) => Verdict::Skipped(why.to_owned()),
            None => Verdict::Passed,
        },
    };
    (verdict, output)
}

/// Its status, its standard output, and that with its standard error.
fn run_child(name: &str, limit: Duration) -> (Option<std::process::ExitStatus>, String, String) {
    let me = std::env::current_exe().expect("a running program has a path");
    let mut command = Command::new(me);
    command.env(CHILD, name).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Whoever kills the harness does not know of the child. The kernel counts as the parent the OS thread that started it: this
    // one, which waits for it.
    let harness = std::process::id();
    // SAFETY: two system calls, nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            peregrine_sys::process::die_with_parent();
            let orphan = std::os::unix::process::parent_id() != harness;
            if orphan { Err(std::io::ErrorKind::Other.into()) } else { Ok(()) }
        });
    }
    let mut child = command.spawn().expect("this program can be run again");
    // Both pipes are drained while the child runs, so that it never waits for us.
    let drain = |mut pipe: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = pipe.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let out = drain(Box::new(child.stdout.take().expect("piped")));
    let err = drain(Box::new(child.stderr.take().expect("piped")));
    let begun = Instant::now();
    let status = loop {
        match child.try_wait().expect("our own child") {
            Some(status) => break Some(status),
            None if begun.elapsed() > limit => {
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let out = out.join().unwrap_or_default();
    let output = format!("{out}{}", err.join().unwrap_or_default());
    (status, out, output)
}

/// A small generator of pseudo-random numbers (splitmix64), seeded so that a failure can be repeated.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// From a seed, which the test prints.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub const fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    ///
    /// # Panics
    /// If `bound` is 0.
    pub const fn below(&mut self, bound: usize) -> usize {
        (self.next_u64() % bound as u64) as usize
    }

    /// The numbers below `count` in random order.
    pub fn permutation(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for i in (1..count).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}
