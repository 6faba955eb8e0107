//! Nodes that do not pause, and the end of a World in spite of them.
//!
//! ```text
//!   main has ended ──▶ last image ──────────────────────────────────────────────▶ end
//!                          └─ a node does not pause: say which thread, and where ─┐
//!                             ▲                                                  │ try again
//!                             └── within `Config::end_patience` ─────────────────┤
//!                                                                                ▼
//!                              the others stay paused, the node is killed ──▶ what is stored is this very state ──▶ end
//! ```
//!
//! A thread that waits in the kernel for what never comes (a terminal, a socket, a lock of another program), or computes in a shared
//! library for long, holds up an image. In a running World that is shown by `peregrine ps`; at its end it would keep the program
//! from ending, as in an ordinary process no thread could that `main` does not wait for. So the end comes all the same, and is
//! sound: nobody runs any more, so nothing that was done is taken back. Without a store all output goes out. With one the
//! World is stored as it is, less the threads that have no whole state: the one that was killed, and what lay in windows of its node.
//! For that the node must not have been killed inside the runtime, with locks held, which its [`Carrier`] tells.

use super::image::lacks_room;
use super::{Supervisor, WorldError, reap};
use crate::control::{NONE, PauseKind, ending, node, record, state, world};
use crate::{arena, ends, join, output, thread};
use peregrine_base::sync::Ordering;
use peregrine_sys::linux_raw_sys::general as k;
use peregrine_sys::other::{self, Condition};
use peregrine_sys::signal::{self, number};
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::carrier::Carrier;
use peregrine_thread::layout::CARRIER;
use peregrine_thread::stack_kind::StackKind;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// How long the last pause is waited for, and the death of who does not come.
const LAST_PAUSE: Duration = Duration::from_millis(500);

impl Supervisor {
    /// `main` has ended, with `code`, and nodes did not pause for the last image: the exit code, if that is how it is to end.
    pub(super) fn end_in_spite_of_blocked(&mut self, code: i32) -> Result<Option<i32>, WorldError> {
        let now = monotonic_ns();
        let patience = self.config.end_patience;
        if self.ending_since.is_none() {
            self.stats.hide_status();
            for i in &self.stats.blocked_nodes {
                let which = self.what_blocks(*i);
                eprintln!(
                    "peregrine: main has ended, but {which}; the program ends in {patience:?} at the latest"
                );
            }
        }
        let begun = *self.ending_since.get_or_insert(now);
        let left = (begun + patience.as_nanos() as u64).saturating_sub(now);
        if left != 0 {
            // A signal to end it at once is heard meanwhile.
            self.image_due = Some(now + left.min(200_000_000));
            return Ok(None);
        }
        if self.pause(PauseKind::Image, LAST_PAUSE) {
            // It came after all: the last image is taken as always.
            self.collect_from_paused();
            self.resume();
            return Ok(None);
        }
        if (0..self.nodes.len()).any(|i| self.is_dead(i)) {
            self.collect_from_paused();
            return Ok(None);
        }
        if lacks_room() {
            // Not for long: it gets some, or gives up.
            self.collect_from_paused();
            self.resume();
            return Ok(None);
        }
        self.stats.hide_status();
        for i in self.unpaused() {
            let which = self.what_blocks(i);
            eprintln!("peregrine: {which}: it is ended with the program");
        }
        if self.durable.is_none() {
            // The others are paused, and stay so.
            self.outlet.commit(output::tail_now());
            return Ok(Some(code));
        }
        self.store_without_blocked()?;
        Ok(Some(code))
    }

    /// Stores the World as it is, without the threads of the nodes that did not pause.
    fn store_without_blocked(&mut self) -> Result<(), WorldError> {
        let late = self.unpaused();
        let lost = || WorldError::Blocked { image: world().committed.load(Ordering::Relaxed) };
        for i in &late {
            if self.is_inside_runtime(*i) {
                return Err(lost());
            }
        }
        let mut victims = Vec::new();
        for i in late {
            let Some(process) = self.nodes[i as usize].take() else { continue };
            let _ = signal::kill(process.pid, number::KILL);
            if !process.has_ended(LAST_PAUSE) {
                self.nodes[i as usize] = Some(process);
                return Err(lost());
            }
            reap(process.pid);
            node(i).idle.store(0, Ordering::SeqCst);
            let current = node(i).current.load(Ordering::Relaxed);
            victims.extend(crate::control::numbers().filter(|n| {
                let in_window = StackKind::of(*n) == StackKind::Copy && node(i).has_run(*n);
                let r = record(*n);
                (*n == current || (in_window && r.node.load(Ordering::Relaxed) == i))
                    && state::is_alive(r.state.load(Ordering::Relaxed))
            }));
        }
        self.collect_reports();
        self.changes.whole_arena = true;
        for slot in victims {
            let why = arena::write(b"it was ended with the program, which it blocked", &[]).unwrap_or(0);
            // SAFETY: all nodes are paused or dead, and no dead one was inside the runtime.
            unsafe { join::finish(slot, ending::QUARANTINED, why) };
            thread::drop_argument(slot);
            ends::release_all_of(slot);
            join::bury(slot);
        }
        self.commit();
        loop {
            self.save()?;
            if !self.save_failing {
                return Ok(());
            }
            if self.sleep(Some(1_000_000_000))?.is_some() {
                return Err(lost());
            }
        }
    }

