//! The control socket: answers `peregrine ps`, `migrate` and `checkpoint` from the supervisor's own loop.
//!
//! ```text
//!   accept ─▶ Client │ read bytes │ waiting for something? │ unsent reply │ ─▶ write
//! ```
//!
//! Nothing here waits. A request whose answer takes time (a move, an image, a trace of a blocked node) leaves a [`Wait`] with
//! its client, looked at each time round; a client that does not read its reply keeps it to itself; one that talks too much or
//! too long is dropped. Only processes of the same user are heard (`SO_PEERCRED`), besides the directory's mode.

use super::Supervisor;
use super::status::{find, is_alive};
use crate::control::{NONE, imaged, mail, node, record, request, world};
use crate::rendezvous::{Place, is_mine};
use crate::status::{Reply, Request};
use crate::thread::ThreadId;
use peregrine_base::sync::Ordering;
use peregrine_sys::rustix::event::{PollFd, PollFlags};
use peregrine_sys::signal;
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::preempt::SIG_TRACE;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

/// Longest request.
const MOST_REQUEST: usize = 4096;
/// Most clients at a time; the one that was silent longest makes room.
const MOST_CLIENTS: usize = 32;
/// How often a waiting request is looked at.
const LOOK_EVERY_NS: u64 = 2_000_000;
/// How long a node that has others waiting may run one thread before it counts as blocked, at least.
const BLOCKED_AFTER_NS: u64 = 50_000_000;
/// How long a blocked node has for its trace.
const TRACE_NS: u64 = 100_000_000;
/// How long a thread has for its move, and an image to be complete.
const MOVE_NS: u64 = 2_000_000_000;
const IMAGE_NS: u64 = 8_000_000_000;

/// The socket and who is connected.
#[derive(Default)]
pub(super) struct ControlSocket {
    place: Option<Place>,
    clients: Vec<Client>,
}

struct Client {
    stream: UnixStream,
    read: Vec<u8>,
    unsent: Vec<u8>,
    wait: Option<Wait>,
    heard_ns: u64,
}

/// What a client's request waits for.
enum Wait {
    /// Whether nodes that looked busy go on: their switches then.
    Busy { until: u64, suspects: Vec<(u32, u64)> },
    /// The traces of blocked nodes.
    Trace { until: u64, blocked: Vec<u32> },
    /// A thread's move.
    Move { until: u64, id: ThreadId, from: u32, to: u32 },
    /// An image later than this one.
    Image { until: u64, since: u64, begun: u64 },
}

impl ControlSocket {
    /// Listens; without a usable directory the World runs on unseen, and says so.
    pub(super) fn open() -> Self {
        match Place::take(peregrine_sys::process::pid() as u32) {
            Ok(place) => Self { place: Some(place), clients: Vec::new() },
            Err(e) => {
                eprintln!("peregrine: `peregrine ps` will not see this World: {e}");
                Self::default()
            }
        }
    }

    /// What to poll for.
    pub(super) fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        let listener = self.place.iter().map(|p| PollFd::new(&p.listener, PollFlags::IN));
        listener.chain(self.clients.iter().map(|c| {
            let flags = if c.unsent.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
            PollFd::new(&c.stream, flags)
        }))
    }

    /// When to look again without being polled.
    pub(super) fn due(&self) -> Option<u64> {
        self.clients.iter().any(|c| c.wait.is_some()).then(|| monotonic_ns() + LOOK_EVERY_NS)
    }

    fn accept(&mut self) {
        let Some(place) = &self.place else { return };
        while let Ok((stream, _)) = place.listener.accept() {
            if !is_mine(&stream) || stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.clients.len() >= MOST_CLIENTS {
                let oldest = (0..self.clients.len()).min_by_key(|i| self.clients[*i].heard_ns).unwrap_or(0);
                self.clients.swap_remove(oldest);
            }
            self.clients.push(Client {
                stream,
                read: Vec::new(),
                unsent: Vec::new(),
                wait: None,
                heard_ns: monotonic_ns(),
            });
        }
    }
}

