//! The keeper: the domain's one thread for everything that is not a call.
//!
//! It admits clients, answers their questions, opens lines, takes rings for lines without an activation to the pool, notices
//! clients that are gone, and repeats recalls. It never waits for a client: it reads one message at a time from whichever has
//! one, and a client whose answer can't be sent at once is dropped. So a client that floods gets its turns and no more; and
//! rings without a call behind them, which an honest client causes only by a rare coincidence, are counted against it. Nor does it close
//! what a client may have made slow to close: see `strays.rs`.

use super::Inner;
use super::ended::Ended;
use super::execute::terminate;
use super::peer::{Buffers, Line, Peer};
use super::pool::{BOUND, QUEUED};
use crate::credentials::Credentials;
use crate::line::{MAX_ARGS, PAYLOAD_AT};
use crate::memory::Lendable;
use crate::shared::{Shared, map_from_peer, sealed_memfd};
use crate::socket::{self, FromClient, FromDomain, PROTOCOL, RecvError, Why};
use crate::step::reach;
use crate::strays::{self, Strays};
use peregrine_base::Protection;
use peregrine_base::sync::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use peregrine_sys::raw::Errno;
use peregrine_sys::rustix;
use peregrine_sys::rustix::event::epoll::{self, EventData, EventFlags};
use peregrine_sys::rustix::event::{PollFd, PollFlags, poll};
use peregrine_sys::rustix::net::RecvFlags;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

const LISTENER: u64 = 0;
const BELL: u64 = 1;
const FIRST_CLIENT: u64 = 2;
/// Marks what a process goes by: it has ended.
const ENDED: u64 = 1 << 63;

/// Rings without a call that a client may send, beyond one for each call that it made.
const RINGS_IN_VAIN: u64 = 1000;

/// Where clients come from.
pub(crate) enum Door {
    /// A listening socket, and its path if it is ours to remove.
    Listener(OwnedFd),
    /// One client only, connected already.
    Pair(OwnedFd),
}

pub(crate) struct Keeper {
    domain: Arc<Inner>,
    epoll: OwnedFd,
    door: Option<OwnedFd>,
    peers: HashMap<u64, (Arc<Peer>, Manners)>,
    /// By [`process_key`]: those that have clients here.
    processes: HashMap<u32, Process>,
    next: u64,
}

/// A process with connections to us, which may be many and need one descriptor of it.
struct Process {
    /// Readable when it has ended; a socket of it may live on in another process.
    fd: OwnedFd,
    clients: Vec<u64>,
}

/// How a client behaves.
#[derive(Default)]
struct Manners {
    greeted: bool,
    in_vain: u64,
}

