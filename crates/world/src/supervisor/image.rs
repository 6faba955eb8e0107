//! Images: every node pauses at a safe point, says what it wrote, and the World is copied.
//!
//! ```text
//!   pause word odd ──▶ nodes report, answer ──▶ reports united ──▶ World copied to the shadow ──▶ pause word even
//!                                                                        └──▶ written to the store while nodes run
//! ```
//!
//! A report is taken once: what a node told for an image that was then given up is kept for the next one.

use super::{Supervisor, WorldError};
use crate::control::{self, NONE, PauseKind, imaged, node, record, world};
use crate::killpoint::supervisor_at;
use crate::shadow::Changes;
use peregrine_base::sync::Ordering;
use peregrine_sys::timer::monotonic_ns;
use peregrine_sys::{futex, signal};
use peregrine_thread::preempt::SIG_STOP;
use peregrine_thread::stack_kind::StackKind;
use std::time::Duration;

/// After an image was given up because a node did not pause, the next is tried this much later.
const GIVEN_UP_FOR_NS: u64 = 2_000_000_000;

/// After an image was put off because a node waits for others to make room, the next is tried this much later.
const LACKS_ROOM_FOR_NS: u64 = 5_000_000;

/// Whether a node can't pause until another has made room, which it can't while it pauses.
pub(super) fn lacks_room() -> bool {
    world().lacking.load(Ordering::Relaxed) != 0
}

impl Supervisor {
    /// Asks every node to pause and waits; `false` if one died or does not come.
    pub(super) fn pause(&mut self, kind: PauseKind, patience: Duration) -> bool {
        let w = world();
        w.pause_kind.store(kind as u32, Ordering::Relaxed);
        let word = w.pause.load(Ordering::Relaxed);
        // Release: who sees the new word sees the kind.
        w.pause.store(if word & 1 == 0 { word + 1 } else { word + 2 }, Ordering::Release);
        for (i, n) in self.nodes.iter().enumerate() {
            let Some(n) = n else { continue };
            if node(i as u32).ready.load(Ordering::Acquire) == 0 {
                // It has no handlers yet, and will see the pause by itself.
                continue;
            }
            let signo = match kind {
                PauseKind::Image if node(i as u32).current.load(Ordering::Relaxed) == NONE => None,
                PauseKind::Image => Some(SIG_STOP),
                PauseKind::Rebuild => None,
                PauseKind::Rollback => Some(peregrine_thread::preempt::SIG_RESET),
            };
            if let Some(signo) = signo {
                let _ = signal::kill(n.pid, signo);
            }
            crate::sched::nudge(i as u32);
        }
        if kind != PauseKind::Image {
            let _ = futex::wake(&w.pause, u32::MAX);
        }
        self.wait_for_pause(patience)
    }

    /// Waits until every node has obeyed the pause.
    pub(super) fn wait_for_pause(&mut self, patience: Duration) -> bool {
        let w = world();
        let word = w.pause.load(Ordering::Relaxed);
        let deadline = monotonic_ns() + patience.as_nanos() as u64;
        let mut kicked = monotonic_ns();
        let is_image = w.pause_kind.load(Ordering::Relaxed) == PauseKind::Image as u32;
        loop {
            let acks = w.acks.load(Ordering::Acquire);
            let missing: Vec<u32> = (0..self.nodes.len() as u32)
                .filter(|i| self.nodes[*i as usize].is_some())
                .filter(|i| node(*i).paused.load(Ordering::Acquire) != word)
                .collect();
            if missing.is_empty() {
                return true;
            }
            if missing.iter().any(|i| self.is_dead(*i as usize)) || (is_image && lacks_room()) {
                return false;
            }
            let now = monotonic_ns();
            if now > deadline {
                return false;
            }
            if now - kicked > 500_000 && is_image {
                // It may have begun a thread since, or been in the vDSO.
                kicked = now;
                for i in &missing {
                    if let Some(n) = &self.nodes[*i as usize]
                        && node(*i).ready.load(Ordering::Acquire) != 0
                    {
                        let _ = signal::kill(n.pid, SIG_STOP);
                    }
                    crate::sched::nudge(*i);
                }
            }
            futex::wait(&w.acks, acks, Some(300_000));
        }
    }

