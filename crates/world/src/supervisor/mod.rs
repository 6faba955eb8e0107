//! The supervisor: holds the World, replaces nodes that die, takes images, releases output.
//!
//! ```text
//!            ┌──────────── run ◀───────────────────────────────┐
//!            │ image due / asked for          a node died      │
//!            ▼                                  ▼              │
//!   pause nodes (all at safe points)    reset the survivors    │
//!   unite their reports                 unite their reports    │
//!   World ──▶ shadow                    shadow ──▶ World       │
//!   release output                      fork the replacements  │
//!            └──────────────────────────────────┴──────────────┘
//! ```
//!
//! It is single-threaded and sleeps in one `poll`. It never executes a thread's code, and touches the World only while all
//! nodes are paused or dead, but for posting moves.

mod control_socket;
mod durable;
mod outlet;
mod recover;
mod stats;

use crate::config::Config;
use crate::contract::{Contract, ContractError, fix_addresses};
use crate::control::{self, NONE, PauseKind, imaged, node, record, request, state, world};
use crate::memory::{MemoryError, STRINGS, WorldMemory};
use crate::shadow::{Changes, Shadow};
use crate::thread::{self, Start};
use crate::zygote::{Zygote, ZygoteError};
pub use durable::{DurableError, Resumed};
pub use outlet::OutputError;
use peregrine_base::sync::Ordering;
use peregrine_sys::signal::{self, number};
use peregrine_sys::timer::monotonic_ns;
use peregrine_sys::{futex, process, rustix};
use peregrine_thread::preempt::SIG_STOP;
use peregrine_thread::template::{self, TemplateError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Pid;
pub use stats::{Stats, median_ms, percentile_ms};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// Why a World could not be made or had to end.
#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    /// No memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The program can't be taken apart.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// No processes.
    #[error(transparent)]
    Zygote(#[from] ZygoteError),
    /// Addresses can't be fixed.
    #[error(transparent)]
    Contract(#[from] ContractError),
    /// The store can't be used.
    #[error(transparent)]
    Durable(#[from] DurableError),
    /// The file named for output can't be used.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The store refuses any further image.
    #[error("the World was stopped, for its store can't go on: {0}")]
    Store(peregrine_store::StoreError),
    /// `main` could not be started.
    #[error("cannot start the main thread: {0}")]
    Main(#[from] crate::error::SpawnError),
    /// The kernel refused something that everything rests on.
    #[error("{what}: {source}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// Nodes die faster than they can be replaced.
    #[error("{deaths} nodes died before one could run: {last}")]
    CannotStart {
        /// How many.
        deaths: u32,
        /// How the last one ended.
        last: String,
    },
}

fn kernel(what: &'static str) -> impl Fn(rustix::io::Errno) -> WorldError {
    move |e| WorldError::Kernel { what, source: e.into() }
}

/// How a World ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Exit code for the process.
    pub code: i32,
    /// What happened in between.
    pub stats: Stats,
    /// The signal that stopped it, if one did.
    pub stopped_by: Option<i32>,
    /// What it was resumed from, if it was.
    pub resumed: Option<Resumed>,
    /// What `main` left: its exit code, then its value as postcard has it. Empty if it did not return.
    pub result: Vec<u8>,
}

/// After an image was given up because a node did not pause, the next is tried this much later.
const GIVEN_UP_FOR_NS: u64 = 2_000_000_000;

/// A node's process, seen from here.
#[derive(Debug)]
struct NodeProcess {
    pid: i32,
    pidfd: OwnedFd,
}

/// The supervisor's state.
struct Supervisor {
    config: Config,
    _memory: WorldMemory,
    zygote: Zygote,
    nodes: Vec<Option<NodeProcess>>,
    shadow: Shadow,
    changes: Changes,
    signals: OwnedFd,
    stats: Stats,
    random: u64,
    /// Crashes of each thread (slot, generation) that it caused itself.
    crashes: HashMap<(u32, u32), u32>,
    /// Slot, generation, [`thread::identity`] and reason.
    quarantine: Vec<(u32, u32, u64, String)>,
    image_due: Option<u64>,
    kill_due: Option<u64>,
    move_due: Option<u64>,
    status_due: Option<u64>,
    last_image_ns: u64,
    outlet: outlet::Outlet,
    durable: Option<durable::Durable>,
    store_due: u64,
    save_failing: bool,
    resumed: Option<Resumed>,
    failed_starts: u32,
    strings_len: usize,
    control: control_socket::ControlSocket,
}

/// Runs `main` in a World of its own until it ends.
///
/// # Errors
/// [`WorldError`]: the World could not be made, or lost what it stands on.
///
/// # Panics
/// If the process has more than one thread: nodes are forked from it.
///
/// With a store ([`Config::store`]) the process may execute itself once more, with its arguments, to have its addresses fixed:
/// call this before anything that must not happen twice.
pub fn run(
    config: Config,
    body: thread::Body,
    function: usize,
    argument: &[u8],
) -> Result<Ended, WorldError> {
    if config.store.is_some() {
        fix_addresses()?;
    }
    let mut s = Supervisor::new(config)?;
    if let Some(dir) = s.config.store.clone() {
        s.durable = Some(durable::Durable::create(&dir, s.contract(), s.strings_len)?);
        s.shadow.note_unsaved();
    }
    let start =
        Start { body, function, argument, ends: &[], stack_bytes: s.config.main_stack_bytes, name: "main" };
    // SAFETY: no node runs yet.
    let id = unsafe { thread::create(&start, 0) }?;
    imaged().main.store(id.slot, Ordering::Relaxed);
    s.changes.whole.insert(id.slot);
    s.changes.whole_arena = true;
    s.start()?;
    s.supervise()
}

/// Goes on with the latest image in the store of `config`, which this build of the program made.
///
/// # Errors
/// [`WorldError`]; among them that the image is another build's, and which executable to run instead.
///
/// # Panics
/// As [`run`].
pub fn resume(config: Config, announce: impl FnOnce(&Resumed)) -> Result<Ended, WorldError> {
    fix_addresses()?;
    let dir = config.store.clone().unwrap_or_default();
    let mut s = Supervisor::new(config)?;
    let (contract, shadow, outlet) = (s.contract(), &mut s.shadow, &mut s.outlet);
    let (durable, resumed, clock_ns) = durable::Durable::resume(&dir, contract, shadow, outlet)?;
    announce(&resumed);
    s.durable = Some(durable);
    s.resumed = Some(resumed);
    let all = durable::all_of(&s.shadow);
    // SAFETY: no node exists yet.
    unsafe { s.shadow.roll_back(&all) };
    s.shadow.note_unsaved();
    durable::settle_in(s.config.nodes, clock_ns);
    s.start()?;
    s.supervise()
}

impl Supervisor {
    fn contract(&self) -> Contract {
        let vdso = [world().vdso[0].load(Ordering::Relaxed), world().vdso[1].load(Ordering::Relaxed)];
        // SAFETY: installed by `new`.
        Contract::of_this_process(unsafe { template::template() }, vdso)
    }

    fn new(mut config: Config) -> Result<Self, WorldError> {
        if config.store.is_some() {
            // Output leaves with images; without any it would never leave.
            config.image_interval.get_or_insert(config.store_interval);
        }
        assert_eq!(threads_of_this_process(), 1, "a World must be started from a process with one thread");
        let outlet = outlet::Outlet::new(config.output.as_deref())?;
        let memory = WorldMemory::new()?;
        // SAFETY: just mapped; no node exists.
        let strings_len = unsafe {
            template::install()?;
            control::initialise(config.nodes);
            move_strings()
        };
        let w = world();
        w.supervisor.store(process::pid() as u32, Ordering::Relaxed);
        w.memory_limit.store(config.memory_bytes, Ordering::Relaxed);
        w.slice_ns.store(config.slice.as_nanos() as u64, Ordering::Relaxed);
        w.spin_ns.store(config.spin.as_nanos() as u64, Ordering::Relaxed);
        w.track.store(config.track, Ordering::Relaxed);
        w.hold_output.store(config.image_interval.is_some(), Ordering::Relaxed);
        w.cpu.store(crate::node::cpu_flags(), Ordering::Relaxed);
        for (i, addr) in vdso_range().into_iter().enumerate() {
            w.vdso[i].store(addr, Ordering::Relaxed);
        }
        // Nodes begin paused, so that the first image holds the World before anything ran.
        w.pause_kind.store(PauseKind::Image as u32, Ordering::Relaxed);
        w.pause.store(1, Ordering::Release);
        peregrine_thread::interpose::warm_up();
        // SAFETY: one thread, checked above.
        let zygote = unsafe { Zygote::fork() }?;
        let shadow = Shadow::new()?;
        let signals = take_signals()?;
        let nodes = (0..config.nodes).map(|_| None).collect();
        Ok(Self {
            random: config.seed | 1,
            config,
            _memory: memory,
            zygote,
            nodes,
            shadow,
            changes: Changes::default(),
            signals,
            stats: Stats::new(),
            crashes: HashMap::new(),
            quarantine: Vec::new(),
            image_due: None,
            kill_due: None,
            move_due: None,
            status_due: None,
            last_image_ns: 0,
            outlet,
            durable: None,
            store_due: 0,
            save_failing: false,
            resumed: None,
            strings_len,
            failed_starts: 0,
            // After the zygote was forked: nodes do not inherit it.
            control: control_socket::ControlSocket::open(),
        })
    }

    /// Starts the nodes and takes the first image.
    fn start(&mut self) -> Result<(), WorldError> {
        loop {
            self.fork_missing()?;
            if self.wait_for_pause(Duration::from_secs(10)) {
                break;
            }
            self.bury_dead()?;
        }
        self.collect_reports();
        self.commit();
        self.resume();
        // From here on there is something to resume.
        self.save()?;
        let now = monotonic_ns();
        self.image_due = self.config.image_interval.map(|d| now + d.as_nanos() as u64);
        self.move_due = self.config.move_every.map(|d| now + d.as_nanos() as u64);
        self.kill_due = self.config.kill_every.map(|d| now + d.as_nanos() as u64);
        self.status_due = self.config.progress.then_some(now);
        Ok(())
    }

    fn supervise(mut self) -> Result<Ended, WorldError> {
        loop {
            let timeout = self.next_due().map(|at| at.saturating_sub(monotonic_ns()));
            let signalled = self.sleep(timeout)?;
            if let Some(signo) = signalled {
                return Ok(self.stop(signo));
            }
            if let Some(code) = self.bury_dead()? {
                return Ok(self.finish(code));
            }
            if self.nodes.iter().any(Option::is_none) {
                self.recover()?;
            }
            let asked = world().requests.swap(0, Ordering::AcqRel) | self.serve_control();
            if asked & request::MAIN_ENDED != 0 || imaged().main_exit.load(Ordering::Acquire) != 0 {
                if let Some(code) = self.try_finish()? {
                    return Ok(self.finish(code));
                }
                continue;
            }
            self.act(asked)?;
            self.show_output();
        }
    }

    /// Does what is due.
    fn act(&mut self, asked: u32) -> Result<(), WorldError> {
        let now = monotonic_ns();
        let due = |at: Option<u64>| at.is_some_and(|t| t <= now);
        let wanted = asked & (request::CHECKPOINT | request::OUTPUT) != 0 && !self.outlet.is_stuck();
        if due(self.image_due) || wanted {
            self.image_due = self.config.image_interval.map(|d| monotonic_ns() + d.as_nanos() as u64);
            self.image(wanted)?;
        }
        if due(self.move_due) {
            self.move_one();
            self.move_due = self.config.move_every.map(|d| now + d.as_nanos() as u64);
        }
        if due(self.kill_due) {
            self.kill_due = None;
            self.kill_one();
        }
        if due(self.status_due) {
            self.stats.show_status();
            self.status_due = Some(now + 100_000_000);
        }
        Ok(())
    }

    /// Writes out what may go out, without mixing it with the status line.
    fn show_output(&mut self) {
        if self.outlet.is_stuck() {
            self.stats.hide_status();
            self.outlet.flush_some();
        }
    }

    fn next_due(&self) -> Option<u64> {
        let retry = self.outlet.is_stuck().then(|| monotonic_ns() + 5_000_000);
        [self.image_due, self.kill_due, self.move_due, self.status_due, self.control.due(), retry]
            .into_iter()
            .flatten()
            .min()
    }

    /// Sleeps until something happens; a signal that ends the World, if one came.
    fn sleep(&mut self, timeout_ns: Option<u64>) -> Result<Option<i32>, WorldError> {
        let ts = timeout_ns.map(|ns| rustix::time::Timespec {
            tv_sec: (ns / 1_000_000_000) as i64,
            tv_nsec: (ns % 1_000_000_000) as i64,
        });
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        fds.extend(self.nodes.iter().flatten().map(|n| PollFd::new(&n.pidfd, PollFlags::IN)));
        fds.extend(self.control.poll_fds());
        match poll(&mut fds, ts.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(kernel("poll")(e)),
        }
        let mut info = [0u8; 128];
        let mut ending = None;
        while let Ok(128) = rustix::io::read(&self.signals, &mut info) {
            let signo = i32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            if matches!(signo, number::INT | number::TERM | number::HUP) {
                ending = Some(signo);
            }
        }
        Ok(ending)
    }

    /// Asks every node to pause and waits; `false` if one died or does not come.
    fn pause(&mut self, kind: PauseKind, patience: Duration) -> bool {
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
    fn wait_for_pause(&mut self, patience: Duration) -> bool {
        let w = world();
        let word = w.pause.load(Ordering::Relaxed);
        let deadline = monotonic_ns() + patience.as_nanos() as u64;
        let mut kicked = monotonic_ns();
        loop {
            let acks = w.acks.load(Ordering::Acquire);
            let missing: Vec<u32> = (0..self.nodes.len() as u32)
                .filter(|i| self.nodes[*i as usize].is_some())
                .filter(|i| node(*i).paused.load(Ordering::Acquire) != word)
                .collect();
            if missing.is_empty() {
                return true;
            }
            if missing.iter().any(|i| self.is_dead(*i as usize)) {
                return false;
            }
            let now = monotonic_ns();
            if now > deadline {
                return false;
            }
            if now - kicked > 500_000 && w.pause_kind.load(Ordering::Relaxed) == PauseKind::Image as u32 {
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

    fn is_dead(&self, i: usize) -> bool {
        let Some(n) = &self.nodes[i] else { return true };
        let mut fds = [PollFd::new(&n.pidfd, PollFlags::IN)];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut fds, Some(&now)), Ok(n) if n > 0)
    }

    /// Lets the nodes run.
    fn resume(&mut self) {
        let w = world();
        w.pause.fetch_add(1, Ordering::Release);
        let _ = futex::wake(&w.pause, u32::MAX);
    }

    /// Unites what the paused nodes report with what is known already.
    fn collect_reports(&mut self) {
        for i in 0..self.nodes.len() as u32 {
            let n = node(i);
            let ran = take_ran(i);
            if self.nodes[i as usize].is_none() || n.dirty.load(Ordering::Acquire) == crate::dirty::UNKNOWN {
                self.changes.add_unknown(ran.into_iter());
            } else {
                let len = n.dirty.load(Ordering::Acquire).min(control::DIRTY_CAPACITY);
                // SAFETY: the node is paused and does not write its list; S1: the slice lives for this call.
                self.changes.add_report(unsafe { core::slice::from_raw_parts(control::dirty_list(i), len) });
            }
            n.dirty.store(0, Ordering::Relaxed);
        }
    }

    /// Makes the paused World the image.
    fn commit(&mut self) {
        let begun = monotonic_ns();
        let sequence = imaged().sequence.load(Ordering::Relaxed) + 1;
        imaged().sequence.store(sequence, Ordering::Relaxed);
        // SAFETY: every node is paused.
        let moved = unsafe { self.shadow.commit(&self.changes) };
        self.changes = Changes::default();
        self.last_image_ns = monotonic_ns();
        self.stats.image(moved, self.last_image_ns - begun);
        if self.durable.is_none() {
            world().committed.store(sequence, Ordering::Release);
            self.outlet.commit(self.shadow.output_tail);
            self.wake_checkpointers();
        }
    }

    /// Takes an image; with `save` it goes to the store at once.
    fn image(&mut self, save: bool) -> Result<(), WorldError> {
        let begun = monotonic_ns();
        if !self.pause(PauseKind::Image, Duration::from_millis(500)) {
            if (0..self.nodes.len()).any(|i| self.is_dead(i)) {
                // The pause goes on as a rollback; what the others have reported must not be lost.
                self.collect_from_paused();
                return Ok(());
            }
            self.stats.images_given_up += 1;
            self.stats.blocked_nodes = self.unpaused();
            // What some nodes have reported already must not be lost.
            self.collect_from_paused();
            self.resume();
            // The others must not stand still for it each time.
            self.image_due = Some(monotonic_ns() + GIVEN_UP_FOR_NS);
            return Ok(());
        }
        self.collect_reports();
        self.commit();
        self.resume();
        self.stats.pause_ns.push(monotonic_ns() - begun);
        if save || monotonic_ns() >= self.store_due {
            self.save()?;
        }
        self.stats.blocked_nodes.clear();
        self.show_output();
        self.note_released();
        Ok(())
    }

    /// Writes the image to the store, if there is one, while the nodes run.
    fn save(&mut self) -> Result<(), WorldError> {
        use peregrine_store::StoreError as E;
        let Some(durable) = &mut self.durable else { return Ok(()) };
        let begun = monotonic_ns();
        match durable.commit(&mut self.shadow, &self.outlet) {
            Ok(bytes) => {
                self.stats.saved(bytes, monotonic_ns() - begun);
                let sequence = imaged().sequence.load(Ordering::Relaxed);
                world().committed.store(sequence, Ordering::Release);
                self.outlet.commit(self.shadow.output_tail);
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
    fn note_released(&mut self) {
        if let (Some(durable), Some(position)) = (&mut self.durable, self.outlet.done()) {
            durable.released(position);
        }
    }

    fn unpaused(&self) -> Vec<u32> {
        let word = world().pause.load(Ordering::Relaxed);
        (0..self.nodes.len() as u32).filter(|i| node(*i).paused.load(Ordering::Acquire) != word).collect()
    }

    /// Keeps the reports of those that did pause when the image was given up.
    fn collect_from_paused(&mut self) {
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
                    core::slice::from_raw_parts(control::dirty_list(i), len.min(control::DIRTY_CAPACITY))
                });
            }
            n.dirty.store(0, Ordering::Relaxed);
        }
    }

    /// Wakes the threads that wait for an image.
    fn wake_checkpointers(&mut self) {
        if imaged().checkpoints_asked.load(Ordering::Relaxed) == 0 {
            return;
        }
        for slot in 0..imaged_used() {
            if record(slot).waiting.load(Ordering::Relaxed) == control::wait::CHECKPOINT {
                // SAFETY: nodes are paused; the post is seen when they go on.
                unsafe { crate::sched::wake(slot) };
            }
        }
    }

    fn move_one(&mut self) {
        let used = imaged_used();
        if self.nodes.len() < 2 || used == 0 {
            return;
        }
        for _ in 0..8 {
            let slot = (self.next_random() % used as u64) as u32;
            let r = record(slot);
            if matches!(r.state.load(Ordering::Relaxed), state::FREE | state::ENDED) {
                continue;
            }
            let at = r.node.load(Ordering::Relaxed);
            let to = (at + 1 + (self.next_random() % (self.nodes.len() as u64 - 1)) as u32)
                % self.nodes.len() as u32;
            self.post_move(slot, to);
            return;
        }
    }

    /// Asks for a move.
    fn post_move(&mut self, slot: u32, to: u32) {
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
    fn kill_one(&mut self) {
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
                self.stats.kills += 1;
                self.stats.kills_hit += hit as u64;
                let counts = [self.stats.kills, self.stats.kills_hit];
                world().kills.iter().zip(counts).for_each(|(a, n)| a.store(n, Ordering::Relaxed));
            }
        }
    }

    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// `main` has ended: one last image makes that certain.
    fn try_finish(&mut self) -> Result<Option<i32>, WorldError> {
        self.image(true)?;
        let code = imaged().main_exit.load(Ordering::Acquire);
        if code != 0
            && !(0..self.nodes.len()).any(|i| self.is_dead(i))
            && self.changes.ranges.is_empty()
            && !self.save_failing
        {
            return Ok(Some(code as i32 - 1));
        }
        Ok(None)
    }

    fn stop(mut self, signo: i32) -> Ended {
        self.kill_all();
        self.collect_stats();
        Ended {
            code: 128 + signo,
            stats: self.stats,
            stopped_by: Some(signo),
            resumed: self.resumed,
            result: Vec::new(),
        }
    }

    fn finish(mut self, code: i32) -> Ended {
        self.kill_all();
        self.outlet.flush_all();
        self.note_released();
        self.collect_stats();
        Ended {
            code,
            stats: self.stats,
            stopped_by: None,
            resumed: self.resumed,
            result: thread::result_of_main(),
        }
    }

    fn collect_stats(&mut self) {
        self.stats.end(world().nodes.iter().take(self.config.nodes as usize));
    }

    fn kill_all(&mut self) {
        for n in self.nodes.iter().flatten() {
            let _ = signal::kill(n.pid, number::KILL);
        }
        let _ = signal::kill(self.zygote.pid, number::KILL);
        for n in &mut self.nodes {
            if let Some(n) = n.take() {
                reap(n.pid);
            }
        }
        reap(self.zygote.pid);
    }
}

fn reap(pid: i32) -> Option<rustix::process::WaitStatus> {
    let pid = Pid::from_raw(pid)?;
    loop {
        match rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()) {
            Ok(status) => return status.map(|(_, s)| s),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

fn imaged_used() -> u32 {
    // Without the lock: a node that was killed may hold it, and it is the supervisor that would have to notice.
    crate::shadow::threads_used_now()
}

/// Slots that node `i` ran since it was last asked.
fn take_ran(i: u32) -> Vec<u32> {
    let mut list = Vec::new();
    for (w, word) in node(i).ran.iter().enumerate() {
        let mut bits = word.swap(0, Ordering::Relaxed);
        while bits != 0 {
            list.push((w * 64) as u32 + bits.trailing_zeros());
            bits &= bits - 1;
        }
    }
    list
}

fn threads_of_this_process() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count)
}

fn vdso_range() -> [usize; 2] {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let range = maps.lines().find(|l| l.ends_with("[vdso]")).and_then(|l| {
        let (low, high) = l.split_whitespace().next()?.split_once('-')?;
        Some([usize::from_str_radix(low, 16).ok()?, usize::from_str_radix(high, 16).ok()?])
    });
    range.unwrap_or([0, 0])
}

fn take_signals() -> Result<OwnedFd, WorldError> {
    use std::os::fd::FromRawFd;
    let mut mask = 0;
    for signo in [number::INT, number::TERM, number::HUP, number::CHLD, crate::SIG_NOTIFY] {
        mask |= signal::bit(signo);
    }
    signal::set_mask(mask);
    let fd = signal::signalfd(mask).map_err(|e| WorldError::Kernel { what: "signalfd", source: e.into() })?;
    // SAFETY: just opened, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Copies arguments and environment to World memory, and makes the template's pointers to them point there: so that they
/// mean the same on every node and after a resume. Returns how many bytes they take.
///
/// # Safety
/// The template is installed, and no node exists.
unsafe fn move_strings() -> usize {
    let (argc, argv, envp) = template::start_arguments();
    if argv == 0 {
        return 0;
    }
    // SAFETY: the loader's own vectors, terminated by null; STRINGS is mapped, fresh, and larger than the kernel lets a
    // process's arguments be (6 MiB by default).
    unsafe {
        let header = &*(peregrine_thread::layout::TEMPLATE as *const template::TemplateHeader);
        let mut place = STRINGS;
        let mut copy = |list: usize, n: usize| {
            let vector = place as *mut usize;
            place += (n + 1) * size_of::<usize>();
            for i in 0..n {
                let s = core::ffi::CStr::from_ptr((list as *const *const core::ffi::c_char).add(i).read());
                let bytes = s.to_bytes_with_nul();
                core::ptr::copy_nonoverlapping(bytes.as_ptr(), place as *mut u8, bytes.len());
                vector.add(i).write(place);
                place = (place + bytes.len()).next_multiple_of(8);
            }
            vector.add(n).write(0);
            vector as usize
        };
        let mut n_env = 0;
        while (envp as *const usize).add(n_env).read() != 0 {
            n_env += 1;
        }
        let (new_argv, new_envp) = (copy(argv, argc), copy(envp, n_env));
        let words = header.statics().cast::<usize>();
        for i in 0..header.statics_len / 8 {
            match words.add(i).read() {
                w if w == argv => words.add(i).write(new_argv),
                w if w == envp => words.add(i).write(new_envp),
                _ => {}
            }
        }
        place - STRINGS
    }
}
