//! Waiting for processes that are being made.
//!
//! A node is up in a millisecond. A domain runs its set-up first, which is the user's code and may take as long as it likes, or never end; and
//! any new process may be stopped. All threads stand still meanwhile. So whoever waits says after a while for what, ends what takes too long,
//! and hears a signal that ends the World, and `peregrine ps`.

use super::Supervisor;
use crate::control::node;
use peregrine_base::sync::Ordering;
use peregrine_sys::signal::{self, number};
use peregrine_sys::timer::monotonic_ns;
use std::time::Duration;

/// How long is waited at a time.
pub(super) const SLICE: Duration = Duration::from_millis(500);
/// After this long it is said what is waited for.
const SAID_AFTER: Duration = Duration::from_secs(5);
/// A process that is not up after this long is ended, which is one failure of a domain's set-up ([`MOST_SETUPS`](crate::carried::MOST_SETUPS)).
const MOST: Duration = Duration::from_secs(60);

/// How many times as fast as time goes both limits come: 1, but for tests, which have no minutes to spare.
fn haste() -> u32 {
    #[cfg(feature = "killpoints")]
    if let Some(haste) = std::env::var("PEREGRINE_HASTE").ok().and_then(|h| h.parse().ok()) {
        return haste;
    }
    1
}

/// A wait for new processes.
pub(super) struct NewProcesses {
    since_ns: u64,
    haste: u32,
    said: bool,
}

/// What there is to do after a while.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Due {
    Nothing,
    /// Say what is waited for.
    Say,
    /// End what is not up.
    End,
}

impl NewProcesses {
    pub fn wait() -> Self {
        Self { haste: haste(), ..Self::since(monotonic_ns()) }
    }

    const fn since(now_ns: u64) -> Self {
        Self { since_ns: now_ns, haste: 1, said: false }
    }

    /// What is due at `now_ns`. What is ended leaves others to be waited for, as long again.
    fn due(&mut self, now_ns: u64) -> Due {
        let waited = Duration::from_nanos(now_ns.saturating_sub(self.since_ns)) * self.haste;
        if waited >= MOST {
            *self = Self { haste: self.haste, ..Self::since(now_ns) };
            Due::End
        } else if waited >= SAID_AFTER && !std::mem::replace(&mut self.said, true) {
            Due::Say
        } else {
            Due::Nothing
        }
    }
}

/// Whether a signal has come that ends the World. It is left for [`Supervisor::sleep`] to take.
pub(super) fn is_told_to_end() -> bool {
    let ending = [number::INT, number::TERM, number::HUP].map(signal::bit);
    ending.iter().any(|bit| signal::pending() & bit != 0)
}

impl Supervisor {
    /// Between two looks at whether the new processes are up; whether to give up waiting, for the World is told to end.
    pub(super) fn wait_no_longer(&mut self, wait: &mut NewProcesses) -> bool {
        match wait.due(monotonic_ns()) {
            Due::Nothing => {}
            Due::Say => {
                self.stats.hide_status();
                for i in self.unpaused() {
                    eprintln!(
                        "peregrine: all threads wait for {}; it is ended after {:?}",
                        self.what_is_made(i),
                        MOST / wait.haste
                    );
                }
            }
            Due::End => {
                for i in self.unpaused() {
                    if let Some(n) = &self.nodes[i as usize] {
                        let _ = signal::kill(n.pid, number::KILL);
                    }
                }
            }
        }
        self.serve_control_while_all_wait();
        is_told_to_end()
    }

    /// What the threads wait for, in words.
    pub(super) fn what_is_waited_for(&self) -> String {
        let all: Vec<String> = self.unpaused().into_iter().map(|i| self.what_is_made(i)).collect();
        if all.is_empty() { "a new process".to_owned() } else { all.join(", ") }
    }

    /// What keeps node `i` from being up, in words.
    fn what_is_made(&self, i: u32) -> String {
        let pid = self.nodes[i as usize].as_ref().map_or(0, |n| n.pid);
        let place = super::blocked::place_of(pid);
        match super::domains::name_of_node(i) {
            Some(name) if node(i).ready.load(Ordering::Acquire) == 0 => {
                format!("the set-up of domain '{name}' (process {pid}): {place}")
            }
            _ => format!("node {i} (process {pid}), which is not up yet: {place}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_five_seconds_is_told_once_and_what_takes_a_minute_is_ended_again_and_again() {
        let begun_ns = 77_000_000_000;
        let mut wait = NewProcesses::since(begun_ns);
        let mut told = Vec::new();
        // In the slices of a wait, to beyond two minutes.
        for slice in 0..=(130_000 / SLICE.as_millis() as u64) {
            let passed = SLICE * slice as u32;
            match wait.due(begun_ns + passed.as_nanos() as u64) {
                Due::Nothing => {}
                due => told.push((passed.as_millis(), due)),
            }
        }
        assert_eq!(
            told,
            [
                (5_000, Due::Say),
                (60_000, Due::End),
                (65_000, Due::Say),
                (120_000, Due::End),
                (125_000, Due::Say)
            ]
        );
    }

    #[test]
    fn a_clock_that_has_just_begun_ends_nothing() {
        assert_eq!(NewProcesses::since(5).due(0), Due::Nothing);
    }
}