impl Keeper {
    pub fn new(domain: Arc<Inner>, door: Door) -> rustix::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &domain.bell, EventData::new_u64(BELL), EventFlags::IN)?;
        let mut keeper = Self {
            domain,
            epoll,
            door: None,
            peers: HashMap::new(),
            processes: HashMap::new(),
            next: FIRST_CLIENT,
        };
        match door {
            Door::Listener(socket) => {
                let flags = rustix::fs::fcntl_getfl(&socket)? | rustix::fs::OFlags::NONBLOCK;
                rustix::fs::fcntl_setfl(&socket, flags)?;
                // An inherited socket may have been made by another process: clients ask the kernel who listens.
                rustix::net::listen(&socket, 1024)?;
                epoll::add(&keeper.epoll, &socket, EventData::new_u64(LISTENER), EventFlags::IN)?;
                keeper.door = Some(socket);
            }
            Door::Pair(socket) => keeper.admit(socket, None)?,
        }
        Ok(keeper)
    }

    /// Until the domain closes.
    pub fn run(mut self) {
        let mut events = Vec::with_capacity(64);
        let mut recalling = false;
        while !self.domain.pool.is_closing() {
            events.clear();
            let tick = rustix::time::Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
            let timeout = recalling.then_some(&tick);
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => panic!("epoll_wait on our own descriptor: {e}"),
            }
            for event in &events {
                match event.data.u64() {
                    LISTENER => self.accept(),
                    BELL => self.hear_bell(),
                    token if token & ENDED != 0 => self.bury(token as u32),
                    token => self.hear(token, event.flags),
                }
            }
            let more = self.domain.pool.asked_for();
            if more > 0 {
                if let Err(e) = self.domain.add_activations(more) {
                    // The domain asked and the system can't: callers wait on, bounded by their deadlines.
                    eprintln!("{}: {more} activations asked for: {e}", self.domain.name);
                }
                self.domain.pool.have_started(more);
            }
            recalling = self.domain.pool.repeat_recalls();
        }
        self.domain.join_activations();
        self.farewell();
    }

    fn hear_bell(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.domain.bell, &mut count);
    }

    fn accept(&mut self) {
        let Some(door) = &self.door else { return };
        if strays::waiting() >= strays::MOST {
            // Somebody has us close what does not close: nobody brings more until that is done.
            std::thread::sleep(std::time::Duration::from_millis(10));
            return;
        }
        // One at a time: the socket stays readable while there are more, and others get their turn between.
        match rustix::net::accept_with(door, rustix::net::SocketFlags::CLOEXEC) {
            Ok(socket) => {
                reach("domain: accepted");
                // A client that can't be looked after is closed, which tells it.
                // Without a descriptor of the process (before Linux 6.5) the hang-up has to do.
                let process = peregrine_sys::peer::process_of(&socket).ok();
                let _ = self.admit(socket, process);
            }
            Err(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE) => {
                // No descriptor to accept it with: let others leave first, rather than spin on a readable socket.
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            Err(_) => {}
        }
    }

    fn admit(&mut self, socket: OwnedFd, process: Option<OwnedFd>) -> rustix::io::Result<()> {
        let credentials = Credentials::of_peer(&socket)?;
        let domain = self.domain.clone();
        let limit = domain.limits.clients;
        let refused = if !domain.access.admits(&credentials, domain.uid) {
            Some(Why::NotAdmitted)
        } else if self.peers.len() >= limit {
            Some(Why::Clients { limit: limit as u64 })
        } else {
            None
        };
        if let Some(why) = refused {
            let _ = socket::send(&socket, &FromDomain::Refused(why), None);
            // It may have sent something already.
            socket::hang_up(&socket, Strays::Thread);
            return Ok(());
        }
        let token = self.next;
        self.next += 1;
        let may_call = domain.portals.iter().map(|p| p.access.admits(&credentials, domain.uid)).collect();
        epoll::add(&self.epoll, &socket, EventData::new_u64(token), EventFlags::IN | EventFlags::RDHUP)?;
        if let Some(process) = process {
            self.watch(process_key(&credentials, token), process, token)?;
        }
        let peer = Arc::new(Peer {
            token,
            credentials,
            socket,
            may_call,
            gone: Ended::default(),
            aside: AtomicUsize::new(0),
            lines: Mutex::default(),
            buffers: Mutex::default(),
            cpu_ns: AtomicU64::new(0),
        });
        self.peers.insert(token, (peer, Manners::default()));
        domain.clients.store(self.peers.len(), Ordering::Relaxed);
        Ok(())
    }

    /// Notes that client `token` is a connection of the process that goes by `key`, which `fd` refers to.
    fn watch(&mut self, key: u32, fd: OwnedFd, token: u64) -> rustix::io::Result<()> {
        // A process that has not ended is the only one of its number. One that has makes way for the next.
        self.bury(key);
        match self.processes.entry(key) {
            Entry::Occupied(known) => known.into_mut().clients.push(token),
            Entry::Vacant(new) => {
                epoll::add(&self.epoll, &fd, EventData::new_u64(u64::from(key) | ENDED), EventFlags::IN)?;
                new.insert(Process { fd, clients: vec![token] });
            }
        }
        Ok(())
    }

    /// If the process has ended, so have all its clients. Asked again, for the number may be another's by the time that the event is handled.
    fn bury(&mut self, key: u32) {
        if self.processes.get(&key).is_some_and(|process| has_ended(&process.fd))
            && let Some(process) = self.processes.remove(&key)
        {
            let _ = epoll::delete(&self.epoll, &process.fd);
            process.clients.into_iter().for_each(|token| self.dismiss(token));
        }
    }

    fn hear(&mut self, token: u64, flags: EventFlags) {
        let Some((peer, manners)) = self.peers.get_mut(&token) else { return };
        let peer = peer.clone();
        let stays = match socket::receive::<FromClient>(&peer.socket, RecvFlags::DONTWAIT, Strays::Thread) {
            Ok((message, fd)) => self.domain.clone().answer(&peer, manners, message, fd),
            Err(RecvError::Nothing) => {
                !flags.intersects(EventFlags::HUP | EventFlags::RDHUP | EventFlags::ERR)
            }
            Err(RecvError::Closed | RecvError::Garbage | RecvError::Kernel(_)) => false,
        };
        if !stays {
            self.dismiss(token);
        }
    }

    fn dismiss(&mut self, token: u64) {
        let Some((peer, _)) = self.peers.remove(&token) else { return };
        let _ = epoll::delete(&self.epoll, &peer.socket);
        if let Entry::Occupied(mut process) = self.processes.entry(process_key(&peer.credentials, token)) {
            process.get_mut().clients.retain(|&client| client != token);
            if process.get().clients.is_empty() {
                let _ = epoll::delete(&self.epoll, &process.remove().fd);
            }
        }
        // What a client that broke the protocol waits for is not coming: hanging up tells it, even while calls of its still run.
        socket::hang_up(&peer.socket, Strays::Thread);
        let lines = peer.leave();
        self.domain.pool.forget(&peer);
        self.domain.lines.fetch_sub(lines.len(), Ordering::Relaxed);
        self.domain.clients.store(self.peers.len(), Ordering::Relaxed);
    }

    /// After the last activation has ended: tells everybody who still waits.
    fn farewell(mut self) {
        for (peer, _) in self.peers.values() {
            for line in peer.lock_lines().iter() {
                if let Some(call) = line.pending() {
                    terminate(line, call);
                }
            }
        }
        let tokens: Vec<u64> = self.peers.keys().copied().collect();
        for token in tokens {
            self.dismiss(token);
        }
    }
}

