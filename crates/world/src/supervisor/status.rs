//! What `peregrine ps` shows: the World as it is at this moment, read while the nodes run.

use super::Supervisor;
use crate::control::{NONE, imaged, node, record, state, wait, world};
use crate::status::{NodeStatus, ThreadStatus, WorldStatus};
use crate::thread::{self, ThreadId};
use peregrine_base::sync::Ordering;
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::slot::SlotHeader;

impl Supervisor {
    pub(super) fn status(&self, blocked: &[u32]) -> WorldStatus {
        let now = monotonic_ns();
        // While the first processes of a resume are waited for, the image is as old as this life.
        let image_ns = self.last_image_ns.max(self.stats.started_ns);
        let age_ms = now.saturating_sub(image_ns) as f64 / 1e6;
        WorldStatus {
            pid: world().supervisor.load(Ordering::Relaxed),
            program: command_line(),
            seconds: (now - self.stats.started_ns) as f64 / 1e9,
            image: imaged().sequence.load(Ordering::Relaxed),
            image_age_ms: age_ms,
            store: self.config.store.as_ref().map(|d| d.display().to_string()),
            images: self.stats.images,
            images_given_up: self.stats.images_given_up,
            rollbacks: self.stats.rollbacks,
            memory: [
                imaged().memory_used.load(Ordering::Relaxed),
                world().memory_limit.load(Ordering::Relaxed),
            ],
            nodes: (0..self.nodes.len()).map(|i| self.node_status(i, blocked)).collect(),
            threads: threads()
                .map(|id| thread_status(id, self.shadow.holds(id.slot, id.generation).then_some(age_ms)))
                .collect(),
        }
    }

    fn node_status(&self, i: usize, blocked: &[u32]) -> NodeStatus {
        let n = node(i as u32);
        let current = n.current.load(Ordering::Relaxed);
        let is_blocked = blocked.contains(&(i as u32));
        let state = match &self.nodes[i] {
            None => "starting",
            Some(_) if n.ready.load(Ordering::Relaxed) == 0 => "starting",
            Some(_) if is_blocked => "blocked",
            Some(_) if current == NONE => "idle",
            Some(_) => "running",
        };
        let depth = if is_blocked { n.trace_len.load(Ordering::Acquire) as usize } else { 0 };
        NodeStatus {
            pid: self.nodes[i].as_ref().map_or(0, |n| n.pid as u32),
            state: state.to_owned(),
            domain: super::domains::name_of_node(i as u32),
            runs: (current != NONE).then(|| id_of(current).to_string()),
            queued: n.queued.load(Ordering::Relaxed),
            switches: n.switches.load(Ordering::Relaxed),
            unmapped: n.unmapped.load(Ordering::Relaxed),
            trace: n.trace.iter().take(depth).map(|pc| pc.load(Ordering::Relaxed) as u64).collect(),
        }
    }
}

fn id_of(slot: u32) -> ThreadId {
    ThreadId { slot, generation: record(slot).generation.load(Ordering::Relaxed) }
}

pub(super) fn is_alive(id: ThreadId) -> bool {
    id_of(id.slot) == id && state::is_alive(record(id.slot).state.load(Ordering::Relaxed))
}

/// Every thread that is not free, by slot.
fn threads() -> impl Iterator<Item = ThreadId> {
    let taken = |slot: &u32| record(*slot).state.load(Ordering::Relaxed) != state::FREE;
    crate::control::numbers().filter(taken).map(id_of)
}

/// The living thread with this number or name.
pub(super) fn find(wanted: &str) -> Result<ThreadId, String> {
    let alive: Vec<ThreadId> = threads().filter(|id| is_alive(*id)).collect();
    let numbered = |id: &&ThreadId| id.to_string() == wanted || id.slot.to_string() == wanted;
    if let Some(id) = alive.iter().find(numbered) {
        return Ok(*id);
    }
    let named: Vec<&ThreadId> = alive.iter().filter(|id| thread::name(id.slot) == wanted).collect();
    match named[..] {
        [id] => Ok(*id),
        [] => Err(format!("no thread {wanted:?} is alive; `peregrine ps` lists numbers and names")),
        _ => Err(format!(
            "{} threads are called {wanted:?}; use the number that `peregrine ps` shows",
            named.len()
        )),
    }
}

fn thread_status(id: ThreadId, image_age_ms: Option<f64>) -> ThreadStatus {
    let r = record(id.slot);
    let now = r.state.load(Ordering::Relaxed);
    let waits = matches!(now, state::PARKED | state::SLEEPING);
    let (waiting, on) = (r.waiting.load(Ordering::Relaxed), r.waiting_on.load(Ordering::Relaxed));
    let state = match now {
        state::RUNNABLE => "ready",
        state::RUNNING => "running",
        state::SLEEPING if waiting == wait::SLEEP => "sleeping",
        // With or without a time to look again.
        state::PARKED | state::SLEEPING => "waiting",
        _ => "ended",
    };
    let waits_for = match waiting {
        _ if !waits => None,
        wait::RECEIVE => Some(format!("a message on channel {on}")),
        wait::JOIN => Some(format!("the end of thread {}", id_of(on))),
        wait::CHECKPOINT => Some("an image".to_owned()),
        wait::OUTPUT => Some("room for output".to_owned()),
        wait::CALL => Some("the reply to a call".to_owned()),
        wait::DOMAIN => Some("the process of a domain".to_owned()),
        wait::SLEEP => {
            let left = r.wake_at.load(Ordering::Relaxed).saturating_sub(monotonic_ns());
            Some(format!("{} ms to pass", left / 1_000_000))
        }
        _ => None,
    };
    let suspended = waits || now == state::RUNNABLE;
    ThreadStatus {
        id: id.to_string(),
        name: thread::name(id.slot),
        state: state.to_owned(),
        waits_for,
        node: r.node.load(Ordering::Relaxed),
        stack_bytes: suspended.then(|| stack_in_use(id.slot)).flatten(),
        memory_bytes: r.granted.load(Ordering::Relaxed),
        moves: r.moves.load(Ordering::Relaxed),
        image_age_ms,
    }
}

/// Bytes of stack in use, of a thread that was suspended a moment ago.
fn stack_in_use(slot: u32) -> Option<u64> {
    if peregrine_thread::stack_kind::is_windowed(slot) {
        // Only the node that it was last on knows.
        return None;
    }
    let header = SlotHeader::of(slot);
    // SAFETY: the header of a slot that was prepared; plain words, read one by one because a node may write them meanwhile
    // (S1): the difference is checked before it is believed.
    let (high, low, sp) = unsafe {
        (
            (&raw const (*header).stack_high).read_volatile(),
            (&raw const (*header).stack_low).read_volatile(),
            (&raw const (*header).saved_sp).read_volatile(),
        )
    };
    (low..=high).contains(&sp).then(|| (high - sp) as u64)
}

fn command_line() -> String {
    let args = std::env::args_os().map(|a| a.to_string_lossy().into_owned());
    args.collect::<Vec<_>>().join(" ")
}
