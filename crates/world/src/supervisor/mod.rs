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

mod blocked;
mod control_socket;
mod descriptors;
mod domains;
mod durable;
mod ending;
mod error;
mod image;
mod new_processes;
mod outlet;
mod recover;
mod refused;
mod seals;
mod start;
mod stats;
mod status;
pub(crate) mod strays;
mod strings;
mod trouble;

use crate::config::Config;
use crate::contract::{Contract, fix_addresses};
use crate::control::{imaged, request, world};
use crate::memory::WorldMemory;
use crate::packed;
use crate::shadow::{Changes, Shadow};
use crate::thread::{self, Start};
use crate::zygote::Zygote;
pub use durable::{DurableError, Resumed};
pub use ending::Ended;
use ending::reap;
pub use error::WorldError;
use error::kernel;
pub use outlet::OutputError;
use peregrine_base::sync::Ordering;
use peregrine_sys::rustix;
use peregrine_sys::signal::number;
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::stack_kind::StackKind;
use peregrine_thread::template;
use rustix::event::{PollFd, PollFlags, poll};
pub use stats::{Stats, median_ms, percentile_ms};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// A node's process, seen from here.
#[derive(Debug)]
struct NodeProcess {
    pid: i32,
    pidfd: OwnedFd,
    space: Option<strays::Space>,
}

impl NodeProcess {
    /// Whether it has ended, or does so within `patience`.
    fn has_ended(&self, patience: Duration) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let ts = rustix::time::Timespec {
            tv_sec: patience.as_secs() as i64,
            tv_nsec: i64::from(patience.subsec_nanos()),
        };
        matches!(poll(&mut fds, Some(&ts)), Ok(n) if n > 0)
    }
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
    /// Deaths by SIGKILL in a row under one thread.
    killed: recover::Killed,
    /// How often nodes lacked something to run a thread, by [`thread::identity`].
    given_up: HashMap<u64, u32>,
    /// The node that was killed on purpose last.
    killed_on_purpose: Option<usize>,
    /// Slot, generation, [`thread::identity`] and reason.
    quarantine: Vec<(u32, u32, u64, String)>,
    /// Those that have been taken away since the last image: every rollback to it brings them back.
    taken_away: Vec<(u32, u32, u64, String)>,
    image_due: Option<u64>,
    kill_due: Option<u64>,
    move_due: Option<u64>,
    status_due: Option<u64>,
    last_image_ns: u64,
    outlet: outlet::Outlet,
    durable: Option<durable::Durable>,
    store_due: u64,
    save_failing: bool,
    /// When a node first kept a World whose `main` has ended from ending.
    ending_since: Option<u64>,
    resumed: Option<Resumed>,
    failed_starts: u32,
    strings_len: usize,
    control: control_socket::ControlSocket,
    seals: seals::Answers,
    descriptors: descriptors::Descriptors,
}

/// How a World comes to its end.
enum End {
    /// By this signal.
    Stopped(i32),
    /// With this exit code.
    Exited(i32),
}

/// Runs `main` in a World of its own until it ends.
///
/// # Errors
/// [`WorldError`]: the World could not be made, or lost what it stands on. Its processes are gone then.
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
    let id = unsafe {
        packed::keep_pristine().map_err(crate::error::SpawnError::from)?;
        thread::create(&start, 0)
    }?;
    imaged().main.store(id.slot, Ordering::Relaxed);
    s.changes.whole.insert(id.slot);
    s.changes.whole_arena = true;
    s.supervise()
}

