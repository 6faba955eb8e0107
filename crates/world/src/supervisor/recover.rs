//! Recovery: a node died, so every thread, channel and join cell goes back to the last image.

use super::new_processes::{self, NewProcesses};
use super::{NodeProcess, Supervisor, WorldError, kernel, reap, strays};
use crate::control::{Lack, MOST_DOOMED, NONE, PauseKind, WHY_WORDS, ending, node, record, state, world};
use crate::killpoint::{hold_fire, supervisor_at, was_ours};
use crate::{arena, carried, ends, join, output, thread};
use peregrine_base::sync::Ordering;
use peregrine_sys::rustix;
use peregrine_sys::signal::{self, number};
use peregrine_sys::timer::monotonic_ns;
use rustix::process::{Pid, PidfdFlags, WaitStatus, pidfd_open};
use std::collections::HashSet;
use std::time::Duration;

/// Crashes after which a thread is taken away.
const MOST_CRASHES: u32 = 3;
/// Nodes killed in a row under one thread, without an image between, after which it is taken away.
const MOST_KILLED: u32 = 30;
/// Nodes that had not what it takes to run a thread, after which it is taken away.
const MOST_GIVEN_UP: u32 = 5;

/// Nodes killed in a row under one thread, of which no image has shown more between.
#[derive(Debug, Default)]
pub(super) struct Killed {
    /// Its [`thread::identity`].
    who: u64,
    slot: u32,
    count: u32,
    /// Whether it ran on a living node since the last rollback or image.
    ran: bool,
}

impl Killed {
    /// Threads that ran on a node that lives.
    pub(super) fn note_ran(&mut self, ran: &[u32]) {
        self.ran |= ran.contains(&self.slot);
    }

    /// An image is complete: if the thread ran before it, it gets on. (Images that are taken before its turn comes show nothing, and
    /// on a slow machine every second one is.)
    pub(super) fn note_image(&mut self) {
        if std::mem::take(&mut self.ran) {
            self.count = 0;
        }
    }
}

impl Supervisor {
    /// Takes note of nodes that have died; an exit code if the program ended itself with `exit`. In the middle of a recovery that
    /// is a death like any other: survivors have dropped what they ran, and the thread that called `exit` goes back with all others.
    pub(super) fn bury_dead(&mut self) -> Result<Option<i32>, WorldError> {
        for i in 0..self.nodes.len() {
            if self.nodes[i].is_none() || !self.is_dead(i) {
                continue;
            }
            hold_fire(true);
            supervisor_at("a node has died");
            let dead = self.nodes[i].take().expect("checked above");
            let n = node(i as u32);
            // Once it is reaped its number may be another process's, and a node that polls is woken by a signal.
            n.idle.store(0, Ordering::SeqCst);
            let status = reap(dead.pid);
            let others = self.nodes.iter().flatten().map(|n| n.pid);
            let ours: Vec<i32> = others.chain([self.zygote.pid]).collect();
            strays::end_those_of(&dead, &ours);
            let current = n.current.load(Ordering::Relaxed);
            let exited = status.and_then(WaitStatus::exit_status);
            let gave_up = n.gave_up[0].swap(0, Ordering::Relaxed).checked_sub(1);
            if let Some(code) = exited
                && current != NONE
                && gave_up.is_none()
            {
                // std::process::exit.
                return Ok(Some(code));
            }
            let signo = status.and_then(WaitStatus::terminating_signal).unwrap_or(0);
            self.stats.deaths += 1;
            if n.ready.load(Ordering::Acquire) == 0 {
                self.failed_starts += 1;
                if self.failed_starts > 20 {
                    let last = exited.map_or(format!("signal {signo}"), |c| format!("exit code {c}"));
                    return Err(WorldError::CannotStart { deaths: self.failed_starts, last });
                }
            }
            if current != NONE && is_crash(signo) {
                self.blame(current, signo);
            }
            if let Some(slot) = gave_up {
                self.note_given_up(i, slot, n.gave_up[1].load(Ordering::Relaxed));
            }
            if signo == number::KILL && !was_ours() && current != NONE {
                self.note_killed(i, current);
            }
            self.close_those_of(i)?;
        }
        Ok(None)
    }

