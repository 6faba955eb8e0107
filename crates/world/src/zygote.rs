//! The zygote: a single-threaded copy of the program, made before anything ran, from which nodes are forked.
//!
//! Nodes share its descriptor table (`CLONE_FILES`): a file that a thread opened on one node is open on all, and stays so when
//! that node is killed. They are children of the supervisor (`CLONE_PARENT`), which learns of their death by itself.

use crate::control;
use crate::node;
use crate::supervisor::strays;
use peregrine_base::sync::Ordering;
use peregrine_sys::descriptors::{PROGRAMS_BELOW, out_of_the_way};
use peregrine_sys::elsewhere::{Table, close_elsewhere};
use peregrine_sys::other::{self, Condition, Pidfd};
use peregrine_sys::process::{self, ForkFlags, Forked};
use peregrine_sys::raw::Errno;
use peregrine_sys::rustix;
use peregrine_sys::signal::{self, number};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

const FORK: u32 = 1;
const CLOSE: u32 = 2;
const CLOSE_THESE: u32 = 3;
const HOLD: u32 = 4;
/// Numbers that one message carries at most.
const MOST_NUMBERS: usize = 128;
/// An answer takes a millisecond; after this long it is looked at what the zygote does.
const LOOK_AFTER: Duration = Duration::from_secs(1);
/// One that is stopped, in spite of SIGCONT, or held by a debugger, is given up after this long; one that is slow never.
const HELD_FOR: Duration = Duration::from_secs(10);

/// The supervisor's handle on the zygote.
#[derive(Debug)]
pub struct Zygote {
    socket: OwnedFd,
    /// Readable when its process has ended. Its end of the socket does not hang up then: the nodes share its descriptors.
    process: OwnedFd,
    /// Its process id.
    pub pid: i32,
}

/// Why a node was not made.
#[derive(Debug, thiserror::Error)]
pub enum ZygoteError {
    /// The zygote could not be forked.
    #[error("cannot fork: {0}; is the limit on processes reached (ulimit -u)?")]
    Fork(Errno),
    /// The zygote does not answer.
    #[error("the zygote process is gone ({0}): nodes can't be replaced any more")]
    Gone(std::io::Error),
    /// Somebody keeps the zygote from running.
    #[error(
        "the zygote (process {pid}), which makes nodes, has been held by a debugger, or stopped again and again, for {seconds} s, so none can be replaced: keep it running the next time (kill -CONT); with a store, resume"
    )]
    Held {
        /// Its process id.
        pid: i32,
        /// For how long it was waited for.
        seconds: u64,
    },
}

