//! One connection: its socket, its lines, and whether the domain at the other end lives.

use super::line::Line;
use super::lines::Lines;
use super::questions::{Answer, Inquiry, Mail, PATIENCE};
use super::stopped::Stopped;
use super::warm::Warm;
use super::watch::{self, Watched};
use crate::chain::Deadline;
use crate::credentials::Credentials;
use crate::error::{BUFFER_BYTES, CallError, Refusal};
use crate::line::Words;
use crate::memory::{Buffer, Forget, Gift, read_only};
use crate::portal::PortalId;
use crate::shared::{Shared, sealed_memfd};
use crate::socket::{self, FromClient, FromDomain, MAX_NAME, PROTOCOL, Why};
use crate::strays::Strays;
use crate::usage::Usage;
use peregrine_base::Protection;
use peregrine_base::sync::{AtomicBool, AtomicUsize, Ordering};
use peregrine_sys::raw::Errno;
use peregrine_sys::rustix;
use peregrine_sys::rustix::event::epoll::EventFlags;
use peregrine_sys::rustix::event::{PollFd, PollFlags, poll};
use peregrine_sys::rustix::time::Timespec;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

pub(crate) struct Connection {
    pub id: u64,
    pub name: String,
    pub domain: Credentials,
    pub argument_bytes: u64,
    /// The domain's process, if it is known.
    pub(super) pid: Option<u32>,
    pub(super) stopped: Stopped,
    pub(super) socket: OwnedFd,
    /// The process that made it.
    of: i32,
    /// What becomes of descriptors that should not have come.
    pub(super) strays: Strays,
    /// Readable when the domain's process has ended; a socket that a child of it inherited would not hang up.
    process: Option<OwnedFd>,
    pub(super) mail: Mutex<Mail>,
    pub(super) lines: Mutex<Lines>,
    pub(super) freed: Condvar,
    pub(super) waiters: AtomicUsize,
    pub(super) most_lines: usize,
    pub(super) dead: AtomicBool,
    /// The line that was used last, if nobody uses it.
    pub(super) warm: Warm<Line>,
    /// Whether anybody has ever had to wait for a line.
    pub(super) contended: AtomicBool,
    /// The memory of all lines, for who wakes their callers when the domain dies.
    pub(super) mapped: Mutex<Vec<Arc<Shared>>>,
    /// Whether somebody watches for the domain's death: see `watch.rs`.
    pub watched: Watched,
}

/// Lines that are opened at most, whatever the domain allows: each call that a domain leaves unanswered keeps one.
const MOST_LINES: usize = 4096;