    fn blame(&mut self, slot: u32, signo: i32) {
        let r = record(slot);
        let id = (slot, r.generation.load(Ordering::Relaxed));
        let count = self.crashes.entry(id).or_default();
        *count += 1;
        let count = *count;
        let name = thread::name(slot);
        // What a collection does that is refused memory is an abort, which says neither why nor what to do.
        let refusal = (signo == number::ABRT).then(|| self.refusal(slot)).flatten().unwrap_or_default();
        let what = signal_name(signo) + &refusal;
        self.stats.crashes += 1;
        self.last_words(slot, &name);
        if count >= MOST_CRASHES {
            let why = format!("it crashed {count} nodes, the last with {what}");
            eprintln!("peregrine: thread {slot} '{name}' is quarantined: {why}");
            self.quarantine.push((id.0, id.1, thread::identity(slot), why));
        } else {
            eprintln!(
                "peregrine: thread {slot} '{name}' crashed its node with {what} ({count} of {MOST_CRASHES}); going back to the last image"
            );
        }
    }

    /// A node had not what it takes to run a thread. Going back may help, for others gave back what they had taken; if it does not,
    /// the World would go back for ever.
    fn note_given_up(&mut self, node: usize, slot: u32, lack: u32) {
        self.stats.gave_up += 1;
        let identity = thread::identity(slot);
        let count = self.given_up.entry(identity).or_default();
        *count += 1;
        // A set-up was tried often enough.
        let last = lack == Lack::SetUp as u32 || *count >= MOST_GIVEN_UP;
        let count = *count;
        let (name, lack) = (thread::name(slot), Lack::in_words(lack));
        self.stats.hide_status();
        if !last {
            eprintln!(
                "peregrine: thread {slot} '{name}': node {node} {lack}; going back to the last image ({count} of {MOST_GIVEN_UP})"
            );
            return;
        }
        eprintln!("peregrine: thread {slot} '{name}' is quarantined: node {node} {lack}");
        let generation = record(slot).generation.load(Ordering::Relaxed);
        self.quarantine.push((slot, generation, identity, format!("node {node} {lack}")));
    }

    /// A node is killed by whom it may be, and no thread is to blame for that, unless the kernel or the thread itself does it
    /// each time that this thread runs, so soon that no image holds what it did: the World would go back for ever.
    fn note_killed(&mut self, node: usize, slot: u32) {
        let on_purpose = self.killed_on_purpose.take() == Some(node);
        if on_purpose || self.config.image_interval.is_none() {
            return;
        }
        let identity = thread::identity(slot);
        let count = if self.killed.who == identity { self.killed.count + 1 } else { 1 };
        self.killed = Killed { who: identity, slot, count, ran: false };
        if count >= MOST_KILLED {
            let why = format!(
                "its node was killed {count} times while it ran, before an image could be taken of what it did"
            );
            self.killed.count = 0;
            let name = thread::name(slot);
            self.stats.hide_status();
            eprintln!("peregrine: thread {slot} '{name}' is quarantined: {why}; is there enough memory?");
            let generation = record(slot).generation.load(Ordering::Relaxed);
            self.quarantine.push((slot, generation, identity, why));
        }
    }

    /// Shows what the thread wrote to standard error since the last image: the rollback takes it back, and with it the reason.
    fn last_words(&mut self, slot: u32, name: &str) {
        let raw = output::raw(self.shadow.output_tail, output::tail_now().max(self.shadow.output_tail));
        let words: Vec<u8> = output::records(&raw)
            .filter(|(fd, s, _)| *fd == 2 && *s == slot)
            .flat_map(|r| r.2.to_vec())
            .collect();
        if !words.is_empty() {
            self.stats.hide_status();
            eprintln!("peregrine: thread {slot} '{name}' wrote before it crashed:");
            eprintln!("{}", String::from_utf8_lossy(&words).trim_end());
        }
    }

    /// Forks a process for each node that has none.
    pub(super) fn fork_missing(&mut self) -> Result<(), WorldError> {
        // SAFETY: in a pause, always.
        unsafe {
            crate::address_space::replace(
                (0..self.nodes.len()).filter(|i| self.nodes[*i].is_none()).map(|i| i as u32),
            );
        }
        for i in 0..self.nodes.len() {
            if self.nodes[i].is_some() {
                continue;
            }
            let n = node(i as u32);
            n.inbox.store(NONE, Ordering::Relaxed);
            n.current.store(NONE, Ordering::Relaxed);
            n.idle.store(0, Ordering::Relaxed);
            n.expected.store(0, Ordering::Relaxed);
            n.lent.store(0, Ordering::Relaxed);
            n.ready.store(0, Ordering::Relaxed);
            n.serves.store(0, Ordering::Relaxed);
            n.paused.store(0, Ordering::Relaxed);
            n.dirty.store(0, Ordering::Relaxed);
            n.crash_signal.store(0, Ordering::Relaxed);
            n.seals_answered.store(0, Ordering::Relaxed);
            let pid = self.zygote.fork_node(i as u32)?;
            let pidfd = Pid::from_raw(pid)
                .ok_or(rustix::io::Errno::SRCH)
                .and_then(|p| pidfd_open(p, PidfdFlags::empty()))
                .map_err(kernel("pidfd_open on a node"))?;
            self.nodes[i] = Some(NodeProcess { pid, pidfd, space: strays::Space::of(pid) });
        }
        Ok(())
    }