    pub(super) fn is_dead(&self, i: usize) -> bool {
        self.nodes[i].as_ref().is_none_or(|n| n.has_ended(Duration::ZERO))
    }

    /// Lets the nodes run.
    pub(super) fn resume(&mut self) {
        let w = world();
        w.pause.fetch_add(1, Ordering::Release);
        let _ = futex::wake(&w.pause, u32::MAX);
    }

    /// Unites what the paused nodes report with what is known already.
    pub(super) fn collect_reports(&mut self) {
        for i in 0..self.nodes.len() as u32 {
            let n = node(i);
            let ran = take_ran(i);
            self.changes.add_windowed(&ran);
            if self.nodes[i as usize].is_none() || n.dirty.load(Ordering::Acquire) == crate::dirty::UNKNOWN {
                self.changes.add_unknown(ran.into_iter());
            } else {
                self.killed.note_ran(&ran);
                let len = n.dirty.load(Ordering::Acquire).min(control::dirty_capacity());
                // SAFETY: the node is paused and does not write its list; S1: the slice lives for this call.
                self.changes.add_report(unsafe { core::slice::from_raw_parts(control::dirty_list(i), len) });
            }
            n.dirty.store(0, Ordering::Relaxed);
        }
    }

    /// Makes the paused World the image.
    pub(super) fn commit(&mut self) {
        let begun = monotonic_ns();
        let sequence = imaged().sequence.load(Ordering::Relaxed) + 1;
        imaged().sequence.store(sequence, Ordering::Relaxed);
        self.note_files();
        // SAFETY: every node is paused.
        let moved = unsafe { self.shadow.commit(&self.changes) };
        self.changes = Changes::default();
        super::recover::pardon();
        self.taken_away.clear();
        self.killed.note_image();
        self.last_image_ns = monotonic_ns();
        self.stats.image(moved, self.last_image_ns - begun);
        if self.durable.is_none() {
            world().committed.store(sequence, Ordering::Release);
            self.outlet.commit(self.shadow.output_tail);
            self.wake_checkpointers();
        }
    }

    /// Takes an image; with `save` it goes to the store at once. Whether it is complete, there too.
    pub(super) fn image(&mut self, save: bool) -> Result<bool, WorldError> {
        let begun = monotonic_ns();
        if !self.pause(PauseKind::Image, Duration::from_millis(500)) {
            if (0..self.nodes.len()).any(|i| self.is_dead(i)) {
                // The pause goes on as a rollback; what the others have reported must not be lost.
                self.collect_from_paused();
                return Ok(false);
            }
            let after = if lacks_room() {
                LACKS_ROOM_FOR_NS
            } else {
                self.stats.images_given_up += 1;
                self.stats.blocked_nodes = self.unpaused();
                // The others must not stand still for it each time.
                GIVEN_UP_FOR_NS
            };
            // What some nodes have reported already must not be lost.
            self.collect_from_paused();
            self.resume();
            self.image_due = Some(monotonic_ns() + after);
            return Ok(false);
        }
        supervisor_at("paused");
        self.collect_reports();
        supervisor_at("reports united");
        self.commit();
        supervisor_at("image in memory");
        self.resume();
        supervisor_at("nodes run on");
        self.stats.paused(monotonic_ns() - begun);
        if save || monotonic_ns() >= self.store_due {
            self.save()?;
        }
        self.stats.blocked_nodes.clear();
        supervisor_at("before output");
        self.show_output();
        supervisor_at("output out");
        self.note_released();
        supervisor_at("output noted");
        Ok(!self.save_failing)
    }

