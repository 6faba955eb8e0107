//! A connection that is being made: nobody needs to wait for it.
//!
//! ```text
//! knocking ──room in the listener's queue──▶ greeting ──welcome──▶ Client
//!    │ the queue of a domain that is stopped is full     │ accepted by the kernel, and never answered
//!    └──────────── time over: Unreachable ───────────────┘
//! ```

use super::Client;
use super::connection::{Connection, refusal};
use crate::chain::Deadline;
use crate::credentials::Credentials;
use crate::error::{CallError, Refusal};
use crate::socket::{self, FromClient, FromDomain, PROTOCOL, RecvError};
use crate::step::reach;
use crate::strays::Strays;
use peregrine_sys::elsewhere::Table;
use peregrine_sys::rustix;
use peregrine_sys::rustix::event::{PollFd, PollFlags, poll};
use peregrine_sys::rustix::io::Errno;
use peregrine_sys::rustix::net::{RecvFlags, SocketAddrUnix};
use peregrine_sys::rustix::time::Timespec;
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often a full queue is looked at, and a domain that does not answer.
const SLICE: Duration = Duration::from_millis(1);

/// A connection that was begun by [`Client::open`]. Dropping it gives it up.
#[must_use = "a connection that is dropped is given up"]
pub struct Opening {
    at: PathBuf,
    /// Taken when there is an outcome.
    socket: Option<OwnedFd>,
    /// Where to knock, until somebody opens.
    door: Option<SocketAddrUnix>,
    /// Who answers, from then on.
    peer: Option<Credentials>,
    /// Whether the peer was found by a path, so that the kernel knows its process. Of a pair it knows only who made it.
    listened: bool,
    within: Duration,
    deadline: Deadline,
    strays: Strays,
}

impl Opening {
    /// To whoever listens at `path`.
    pub(super) fn to(path: &Path, within: Duration, strays: Strays) -> Result<Self, CallError> {
        let unreachable = |e: Errno| CallError::Unreachable { at: path.to_owned(), reason: e.to_string() };
        let door = SocketAddrUnix::new(path).map_err(unreachable)?;
        let socket = socket::new_socket().map_err(unreachable)?;
        // Connecting is all that could wait; messages are told each time not to.
        rustix::io::ioctl_fionbio(&socket, true).map_err(unreachable)?;
        let mut opening = Self::over(socket, path, within, strays);
        (opening.door, opening.listened) = (Some(door), true);
        Ok(opening)
    }

    /// Over a socket that is connected.
    pub(super) fn over(socket: OwnedFd, at: &Path, within: Duration, strays: Strays) -> Self {
        Self {
            at: at.to_owned(),
            socket: Some(socket),
            door: None,
            peer: None,
            listened: false,
            within,
            deadline: Deadline::after(within),
            strays,
        }
    }

    /// Says that this process shares its descriptor table, and that all who do end with its parent (`PR_SET_PDEATHSIG`). So the table is over when
    /// that parent ends, though one of the processes in which the connection closes what a hostile domain sent may be held by that for longer, and
    /// then nothing else is left open in it. Without effect on a connection of [`Client::connect`].
    pub const fn table_ends_with_parent(mut self) -> Self {
        if let Strays::Process(_) = self.strays {
            self.strays = Strays::Process(Table::EndsWithParent);
        }
        self
    }

    fn unreachable(&self, reason: impl Into<String>) -> CallError {
        CallError::Unreachable { at: self.at.clone(), reason: reason.into() }
    }

    /// The outcome, if there is one. Never waits.
    pub fn try_finish(&mut self) -> Option<Result<Client, CallError>> {
        match self.step() {
            Ok(None) if self.deadline.left().is_some() => None,
            Ok(None) => {
                let what = if self.door.is_some() {
                    "the queue of its socket was full"
                } else {
                    "it did not answer"
                };
                Some(Err(self.unreachable(format!("{what} for {:?}", self.within))))
            }
            Ok(Some(client)) => Some(Ok(client)),
            Err(e) => Some(Err(e)),
        }
    }

    fn step(&mut self) -> Result<Option<Client>, CallError> {
        let Some(socket) = &self.socket else { return Err(self.unreachable("the outcome was taken")) };
        if let Some(door) = &self.door {
            match rustix::net::connect(socket, door) {
                Ok(()) | Err(Errno::ISCONN) => self.door = None,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
                Err(e) => return Err(self.unreachable(e.to_string())),
            }
        }
        let peer = match self.peer {
            Some(peer) => peer,
            None => {
                let peer = Credentials::of_peer(socket).map_err(|e| self.unreachable(e.to_string()))?;
                // An error here is told by the answer, if the domain had time to say why it hung up.
                let _ = socket::send(socket, &FromClient::Hello { protocol: PROTOCOL }, None);
                reach("client: said hello");
                *self.peer.insert(peer)
            }
        };
        match socket::receive::<FromDomain>(socket, RecvFlags::DONTWAIT, self.strays) {
            Ok((FromDomain::Welcome { id, name, calls_in_flight, argument_bytes }, _)) => {
                let process = self.listened.then(|| peregrine_sys::peer::process_of(socket).ok()).flatten();
                let socket = self.socket.take().ok_or_else(|| self.unreachable("the outcome was taken"))?;
                let made = Connection::new(
                    socket,
                    (process, Some(peer.pid).filter(|&pid| self.listened && pid != 0)),
                    peer,
                    (id, name),
                    calls_in_flight,
                    argument_bytes,
                    self.strays,
                );
                Ok(Some(Client(made)))
            }
            Ok((FromDomain::Refused(why), _)) => Err(refusal(why)),
            Ok(_) | Err(RecvError::Garbage) => {
                Err(Refusal::Protocol("the first answer is not a welcome".into()).into())
            }
            Err(RecvError::Nothing) => Ok(None),
            Err(RecvError::Closed) => Err(self.unreachable("it hung up")),
            Err(RecvError::Kernel(e)) => Err(self.unreachable(e.to_string())),
        }
    }

    /// Blocks until there is an outcome.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn wait(mut self) -> Result<Client, CallError> {
        loop {
            if let Some(outcome) = self.try_finish() {
                return outcome;
            }
            match &self.socket {
                Some(socket) if self.door.is_none() => {
                    let left = self.deadline.left().unwrap_or_default();
                    let timeout =
                        Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
                    let _ = poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout));
                }
                _ => std::thread::sleep(SLICE),
            }
        }
    }

    /// The descriptor that it has open, for a process that shares its table with others: see [`Client::descriptors`].
    pub fn descriptor(&self) -> Option<RawFd> {
        self.socket.as_ref().map(AsRawFd::as_raw_fd)
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            socket::hang_up(socket, self.strays);
        }
    }
}

impl fmt::Debug for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opening").field("at", &self.at).field("within", &self.within).finish_non_exhaustive()
    }
}
