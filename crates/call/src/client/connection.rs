//! One connection: its socket, its lines, and whether the domain at the other end lives.
//!
//! Questions go over the socket one at a time, under a lock; the answer to a question is the next message that is not `Results`.

use super::line::Line;
use super::lines::Lines;
use super::watch::{self, Watched};
use crate::chain::Deadline;
use crate::credentials::Credentials;
use crate::error::{CallError, Refusal, system};
use crate::line::Words;
use crate::memory::{Buffer, Forget, Gift, read_only};
use crate::portal::PortalId;
use crate::shared::{Shared, sealed_memfd};
use crate::socket::{self, FromClient, FromDomain, MAX_NAME, PROTOCOL, RecvError, Why};
use crate::step::reach;
use crate::usage::Usage;
use peregrine_base::Protection;
use peregrine_base::sync::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use peregrine_sys::raw::Errno;
use peregrine_sys::rustix;
use peregrine_sys::rustix::event::epoll::EventFlags;
use peregrine_sys::rustix::event::{PollFd, PollFlags, poll};
use peregrine_sys::rustix::net::RecvFlags;
use peregrine_sys::rustix::time::Timespec;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub(crate) struct Connection {
    pub id: u64,
    pub name: String,
    pub domain: Credentials,
    pub argument_bytes: u64,
    socket: OwnedFd,
    /// Readable when the domain's process has ended; a socket that a child of it inherited would not hang up.
    process: Option<OwnedFd>,
    /// Held from a question to its answer.
    asking: Mutex<Mail>,
    pub(super) lines: Mutex<Lines>,
    pub(super) freed: Condvar,
    pub(super) waiters: AtomicUsize,
    pub(super) most_lines: usize,
    pub(super) dead: AtomicBool,
    /// The line that was used last, if nobody uses it: taken and put back without a lock.
    pub(super) warm: AtomicPtr<Line>,
    /// The memory of all lines, for who wakes their callers when the domain dies.
    pub(super) mapped: Mutex<Vec<Arc<Shared>>>,
    /// Whether somebody watches for the domain's death: see `watch.rs`.
    pub watched: Watched,
}

/// Results that came while an answer was awaited, or for another line: by line and call.
#[derive(Default)]
struct Mail {
    results: Vec<(u32, u32, u64, OwnedFd)>,
}

impl Connection {
    /// Says hello on a fresh connection.
    ///
    /// `listened`: the peer was found by a path, so the kernel knows its process. Of a pair it knows only who made it.
    pub fn greet(socket: OwnedFd, at: &Path, listened: bool) -> Result<Arc<Self>, CallError> {
        let unreachable = |reason: String| CallError::Unreachable { at: at.to_owned(), reason };
        let domain = Credentials::of_peer(&socket).map_err(|e| unreachable(e.to_string()))?;
        // An error here is told by the answer, if the domain had time to say why it hung up.
        let _ = socket::send(&socket, &FromClient::Hello { protocol: PROTOCOL }, None);
        reach("client: said hello");
        match socket::receive::<FromDomain>(&socket, RecvFlags::empty()) {
            Ok((FromDomain::Welcome { id, name, calls_in_flight, argument_bytes }, _)) => {
                Ok(Arc::new(Self {
                    id,
                    name,
                    domain,
                    argument_bytes,
                    process: if listened { peregrine_sys::peer::process_of(&socket).ok() } else { None },
                    socket,
                    asking: Mutex::default(),
                    lines: Mutex::default(),
                    freed: Condvar::new(),
                    waiters: AtomicUsize::new(0),
                    most_lines: calls_in_flight as usize,
                    dead: AtomicBool::new(false),
                    warm: AtomicPtr::new(std::ptr::null_mut()),
                    mapped: Mutex::default(),
                    watched: Watched::default(),
                }))
            }
            Ok((FromDomain::Refused(why), _)) => Err(refusal(why)),
            Ok(_) | Err(RecvError::Garbage) => {
                Err(Refusal::Protocol("the first answer is not a welcome".into()).into())
            }
            Err(RecvError::Closed | RecvError::Nothing) => Err(unreachable("it hung up".into())),
            Err(RecvError::Kernel(e)) => Err(unreachable(e.to_string())),
        }
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

    /// Socket, and pipes of free lines.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let mut lines = self.lock_lines();
        lines.free.extend(self.take_warm());
        let pipes = lines.free.iter().chain(&lines.abandoned).filter_map(|line| line.pipe.as_ref());
        let process = self.process.iter().map(AsRawFd::as_raw_fd);
        [self.socket.as_raw_fd()].into_iter().chain(process).chain(pipes.map(AsRawFd::as_raw_fd)).collect()
    }