impl Zygote {
    /// Forks the zygote.
    ///
    /// # Safety
    /// The process is single-threaded, and the World's memory is mapped and initialised.
    pub unsafe fn fork() -> Result<Self, ZygoteError> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|e| ZygoteError::Fork(Errno(e.raw_os_error())))?;
        // SAFETY: single-threaded, as promised.
        match unsafe { process::fork_with(ForkFlags::default()) }.map_err(ZygoteError::Fork)? {
            Forked::Parent(pid) => {
                let process = Pidfd::open(pid as u32).map_err(ZygoteError::Fork)?.into();
                Ok(Self { socket: ours, process, pid })
            }
            Forked::Child => {
                let fd = out_of_the_way(theirs).into_raw_fd();
                drop(ours);
                serve(fd)
            }
        }
    }

    fn ask(&self, op: u32, args: &[u32]) -> Result<i32, ZygoteError> {
        use rustix::net::{RecvFlags, SendFlags, recv, send};
        let gone = |e: rustix::io::Errno| ZygoteError::Gone(e.into());
        let bytes: Vec<u8> = [op].iter().chain(args).flat_map(|w| w.to_ne_bytes()).collect();
        send(&self.socket, &bytes, SendFlags::NOSIGNAL).map_err(gone)?;
        let mut answer = [0u8; 4];
        let begun = Instant::now();
        let wait = rustix::time::Timespec { tv_sec: LOOK_AFTER.as_secs() as i64, tv_nsec: 0 };
        loop {
            let mut fds =
                [PollFd::new(&self.socket, PollFlags::IN), PollFd::new(&self.process, PollFlags::IN)];
            match poll(&mut fds, Some(&wait)) {
                Err(rustix::io::Errno::INTR) => continue,
                Ok(0) => {
                    self.see_what_holds_it(begun.elapsed())?;
                    continue;
                }
                other => other.map_err(gone)?,
            };
            let is_dead = !fds[1].revents().is_empty();
            match recv(&self.socket, &mut answer[..], RecvFlags::DONTWAIT) {
                Ok((4, _)) => return Ok(i32::from_ne_bytes(answer)),
                Ok(_) => return Err(ZygoteError::Gone(std::io::ErrorKind::UnexpectedEof.into())),
                // What it answered before it died was there when its death was.
                Err(rustix::io::Errno::AGAIN) if is_dead => {
                    return Err(ZygoteError::Gone(std::io::ErrorKind::BrokenPipe.into()));
                }
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(e) => return Err(gone(e)),
            }
        }
    }

    /// Lets it go on if it was stopped; an error if that does not help.
    fn see_what_holds_it(&self, waited: Duration) -> Result<(), ZygoteError> {
        let pid = self.pid;
        if other::stat(pid as u32).is_none_or(|s| s.condition != Condition::Stopped) {
            return Ok(());
        }
        if waited >= HELD_FOR {
            return Err(ZygoteError::Held { pid, seconds: waited.as_secs() });
        }
        eprintln!(
            "peregrine: a node is to be replaced, but the zygote (process {pid}), which makes them, is stopped; it is told to go on"
        );
        let _ = signal::kill(pid, number::CONT);
        Ok(())
    }

    /// Forks node `index`; its process id.
    pub fn fork_node(&self, index: u32) -> Result<i32, ZygoteError> {
        match self.ask(FORK, &[index])? {
            pid if pid > 0 => Ok(pid),
            e => Err(ZygoteError::Fork(Errno(-e))),
        }
    }

    /// Closes the descriptors that node `index`, which is dead, left in the shared table. Some may be slow to close: what is in the queue of
    /// a connection to a domain is the domain's choice. So nobody waits for that.
    pub fn close_those_of(&self, index: u32) -> Result<(), ZygoteError> {
        self.ask(CLOSE, &[index]).map(drop)
    }

    /// Closes `numbers`. As above, nobody waits for the slow ones.
    pub fn close_these(&self, numbers: &[RawFd]) -> Result<(), ZygoteError> {
        self.ask_of_numbers(CLOSE_THESE, numbers)
    }

    /// Gives `numbers` to a file that can't be read, written or waited for: who uses one is told EBADF, nobody is given it for another file,
    /// and it can be closed. What they stood for is closed.
    pub fn hold(&self, numbers: &[RawFd]) -> Result<(), ZygoteError> {
        self.ask_of_numbers(HOLD, numbers)
    }

    fn ask_of_numbers(&self, op: u32, numbers: &[RawFd]) -> Result<(), ZygoteError> {
        for some in numbers.chunks(MOST_NUMBERS) {
            let args: Vec<u32> = some.iter().map(|&fd| fd as u32).collect();
            self.ask(op, &args)?;
        }
        Ok(())
    }
}

/// In the zygote: see [`Zygote::close_those_of`].
fn close_those_of(index: u32) {
    let n = control::node(index);
    let listed = n.fds.iter().chain(&n.call_fds).map(|fd| fd.swap(0, Ordering::Relaxed));
    let mut listed: Vec<RawFd> = listed.filter(|&fd| fd != 0).map(|fd| fd as RawFd - 1).collect();
    listed.sort_unstable();
    listed.dedup();
    // SAFETY: the table is this process's too, and of those who had listed them nobody lives.
    let fds = listed.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    // Their numbers are free at once: a rollback is about to hold those that it needs. To close a copy of what a node lists (sockets, pipes,
    // memory) takes no time; to close the last may.
    close_all(fds.map(out_of_the_way).collect());
}

