//! The paper's measure of complexity: instructions, branches and system calls on the path of a null call.
//!
//! ```text
//!   tracer ──▶ client: calls all the time │ server: serves           both on one processor
//!      └ steps every thread of one of them, one instruction at a time, for so many calls; counts by what the next instruction is
//! ```
//!
//! One side is stepped while the other runs free, and then the other: stepped together, a call would take so long that waiting in
//! slices became part of the path.
//!
//! Ford and Lepreau counted inside their kernel; here the kernel is Linux's, and what can be counted exactly is what runs in user mode
//! on both sides, and how often the kernel is entered. The server is stepped from call to call, so what it does after its answer
//! (going back to sleep) is counted too. The *static* form hands the call to a static server thread over the same transport.

use super::again;
use super::ours::{self, Form, Place};
use super::subject::{Caller, server_anywhere};
use super::ways::Cores;
use crate::measure::Options;
use crate::report::Report;
use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_sys::rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use peregrine_sys::signal::number;
use peregrine_sys::trace::{Stop, Tracee, next_stop};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Calls that are stepped through.
const CALLS: u64 = 40;

pub fn run(report: &mut Report, _: &Options) {
    report.section("Path of a null call in user mode, both sides");
    let count = |form: &str| {
        let side = |side: &str| <[f64; 3]>::try_from(again(&["call-case", "path", form, side])).ok();
        let (client, server) = (side("client")?, side("server")?);
        Some([0, 1, 2].map(|i| client[i] + server[i]))
    };
    let (Some([a, b, c]), Some([d, e, f])) = (count("migrating"), count("static")) else {
        return report.note("skipped: single steps are not allowed here (ptrace)");
    };
    let base = "static thread over the same transport";
    for (metric, ours, theirs) in [("instructions", a, d), ("branches", b, e), ("system calls", c, f)] {
        report.value("null call, migrating form", metric, "", ours, Some((base, theirs)));
    }
    report.note(&format!(
        "    static thread: {:.1} times the instructions, {:.1} times the branches, {:.1} times the system calls (the paper's kernel: 5.3, 9, 1)",
        d / a,
        e / b,
        f / c
    ));
}

/// What a thread's next instruction is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Other,
    /// Any transfer of control: jump, conditional jump, call, return.
    Branch,
    SystemCall,
}

/// Classifies an x86-64 instruction by its first bytes.
fn classify(bytes: &[u8; 16]) -> Kind {
    let is_prefix =
        |b: u8| matches!(b, 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65);
    let mut i = 0;
    while i < 8 && is_prefix(bytes[i]) {
        i += 1;
    }
    if bytes[i] & 0xf0 == 0x40 {
        i += 1;
    }
    match (bytes[i], bytes[i + 1]) {
        (0x0f, 0x05) => Kind::SystemCall,
        (0x0f, 0x80..=0x8f) | (0x70..=0x7f | 0xe0..=0xe3 | 0xe8 | 0xe9 | 0xeb | 0xc2 | 0xc3, _) => {
            Kind::Branch
        }
        // The operation of 0xff is in the middle of the byte that follows: 2 and 3 call, 4 and 5 jump.
        (0xff, operation) if matches!(operation >> 3 & 7, 2..=5) => Kind::Branch,
        _ => Kind::Other,
    }
}

/// `migrating|static client|server`.
pub fn case(words: &[&str]) -> ExitCode {
    let (form, steps_server) = match words {
        ["migrating", side] => (Form::In, *side == "server"),
        ["static", side] => (Form::StaticThread, *side == "server"),
        _ => return ExitCode::from(2),
    };
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    // SAFETY: a new mapping, zeroed, kept for the life of the process (S1: an atomic).
    let calls: &AtomicU64 =
        unsafe { &*mmap_anonymous(core::ptr::null_mut(), 4096, prot, flags).expect("shared memory").cast() };
    // The client forks the server: both are below this process, which traces them.
    let client = server_anywhere(move || {
        let mut caller = ours::start(0, Cores::One, form, Place::Default);
        loop {
            caller.call();
            calls.fetch_add(1, Ordering::Release);
        }
    });
    while calls.load(Ordering::Acquire) < 1000 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let server = children_of(client.pid());
    let stepped = if steps_server { &server[..] } else { &[client.pid()] };
    if let Some(counts) = step_through(stepped, calls) {
        println!("{} {} {}", counts[0], counts[1], counts[2]);
    }
    for pid in server {
        let _ = peregrine_sys::signal::kill(pid, number::KILL);
    }
    ExitCode::SUCCESS
}

fn children_of(pid: i32) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|w| w.parse().ok()).collect()
}

/// Steps all threads of the processes until so many calls were made: instructions, branches and system calls of one.
fn step_through(processes: &[i32], calls: &AtomicU64) -> Option<[f64; 3]> {
    let mut tracees = BTreeMap::new();
    for pid in processes {
        for task in std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
            let tid: i32 = task.file_name().to_string_lossy().parse().ok()?;
            tracees.insert(tid, Tracee::seize(tid).ok()?);
        }
    }
    let mut counts = [0u64; 3];
    let mut from = None;
    let limit = Instant::now() + Duration::from_secs(60);
    while Instant::now() < limit {
        let (tid, stop) = next_stop(true).ok()??;
        let (Some(tracee), Stop::Signal(signal)) = (tracees.get(&tid), stop) else { continue };
        let done = calls.load(Ordering::Acquire);
        // The first two calls set everything in motion: they were interrupted.
        let begun = *from.get_or_insert(done + 2);
        if done >= begun + CALLS {
            let each = |i: usize| counts[i] as f64 / CALLS as f64;
            return Some([each(0), each(1), each(2)]);
        }
        if done >= begun {
            let (_, bytes) = tracee.next_instruction().ok()?;
            counts[0] += 1;
            match classify(&bytes) {
                Kind::Branch => counts[1] += 1,
                Kind::SystemCall => counts[2] += 1,
                Kind::Other => {}
            }
        }
        tracee.step(if signal == number::TRAP { 0 } else { signal }).ok()?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bytes: &[u8]) -> Kind {
        let mut all = [0x90; 16];
        all[..bytes.len()].copy_from_slice(bytes);
        classify(&all)
    }

    #[test]
    fn instructions_are_told_apart_by_their_first_bytes() {
        for branch in [
            &[0xe8u8, 1, 0, 0, 0][..],
            &[0xc3],
            &[0xf3, 0xc3],
            &[0x74, 5],
            &[0x0f, 0x84, 0, 0],
            &[0xff, 0xd0],
            &[0x41, 0xff, 0xe3],
            &[0xff, 0x25],
        ] {
            assert_eq!(of(branch), Kind::Branch, "{branch:x?}");
        }
        for other in
            [&[0x48u8, 0x89, 0xd8][..], &[0xff, 0xc0], &[0x0f, 0x1f, 0], &[0x50], &[0xf0, 0x48, 0x0f, 0xb1]]
        {
            assert_eq!(of(other), Kind::Other, "{other:x?}");
        }
        assert_eq!(of(&[0x0f, 0x05]), Kind::SystemCall);
    }
}
