//! What happened in a World, and what it cost.
//!
//! Counts are of the whole run. Of what is measured one by one only the newest few thousand values are kept, so that a World may
//! run for years: medians are theirs.

use super::outlet::takes_bytes;
use crate::control::NodeShared;
use crate::shadow::Moved;
use peregrine_base::sync::Ordering;
use peregrine_sys::timer::monotonic_ns;
use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;

/// Counts and costs of one run.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Stats {
    /// When it began (monotonic ns).
    pub started_ns: u64,
    /// How long it ran.
    pub ran_ns: u64,
    /// Nodes killed on purpose.
    pub kills: u64,
    /// Kills that hit a running thread.
    pub kills_hit: u64,
    /// Node processes that died, for whatever reason.
    pub deaths: u64,
    /// Deaths that a thread caused.
    pub crashes: u64,
    /// Nodes that ended because they lacked what a thread needs to run.
    pub gave_up: u64,
    /// Threads taken away.
    pub quarantined: u64,
    /// Moves asked for by the supervisor.
    pub moves_asked: u64,
    /// Moves that took place.
    pub moves: u64,
    /// Time from leaving one node to being taken up by the other, all moves together, ns.
    pub move_ns: u64,
    /// Switches between threads.
    pub switches: u64,
    /// Preemptions.
    pub preemptions: u64,
    /// Moves that took a running thread from its computation.
    pub preempted_moves: u64,
    /// Writes to sealed pages of the statics window (`peregrine_thread::seal`).
    pub seal_faults: u64,
    /// Images taken.
    pub images: u64,
    /// Images given up because a node did not pause.
    pub images_given_up: u64,
    /// Nodes that did not pause last time.
    pub blocked_nodes: Vec<u32>,
    /// Pages copied by each of the newest images.
    pub image_pages: Vec<u64>,
    /// Pages copied by all images together.
    pub copied_pages: u64,
    /// Pause of each image, ns.
    pub pause_ns: Vec<u64>,
    /// Copying part of each image, ns.
    pub copy_ns: Vec<u64>,
    /// Images written to the store.
    pub saves: u64,
    /// Attempts that failed.
    pub saves_failed: u64,
    /// Bytes written to the store.
    pub saved_bytes: u64,
    /// Time each took, ns.
    pub save_ns: Vec<u64>,
    /// Rollbacks.
    pub rollbacks: u64,
    /// From the discovery of a death until all nodes ran again, ns each.
    pub recovery_ns: Vec<u64>,
    /// The part of it that restored memory, ns each.
    pub restore_ns: Vec<u64>,
    /// Time between the image gone back to and the death, ns each.
    pub distance_ns: Vec<u64>,
    /// Pages restored.
    pub restored_pages: u64,
    #[serde(skip)]
    shown: bool,
    /// When the last plain line of progress was written.
    #[serde(skip)]
    line_ns: u64,
}

impl Stats {
    pub(super) fn new() -> Self {
        Self { started_ns: monotonic_ns(), ..Self::default() }
    }

    pub(super) fn image(&mut self, moved: Moved, ns: u64) {
        self.images += 1;
        self.copied_pages += moved.pages;
        keep(&mut self.image_pages, moved.pages);
        keep(&mut self.copy_ns, ns);
    }

    pub(super) fn saved(&mut self, bytes: u64, ns: u64) {
        self.saves += 1;
        self.saved_bytes += bytes;
        keep(&mut self.save_ns, ns);
    }

    pub(super) fn rollback(&mut self, moved: Moved, restore_ns: u64, total_ns: u64, distance_ns: u64) {
        self.rollbacks += 1;
        self.restored_pages += moved.pages;
        keep(&mut self.restore_ns, restore_ns);
        keep(&mut self.recovery_ns, total_ns);
        keep(&mut self.distance_ns, distance_ns);
    }

    pub(super) fn paused(&mut self, ns: u64) {
        keep(&mut self.pause_ns, ns);
    }

    pub(super) fn end<'a>(&mut self, nodes: impl Iterator<Item = &'a NodeShared>) {
        self.ran_ns = monotonic_ns() - self.started_ns;
        for n in nodes {
            self.moves += n.arrivals.load(Ordering::Relaxed);
            self.move_ns += n.arrival_ns.load(Ordering::Relaxed);
            self.switches += n.switches.load(Ordering::Relaxed);
            self.preemptions += n.preemptions.load(Ordering::Relaxed);
            self.preempted_moves += n.preempted_moves.load(Ordering::Relaxed);
            self.seal_faults += n.seal_faults.load(Ordering::Relaxed);
        }
        self.hide_status();
    }

    /// Takes the status line away, before something else is written to the terminal.
    pub(super) fn hide_status(&mut self) {
        if core::mem::take(&mut self.shown) && takes_bytes(std::io::stderr().as_fd()) {
            let _ = std::io::stderr().write_all(b"\r\x1b[K");
        }
    }

    /// One line on a terminal, rewritten in place; elsewhere a line a second.
    pub(super) fn show_status(&mut self) {
        let now = monotonic_ns();
        let line = format!(
            "{:6.1} s  images {}  moves {}  kills {} ({} on a running thread)  rollbacks {}",
            (now - self.started_ns) as f64 / 1e9,
            self.images,
            crate::control::world().nodes.iter().map(|n| n.arrivals.load(Ordering::Relaxed)).sum::<u64>(),
            self.kills,
            self.kills_hit,
            self.rollbacks
        );
        let mut err = std::io::stderr().lock();
        if !takes_bytes(err.as_fd()) {
            // Nobody reads: a World does not wait for that.
            return;
        }
        if err.is_terminal() {
            self.shown = true;
            let _ = write!(err, "\r\x1b[K{line}");
        } else if now - self.line_ns.max(self.started_ns) >= 1_000_000_000 {
            self.line_ns = now;
            let _ = writeln!(err, "{}", line.trim_start());
        }
    }
}

/// Most values kept of one kind.
const MOST: usize = 16_384;

/// Appends a value; when there are too many the older half goes.
fn keep(list: &mut Vec<u64>, value: u64) {
    if list.len() >= MOST {
        list.drain(..MOST / 2);
    }
    list.push(value);
}

/// Median of a list of nanoseconds, as milliseconds.
pub fn median_ms(list: &[u64]) -> f64 {
    percentile_ms(list, 50)
}

/// A percentile of a list of nanoseconds, as milliseconds.
pub fn percentile_ms(list: &[u64], percent: usize) -> f64 {
    let mut sorted = list.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len().saturating_sub(1)) * percent / 100;
    sorted.get(at).copied().unwrap_or(0) as f64 / 1e6
}