fn close_all(fds: Vec<OwnedFd>) {
    if let Err((_, fds)) = close_elsewhere(fds, Table::EndsWithParent) {
        // No process is to be had for it: then this one waits, if need be, for longer than the supervisor may live.
        process::die_with_parent();
        drop(fds);
        process::signal_with_parent(number::CONT);
    }
}

/// In the zygote: see [`Zygote::hold`].
fn hold(numbers: impl Iterator<Item = RawFd>) {
    use rustix::fs::{Mode, OFlags, open};
    // Its number must be none of those.
    let place = open(c"/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map(out_of_the_way);
    let mut before = Vec::new();
    // A file whose server does not answer keeps whoever closes a copy of it, for longer than the supervisor may live.
    process::die_with_parent();
    for fd in numbers {
        // SAFETY: no thread runs, and after the rollback nobody uses the number for what it stands for now.
        let mut number = unsafe { OwnedFd::from_raw_fd(fd) };
        let copy = rustix::io::fcntl_dupfd_cloexec(&number, PROGRAMS_BELOW);
        let is_open = copy.is_ok();
        // What closes slowly is closed by a copy.
        before.extend(copy);
        match &place {
            Ok(place) if rustix::io::dup3(place, &mut number, rustix::io::DupFlags::CLOEXEC).is_ok() => {
                let _ = number.into_raw_fd();
            }
            // No file is to be had for the place: at least it is nobody else's.
            _ if is_open => before.push(number),
            _ => drop(number.into_raw_fd()),
        }
    }
    process::signal_with_parent(number::CONT);
    close_all(before);
}

/// The supervisor's end of the socket is closed: it has ended, or does so now. Its nodes are killed with it, by the kernel; what they had
/// started that is not another program yet is not.
fn end() -> ! {
    const PATIENCE: Duration = Duration::from_secs(1);
    let supervisor = control::world().supervisor.load(Ordering::Relaxed);
    let begun = Instant::now();
    // Its files are closed a moment before its children are told.
    while process::parent_pid() as u32 == supervisor && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_micros(200));
    }
    if process::parent_pid() as u32 != supervisor {
        strays::end_all();
    }
    process::exit_now(0)
}

fn serve(fd: RawFd) -> ! {
    // It is told by the socket, and is to go on then if it was stopped.
    process::signal_with_parent(number::CONT);
    node::shield_from_terminal();
    if let Err(e) = crate::archive::make_read_only() {
        eprintln!("peregrine: the memory of packed threads can't be protected in nodes (mprotect): {e}");
        process::exit_now(1);
    }
    loop {
        // SAFETY: the socket is open for this process's life.
        let socket = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        let mut message = [0u8; 4 + 4 * MOST_NUMBERS];
        let n = match rustix::net::recv(socket, &mut message[..], rustix::net::RecvFlags::empty()) {
            Ok((n, _)) => n,
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => 0,
        };
        let mut words = message[..n].chunks_exact(4).map(|w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]]));
        let Some(op) = words.next() else { end() };
        let answer: i32 = match op {
            FORK => {
                let flags = ForkFlags { share_files: true, sibling: true };
                // SAFETY: the zygote has one thread; the child never returns from `become_node`.
                match unsafe { process::fork_with(flags) } {
                    // SAFETY: a fresh child, as `become_node` asks.
                    Ok(Forked::Child) => unsafe { node::become_node(words.next().unwrap_or(0)) },
                    Ok(Forked::Parent(pid)) => pid,
                    Err(e) => -e.0,
                }
            }
            CLOSE => {
                words.for_each(close_those_of);
                0
            }
            CLOSE_THESE => {
                // SAFETY: no thread runs, and after the rollback nobody knows of them.
                close_all(words.map(|fd| unsafe { OwnedFd::from_raw_fd(fd as RawFd) }).collect());
                0
            }
            _ => {
                hold(words.map(|fd| fd as RawFd));
                0
            }
        };
        let _ = rustix::net::send(socket, &answer.to_ne_bytes(), rustix::net::SendFlags::NOSIGNAL);
    }
}
