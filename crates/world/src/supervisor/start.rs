//! The making of a World: memory and template, the zygote forked from them, then the supervisor's own things, the nodes, and the
//! first image, which holds the World before anything ran.

use super::new_processes::{self, NewProcesses};
use super::stats::Stats;
use super::{Supervisor, WorldError, control_socket, outlet, seals, strings};
use crate::config::Config;
use crate::control::{self, PauseKind, world};
use crate::killpoint::{hold_fire, supervisor_at};
use crate::memory::{self, WorldMemory};
use crate::shadow::{Changes, Shadow};
use crate::zygote::Zygote;
use peregrine_base::sync::Ordering;
use peregrine_sys::descriptors::{self, out_of_the_way};
use peregrine_sys::process;
use peregrine_sys::signal::{self, number};
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::layout::{SLOT_COUNT, SLOTS};
use peregrine_thread::template;
use peregrine_thread::window::Windows;
use std::collections::HashMap;
use std::os::fd::OwnedFd;

impl Supervisor {
    pub(super) fn new(mut config: Config, is_new: bool) -> Result<Self, WorldError> {
        if config.store.is_some() {
            // Output leaves with images; without any it would never leave.
            config.image_interval.get_or_insert(config.store_interval);
        }
        assert_eq!(threads_of_this_process(), 1, "a World must be started from a process with one thread");
        // Before anything is made; nodes inherit it.
        descriptors::have_enough().map_err(|hard| WorldError::Descriptors { hard })?;
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
            template::set_slots_end(SLOTS + world().room.slots_bytes.load(Ordering::Relaxed));
            control::initialise(config.nodes, config.seed);
            crate::address_space::make();
            strings::move_to_world()
        };
        let frames = out_of_the_way(memory::frames(c"peregrine-frames", config.window_bytes)?);
        let w = world();
        w.frames_fd.store(std::os::fd::AsRawFd::as_raw_fd(&frames) as u32, Ordering::Relaxed);
        w.default_kind.store(config.kind as u32, Ordering::Relaxed);
        let pack_after = config.pack_after.map_or(u64::MAX, |d| d.as_nanos() as u64);
        w.pack_after_ns.store(pack_after, Ordering::Relaxed);
        w.supervisor.store(process::pid() as u32, Ordering::Relaxed);
        w.memory_limit.store(config.memory_bytes, Ordering::Relaxed);
        w.slice_ns.store(config.slice.as_nanos() as u64, Ordering::Relaxed);
        // Where processors are shared, whoever spins keeps off the one that it waits for.
        let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
        let crowded = processors == 1 || processors < config.nodes as usize;
        w.spin_ns.store(if crowded { 0 } else { config.spin.as_nanos() as u64 }, Ordering::Relaxed);
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
        let descriptors = super::descriptors::Descriptors::of(zygote.pid);
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
            killed: Default::default(),
            given_up: HashMap::new(),
            killed_on_purpose: None,
            quarantine: Vec::new(),
            taken_away: Vec::new(),
            image_due: None,
            kill_due: None,
            move_due: None,
            status_due: None,
            last_image_ns: 0,
            outlet,
            durable: None,
            store_due: 0,
            save_failing: false,
            ending_since: None,
            resumed: None,
            strings_len,
            failed_starts: 0,
            // After the zygote was forked: nodes do not inherit it.
            control: control_socket::ControlSocket::open(),
            seals: seals::Answers::none(),
            descriptors,
        })
    }

    /// Starts the nodes and takes the first image.
    pub(super) fn start(&mut self) -> Result<(), WorldError> {
        let mut wait = NewProcesses::wait();
        loop {
            self.fork_missing()?;
            if self.wait_for_pause(new_processes::SLICE) {
                break;
            }
            self.bury_dead()?;
            if self.wait_no_longer(&mut wait) {
                return Ok(());
            }
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
