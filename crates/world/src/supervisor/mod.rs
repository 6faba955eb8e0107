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
//! It sleeps in one `poll`; a second OS thread does nothing but answer writes to sealed pages (`seals`). It never executes a thread's code, and touches the World only while all
//! nodes are paused or dead, but for posting moves.

mod control_socket;
mod domains;
mod durable;
mod image;
mod outlet;
mod recover;
mod seals;
mod stats;
mod strings;

use crate::config::Config;
use crate::contract::{Contract, ContractError, fix_addresses};
use crate::control::{self, NONE, PauseKind, imaged, node, record, request, state, world};
use crate::killpoint::{hold_fire, supervisor_at};
use crate::memory::{self, MemoryError, WorldMemory};
use crate::shadow::{Changes, Shadow};
use crate::thread::{self, Start};
use crate::zygote::{Zygote, ZygoteError};
pub use durable::{DurableError, Resumed};
pub use outlet::OutputError;
use peregrine_base::sync::Ordering;
use peregrine_sys::signal::{self, number};
use peregrine_sys::timer::monotonic_ns;
use peregrine_sys::{process, rustix};
use peregrine_thread::layout::SLOT_COUNT;
use peregrine_thread::stack_kind::StackKind;
use peregrine_thread::template::{self, TemplateError};
use peregrine_thread::window::{Windows, WindowsError};
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
    /// The settings of the windows can't be.
    #[error(transparent)]
    Windows(#[from] WindowsError),
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
    _frames: OwnedFd,
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
    seals: seals::Answers,
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
    let mut s = Supervisor::new(config, true)?;
    if let Some(dir) = s.config.store.clone() {
        s.durable = Some(durable::Durable::create(&dir, s.contract(), s.strings_len)?);
        s.shadow.note_unsaved();
    }
    let start = Start {
        body,
        function,
        argument,
        ends: &[],
        stack_bytes: s.config.main_stack_bytes,
        kind: StackKind::Isomalloc,
        name: "main",
    };
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
    let mut s = Supervisor::new(config, false)?;
    let (contract, shadow, outlet) = (s.contract(), &mut s.shadow, &mut s.outlet);
    let (durable, resumed, clock_ns) = durable::Durable::resume(&dir, contract, shadow, outlet)?;
    announce(&resumed);
    world().resumed.store(true, Ordering::Relaxed);
    s.durable = Some(durable);
    s.resumed = Some(resumed);
    let all = durable::all_of(&s.shadow);
    // SAFETY: no node exists yet.
    unsafe { s.shadow.roll_back(&all) };
    s.shadow.note_unsaved();
    durable::settle_in(s.config.nodes, clock_ns);
    s.make_room_for_domains();
    s.start()?;
    s.supervise()
}

impl Supervisor {
    fn contract(&self) -> Contract {
        let vdso = [world().vdso[0].load(Ordering::Relaxed), world().vdso[1].load(Ordering::Relaxed)];
        // SAFETY: installed by `new`.
        Contract::of_this_process(unsafe { template::template() }, vdso)
    }

