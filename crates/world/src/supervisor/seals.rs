//! Answers writes to sealed pages of the nodes' statics windows (`peregrine_thread::seal`).
//!
//! ```text
//!   node's thread   writes to a sealed page ── sleeps in the kernel ───────────────── goes on
//!   this OS thread        message ──▶ mark the unit open ──▶ lift the protection ──────┘
//! ```
//!
//! The supervisor itself may be long at an image or a rollback while a node waits, so an OS thread of its own answers. It
//! holds a descriptor of its own on each node's userfaultfd (`pidfd_getfd`): the number in the nodes' shared table may
//! mean another file by the time it is used. It ends with the supervisor's handle.

use super::Supervisor;
use crate::control::node;
use peregrine_base::sync::Ordering;
use peregrine_sys::rustix;
use peregrine_thread::seal::{self, Units};
use peregrine_thread::template::template;
use peregrine_vm::Errno;
use peregrine_vm::trap::RemotePager;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

/// Node number and the pager of its window; replaces an earlier one of that node.
type Watched = (u32, RemotePager);

/// The OS thread that answers, once there is something to answer.
#[derive(Debug)]
pub(super) struct Answers(Option<Running>);

#[derive(Debug)]
struct Running {
    /// Dropped to end the thread.
    watch: Option<Sender<Watched>>,
    kick: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Answers {
    pub(super) const fn none() -> Self {
        Self(None)
    }

    fn watch(&mut self, watched: Watched) -> std::io::Result<()> {
        if self.0.is_none() {
            self.0 = Some(Running::start()?);
        }
        let running = self.0.as_ref().expect("just started");
        if let Some(sender) = &running.watch {
            sender.send(watched).map_err(|_| std::io::ErrorKind::BrokenPipe)?;
        }
        running.kick();
        Ok(())
    }
}

impl Running {
    fn start() -> std::io::Result<Self> {
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let theirs = kick.try_clone()?;
        let (watch, incoming) = channel();
        let thread =
            std::thread::Builder::new().name("seals".into()).spawn(move || answer_all(&theirs, &incoming))?;
        Ok(Self { watch: Some(watch), kick, thread: Some(thread) })
    }

    fn kick(&self) {
        let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.watch = None;
        self.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Supervisor {
    /// Answers for nodes that are new. Without, a node seals nothing.
    pub(super) fn answer_seals(&mut self) {
        for i in 0..self.nodes.len() as u32 {
            let n = node(i);
            let fd = n.fds[2].load(Ordering::Relaxed) as i32 - 1;
            let Some(process) = &self.nodes[i as usize] else { continue };
            if fd < 0 || n.seals_answered.load(Ordering::Relaxed) != 0 {
                continue;
            }
            let watched = RemotePager::of_process(process.pidfd.as_fd(), fd)
                .map_err(std::io::Error::from)
                .and_then(|pager| self.seals.watch((i, pager)));
            if watched.is_ok() {
                // Release: the node seals only after this.
                n.seals_answered.store(1, Ordering::Release);
            }
        }
    }
}

fn answer_all(kick: &OwnedFd, incoming: &Receiver<Watched>) {
    // SAFETY: the World's memory is mapped for as long as the supervisor lives.
    let units = Units::of(unsafe { template() });
    let mut watched: Vec<Watched> = Vec::new();
    loop {
        let mut fds = vec![PollFd::new(kick, PollFlags::IN)];
        fds.extend(watched.iter().map(|(_, fd)| PollFd::new(fd, PollFlags::IN)));
        if poll(&mut fds, None).is_err() {
            continue;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut i = 0;
        watched.retain(|(index, pager)| {
            i += 1;
            !ready[i] || answer(units, *index, pager)
        });
        if ready[0] {
            let _ = rustix::io::read(kick, &mut [0u8; 8]);
            loop {
                match incoming.try_recv() {
                    Ok((index, pager)) => {
                        watched.retain(|(old, _)| *old != index);
                        watched.push((index, pager));
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
        }
    }
}

/// Answers what node `index` waits for; `false` if it is gone.
fn answer(units: Units, index: u32, pager: &RemotePager) -> bool {
    let shared = node(index);
    let mut there = true;
    // Before the read: a message is there only while its writer waits, which looks at this when it does not (`Seals::review`).
    shared.seals_answering.store(1, Ordering::SeqCst);
    let read = pager.read(|fault| {
        shared.seal_faults.fetch_add(1, Ordering::Relaxed);
        there &= seal::answer(units, &shared.window_open, pager.by_ref(), fault.address.as_usize());
    });
    // Release: pairs with the acquire in `Seals::review`; what was to be lifted has been.
    shared.seals_answering.store(0, Ordering::Release);
    match read {
        Ok(_) => there,
        Err(e) => e == Errno::EAGAIN || e == Errno::EINTR,
    }
}