    /// Rolls the World back and goes on.
    pub(super) fn recover(&mut self) -> Result<(), WorldError> {
        self.forget_refusals();
        // The end of `main`, if there was one, is taken back too.
        self.ending_since = None;
        let begun = monotonic_ns();
        let lost_since = self.last_image_ns;
        if self.config.image_interval.is_none() {
            let to = match self.stats.images {
                1 => "to its start".to_owned(),
                n => format!("to image {n}, which it asked for"),
            };
            self.stats.hide_status();
            eprintln!(
                "peregrine: a node died, and no images are taken (PEREGRINE_IMAGE_INTERVAL=0): the program goes back {to}"
            );
        }
        loop {
            // Whoever does not come is stuck in the kernel or stopped: it is killed and replaced like the dead.
            if !self.pause(PauseKind::Rollback, Duration::from_millis(1000)) {
                self.bury_dead()?;
                let late = self.unpaused();
                for i in &late {
                    let Some(n) = &self.nodes[*i as usize] else { continue };
                    let _ = signal::kill(n.pid, number::KILL);
                    let shared = node(*i);
                    let setups = shared.setups.load(Ordering::Relaxed);
                    if shared.ready.load(Ordering::Acquire) == 0 && setups != carried::FAILED && setups > 0 {
                        // That it ended was not its set-up's doing. (Who counts on while it is killed is counted once too often.)
                        shared.setups.store(setups - 1, Ordering::Relaxed);
                    }
                }
                std::thread::sleep(Duration::from_millis(1));
                self.bury_dead()?;
                self.keep_unknown();
                continue;
            }
            break;
        }
        supervisor_at("survivors reset");
        self.collect_reports();
        // SAFETY: every living node is paused and has dropped what it ran.
        let moved = unsafe { self.shadow.roll_back(&self.changes) };
        self.changes = Default::default();
        for i in 0..self.nodes.len() as u32 {
            node(i).inbox.store(NONE, Ordering::Relaxed);
        }
        world().hungry.store(0, Ordering::Relaxed);
        world().lacking.store(0, Ordering::Relaxed);
        self.carry_out_quarantine()?;
        self.retire_strangers();
        self.make_room_for_domains();
        // It woke those who waited for them: the posts must not lie in an inbox that a new node starts with empty.
        crate::shadow::settle_mail();
        for i in 0..self.nodes.len() as u32 {
            node(i).inbox.store(NONE, Ordering::Relaxed);
        }
        self.set_files_right()?;
        let restored = monotonic_ns();
        supervisor_at("memory restored");
        // All nodes fill their queues before any of them runs.
        world().life.fetch_add(1, Ordering::Release);
        let mut wait = NewProcesses::wait();
        let open = self.open_files();
        loop {
            self.fork_missing()?;
            if self.pause(PauseKind::Rebuild, new_processes::SLICE) {
                break;
            }
            self.bury_dead()?;
            if self.wait_no_longer(&mut wait) {
                return Ok(());
            }
        }
        self.keep_files_opened_since(&open);
        supervisor_at("replacements up");
        self.answer_seals();
        self.collect_reports();
        self.killed.ran = false;
        self.wake_checkpointers();
        // Before the threads run: one that looks must not take itself for its former self.
        world().rollbacks.store(self.stats.rollbacks + 1, Ordering::Relaxed);
        self.resume();
        hold_fire(false);
        let now = monotonic_ns();
        self.failed_starts = 0;
        self.stats.rollback(moved, restored - begun, now - begun, begun.saturating_sub(lost_since));
        if let Some(every) = self.config.kill_every {
            let every = every.as_nanos() as u64;
            if self.stats.kills < self.config.most_kills {
                self.kill_due = Some(now + every);
            }
            // An image that was due before holds nothing new, and if it takes longer than the time that is left, as it may on a
            // slow machine, it would be the only one: the next kill comes right after it, for ever.
            if let (Some(due), Some(interval)) = (&mut self.image_due, self.config.image_interval) {
                *due = (*due).max(now + (interval.as_nanos() as u64).min(every / 2));
            }
        }
        Ok(())
    }