    /// Whether the node is in a section of the runtime, or can't be asked.
    fn is_inside_runtime(&self, i: u32) -> bool {
        let Some(process) = &self.nodes[i as usize] else { return false };
        let at = CARRIER + core::mem::offset_of!(Carrier, depth);
        let mut depth = [0u8; 4];
        let read = std::fs::File::open(format!("/proc/{}/mem", process.pid))
            .and_then(|memory| memory.read_exact_at(&mut depth, at as u64));
        read.is_err() || depth != [0; 4] || node(i).current.load(Ordering::Relaxed) == NONE
    }

    /// Who keeps node `i` from pausing, and where, in words.
    pub(super) fn what_blocks(&self, i: u32) -> String {
        let n = node(i);
        let current = n.current.load(Ordering::Relaxed);
        let pid = self.nodes[i as usize].as_ref().map_or(0, |n| n.pid);
        let place = place_of(pid);
        if current == NONE {
            return format!("node {i} (process {pid}) does not answer: {place}");
        }
        format!("thread {current} '{}' blocks node {i} (process {pid}): {place}", thread::name(current))
    }
}

/// Where a process is, as the kernel tells.
pub(super) fn place_of(pid: i32) -> String {
    if other::stat(pid as u32).is_some_and(|s| s.condition == Condition::Stopped) {
        return format!("it is stopped, by a signal (kill -CONT {pid}) or a debugger");
    }
    let said = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    let mut words = said.split_whitespace();
    let Some(nr) = words.next().and_then(|w| w.parse::<i64>().ok()) else {
        return "it computes without a pause, in the middle of a library".to_owned();
    };
    let first = words.next().and_then(|w| u32::from_str_radix(w.trim_start_matches("0x"), 16).ok());
    let (name, takes_descriptor) = system_call(nr);
    let name = if name.is_empty() { format!("system call {nr}") } else { name.to_owned() };
    match first.filter(|_| takes_descriptor) {
        Some(fd) => {
            let file = std::fs::read_link(format!("/proc/{pid}/fd/{fd}"));
            let file = file.map_or_else(|_| "closed".to_owned(), |f| f.display().to_string());
            format!("it waits in {name} on descriptor {fd} ({file})")
        }
        None => format!("it waits in {name}"),
    }
}

/// Its name, if it is one of those that wait, and whether its first argument is a descriptor.
fn system_call(nr: i64) -> (&'static str, bool) {
    match nr as u32 {
        k::__NR_read => ("read", true),
        k::__NR_write => ("write", true),
        k::__NR_readv => ("readv", true),
        k::__NR_writev => ("writev", true),
        k::__NR_recvfrom => ("recvfrom", true),
        k::__NR_recvmsg => ("recvmsg", true),
        k::__NR_sendto => ("sendto", true),
        k::__NR_sendmsg => ("sendmsg", true),
        k::__NR_accept4 => ("accept4", true),
        k::__NR_connect => ("connect", true),
        k::__NR_flock => ("flock", true),
        k::__NR_fcntl => ("fcntl", true),
        k::__NR_fsync => ("fsync", true),
        k::__NR_epoll_pwait => ("epoll_pwait", true),
        #[cfg(target_arch = "x86_64")]
        k::__NR_epoll_wait => ("epoll_wait", true),
        #[cfg(target_arch = "x86_64")]
        k::__NR_poll => ("poll", false),
        k::__NR_ppoll => ("ppoll", false),
        k::__NR_futex => ("futex", false),
        k::__NR_wait4 => ("wait4", false),
        k::__NR_waitid => ("waitid", false),
        k::__NR_clock_nanosleep => ("clock_nanosleep", false),
        k::__NR_rt_sigsuspend => ("rt_sigsuspend", false),
        k::__NR_rt_sigtimedwait => ("rt_sigtimedwait", false),
        _ => ("", false),
    }
}
