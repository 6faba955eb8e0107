//! Instructions of the inline path, counted by callgrind or `perf stat`: ours less the floor's is what the layer adds.

use super::raw::{self, Bare};
use super::table::Ours;
use super::{Kind, Way};
use crate::measure::Options;
use crate::report::Report;
use peregrine_base::sync::Ordering;
use peregrine_vm::{Capabilities, PAGE_SIZE, PageCount, Protection};
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const PAGES: usize = 100;
/// A tool that has not answered by then (half a second is usual) is given up.
const LIMIT: Duration = Duration::from_secs(20);

/// `vm-path ours|bare ROUNDS`: so many rounds of Appel2 over `mprotect`, for somebody who counts.
pub fn run_one(arguments: &[String]) {
    let rounds: usize = arguments.get(1).and_then(|n| n.parse().ok()).unwrap_or(10);
    let unit = PageCount::new(1);
    let touch = |start: *mut u8| {
        for page in 0..PAGES {
            // SAFETY: in the mapping, which is behind no reference.
            unsafe { start.add(page * PAGE_SIZE).write_volatile(1) };
        }
    };
    if arguments.first().is_some_and(|a| a == "ours") {
        let ours = Ours::new(Way::MprotectRead, Kind::Anonymous, PAGES, unit, &Capabilities::probe());
        for _ in 0..rounds {
            ours.region.protect(&[ours.region.range()], Protection::Read).expect("protect");
            touch(ours.memory.range().start().as_ptr());
        }
    } else {
        // The probe is part of both programs, so that it falls out of the difference.
        let _ = Capabilities::probe();
        let bare = Bare::apart(Way::MprotectRead, Kind::Anonymous, PAGES, unit);
        bare.aim();
        raw::IDLE.store(0, Ordering::Relaxed);
        raw::with_handler(|| {
            for _ in 0..rounds {
                bare.close(bare.memory.range());
                touch(bare.memory.range().start().as_ptr());
            }
        });
    }
}

pub fn run(report: &mut Report, options: &Options) {
    if !options.wants("instructions") {
        return;
    }
    report.section("Instructions in user mode on the inline path (mprotect+SIGSEGV), per trap");
    let Ok(me) = std::env::current_exe() else { return };
    let count = |tool: Tool, which: &str, rounds: usize| tool.count(&me, which, rounds);
    for tool in [Tool::Callgrind, Tool::Perf] {
        let per_trap = |which: &str| {
            let (few, many) = (count(tool, which, 10)?, count(tool, which, 60)?);
            Some((many - few) / (50.0 * PAGES as f64))
        };
        match (per_trap("ours"), per_trap("bare")) {
            (Some(ours), Some(bare)) if bare > 1.0 => {
                report.value(
                    &format!("instructions by {}", tool.name()),
                    "per trap",
                    "instr",
                    ours,
                    Some(("bare handler", bare)),
                );
            }
            _ => {
                report.note(&format!("skipped: {} is not there or can't count on this machine", tool.name()))
            }
        }
    }
}

/// What `command` says on its standard error; `None` if it does not end in time.
fn said_within(mut command: Command, limit: Duration) -> Option<String> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().ok()?;
    let begun = Instant::now();
    // What these tools say fits a pipe.
    while child.try_wait().ok()?.is_none() {
        if begun.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut text = Vec::new();
    child.stderr.take()?.read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

#[derive(Clone, Copy)]
enum Tool {
    Callgrind,
    Perf,
}

impl Tool {
    const fn name(self) -> &'static str {
        match self {
            Self::Callgrind => "valgrind --tool=callgrind",
            Self::Perf => "perf stat",
        }
    }

    fn count(self, program: &std::path::Path, which: &str, rounds: usize) -> Option<f64> {
        let mut command = match self {
            Self::Callgrind => {
                let mut c = Command::new("valgrind");
                // A handler returns to the instruction that faulted, with the registers that the tool shows it: unless told to, it
                // keeps some of them back, and the store goes to a wrong address for ever.
                c.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
                c.args(["--px-default", "--px-file-backed"].map(|o| format!("{o}=allregs-at-mem-access")));
                c
            }
            Self::Perf => {
                let mut c = Command::new("perf");
                c.args(["stat", "-x,", "-e", "instructions:u"]);
                c
            }
        };
        command.arg(program).args(["vm-path", which, &rounds.to_string()]);
        let text = said_within(command, LIMIT)?;
        match self {
            Self::Callgrind => text.lines().find_map(|l| l.split_once("Collected :")?.1.trim().parse().ok()),
            Self::Perf => text.lines().find(|l| l.contains("instructions"))?.split(',').next()?.parse().ok(),
        }
    }
}