    /// Writes the image to the store, if there is one, while the nodes run.
    pub(super) fn save(&mut self) -> Result<(), WorldError> {
        use peregrine_store::StoreError as E;
        let Some(durable) = &mut self.durable else { return Ok(()) };
        let begun = monotonic_ns();
        match durable.commit(&mut self.shadow, &self.outlet) {
            Ok(bytes) => {
                supervisor_at("image on disk");
                self.stats.saved(bytes, monotonic_ns() - begun);
                let sequence = imaged().sequence.load(Ordering::Relaxed);
                world().committed.store(sequence, Ordering::Release);
                supervisor_at("image known");
                self.outlet.commit(self.shadow.output_tail);
                supervisor_at("output may go");
                self.wake_checkpointers();
                self.save_failing = false;
            }
            Err(e @ (E::Lost { .. } | E::Superseded { .. } | E::InDoubt { .. } | E::Stopped { .. })) => {
                return Err(WorldError::Store(e));
            }
            Err(e) => {
                self.stats.saves_failed += 1;
                if !self.save_failing {
                    eprintln!("peregrine: image {} could not be stored: {e}", durable.sequence());
                    eprintln!(
                        "peregrine: the program runs on; its output is held until an image can be stored"
                    );
                }
                self.save_failing = true;
            }
        }
        let pause =
            if self.save_failing { 1_000_000_000 } else { self.config.store_interval.as_nanos() as u64 };
        self.store_due = monotonic_ns() + pause;
        Ok(())
    }

    /// Tells the store how much output has left.
    pub(super) fn note_released(&mut self) {
        if let (Some(durable), Some(position)) = (&mut self.durable, self.outlet.done()) {
            durable.released(position);
        }
    }

    pub(super) fn unpaused(&self) -> Vec<u32> {
        let word = world().pause.load(Ordering::Relaxed);
        (0..self.nodes.len() as u32).filter(|i| node(*i).paused.load(Ordering::Acquire) != word).collect()
    }

    /// Keeps the reports of those that did pause when the image was given up.
    pub(super) fn collect_from_paused(&mut self) {
        let late = self.unpaused();
        for i in 0..self.nodes.len() as u32 {
            if late.contains(&i) {
                continue;
            }
            let n = node(i);
            let len = n.dirty.load(Ordering::Acquire);
            if len == crate::dirty::UNKNOWN {
                self.changes.add_unknown(take_ran(i).into_iter());
            } else {
                // SAFETY: as in `collect_reports`.
                self.changes.add_report(unsafe {
                    core::slice::from_raw_parts(control::dirty_list(i), len.min(control::dirty_capacity()))
                });
            }
            n.dirty.store(0, Ordering::Relaxed);
        }
    }

    /// Wakes the threads that wait for an image.
    pub(super) fn wake_checkpointers(&mut self) {
        if imaged().checkpoints_asked.load(Ordering::Relaxed) == 0 {
            return;
        }
        for slot in crate::control::numbers() {
            if record(slot).waiting.load(Ordering::Relaxed) == control::wait::CHECKPOINT {
                // SAFETY: nodes are paused; the post is seen when they go on.
                unsafe { crate::sched::wake(slot) };
            }
        }
    }
}

/// Threads that node `i` ran since it was last asked.
pub(super) fn take_ran(i: u32) -> Vec<u32> {
    let mut list = Vec::new();
    let used = control::used_now();
    for kind in StackKind::ALL {
        let first = kind.first() as usize / 64;
        for (w, word) in node(i).ran.iter().enumerate().skip(first).take(used[kind as usize].div_ceil(64)) {
            // Most words are zero, and reading is cheaper than swapping.
            let mut bits = match word.load(Ordering::Relaxed) {
                0 => continue,
                _ => word.swap(0, Ordering::Relaxed),
            };
            while bits != 0 {
                list.push((w * 64) as u32 + bits.trailing_zeros());
                bits &= bits - 1;
            }
        }
    }
    list
}