/// Goes on with the latest image in the store of `config`, or the one that [`Config::resume_image`] names, which this build of the
/// program made.
///
/// # Errors
/// [`WorldError`]; among them that the image is another build's, and which executable to run instead; and that it is damaged, and
/// which one to go back to.
///
/// # Panics
/// As [`run`].
pub fn resume(config: Config, announce: impl FnOnce(&Resumed)) -> Result<Ended, WorldError> {
    fix_addresses()?;
    let (dir, wanted) = (config.store.clone().unwrap_or_default(), config.resume_image);
    let mut s = Supervisor::new(config, false)?;
    let (contract, shadow, outlet) = (s.contract(), &mut s.shadow, &mut s.outlet);
    let (durable, resumed, clock_ns) = durable::Durable::resume(&dir, wanted, contract, shadow, outlet)?;
    announce(&resumed);
    world().resumed.store(true, Ordering::Relaxed);
    s.durable = Some(durable);
    s.resumed = Some(resumed);
    let all = durable::all_of(&s.shadow);
    // SAFETY: no node exists yet.
    unsafe { s.shadow.roll_back(&all) };
    s.check_room_for_domains()?;
    s.shadow.note_unsaved();
    durable::settle_in(s.config.nodes, clock_ns);
    s.make_room_for_domains();
    s.hold_numbers()?;
    s.supervise()
}

impl Supervisor {
    fn contract(&self) -> Contract {
        let vdso = [world().vdso[0].load(Ordering::Relaxed), world().vdso[1].load(Ordering::Relaxed)];
        // SAFETY: installed by `new`.
        Contract::of_this_process(unsafe { template::template() }, vdso)
    }

    /// Starts the nodes, and stays until the World ends. Whatever ends it, no process of it is left.
    fn supervise(mut self) -> Result<Ended, WorldError> {
        match self.start().and_then(|()| self.go_on()) {
            Ok(End::Stopped(signo)) => Ok(self.stop(signo)),
            Ok(End::Exited(code)) => Ok(self.finish(code)),
            Err(e) => {
                self.kill_all();
                Err(e)
            }
        }
    }

    fn go_on(&mut self) -> Result<End, WorldError> {
        loop {
            let timeout = match self.nodes.iter().any(Option::is_none) {
                // Somebody was buried while something else was done, and the rollback is due.
                true => Some(0),
                false => self.next_due().map(|at| at.saturating_sub(monotonic_ns())),
            };
            let signalled = self.sleep(timeout)?;
            if let Some(signo) = signalled {
                return Ok(End::Stopped(signo));
            }
            if let Some(code) = self.bury_dead()? {
                // The program's end. What it wrote goes out with it.
                self.outlet.commit(crate::output::tail_now());
                return Ok(End::Exited(code));
            }
            if self.nodes.iter().any(Option::is_none) {
                self.recover()?;
                if new_processes::is_told_to_end() {
                    continue;
                }
            }
            let asked = world().requests.swap(0, Ordering::AcqRel) | self.serve_control();
            if asked & request::MAIN_ENDED != 0 || imaged().main_exit.load(Ordering::Acquire) != 0 {
                // Each attempt writes all that has changed: one that failed is not repeated at once.
                if self.next_attempt().is_none_or(|at| at <= monotonic_ns())
                    && let Some(code) = self.try_finish()?
                {
                    return Ok(End::Exited(code));
                }
                self.show_output();
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
            if self.nodes.iter().any(Option::is_none) || new_processes::is_told_to_end() {
                // What is due waits for the rollback, or never will be.
                return Ok(());
            }
        }
        let w = world();
        // Who asked may have got it already.
        let lacking = w.committed.load(Ordering::Acquire) < w.image_wanted.load(Ordering::Acquire);
        let asks = asked & request::OUTPUT != 0 || asked & request::CHECKPOINT != 0 && lacking;
        let wanted = asks && !self.outlet.is_stuck();
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
        if let Some(at) = self.next_attempt().filter(|_| imaged().main_exit.load(Ordering::Acquire) != 0) {
            // Nothing else is done any more.
            return [Some(at), self.control.due(), retry].into_iter().flatten().min();
        }
        [self.image_due, self.kill_due, self.move_due, self.status_due, self.control.due(), retry]
            .into_iter()
            .flatten()
            .min()
    }

    /// When an image that could not be stored is tried again.
    fn next_attempt(&self) -> Option<u64> {
        self.save_failing.then_some(self.store_due)
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
}