impl Client {
    /// Reads what there is; `false` if the client is gone or talks too much.
    fn hear(&mut self) -> bool {
        let mut bytes = [0u8; 1024];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return false,
                Ok(n) => {
                    self.heard_ns = monotonic_ns();
                    self.read.extend_from_slice(&bytes[..n]);
                    if self.read.len() > MOST_REQUEST {
                        return false;
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }

    /// The next whole request, if there is one and the last was answered.
    fn next_request(&mut self) -> Option<Result<Request, String>> {
        if self.wait.is_some() || !self.unsent.is_empty() {
            return None;
        }
        let end = self.read.iter().position(|b| *b == b'\n')?;
        let line: Vec<u8> = self.read.drain(..=end).collect();
        Some(serde_json::from_slice(&line).map_err(|e| {
            format!(
                "this World does not know the request ({e}): it was built with another version of peregrine"
            )
        }))
    }

    fn say(&mut self, reply: &Reply) {
        self.wait = None;
        self.unsent = serde_json::to_vec(reply).unwrap_or_default();
        self.unsent.push(b'\n');
    }

    /// Writes what the client takes; `false` if it is gone.
    fn send(&mut self) -> bool {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }
}

impl Supervisor {
    /// Between two looks at new processes, while all threads wait for them: `ps` is answered at once, for nobody runs who could be blocked,
    /// and nothing else can be begun. What was begun before waits too, for as long as it may, and is then told for what.
    pub(super) fn serve_control_while_all_wait(&mut self) {
        self.control.accept();
        let mut clients = std::mem::take(&mut self.control.clients);
        clients.retain_mut(|client| {
            if !client.hear() {
                return false;
            }
            match client.wait.take() {
                None => {}
                Some(Wait::Busy { .. } | Wait::Trace { .. }) => {
                    client.say(&Reply::Status(Box::new(self.status(&[]))));
                }
                Some(wait) => self.go_on_with(client, wait, true),
            }
            match client.next_request() {
                None => {}
                Some(Err(why)) => client.say(&Reply::Refused { why }),
                Some(Ok(Request::Status)) => client.say(&Reply::Status(Box::new(self.status(&[])))),
                Some(Ok(_)) => client.say(&Reply::Refused { why: self.why_nothing_goes_on() }),
            }
            client.send()
        });
        self.control.clients = clients;
    }

    /// Hears and answers clients; what they ask of the supervisor, as bits of [`request`].
    pub(super) fn serve_control(&mut self) -> u32 {
        self.control.accept();
        let mut asked = 0;
        // The clients are taken out meanwhile, so that answering may look at the rest of the supervisor.
        let mut clients = std::mem::take(&mut self.control.clients);
        clients.retain_mut(|client| {
            if !client.hear() {
                return false;
            }
            if let Some(wait) = client.wait.take() {
                self.go_on_with(client, wait, false);
            }
            match client.next_request() {
                None => {}
                Some(Err(why)) => client.say(&Reply::Refused { why }),
                Some(Ok(Request::Status)) => self.begin_status(client),
                Some(Ok(Request::Migrate { thread, node })) => self.begin_move(client, &thread, node),
                Some(Ok(Request::Checkpoint)) => {
                    let (since, begun) = (imaged().sequence.load(Ordering::Acquire), monotonic_ns());
                    client.wait = Some(Wait::Image { until: begun + IMAGE_NS, since, begun });
                    world().image_wanted.fetch_max(since + 1, Ordering::Release);
                    asked |= request::CHECKPOINT;
                }
            }
            client.send()
        });
        self.control.clients = clients;
        asked
    }

    fn why_nothing_goes_on(&self) -> String {
        format!("all threads wait for {}; ask again when it is up", self.what_is_waited_for())
    }

    /// `all_wait`: for new processes.
    fn go_on_with(&mut self, client: &mut Client, wait: Wait, all_wait: bool) {
        let now = monotonic_ns();
        match wait {
            Wait::Busy { until, .. } if now < until => client.wait = Some(wait),
            Wait::Busy { suspects, .. } => {
                let stands = |(i, then): &(u32, u64)| {
                    node(*i).current.load(Ordering::Relaxed) != NONE
                        && node(*i).switches.load(Ordering::Relaxed) == *then
                };
                let mut blocked = self.stats.blocked_nodes.clone();
                blocked.extend(suspects.iter().filter(|s| stands(s)).map(|(i, _)| *i));
                blocked.sort_unstable();
                blocked.dedup();
                self.ask_for_traces(client, blocked);
            }
            Wait::Trace { until, ref blocked } => {
                let answered = |i: &u32| node(*i).trace_len.load(Ordering::Acquire) != 0;
                if now < until && !blocked.iter().all(answered) {
                    client.wait = Some(wait);
                } else {
                    client.say(&Reply::Status(Box::new(self.status(blocked))));
                }
            }
            Wait::Move { until, id, from, to } => {
                let r = record(id.slot);
                let there = r.node.load(Ordering::Acquire) == to
                    && r.mail.load(Ordering::Acquire) & mail::ARRIVE == 0;
                if !is_alive(id) {
                    let why = format!("thread {id} ended before it could be moved");
                    client.say(&Reply::Refused { why });
                } else if there {
                    client.say(&Reply::Moved { thread: id.to_string(), from, to });
                } else if now >= until && all_wait {
                    client.say(&Reply::Refused { why: self.why_nothing_goes_on() });
                } else if now >= until {
                    let at = r.node.load(Ordering::Relaxed);
                    let why = format!(
                        "thread {id} is still on node {at} after {} s; see `peregrine ps` for what it does there",
                        MOVE_NS / 1_000_000_000
                    );
                    client.say(&Reply::Refused { why });
                } else {
                    if !all_wait && r.move_to.load(Ordering::Relaxed) != to {
                        // A rollback took the wish back.
                        self.post_move(id.slot, to);
                    }
                    client.wait = Some(wait);
                }
            }
            Wait::Image { until, since, begun } => {
                let sequence = world().committed.load(Ordering::Acquire);
                if sequence > since {
                    let milliseconds = (now - begun) as f64 / 1e6;
                    client.say(&Reply::Image { sequence, durable: self.durable.is_some(), milliseconds });
                } else if now >= until {
                    let why = match self.stats.blocked_nodes.first() {
                        _ if all_wait => self.why_nothing_goes_on(),
                        Some(i) => format!("node {i} does not pause; `peregrine ps` shows what it does"),
                        None => "no image was completed in time; the World's own messages say why".to_owned(),
                    };
                    client.say(&Reply::Refused { why });
                } else {
                    client.wait = Some(wait);
                }
            }
        }
    }

    /// A node that did not pause for the last image is blocked; one that runs a thread while others wait is watched for a
    /// moment first.
    fn begin_status(&mut self, client: &mut Client) {
        let busy = |i: &u32| {
            node(*i).current.load(Ordering::Relaxed) != NONE && node(*i).queued.load(Ordering::Relaxed) != 0
        };
        let suspects: Vec<(u32, u64)> = (0..self.nodes.len() as u32)
            .filter(busy)
            .map(|i| (i, node(i).switches.load(Ordering::Relaxed)))
            .collect();
        if suspects.is_empty() {
            return self.ask_for_traces(client, self.stats.blocked_nodes.clone());
        }
        let watch = BLOCKED_AFTER_NS.max(4 * world().slice_ns.load(Ordering::Relaxed));
        client.wait = Some(Wait::Busy { until: monotonic_ns() + watch, suspects });
    }

    fn ask_for_traces(&mut self, client: &mut Client, blocked: Vec<u32>) {
        if blocked.is_empty() {
            return client.say(&Reply::Status(Box::new(self.status(&[]))));
        }
        for i in &blocked {
            node(*i).trace_len.store(0, Ordering::Relaxed);
            if let Some(Some(n)) = self.nodes.get(*i as usize) {
                let _ = signal::kill(n.pid, SIG_TRACE);
            }
        }
        client.wait = Some(Wait::Trace { until: monotonic_ns() + TRACE_NS, blocked });
    }

    fn begin_move(&mut self, client: &mut Client, thread: &str, to: u32) {
        if to >= self.config.nodes {
            let why = format!("there is no node {to}: this World has nodes 0 to {}", self.config.nodes - 1);
            return client.say(&Reply::Refused { why });
        }
        match find(thread) {
            Err(why) => client.say(&Reply::Refused { why }),
            Ok(id) => {
                let from = record(id.slot).node.load(Ordering::Relaxed);
                if from != to {
                    self.post_move(id.slot, to);
                }
                client.wait = Some(Wait::Move { until: monotonic_ns() + MOVE_NS, id, from, to });
            }
        }
    }
}