impl Inner {
    /// Answers one message; false if the client is to be dismissed.
    fn answer(
        &self,
        peer: &Arc<Peer>,
        manners: &mut Manners,
        message: FromClient,
        fd: Option<OwnedFd>,
    ) -> bool {
        if !manners.greeted && !matches!(message, FromClient::Hello { .. }) {
            return false;
        }
        let say = |answer: &FromDomain, fd: Option<&OwnedFd>| {
            reach("domain: answers a question");
            socket::send(&peer.socket, answer, fd.map(AsFd::as_fd)).is_ok()
        };
        match message {
            FromClient::Hello { protocol: PROTOCOL } => {
                manners.greeted = true;
                say(
                    &FromDomain::Welcome {
                        id: self.id,
                        name: self.name.clone(),
                        calls_in_flight: self.limits.calls_in_flight as u32,
                        argument_bytes: self.limits.argument_bytes as u64,
                    },
                    None,
                )
            }
            FromClient::Hello { .. } => {
                say(&FromDomain::Refused(Why::Protocol { theirs: PROTOCOL }), None);
                false
            }
            FromClient::Resolve { name } => say(&self.resolve(peer, &name), None),
            FromClient::OpenLine => match self.open_line(peer) {
                Ok((index, fd)) => {
                    say(&FromDomain::Line { index, len_bytes: self.line_bytes() as u64 }, Some(&fd))
                }
                Err(why) => say(&FromDomain::Refused(why), None),
            },
            FromClient::Ring { line } => {
                let line = peer.lock_lines().get(line as usize).cloned();
                let useful = line.is_some_and(|line| {
                    let waits = matches!(line.binding.load(Ordering::Relaxed), QUEUED | BOUND);
                    self.pool.ring(&line) || waits
                });
                manners.in_vain += u64::from(!useful);
                manners.in_vain <= RINGS_IN_VAIN || manners.in_vain <= RINGS_IN_VAIN + peer.calls()
            }
            FromClient::OpenPipe { line } => {
                let line = peer.lock_lines().get(line as usize).cloned();
                match line.ok_or(Why::Unexpected).and_then(|line| open_pipe(&line)) {
                    Ok(read_end) => say(&FromDomain::Pipe, Some(&read_end)),
                    Err(why) => say(&FromDomain::Refused(why), None),
                }
            }
            FromClient::AddBuffer { len_bytes, results } => {
                let added = self.add_buffer(&mut peer.lock_buffers(), len_bytes, results, fd);
                say(&added.map_or_else(FromDomain::Refused, |id| FromDomain::Buffer { id }), None)
            }
            FromClient::AddGift { len_bytes } => {
                let added = self.add_gift(&mut peer.lock_buffers(), len_bytes, fd);
                say(&added.map_or_else(FromDomain::Refused, |id| FromDomain::Buffer { id }), None)
            }
            FromClient::Forget { buffer } => {
                let mut buffers = peer.lock_buffers();
                if let Some(lent) = buffers.lent.remove(&buffer) {
                    buffers.total_bytes -= lent.len_bytes;
                } else if let Some((_, len)) = buffers.gifts.remove(&buffer) {
                    buffers.total_bytes -= len as u64;
                }
                true
            }
            FromClient::Usage => {
                let cpu_ns = peer.cpu_ns.load(Ordering::Relaxed) + self.pool.live_cpu_ns(peer);
                say(&FromDomain::Usage { cpu_ns, calls: peer.calls() }, None)
            }
        }
    }

