//! The keeper: the domain's one thread for everything that is not a call.
//!
//! It admits clients, answers their questions (`answers.rs`), takes rings for lines without an activation to the pool, notices
//! clients that are gone, and repeats recalls. It never waits for a client: it reads one message at a time from whichever has
//! one, and a client whose answer can't be sent at once is dropped. So a client that floods gets its turns and no more; and
//! rings without a call behind them, which an honest client causes only by a rare coincidence, are counted against it. Nor does it close
//! what a client may have made slow to close: see `strays.rs`.

use super::Inner;
use super::answers::Manners;
use super::ended::Ended;
use super::outcome::terminate;
use super::peer::Peer;
use crate::credentials::Credentials;
use crate::socket::{self, FromClient, FromDomain, RecvError, Why};
use crate::step::reach;
use crate::strays::{self, Strays};
use peregrine_base::sync::{AtomicU64, AtomicUsize, Ordering};
use peregrine_sys::rustix;
use peregrine_sys::rustix::event::epoll::{self, EventData, EventFlags};
use peregrine_sys::rustix::event::{PollFd, PollFlags, poll};
use peregrine_sys::rustix::net::RecvFlags;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const LISTENER: u64 = 0;
const BELL: u64 = 1;
const FIRST_CLIENT: u64 = 2;
/// Marks what a process goes by: it has ended.
const ENDED: u64 = 1 << 63;

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
    /// Kept to be let go of when there is no other descriptor left: whoever knocks then is told so.
    spare: Option<OwnedFd>,
    /// Since when nobody could be let in for want of a descriptor.
    short_since: Option<Instant>,
}

/// How long those who knock wait for others to leave, when there is no descriptor left to let them in with.
const WAITS_FOR_A_DESCRIPTOR: Duration = Duration::from_millis(100);

/// A process with connections to us, which may be many and need one descriptor of it.
struct Process {
    /// Readable when it has ended; a socket of it may live on in another process.
    fd: OwnedFd,
    clients: Vec<u64>,
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
            spare: None,
            short_since: None,
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
            std::thread::sleep(Duration::from_millis(10));
            return;
        }
        // As soon as there is one to spare.
        self.spare = self.spare.take().or_else(spare);
        // One at a time: the socket stays readable while there are more, and others get their turn between.
        match rustix::net::accept_with(door, rustix::net::SocketFlags::CLOEXEC) {
            Ok(socket) => {
                self.short_since = None;
                reach("domain: accepted");
                // A client that can't be looked after is closed, which tells it.
                // Without a descriptor of the process (before Linux 6.5) the hang-up has to do.
                let process = peregrine_sys::peer::process_of(&socket).ok();
                let _ = self.admit(socket, process);
            }
            Err(e @ (rustix::io::Errno::MFILE | rustix::io::Errno::NFILE)) => {
                // No descriptor to accept it with: let others leave first, rather than spin on a readable socket.
                let since = *self.short_since.get_or_insert_with(Instant::now);
                if since.elapsed() < WAITS_FOR_A_DESCRIPTOR || !self.refuse(e) {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
            Err(_) => {}
        }
    }

    /// Tells the next who knocks that there is no descriptor left for it, by the spare one; false if that is not to be had either.
    fn refuse(&mut self, why: rustix::io::Errno) -> bool {
        let Some(door) = &self.door else { return false };
        if self.spare.take().is_none() {
            return false;
        }
        let accepted = rustix::net::accept_with(door, rustix::net::SocketFlags::CLOEXEC);
        if let Ok(socket) = &accepted {
            let why = Why::Short { errno: why.raw_os_error() };
            let _ = socket::send(socket, &FromDomain::Refused(why), None);
            // It may have sent something already.
            socket::hang_up(socket, Strays::Thread);
        }
        let was_told = accepted.is_ok();
        drop(accepted);
        self.spare = spare();
        was_told
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
            Ok((message, came)) => self.domain.clone().answer(&peer, manners, message, came),
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

/// An open file that is of no other use than that there is one less when it is closed.
fn spare() -> Option<OwnedFd> {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).ok()
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