    fn new(mut config: Config, is_new: bool) -> Result<Self, WorldError> {
        if config.store.is_some() {
            // Output leaves with images; without any it would never leave.
            config.image_interval.get_or_insert(config.store_interval);
        }
        assert_eq!(threads_of_this_process(), 1, "a World must be started from a process with one thread");
        let outlet = outlet::Outlet::new(config.output.as_deref(), is_new)?;
        let memory = WorldMemory::new(config.slots.clamp(1, SLOT_COUNT), config.nodes)?;
        // SAFETY: just mapped; no node exists.
        let strings_len = unsafe {
            let t = template::install()?;
            template::set_windows(Windows::new(
                config.windows,
                config.window_bytes,
                config.window_stack_bytes,
                &t,
            )?);
            control::initialise(config.nodes, config.seed);
            crate::records::make();
            strings::move_to_world()
        };
        let frames = memory::frames(c"peregrine-frames", config.window_bytes)?;
        let w = world();
        w.frames_fd.store(std::os::fd::AsRawFd::as_raw_fd(&frames) as u32, Ordering::Relaxed);
        w.default_kind.store(config.kind as u32, Ordering::Relaxed);
        let pack_after = config.pack_after.map_or(u64::MAX, |d| d.as_nanos() as u64);
        w.pack_after_ns.store(pack_after, Ordering::Relaxed);
        w.supervisor.store(process::pid() as u32, Ordering::Relaxed);
        w.memory_limit.store(config.memory_bytes, Ordering::Relaxed);
        w.slice_ns.store(config.slice.as_nanos() as u64, Ordering::Relaxed);
        // Where all share one processor, whoever spins keeps off the one that it waits for.
        let alone = std::thread::available_parallelism().is_ok_and(|n| n.get() == 1);
        w.spin_ns.store(if alone { 0 } else { config.spin.as_nanos() as u64 }, Ordering::Relaxed);
        w.track.store(config.track, Ordering::Relaxed);
        w.hold_output.store(config.image_interval.is_some(), Ordering::Relaxed);
        w.seal_every.store(config.seal_every, Ordering::Relaxed);
        w.cpu.store(crate::node::cpu_flags(), Ordering::Relaxed);
        for (i, addr) in vdso_range().into_iter().enumerate() {
            w.vdso[i].store(addr, Ordering::Relaxed);
        }
        // Nodes begin paused, so that the first image holds the World before anything ran.
        w.pause_kind.store(PauseKind::Image as u32, Ordering::Relaxed);
        w.pause.store(1, Ordering::Release);
        peregrine_thread::interpose::warm_up();
        supervisor_at("memory made");
        // SAFETY: one thread, checked above.
        let zygote = unsafe { Zygote::fork() }?;
        supervisor_at("zygote forked");
        let shadow = Shadow::new(config.window_bytes)?;
        let signals = take_signals()?;
        let nodes = (0..config.nodes).map(|_| None).collect();
        Ok(Self {
            random: config.seed | 1,
            config,
            _memory: memory,
            _frames: frames,
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
            seals: seals::Answers::none(),
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
        self.answer_seals();
        self.collect_reports();
        self.commit();
        supervisor_at("first image in memory");
        self.resume();
        // From here on there is something to resume.
        self.save()?;
        let now = monotonic_ns();
        self.image_due = self.config.image_interval.map(|d| now + d.as_nanos() as u64);
        self.move_due = self.config.move_every.map(|d| now + d.as_nanos() as u64);
        self.kill_due = self.config.kill_every.map(|d| now + d.as_nanos() as u64);
        self.status_due = self.config.progress.then_some(now);
        if self.config.track && !world().track.load(Ordering::Relaxed) {
            eprintln!(
                "peregrine: this system does not track writes, so all memory is compared for each image, which is slower; `peregrine doctor` says what to change"
            );
        }
        supervisor_at("started");
        hold_fire(false);
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
        if asked & request::DOMAINS != 0 {
            self.add_domains()?;
        }
        let wanted = asked & (request::CHECKPOINT | request::OUTPUT) != 0 && !self.outlet.is_stuck();
        if due(self.image_due) || wanted {
            self.image_due = self.config.image_interval.map(|d| monotonic_ns() + d.as_nanos() as u64);
            self.image(wanted)?;
            // An image that takes longer than the time between two must not leave the nodes no time to run.
            let over = monotonic_ns();
            if let Some(due) = &mut self.image_due {
                *due = (*due).max(over + (over - now));
            }
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

    fn move_one(&mut self) {
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
        supervisor_at("main has ended");
        let code = imaged().main_exit.load(Ordering::Acquire);
        // Nothing is taken back between here and the image: if it is complete, the end and all output are in it.
        let complete = self.image(true)?;
        Ok((code != 0 && complete).then(|| code as i32 - 1))
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
        supervisor_at("last image taken");
        self.kill_all();
        supervisor_at("nodes killed");
        self.outlet.flush_all();
        supervisor_at("last output out");
        self.note_released();
        supervisor_at("last output noted");
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
        self.stats.end(world().nodes.iter().take(self.nodes.len()));
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