impl Connection {
    /// A domain that has made us welcome, with its number and name, and what it allows.
    pub fn new(
        socket: OwnedFd,
        (process, pid): (Option<OwnedFd>, Option<u32>),
        domain: Credentials,
        (id, name): (u64, String),
        calls_in_flight: u32,
        argument_bytes: u64,
        strays: Strays,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            name,
            domain,
            argument_bytes,
            pid,
            stopped: Stopped::with_patience(PATIENCE),
            process,
            socket,
            of: peregrine_sys::process::pid(),
            strays,
            mail: Mutex::default(),
            lines: Mutex::default(),
            freed: Condvar::new(),
            waiters: AtomicUsize::new(0),
            most_lines: (calls_in_flight as usize).min(MOST_LINES),
            dead: AtomicBool::new(false),
            warm: Warm::new(),
            contended: AtomicBool::new(false),
            mapped: Mutex::default(),
            watched: Watched::default(),
        })
    }

    /// Whether the domain's end is still open. Once it is not, it never is again.
    pub fn is_alive(&self) -> bool {
        if self.dead.load(Ordering::Relaxed) {
            return false;
        }
        let mut fds = self.signs_of_death();
        let hung_up = loop {
            match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => break true,
                Ok(_) => break fds.iter().any(|fd| !fd.revents().is_empty()),
            }
        };
        if hung_up {
            self.give_up();
        }
        !hung_up
    }

    /// What to poll for the end of the domain; each is ready only then.
    pub fn signs_of_death(&self) -> [PollFd<'_>; 2] {
        let socket = PollFd::new(&self.socket, PollFlags::RDHUP);
        let process = self.process.as_ref().map(|process| PollFd::new(process, PollFlags::IN));
        [socket, process.unwrap_or_else(|| PollFd::new(&self.socket, PollFlags::RDHUP))]
    }

    /// Does something with each descriptor that tells of the domain's end, and the events by which it does.
    pub fn watch_by(
        &self,
        mut each: impl FnMut(BorrowedFd<'_>, EventFlags) -> rustix::io::Result<()>,
    ) -> rustix::io::Result<()> {
        each(self.socket.as_fd(), EventFlags::RDHUP)?;
        self.process.as_ref().map_or(Ok(()), |process| each(process.as_fd(), EventFlags::IN))
    }

    /// Socket, pipes of lines that no call is under way on, and what has come that its asker has yet to fetch.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let warm = self.warm.take();
        let mut all = vec![self.socket.as_raw_fd()];
        all.extend(self.process.iter().map(AsRawFd::as_raw_fd));
        all.extend(warm.iter().filter_map(|line| line.pipe.as_ref()).map(AsRawFd::as_raw_fd));
        if let Some(line) = warm {
            self.put_back_over(line);
        }
        let lines = self.lock_lines();
        let pipes = lines.free.iter().chain(&lines.abandoned).filter_map(|line| line.pipe.as_ref());
        all.extend(pipes.map(AsRawFd::as_raw_fd));
        drop(lines);
        all.extend(self.mail().descriptors());
        all
    }

    pub(super) fn give_up(&self) {
        self.dead.store(true, Ordering::Relaxed);
        self.freed.notify_all();
    }

    /// The domain died: whoever sleeps for a reply or a line is woken, and finds that out.
    pub fn wake_all(&self) {
        self.give_up();
        for shared in self.mapped.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = peregrine_sys::futex::wake(Words(shared).gate().reply, u32::MAX);
        }
    }

    pub fn resolve(&self, name: &str, ours: u64) -> Result<PortalId, CallError> {
        portal_of(self.question(asks_for(name)?, Some(Deadline::after(PATIENCE))), self.id, name, ours)
    }

    /// Refuses a portal that was found elsewhere: here its number is another's.
    #[inline]
    pub fn has(&self, portal: PortalId) -> Result<(), CallError> {
        if portal.is_of(self.id) { Ok(()) } else { Err(Refusal::OtherDomain.into()) }
    }

    pub fn usage(&self) -> Result<Usage, CallError> {
        match self.question(Inquiry::new(FromClient::Usage, None), Some(Deadline::after(PATIENCE)))? {
            (FromDomain::Usage { cpu_ns, calls }, _) => Ok(Usage { cpu_ns, calls }),
            _ => Err(ANOTHER_ANSWER),
        }
    }

    /// New memory of this client and this domain alone; with `results`, the domain writes results into it.
    pub fn register_buffer(
        &self,
        len_bytes: usize,
        results: bool,
        deadline: Option<Deadline>,
    ) -> Result<(Shared, u32), CallError> {
        let (shared, inquiry) = offers_buffer(len_bytes, results)?;
        Ok((shared, buffer_of(&self.question(inquiry, deadline)?)?))
    }

    /// Memory to lend.
    pub fn buffer(self: &Arc<Self>, len_bytes: usize) -> Result<Buffer, CallError> {
        let (shared, id) = self.register_buffer(len_bytes, false, Some(Deadline::after(PATIENCE)))?;
        Ok(Buffer { shared, id, len_bytes, home: self.clone() })
    }
}

/// The question where a portal is.
pub(super) fn asks_for(name: &str) -> Result<Inquiry, CallError> {
    if name.len() > MAX_NAME {
        return Err(Refusal::NoPortal(name.into()).into());
    }
    Ok(Inquiry::new(FromClient::Resolve { name: name.into() }, None))
}

