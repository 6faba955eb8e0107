//! What looking costs when the calls end: the activation looks for the next one for a moment, and then uses no processor; its caller looks for
//! nothing once it has its reply, and not long for the reply of an activation that sleeps.
//!
//! ```text
//!   … call call call          A ─────────── 20 ms without one ─────────── B
//!                        domain: looks, sleeps ·                 · wakes   handler's own clock, B - A
//!                                                  caller: rings, waits    its clock, round B
//! ```
//!
//! Each side reads the processor time of its own thread, for the kernel's count of another's is as old as that one's last tick. Beside it the same
//! of a domain that does not look (`Limits::spin` of zero). Going to sleep and waking up are in both; the difference of the sums is what
//! looking burned, and may be 20 us.

use super::again;
use super::ours::{self, Form, Place};
use super::subject::Caller;
use super::ways::Cores;
use crate::measure::{Options, Samples};
use crate::report::Report;
use peregrine_call::Limits;
use peregrine_sys::timer;
use std::process::ExitCode;
use std::time::Duration;

/// Calls before each rest: enough for looking to have paid.
const CALLS: usize = 200;
const REST: Duration = Duration::from_millis(20);
/// Rests of one process, whose middle counts.
const RESTS: usize = 31;

const PLACES: [(&str, &str, Cores, Place); 2] = [
    ("one", "one core", Cores::One, Place::Default),
    ("hot", "hot on another core", Cores::Two, Place::Apart),
];

pub fn run(report: &mut Report, options: &Options) {
    report.section("Processor time from a call over 20 ms without one to the next, us");
    for (name, title, _, _) in PLACES {
        let mut rows: [[Samples; 2]; 3] = Default::default();
        for _ in 0..options.rounds(7) {
            for (i, what) in ["looks", "asleep"].iter().enumerate() {
                let numbers = again(&["call-case", "idle", name, what]);
                let [domain, caller] = [numbers[0] * 1e-3, numbers[1] * 1e-3];
                for (row, us) in rows.iter_mut().zip([domain, caller, domain + caller]) {
                    row[i].push(us);
                }
            }
        }
        for (side, [looks, asleep]) in ["the activation", "its caller", "both sides"].iter().zip(&rows) {
            let case = format!("a call, then idle, {title}, {side}");
            report.samples(&case, "processor time", "us", looks, ("a domain that does not look", asleep));
        }
        let [looks, asleep] = &rows[2];
        let extra = looks.median() - asleep.median();
        let verdict = if extra <= 20.0 { "met" } else { "MISSED" };
        report
            .note(&format!("goal: burned by looking, {title}: {extra:.1} us (wanted at most 20): {verdict}"));
    }
}

/// Some rests in this process: `one|hot looks|asleep`.
pub fn case(words: &[&str]) -> ExitCode {
    let [name, what] = words[..] else { return ExitCode::from(2) };
    let Some((_, _, cores, place)) = PLACES.iter().find(|place| place.0 == name) else {
        return ExitCode::from(2);
    };
    let mut limits = Limits::default();
    if what == "asleep" {
        limits.spin = Duration::ZERO;
    }
    let mut caller = ours::start_with(0, *cores, Form::In, *place, limits);
    let (mut domain, mut own) = (Samples::default(), Samples::default());
    for _ in 0..RESTS {
        for _ in 0..CALLS {
            caller.call();
        }
        let before = caller.clock_of_activation();
        std::thread::sleep(REST);
        let mine = timer::thread_cpu_ns();
        let after = caller.clock_of_activation();
        own.push((timer::thread_cpu_ns() - mine) as f64);
        domain.push(after.saturating_sub(before) as f64);
    }
    println!("{} {}", domain.median(), own.median());
    ExitCode::SUCCESS
}
