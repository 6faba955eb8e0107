//! Waiting for processes that are being made.
//!
//! A node is up in a millisecond. A domain runs its set-up first, which is the user's code and may take as long as it likes, or never end; and
//! any new process may be stopped. All threads stand still meanwhile. So whoever waits says after a while for what, ends what takes too long,
//! and hears a signal that ends the World.

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
/// A process that is not up after this long is ended; a domain's set-up has failed then.
const MOST: Duration = Duration::from_secs(60);

/// A wait for new processes.
pub(super) struct NewProcesses {
    since_ns: u64,
    said: bool,
}

impl NewProcesses {
    pub fn wait() -> Self {
        Self { since_ns: monotonic_ns(), said: false }
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
        let waited = Duration::from_nanos(monotonic_ns().saturating_sub(wait.since_ns));
        if waited >= SAID_AFTER && !wait.said {
            wait.said = true;
            self.stats.hide_status();
            for i in self.unpaused() {
                eprintln!(
                    "peregrine: all threads wait for {}; it is ended after {MOST:?}",
                    self.what_is_made(i)
                );
            }
        }
        if waited >= MOST {
            *wait = NewProcesses::wait();
            for i in self.unpaused() {
                if let Some(n) = &self.nodes[i as usize] {
                    let _ = signal::kill(n.pid, number::KILL);
                }
            }
        }
        is_told_to_end()
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