/// What the domain said of the portal that it was asked for.
pub(super) fn portal_of(
    answer: Result<Answer, CallError>,
    domain: u64,
    name: &str,
    ours: u64,
) -> Result<PortalId, CallError> {
    match answer {
        Ok((FromDomain::Portal { id, version }, _)) if version == ours => Ok(PortalId::new(id, domain)),
        Ok((FromDomain::Portal { version: theirs, .. }, _)) => {
            Err(CallError::Version { portal: name.into(), ours, theirs })
        }
        Ok(_) => Err(ANOTHER_ANSWER),
        Err(CallError::Refused(Refusal::NoPortal(_))) => Err(Refusal::NoPortal(name.into()).into()),
        Err(CallError::Refused(Refusal::Access(id))) => {
            Err(Refusal::Access(PortalId::new(id.0, domain)).into())
        }
        Err(e) => Err(e),
    }
}

/// New memory, and what offers it to the domain.
pub(super) fn offers_buffer(len_bytes: usize, results: bool) -> Result<(Shared, Inquiry), CallError> {
    let system = |what: &'static str| move |errno: Errno| CallError::System { what, errno };
    let fd = sealed_memfd(c"peregrine-buffer", len_bytes).map_err(system("memfd"))?;
    let shared = Shared::map(&fd, len_bytes, Protection::ReadWrite).map_err(system("mmap"))?;
    let for_reading = if results { None } else { read_only(&fd) };
    let what = FromClient::AddBuffer { len_bytes: len_bytes as u64, results };
    Ok((shared, Inquiry::new(what, Some(for_reading.unwrap_or(fd)))))
}

/// What hands a gift over, which is unmapped here first; and its length in bytes.
pub(super) fn hands_over(gift: Gift) -> (Inquiry, usize) {
    let (fd, len) = gift.let_go();
    (Inquiry::new(FromClient::AddGift { len_bytes: len as u64 }, Some(fd)), len)
}

/// The domain's number of what was offered.
pub(super) fn buffer_of(answer: &Answer) -> Result<u32, CallError> {
    match answer.0 {
        FromDomain::Buffer { id } => Ok(id),
        _ => Err(ANOTHER_ANSWER),
    }
}

pub(super) const ANOTHER_ANSWER: CallError = CallError::BadReply("another answer than was asked for");

impl Drop for Connection {
    fn drop(&mut self) {
        watch::forget(self);
        // Not in a forked child, whose parent goes on with the connection.
        if self.of == peregrine_sys::process::pid() {
            socket::hang_up(&self.socket, self.strays);
        }
    }
}

impl Forget for Connection {
    fn forget(&self, buffer: u32) {
        if !self.dead.load(Ordering::Relaxed) {
            self.owe(buffer);
        }
    }

    fn is(&self, connection: u64) -> bool {
        std::ptr::from_ref(self).addr() as u64 == connection
    }
}

pub(super) fn refusal(why: Why) -> CallError {
    match why {
        Why::NotAdmitted => Refusal::NotAdmitted.into(),
        Why::Clients { limit } => Refusal::Clients { limit: limit as usize }.into(),
        Why::Protocol { theirs } => {
            Refusal::Protocol(format!("this library speaks version {PROTOCOL}, the domain {theirs}")).into()
        }
        Why::NoPortal => Refusal::NoPortal(String::new()).into(),
        Why::Access { id } => Refusal::Access(PortalId::new(id, 0)).into(),
        Why::Lines { limit } => {
            CallError::TooLarge { what: "calls in flight", asked_bytes: limit + 1, limit_bytes: limit }
        }
        Why::Buffers { asked, limit } => {
            CallError::TooLarge { what: "buffers", asked_bytes: asked, limit_bytes: limit }
        }
        Why::BufferBytes { asked, limit } => {
            CallError::TooLarge { what: BUFFER_BYTES, asked_bytes: asked, limit_bytes: limit }
        }
        Why::BadMemory => {
            Refusal::Protocol("the domain does not trust the memory that it was given".into()).into()
        }
        Why::Short { errno } => {
            CallError::System { what: "the domain lacks memory or descriptors", errno: Errno(errno) }
        }
        Why::Unexpected => Refusal::Protocol("the domain did not expect the question".into()).into(),
    }
}