    fn resolve(&self, peer: &Peer, name: &str) -> FromDomain {
        match self.portals.iter().position(|p| p.name == name) {
            None => FromDomain::Refused(Why::NoPortal),
            Some(id) if !peer.may_call[id] => FromDomain::Refused(Why::Access { id: id as u32 }),
            Some(id) => FromDomain::Portal { id: id as u32, version: self.portals[id].version },
        }
    }

    /// Bytes of a line's memory.
    fn line_bytes(&self) -> usize {
        PAYLOAD_AT + self.limits.argument_stack_bytes.max(crate::Failure::MAX_DETAIL) + 8 * MAX_ARGS
    }

    fn open_line(&self, peer: &Arc<Peer>) -> Result<(u32, OwnedFd), Why> {
        let mut lines = peer.lock_lines();
        let limit = self.limits.calls_in_flight;
        if lines.len() >= limit {
            return Err(Why::Lines { limit: limit as u64 });
        }
        let short = |e: Errno| Why::Short { errno: e.0 };
        let fd = sealed_memfd(c"peregrine-line", self.line_bytes()).map_err(short)?;
        let shared = Shared::map(&fd, self.line_bytes(), Protection::ReadWrite).map_err(short)?;
        let index = lines.len() as u32;
        lines.push(Arc::new(Line {
            peer: peer.clone(),
            index,
            shared,
            served: AtomicU32::new(0),
            calls: AtomicU64::new(0),
            binding: AtomicU32::new(0),
            pipe: Mutex::new(None),
        }));
        self.lines.fetch_add(1, Ordering::Relaxed);
        Ok((index, fd))
    }

    fn add_buffer(
        &self,
        buffers: &mut Buffers,
        len_bytes: u64,
        results: bool,
        fd: Option<OwnedFd>,
    ) -> Result<u32, Why> {
        self.check_room(buffers, len_bytes)?;
        let fd = fd.ok_or(Why::BadMemory)?;
        let access = if results { Protection::ReadWrite } else { Protection::Read };
        let shared = map_from_peer(fd.as_fd(), len_bytes as usize, access).map_err(|_| Why::BadMemory)?;
        let id = buffers.number();
        buffers.lent.insert(id, Arc::new(Lendable { shared, results, len_bytes }));
        buffers.total_bytes += len_bytes;
        Ok(id)
    }

    fn add_gift(&self, buffers: &mut Buffers, len_bytes: u64, fd: Option<OwnedFd>) -> Result<u32, Why> {
        self.check_room(buffers, len_bytes)?;
        let fd = fd.ok_or(Why::BadMemory)?;
        // What is no memory at all is not kept until a call comes for it.
        if peregrine_sys::memfd::size_if_safe(&fd).map_err(|_| Why::BadMemory)? < len_bytes {
            return Err(Why::BadMemory);
        }
        let id = buffers.number();
        buffers.gifts.insert(id, (fd, len_bytes as usize));
        buffers.total_bytes += len_bytes;
        Ok(id)
    }

    fn check_room(&self, buffers: &Buffers, len_bytes: u64) -> Result<(), Why> {
        let limits = &self.limits;
        if buffers.count() >= limits.buffers {
            return Err(Why::Buffers { asked: buffers.count() as u64 + 1, limit: limits.buffers as u64 });
        }
        let asked = buffers.total_bytes.saturating_add(len_bytes);
        if len_bytes == 0 || asked > limits.buffer_bytes {
            return Err(Why::Buffers { asked, limit: limits.buffer_bytes });
        }
        Ok(())
    }
}

/// What a client's process goes by: its id, or if it has none in our namespace, a number of this client alone.
fn process_key(client: &Credentials, token: u64) -> u32 {
    /// Beyond all process ids.
    const NAMELESS: u32 = 1 << 31;
    if client.pid == 0 { NAMELESS | token as u32 } else { client.pid }
}

fn has_ended(process: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    let at_once = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    // An interrupted look says no more than a failed one; the set of descriptors tells of the end anyway.
    matches!(poll(&mut fds, Some(&at_once)), Ok(n) if n > 0)
}

/// Makes the line's pipe: we keep the write end, non-blocking and nobody else's, and hand out the read end, which is
/// then the client's alone, so that it hangs up when we die.
fn open_pipe(line: &Line) -> Result<OwnedFd, Why> {
    let short = |e: rustix::io::Errno| Why::Short { errno: e.raw_os_error() };
    let flags = rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK;
    let (read_end, write_end) = rustix::pipe::pipe_with(flags).map_err(short)?;
    // One page is plenty for bells; less of the user's allowance is taken.
    let _ = rustix::pipe::fcntl_setpipe_size(&write_end, 4096);
    *line.pipe.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(write_end);
    Ok(read_end)
}