    fn give_up(&self) {
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

    fn ask(&self) -> MutexGuard<'_, Mail> {
        self.asking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks and waits for the answer, at most until `deadline`.
    pub(super) fn question(
        &self,
        question: &FromClient,
        fd: Option<BorrowedFd<'_>>,
        deadline: Option<Deadline>,
    ) -> Result<(FromDomain, Option<OwnedFd>), CallError> {
        let mut mail = self.ask();
        self.tell(question, fd)?;
        reach("client: asked");
        loop {
            match self.receive(deadline)? {
                (FromDomain::Results { line, call, len_bytes }, Some(fd)) => {
                    mail.results.push((line, call, len_bytes, fd));
                }
                (FromDomain::Refused(why), _) => return Err(refusal(why)),
                answer => return Ok(answer),
            }
        }
    }

    /// Sends what needs no answer.
    pub fn tell(&self, message: &FromClient, fd: Option<BorrowedFd<'_>>) -> Result<(), CallError> {
        loop {
            match socket::send(&self.socket, message, fd) {
                Ok(()) => return Ok(()),
                // The domain does not read: wait a moment for it, as long as it lives.
                Err(rustix::io::Errno::AGAIN) if self.is_alive() => {
                    std::thread::sleep(Duration::from_micros(200))
                }
                Err(rustix::io::Errno::MSGSIZE) => {
                    return Err(Refusal::Protocol("message too long".into()).into());
                }
                Err(_) => {
                    self.give_up();
                    return Err(CallError::DomainDied);
                }
            }
        }
    }

    fn receive(&self, deadline: Option<Deadline>) -> Result<(FromDomain, Option<OwnedFd>), CallError> {
        loop {
            match socket::receive(&self.socket, RecvFlags::DONTWAIT) {
                Ok(message) => return Ok(message),
                Err(RecvError::Nothing) => {}
                Err(RecvError::Closed | RecvError::Kernel(_)) => {
                    self.give_up();
                    return Err(CallError::DomainDied);
                }
                Err(RecvError::Garbage) => {
                    // Nothing that follows can be understood either.
                    self.give_up();
                    return Err(CallError::BadReply("a message of no known kind"));
                }
            }
            let left = match deadline {
                Some(deadline) => deadline.left().ok_or_else(|| {
                    // The answer may still come and would be taken for that to the next question.
                    self.give_up();
                    CallError::Deadline
                })?,
                None => Duration::from_secs(3600),
            };
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let [_, process] = self.signs_of_death();
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN | PollFlags::RDHUP), process];
            match poll(&mut fds, Some(&timeout)) {
                // Dead, with nothing to read a moment ago: what it had sent before it died is there now.
                Ok(_) if fds[0].revents().is_empty() && !fds[1].revents().is_empty() => {
                    return socket::receive(&self.socket, RecvFlags::DONTWAIT).map_err(|_| {
                        self.give_up();
                        CallError::DomainDied
                    });
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(system("poll")(e)),
            }
        }
    }

    pub fn resolve(&self, name: &str, ours: u64) -> Result<PortalId, CallError> {
        if name.len() > MAX_NAME {
            return Err(Refusal::NoPortal(name.into()).into());
        }
        match self.question(&FromClient::Resolve { name: name.into() }, None, None) {
            Ok((FromDomain::Portal { id, version }, _)) if version == ours => Ok(PortalId(id)),
            Ok((FromDomain::Portal { version: theirs, .. }, _)) => {
                Err(CallError::Version { portal: name.into(), ours, theirs })
            }
            Ok(_) => Err(CallError::BadReply("another answer than was asked for")),
            Err(CallError::Refused(Refusal::NoPortal(_))) => Err(Refusal::NoPortal(name.into()).into()),
            Err(e) => Err(e),
        }
    }