    /// Notes what nodes that died meanwhile had run.
    fn keep_unknown(&mut self) {
        for i in 0..self.nodes.len() {
            if self.nodes[i].is_none() {
                let ran = super::image::take_ran(i as u32);
                self.changes.add_unknown(ran.into_iter());
            }
        }
    }

    fn carry_out_quarantine(&mut self) -> Result<(), WorldError> {
        self.stats.quarantined += self.quarantine.len() as u64;
        // Those of before, too: the image has them as they were.
        let mut all = std::mem::take(&mut self.taken_away);
        all.append(&mut self.quarantine);
        let mut seen = HashSet::new();
        all.retain(|(_, _, identity, _)| seen.insert(*identity));
        for (slot, generation, identity, why) in &all {
            let (slot, generation) = (*slot, *generation);
            let r = record(slot);
            let known = crate::control::numbers().any(|n| n == slot)
                && r.generation.load(Ordering::Relaxed) == generation
                && state::is_alive(r.state.load(Ordering::Relaxed));
            if !known {
                // It was made after the image: it must not run when it is made again.
                doom((slot, generation), *identity, why)?;
                continue;
            }
            self.changes.whole_arena = true;
            let result = arena::write(why.as_bytes(), &[]).unwrap_or(0);
            // SAFETY: nodes are paused.
            unsafe { join::finish(slot, ending::QUARANTINED, result) };
            thread::drop_argument(slot);
            ends::release_all_of(slot);
            join::bury(slot);
        }
        self.taken_away = all;
        Ok(())
    }
}

/// Has the thread of this identity, of slot and generation `at`, end before it begins when it is made again: until an image holds that it was
/// ([`pardon`]).
fn doom(at: (u32, u32), id: u64, why: &str) -> Result<(), WorldError> {
    let w = world();
    let count = w.doomed_count.load(Ordering::Relaxed) as usize;
    // It may stand there already, if a node gave up for it before it ran to its end.
    let known = w.doomed.iter().take(count).position(|p| p.load(Ordering::Relaxed) == id);
    let i = known.unwrap_or(count);
    if i == MOST_DOOMED {
        return Err(WorldError::TooManyCrash { most: MOST_DOOMED, last: why.to_owned() });
    }
    let mut text = [0; WHY_WORDS * 8];
    let len = why.floor_char_boundary(text.len());
    text[..len].copy_from_slice(&why.as_bytes()[..len]);
    for (word, bytes) in w.doomed_why[i].iter().zip(text.as_chunks().0) {
        word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
    }
    w.doomed[i].store(id, Ordering::Relaxed);
    w.doomed_at[i].store(u64::from(at.0) << 32 | u64::from(at.1), Ordering::Relaxed);
    w.doomed_count.store(count.max(i + 1) as u32, Ordering::Relaxed);
    Ok(())
}

/// After an image, while every node is paused. Whoever has been made by now has ended, and is in the image so, or another has its place
/// and generation; neither is made again. Who has not been made yet will be, and must not run then: it would bring down one more node.
/// They leave half of the places to others.
pub(super) fn pardon() {
    let w = world();
    let count = w.doomed_count.load(Ordering::Relaxed) as usize;
    let comes = |i: &usize| {
        let at = w.doomed_at[*i].load(Ordering::Relaxed);
        record((at >> 32) as u32).generation.load(Ordering::Relaxed) < at as u32
    };
    let mut kept = 0;
    for i in (0..count).filter(comes).take(MOST_DOOMED / 2) {
        for list in [&w.doomed, &w.doomed_at] {
            list[kept].store(list[i].load(Ordering::Relaxed), Ordering::Relaxed);
        }
        for (to, from) in w.doomed_why[kept].iter().zip(&w.doomed_why[i]) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        kept += 1;
    }
    w.doomed_count.store(kept as u32, Ordering::Relaxed);
}

/// Whether the signal is of the thread's own making.
fn is_crash(signo: i32) -> bool {
    [number::SEGV, number::BUS, number::ILL, number::FPE, number::ABRT, number::TRAP].contains(&signo)
}

fn signal_name(signo: i32) -> String {
    let name = match signo {
        number::SEGV => "SIGSEGV",
        number::BUS => "SIGBUS",
        number::ILL => "SIGILL",
        number::FPE => "SIGFPE",
        number::ABRT => "SIGABRT",
        number::TRAP => "SIGTRAP",
        _ => return format!("signal {signo}"),
    };
    name.to_owned()
}
