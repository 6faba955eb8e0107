//! The paper's measure of complexity: instructions, branches and system calls on the path of a call.
//!
//! ```text
//!   tracer ──▶ client: calls all the time │ server: serves           both on one processor
//!      └ steps every thread of one of them, one instruction at a time, for so many calls; counts by what the next instruction is
//! ```
//!
//! On one core, one side is stepped while the other runs free, and then the other: stepped together, a call would take so long that waiting in
//! slices became part of the path.
//!
//! A *hot* call is made between two threads that both spin, and one that runs free would find the other so slow that it went to sleep. There both
//! are stepped, turn and turn about: a thread that comes to the `pause` of its loop is held there until the other comes to its own. So the
//! path has one look in vain on each side, and nothing else of the waiting.
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
use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Calls that are stepped through.
const CALLS: u64 = 40;

pub fn run(report: &mut Report, _: &Options) {
    report.section("Path of a call in user mode, both sides");
    let count = |form: &str, sides: &[&str], bytes: &str| {
        let mut sum = [0.0; 3];
        for side in sides {
            let counts = <[f64; 3]>::try_from(again(&["call-case", "path", form, side, bytes])).ok()?;
            sum.iter_mut().zip(counts).for_each(|(sum, n)| *sum += n);
        }
        Some(sum)
    };
    let (parked, hot) = (&["client", "server"][..], &["both"][..]);
    for (name, form, sides, bytes) in [
        ("null call on one core", "migrating", parked, "0"),
        ("null call, hot", "migrating", hot, "0"),
        ("64 B call, hot", "migrating", hot, "64"),
        ("64 B lent, hot", "lent", hot, "64"),
    ] {
        let (Some(ours), Some(theirs)) = (count(form, sides, bytes), count("static", sides, bytes)) else {
            return report.note("skipped: single steps are not allowed here (ptrace)");
        };
        let base = "static thread over the same transport";
        for (i, metric) in ["instructions", "branches", "system calls"].into_iter().enumerate() {
            report.value(&format!("{name}, migrating form"), metric, "", ours[i], Some((base, theirs[i])));
        }
        let times = |i: usize| match ours[i] {
            0.0 => format!("{:.1} (beside none)", theirs[i]),
            n => format!("{:.1} times the", theirs[i] / n),
        };
        report.note(&format!(
            "    static thread: {} instructions, {} branches, {} system calls (the paper's kernel: 5.3, 9, 1)",
            times(0),
            times(1),
            times(2)
        ));
    }
}

/// What a thread's next instruction is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Other,
    /// Any transfer of control: jump, conditional jump, call, return.
    Branch,
    SystemCall,
    /// What a loop that spins says to its processor.
    Pause,
}

/// Classifies an x86-64 instruction by its first bytes.
fn classify(bytes: &[u8; 16]) -> Kind {
    if bytes[..2] == [0xf3, 0x90] {
        return Kind::Pause;
    }
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

/// `migrating|lent|static client|server|both BYTES`: both sides of a hot call, or one of a call on one core.
pub fn case(words: &[&str]) -> ExitCode {
    let [form, side, bytes] = words else { return ExitCode::from(2) };
    let form = match *form {
        "static" => Form::StaticThread,
        "lent" => Form::Lend,
        _ => Form::In,
    };
    let Ok(bytes) = bytes.parse() else { return ExitCode::from(2) };
    let is_hot = *side == "both";
    let (cores, place) = if is_hot { (Cores::Two, Place::Apart) } else { (Cores::One, Place::Default) };
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    // SAFETY: a new mapping, zeroed, kept for the life of the process (S1: an atomic).
    let calls: &AtomicU64 =
        unsafe { &*mmap_anonymous(core::ptr::null_mut(), 4096, prot, flags).expect("shared memory").cast() };
    // The client forks the server: both are below this process, which traces them.
    let client = server_anywhere(move || {
        let mut caller = ours::start(bytes, cores, form, place);
        loop {
            caller.call();
            calls.fetch_add(1, Ordering::Release);
        }
    });
    while calls.load(Ordering::Acquire) < 1000 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let server = children_of(client.pid());
    let mut stepped = if *side == "client" { Vec::new() } else { server.clone() };
    if *side != "server" {
        stepped.push(client.pid());
    }
    if let Some(counts) = step_through(&stepped, calls, is_hot) {
        println!("{} {} {}", counts[0], counts[1], counts[2]);
    }
    // The client first, which would complain of a server that died.
    drop(client);
    for pid in server {
        let _ = peregrine_sys::signal::kill(pid, number::KILL);
    }
    ExitCode::SUCCESS
}

fn children_of(pid: i32) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|w| w.parse().ok()).collect()
}

/// Steps all threads of the processes until so many calls were made: instructions, branches and system calls of one. With `turns`, threads that
/// spin take turns.
fn step_through(processes: &[i32], calls: &AtomicU64, turns: bool) -> Option<[f64; 3]> {
    let mut tracees = BTreeMap::new();
    for pid in processes {
        for task in std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
            let tid: i32 = task.file_name().to_string_lossy().parse().ok()?;
            tracees.insert(tid, Tracee::seize(tid).ok()?);
        }
    }
    let mut counts = [0u64; 3];
    let mut from = None;
    let mut held: BTreeSet<i32> = BTreeSet::new();
    let limit = Instant::now() + Duration::from_secs(60);
    while Instant::now() < limit {
        let Some((tid, stop)) = next_stop(held.is_empty()).ok()? else {
            // Whom it waits for is in the kernel.
            std::thread::yield_now();
            continue;
        };
        let (Some(tracee), Stop::Signal(signal)) = (tracees.get(&tid), stop) else { continue };
        let done = calls.load(Ordering::Acquire);
        // The first two calls set everything in motion: they were interrupted.
        let begun = *from.get_or_insert(done + 2);
        if done >= begun + CALLS {
            let each = |i: usize| counts[i] as f64 / CALLS as f64;
            return Some([each(0), each(1), each(2)]);
        }
        let (_, bytes) = tracee.next_instruction().ok()?;
        let kind = classify(&bytes);
        if done >= begun {
            counts[0] += 1;
            match kind {
                Kind::Branch => counts[1] += 1,
                Kind::SystemCall => counts[2] += 1,
                Kind::Other | Kind::Pause => {}
            }
        }
        if turns && kind == Kind::Pause && signal == number::TRAP {
            for other in std::mem::take(&mut held) {
                tracees.get(&other)?.step(0).ok()?;
            }
            held.insert(tid);
            continue;
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
        assert_eq!(of(&[0xf3, 0x90]), Kind::Pause);
    }
}
