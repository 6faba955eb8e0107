//! Processes for the domains of carried calls.
//!
//! A domain is a node whose number follows the ordinary nodes'. Threads write what they want into the imaged table
//! (`carried`); here it gets a process:
//!
//! ```text
//!   table (imaged)   [ ledger │ scratch ]          a rollback may take an entry back, or another may follow it
//!   nodes            0 1 │ 2      3                process 2 was set up as `ledger`: NodeShared::serves
//!                         └ a process that serves another than its entry is killed, and replaced
//! ```
//!
//! A new process joins in a pause, like a replacement: all nodes are at safe points, so nothing arrives at it before it has
//! filled its queue, and nothing is rolled back, unless it dies before and not in its set-up. Who asked asks again until the process serves.

use super::new_processes::{self, NewProcesses};
use super::{Supervisor, WorldError, reap};
use crate::carried;
use crate::control::{DomainEntry, MAX_NODES, PauseKind, imaged, node, world};
use peregrine_base::sync::Ordering;
use peregrine_sys::signal::{self, number};
use std::collections::BTreeMap;
use std::time::Duration;

/// The entry of domain-node `index`, if the table has one.
///
/// Looked at without the lock: a node that was killed may hold it. An entry is written before the count that makes it known, and
/// not changed but by a rollback, which runs here.
fn entry_of(index: u32) -> Option<DomainEntry> {
    let place = index.checked_sub(world().node_count.load(Ordering::Relaxed))? as usize;
    // SAFETY: mapped; plain words without invalid values (S1: copied out, not referred to).
    let table = unsafe { imaged().domains.as_ptr().read_volatile() };
    table.used().get(place).copied()
}

/// The name of the domain that node `index` is.
pub(super) fn name_of_node(index: u32) -> Option<String> {
    let name = entry_of(index)?.name;
    let n = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    Some(String::from_utf8_lossy(&name[..n]).into_owned())
}

impl Supervisor {
    /// A resumed image may have been one of fewer nodes, and have domains.
    pub(super) fn check_room_for_domains(&self) -> Result<(), WorldError> {
        let (nodes, domains) = (self.config.nodes, imaged().domains.with(|d| d.count));
        if (nodes + domains) as usize > MAX_NODES {
            Err(WorldError::Nodes { nodes, domains })
        } else {
            Ok(())
        }
    }

    /// Makes a place for each domain of the table.
    pub(super) fn make_room_for_domains(&mut self) {
        while entry_of(self.nodes.len() as u32).is_some() {
            self.nodes.push(None);
        }
    }

    /// Whether a domain of the table has no process, or one that was set up as another.
    fn lacks_domains(&self) -> bool {
        entry_of(self.nodes.len() as u32).is_some() || self.strangers().next().is_some()
    }

    /// Living domain processes that serve another domain than the table has in their place.
    fn strangers(&self) -> impl Iterator<Item = usize> {
        (self.config.nodes as usize..self.nodes.len()).filter(|i| {
            let n = node(*i as u32);
            let serves = n.serves.load(Ordering::Acquire);
            let is_ready = self.nodes[*i].is_some() && n.ready.load(Ordering::Acquire) != 0;
            is_ready && entry_of(*i as u32).is_some_and(|e| e.identity() != serves)
        })
    }

    /// Kills the strangers. While all nodes are paused: a stranger runs no thread, for no entry named it.
    pub(super) fn retire_strangers(&mut self) {
        for i in self.strangers().collect::<Vec<_>>() {
            node(i as u32).setups.store(0, Ordering::Relaxed);
            if let Some(n) = self.nodes[i].take() {
                let _ = signal::kill(n.pid, number::KILL);
                reap(n.pid);
                let ran = super::image::take_ran(i as u32);
                self.changes.add_unknown(ran.into_iter());
            }
            let _ = self.close_those_of(i);
        }
    }

    /// Starts what the table has and nobody serves.
    pub(super) fn add_domains(&mut self) -> Result<(), WorldError> {
        if !self.lacks_domains() {
            return Ok(());
        }
        if !self.pause(PauseKind::Image, Duration::from_millis(500)) {
            self.collect_from_paused();
            if !(0..self.nodes.len()).any(|i| self.is_dead(i)) {
                // A node is blocked; who asked will ask again.
                self.resume();
            }
            // Else the pause goes on as a rollback.
            return Ok(());
        }
        // This is no image, and reports tell of live stack only: what was live in the image may be missing. So nothing that ran is taken
        // from the nodes' lists, and all of it is looked at again.
        self.collect_from_paused();
        self.retire_strangers();
        self.make_room_for_domains();
        let begun = |i: usize| node(i as u32).setups.load(Ordering::Relaxed);
        // The new ones, and how many set-ups had been begun before.
        let (mut new, mut wait) = (BTreeMap::new(), NewProcesses::wait());
        let open = self.open_files();
        loop {
            new.extend((0..self.nodes.len()).filter(|i| self.nodes[*i].is_none()).map(|i| (i, begun(i))));
            self.fork_missing()?;
            if self.wait_for_pause(new_processes::SLICE) {
                break;
            }
            self.bury_dead()?;
            // Who died in its set-up has changed nothing, and is made again until it is given up.
            let died_in_set_up =
                |i| new.get(&i).is_some_and(|before| begun(i) > *before && begun(i) != carried::FAILED);
            if (0..self.nodes.len()).any(|i| self.nodes[i].is_none() && !died_in_set_up(i)) {
                // Another, or a new one with a lock in its hands, perhaps: the pause goes on as a rollback, which frees it.
                return Ok(());
            }
            if self.wait_no_longer(&mut wait) {
                return Ok(());
            }
        }
        self.collect_from_paused();
        self.keep_files_opened_since(&open);
        self.failed_starts = 0;
        self.resume();
        Ok(())
    }
}
