//! Trouble on purpose: moves of threads that nobody needs, and deaths of nodes. What [`Config`](crate::Config) asks for.

use super::Supervisor;
use crate::control::{self, NONE, node, record, state, world};
use peregrine_base::sync::Ordering;
use peregrine_sys::signal::{self, number};
use peregrine_sys::timer::monotonic_ns;

impl Supervisor {
    pub(super) fn move_one(&mut self) {
        let numbers = control::numbers();
        let used = numbers.clone().count();
        let nodes = self.config.nodes;
        if nodes < 2 || used == 0 {
            return;
        }
        for _ in 0..8 {
            let Some(slot) = numbers.clone().nth((self.next_random() % used as u64) as usize) else { return };
            let r = record(slot);
            if !state::is_alive(r.state.load(Ordering::Relaxed)) {
                continue;
            }
            let at = r.node.load(Ordering::Relaxed);
            let to = (at + 1 + (self.next_random() % (u64::from(nodes) - 1)) as u32) % nodes;
            self.post_move(slot, to);
            return;
        }
    }

    /// Asks for a move.
    pub(super) fn post_move(&mut self, slot: u32, to: u32) {
        let r = record(slot);
        r.move_to.store(to, Ordering::Release);
        crate::sched::post(slot, control::mail::MOVE);
        let at = r.node.load(Ordering::Relaxed);
        if node(at).current.load(Ordering::Relaxed) == slot
            && let Some(Some(n)) = self.nodes.get(at as usize)
        {
            let _ = signal::kill(n.pid, peregrine_thread::preempt::SIG_TICK);
        }
        self.stats.moves_asked += 1;
    }

    /// Kills a node: mostly one that runs a thread, for that is the harder case.
    pub(super) fn kill_one(&mut self) {
        let runs = |i: usize| node(i as u32).current.load(Ordering::Relaxed) != NONE;
        let mut i = (self.next_random() % self.nodes.len() as u64) as usize;
        if !self.next_random().is_multiple_of(4) {
            let begun = monotonic_ns();
            while !runs(i) && monotonic_ns() - begun < 200_000 {
                i = (i + 1) % self.nodes.len();
            }
        }
        if let Some(n) = &self.nodes[i] {
            let hit = node(i as u32).current.load(Ordering::Relaxed) != NONE;
            if signal::kill(n.pid, number::KILL).is_ok() {
                self.killed_on_purpose = Some(i);
                self.stats.kills += 1;
                self.stats.kills_hit += hit as u64;
                let counts = [self.stats.kills, self.stats.kills_hit];
                world().kills.iter().zip(counts).for_each(|(a, n)| a.store(n, Ordering::Relaxed));
            }
        }
    }

    pub(super) fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}