    pub fn usage(&self) -> Result<Usage, CallError> {
        match self.question(&FromClient::Usage, None, None)? {
            (FromDomain::Usage { cpu_ns, calls }, _) => Ok(Usage { cpu_ns, calls }),
            _ => Err(CallError::BadReply("another answer than was asked for")),
        }
    }

    /// New memory of this client and this domain alone; with `results`, the domain writes results into it.
    pub fn register_buffer(&self, len_bytes: usize, results: bool) -> Result<(Shared, u32), CallError> {
        let system = |what: &'static str| move |errno: Errno| CallError::System { what, errno };
        let fd = sealed_memfd(c"peregrine-buffer", len_bytes).map_err(system("memfd"))?;
        let shared = Shared::map(&fd, len_bytes, Protection::ReadWrite).map_err(system("mmap"))?;
        let for_reading = if results { None } else { read_only(&fd) };
        let sent = for_reading.as_ref().unwrap_or(&fd).as_fd();
        let question = FromClient::AddBuffer { len_bytes: len_bytes as u64, results };
        match self.question(&question, Some(sent), None)? {
            (FromDomain::Buffer { id }, _) => Ok((shared, id)),
            _ => Err(CallError::BadReply("another answer than was asked for")),
        }
    }

    /// Memory to lend.
    pub fn buffer(self: &Arc<Self>, len_bytes: usize) -> Result<Buffer, CallError> {
        let (shared, id) = self.register_buffer(len_bytes, false)?;
        Ok(Buffer { shared, id, len_bytes, home: self.clone() })
    }

    /// Hands a gift over; it is unmapped here first.
    pub fn register_gift(&self, gift: Gift, deadline: Option<Deadline>) -> Result<(u32, usize), CallError> {
        let (fd, len) = gift.let_go();
        let question = FromClient::AddGift { len_bytes: len as u64 };
        match self.question(&question, Some(fd.as_fd()), deadline)? {
            (FromDomain::Buffer { id }, _) => Ok((id, len)),
            _ => Err(CallError::BadReply("another answer than was asked for")),
        }
    }

    /// The memfd with the results of a call on a line, which the domain sent before it replied.
    pub fn results_of(&self, line: u32, call: u32) -> Result<(u64, OwnedFd), CallError> {
        let mut mail = self.ask();
        loop {
            let found = mail.results.iter().position(|r| (r.0, r.1) == (line, call));
            if let Some(at) = found {
                let (_, _, len, fd) = mail.results.swap_remove(at);
                // Leftovers of calls that were given up.
                mail.results.retain(|r| r.0 != line);
                return Ok((len, fd));
            }
            match socket::receive(&self.socket, RecvFlags::DONTWAIT) {
                Ok((FromDomain::Results { line, call, len_bytes }, Some(fd))) => {
                    mail.results.push((line, call, len_bytes, fd));
                }
                _ => return Err(CallError::BadReply("results that never came")),
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        drop(self.take_warm());
        watch::forget(self);
    }
}

impl Forget for Connection {
    fn forget(&self, buffer: u32) {
        if !self.dead.load(Ordering::Relaxed) {
            let _ = self.tell(&FromClient::Forget { buffer }, None);
        }
    }

    fn is(&self, connection: u64) -> bool {
        std::ptr::from_ref(self).addr() as u64 == connection
    }
}

fn refusal(why: Why) -> CallError {
    match why {
        Why::NotAdmitted => Refusal::NotAdmitted.into(),
        Why::Clients { limit } => Refusal::Clients { limit: limit as usize }.into(),
        Why::Protocol { theirs } => {
            Refusal::Protocol(format!("this library speaks version {PROTOCOL}, the domain {theirs}")).into()
        }
        Why::NoPortal => Refusal::NoPortal(String::new()).into(),
        Why::Access { id } => Refusal::Access(PortalId(id)).into(),
        Why::Lines { limit } => {
            CallError::TooLarge { what: "calls in flight", asked_bytes: limit + 1, limit_bytes: limit }
        }
        Why::Buffers { asked, limit } => {
            CallError::TooLarge { what: "buffers", asked_bytes: asked, limit_bytes: limit }
        }
        Why::BadMemory => {
            Refusal::Protocol("the domain does not trust the memory that it was given".into()).into()
        }
        Why::Short { errno } => CallError::System { what: "in the domain", errno: Errno(errno) },
        Why::Unexpected => Refusal::Protocol("the domain did not expect the question".into()).into(),
    }
}
