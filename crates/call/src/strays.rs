//! Strays: descriptors that a stranger sent and that are not what this protocol sends.
//!
//! To close a descriptor may block for as long as whoever made it likes: a socket that lingers, a file whose server does not answer. What
//! may come is memory and the ends of pipes, which close at once; the kernel tells them from everything else by a look at the open file
//! alone (a file's own server is not asked, as it would be by `fstat`). Everything else costs its sender the connection, and is closed by
//! a thread that does nothing else, or a process, so that whoever is made to wait is not the one who received it.
//!
//! **What is in the queue of a socket is closed by whoever closes the socket.** So it is emptied first: [`empty`].

use peregrine_sys::elsewhere::{Table, close_elsewhere};
use peregrine_sys::rustix;
use peregrine_sys::rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The most descriptors that one message brings (`SCM_MAX_FD`): with less room the kernel would close the rest, in the receiver's time.
pub(crate) const MOST_IN_A_MESSAGE: usize = 253;

/// Strays that may wait for their closing before a domain admits nobody new.
pub(crate) const MOST: usize = 256;

/// More messages than a socket's queue holds.
const MOST_MESSAGES: usize = 100_000;

/// Who closes strays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Strays {
    /// A thread.
    Thread,
    /// A process made for it: where there must be no other thread, and statics are somebody else's.
    Process(Table),
}

impl Strays {
    /// Gets rid of descriptors that are of no use, without waiting for anything.
    pub fn take(self, fds: Vec<OwnedFd>) {
        let slow: Vec<OwnedFd> = fds.into_iter().filter(|fd| !closes_at_once(fd)).collect();
        match self {
            Self::Thread => slow.into_iter().for_each(close_by_thread),
            Self::Process(table) => {
                if let Err((_, fds)) = close_elsewhere(slow, table) {
                    // Neither memory nor processes to be had. Open for ever is better than a wait for ever.
                    fds.into_iter().for_each(std::mem::forget);
                }
            }
        }
    }
}

/// Whether it is memory or a pipe.
pub(crate) fn closes_at_once(fd: impl AsFd) -> bool {
    is_memory(&fd) || is_pipe(&fd)
}

/// Whether it is a memfd, or a file that is kept in memory only.
pub(crate) fn is_memory(fd: impl AsFd) -> bool {
    rustix::fs::fcntl_get_seals(fd).is_ok()
}

/// Whether it is an end of a pipe.
pub(crate) fn is_pipe(fd: impl AsFd) -> bool {
    rustix::pipe::fcntl_getpipe_size(fd).is_ok()
}

/// Receives and drops what is in the queue of `socket`, which is shut down for receiving.
pub(crate) fn empty(socket: impl AsFd, strays: Strays) {
    // With it a message of no bytes is told from the end: it has a sender.
    if rustix::net::sockopt::set_socket_passcred(&socket, true).is_err() {
        return;
    }
    for _ in 0..MOST_MESSAGES {
        let mut byte = [0];
        let mut parts = [IoSliceMut::new(&mut byte)];
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_IN_A_MESSAGE), ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(&socket, &mut parts, &mut control, flags) {
            Ok(_) | Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNRESET) => {}
            Err(_) => return,
        }
        let mut any = false;
        for message in control.drain() {
            any = true;
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                strays.take(fds.collect());
            }
        }
        if !any {
            return;
        }
    }
}

/// How many wait for their closing, with the one that is being closed.
pub(crate) fn waiting() -> usize {
    closer().waiting
}

#[derive(Default)]
struct Closer {
    queue: Vec<OwnedFd>,
    waiting: usize,
    /// The process whose thread closes; 0 for none.
    running: i32,
}

static CLOSER: Mutex<Closer> = Mutex::new(Closer { queue: Vec::new(), waiting: 0, running: 0 });

fn closer() -> MutexGuard<'static, Closer> {
    CLOSER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the thread close it; it stays open if there is no thread to be had.
fn close_by_thread(fd: OwnedFd) {
    let me = peregrine_sys::process::pid();
    let mut closer = closer();
    if closer.running != me {
        let thread = std::thread::Builder::new().name("peregrine-strays".into()).stack_size(64 * 1024);
        if thread.spawn(run).is_err() {
            std::mem::forget(fd);
            return;
        }
        closer.running = me;
    }
    closer.queue.push(fd);
    closer.waiting += 1;
}

fn run() {
    loop {
        let mut locked = closer();
        let Some(fd) = locked.queue.pop() else {
            locked.running = 0;
            return;
        };
        drop(locked);
        drop(fd);
        closer().waiting -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn what_would_block_is_closed_by_somebody_else() {
        let begun = Instant::now();
        let (stray, reader) = testkit::lingering();
        Strays::Thread.take(vec![stray]);
        let (a, b) = crate::socket_pair().unwrap();
        let (stray, another_reader) = testkit::lingering();
        for bytes in [&b""[..], b"x", b""] {
            let fds = [stray.as_fd(), stray.as_fd(), stray.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
            let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
            control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds));
            let parts = [std::io::IoSlice::new(bytes)];
            rustix::net::sendmsg(&a, &parts, &mut control, rustix::net::SendFlags::empty()).unwrap();
            // Nothing but an empty message.
            rustix::net::send(&a, b"", rustix::net::SendFlags::empty()).unwrap();
        }
        drop(stray);
        rustix::net::shutdown(&b, rustix::net::Shutdown::Both).unwrap();
        empty(&b, Strays::Thread);
        let mut left = [0];
        assert_eq!(
            rustix::net::recv(&b, &mut left, RecvFlags::DONTWAIT).map(|r| r.0),
            Ok(0),
            "all of it was received"
        );
        drop((a, b));
        assert!(waiting() > 0, "one is being closed still");
        assert!(begun.elapsed() < Duration::from_secs(50), "and we did not wait for it");
        // Read, or reset: then the closing ends.
        drop((reader, another_reader));
        while waiting() > 0 {
            assert!(begun.elapsed() < Duration::from_secs(55), "closed once it can be");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn where_there_must_be_no_thread_a_process_closes() {
        let begun = Instant::now();
        let (a, b) = crate::socket_pair().unwrap();
        let (stray, _reader) = testkit::lingering();
        let memory = crate::shared::sealed_memfd(c"test", 4096).unwrap();
        let fds = [stray.as_fd(), memory.as_fd(), stray.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds));
        let parts = [std::io::IoSlice::new(b"x")];
        rustix::net::sendmsg(&a, &parts, &mut control, rustix::net::SendFlags::empty()).unwrap();
        let (another, _another_reader) = testkit::lingering();
        drop(stray);
        let process = Strays::Process(Table::EndsSometime);
        empty(&b, process);
        process.take(vec![another, memory]);
        assert!(begun.elapsed() < Duration::from_secs(50), "it was waited for: {:?}", begun.elapsed());
    }

    #[test]
    fn memory_and_pipes_are_told_from_everything_else() {
        let memory = crate::shared::sealed_memfd(c"test", 4096).unwrap();
        let (end, other) = rustix::pipe::pipe().unwrap();
        assert!(closes_at_once(&memory) && closes_at_once(&end) && closes_at_once(&other));
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let (socket, _b) = crate::socket_pair().unwrap();
        let file = std::fs::File::open("/proc/self/maps").unwrap();
        assert!(!closes_at_once(&event) && !closes_at_once(&socket) && !closes_at_once(&file));
    }
}
