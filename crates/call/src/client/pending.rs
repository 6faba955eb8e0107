//! A call under way that nobody blocks for: the ground that asynchronous callers stand on.
//!
//! ```text
//! set-up (line, pipe, room: see setup.rs) ──▶ sent ──▶ outcome
//! ```
//!
//! The domain tells of the reply by a byte in the line's pipe, whose read end is readable from then on, and hangs up when the domain
//! dies. So any reactor that watches descriptors can wait for calls, any number of them, without a thread. A call that is still being set
//! up has no such descriptor: it is looked at now and then.

use super::connection::Connection;
use super::line::Line;
use super::setup::{self, Setup};
use super::transfer::{Manner, Sent};
use crate::args::Call;
use crate::chain::{Caller, Deadline};
use crate::error::CallError;
use crate::portal::PortalId;
use crate::usage;
use peregrine_sys::rustix;
use peregrine_sys::rustix::event::{PollFd, PollFlags, poll};
use peregrine_sys::rustix::time::Timespec;
use std::fmt;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// A call that was begun by [`Client::start`](crate::Client::start).
///
/// Its descriptor is readable when [`try_finish`](Self::try_finish) has something to say. Dropping it gives the call up: a callee that
/// has not begun will not, one that has goes on and its results are dropped.
#[must_use = "a call that is dropped is given up"]
pub struct Pending<'a> {
    connection: Arc<Connection>,
    stage: Stage,
    caller: Caller,
    portal: PortalId,
    deadline: Option<Deadline>,
    call: Call<'a>,
    /// What the call cost, by domain, if somebody else is to be charged than the thread that finishes it.
    charges: Option<Vec<(u64, u64)>>,
}

enum Stage {
    Setup(Setup),
    Sent(Box<Line>, Sent),
    /// The outcome was told.
    Over,
}

impl<'a> Pending<'a> {
    /// Begins as much as can be done without waiting.
    pub(super) fn begin(
        connection: Arc<Connection>,
        portal: PortalId,
        call: Call<'a>,
        caller: Caller,
    ) -> Result<Self, CallError> {
        let deadline = Deadline::earlier(call.attributes.deadline, caller.link.deadline);
        let stage = Stage::Setup(Setup::default());
        let mut this = Self { connection, stage, caller, portal, deadline, call, charges: None };
        match this.set_up() {
            Some(Err(e)) => Err(e),
            _ => Ok(this),
        }
    }

    /// Keeps what the call cost instead of charging the thread that finishes it.
    pub(super) fn keeping_charges(mut self) -> Self {
        self.charges = Some(Vec::new());
        self
    }

    /// What the call cost, by domain, in ns: if it was begun for another thread, is charged, and has ended.
    pub fn charges(&self) -> &[(u64, u64)] {
        self.charges.as_deref().unwrap_or_default()
    }

    /// Begins a call that needs no set-up; gives back one that does.
    pub(super) fn at_once(
        connection: &Arc<Connection>,
        portal: PortalId,
        mut call: Call<'a>,
        caller: Caller,
    ) -> Result<Result<Self, Call<'a>>, CallError> {
        let Some(mut line) = setup::at_once(connection, &call) else { return Ok(Err(call)) };
        let deadline = Deadline::earlier(call.attributes.deadline, caller.link.deadline);
        match line.send(connection, portal, &mut call, caller, Manner::Told) {
            Ok(sent) => {
                let (connection, stage) = (connection.clone(), Stage::Sent(line, sent));
                Ok(Ok(Self { connection, stage, caller, portal, deadline, call, charges: Some(Vec::new()) }))
            }
            Err(e) => {
                connection.put_back(line);
                Err(e)
            }
        }
    }

    /// Goes on with the set-up, if there is anything left of it; its failure.
    fn set_up(&mut self) -> Option<Result<(), CallError>> {
        let Stage::Setup(setup) = &mut self.stage else { return None };
        if self.deadline.is_some_and(|d| d.left().is_none()) {
            self.abandon();
            return Some(Err(CallError::Deadline));
        }
        let mut line = match setup.step(&self.connection, &mut self.call) {
            Ok(Some(line)) => line,
            Ok(None) if self.connection.is_alive() => {
                let works = self.see_whether_it_works();
                return works.is_err().then(|| {
                    self.abandon();
                    works
                });
            }
            Ok(None) => {
                self.abandon();
                return Some(Err(CallError::DomainDied));
            }
            Err(e) => {
                self.abandon();
                return Some(Err(e));
            }
        };
        match line.send(&self.connection, self.portal, &mut self.call, self.caller, Manner::Told) {
            Ok(sent) => {
                self.stage = Stage::Sent(line, sent);
                None
            }
            Err(e) => {
                self.connection.put_back(line);
                self.abandon();
                Some(Err(e))
            }
        }
    }

    /// Blocks until the call is sent.
    pub(super) fn sent(mut self) -> Result<Self, CallError> {
        while !self.is_sent() {
            self.connection.wait_a_moment(self.deadline)?;
            if let Some(Err(e)) = self.set_up() {
                return Err(e);
            }
        }
        Ok(self)
    }

    /// Whether it is on its way. Until then nothing is executed, and the descriptor is the connection's socket, which says little: look
    /// again now and then.
    pub const fn is_sent(&self) -> bool {
        !matches!(self.stage, Stage::Setup(_))
    }

    /// What this call has open, besides what the connection has ([`Client::descriptors`](crate::Client::descriptors)): its line's pipe, gifts that
    /// are yet to be handed over, memory that the domain is being told of.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let mut all = self.call.descriptors();
        match &self.stage {
            Stage::Setup(setup) => all.extend(setup.descriptors()),
            Stage::Sent(line, _) => all.extend(line.pipe.iter().map(AsRawFd::as_raw_fd)),
            Stage::Over => {}
        }
        all
    }

    /// Whether something was asked of the domain that it has not answered yet: not so of a call that waits for another's line.
    pub const fn awaits_answer(&self) -> bool {
        matches!(&self.stage, Stage::Setup(setup) if setup.awaits_answer())
    }

    /// Whether the domain is still to be told of it.
    #[cfg(feature = "async")]
    pub(crate) fn owes_ring(&self) -> bool {
        matches!(&self.stage, Stage::Sent(line, _) if line.owes_ring)
    }

    /// When the call gives up by itself.
    pub const fn deadline(&self) -> Option<Deadline> {
        self.deadline
    }

    /// For a call that has no deadline: an error if its domain has been stopped for too long.
    fn see_whether_it_works(&self) -> Result<(), CallError> {
        if self.deadline.is_some() { Ok(()) } else { self.connection.see_whether_it_works() }
    }

    /// When to look again at a call of which nothing is heard.
    pub(crate) const LOOK_AGAIN: Duration = Duration::from_secs(1);

    /// Whether the reply is there: one load, no system call. False says nothing about deadline and death.
    pub fn is_ready(&self) -> bool {
        match &self.stage {
            Stage::Setup(_) => false,
            Stage::Sent(line, _) => line.is_over(),
            Stage::Over => true,
        }
    }

    /// The outcome, if there is one: results, failure, death of the domain, deadline. Never waits.
    pub fn try_finish(&mut self) -> Option<Result<(), CallError>> {
        if let Some(failed) = self.set_up() {
            return Some(failed);
        }
        let (line, _) = match &mut self.stage {
            Stage::Setup(_) => return None,
            Stage::Sent(line, sent) => (line, sent),
            Stage::Over => return Some(Err(CallError::Terminated)),
        };
        if !line.is_over() {
            if self.deadline.is_some_and(|d| d.left().is_none()) {
                return Some(Err(CallError::Deadline));
            }
            if line.owes_ring {
                match line.try_ring(&self.connection, line.words().gate().bell()) {
                    Ok(done) => line.owes_ring = !done,
                    Err(e) => return Some(Err(e)),
                }
            }
            let is_alive = self.connection.is_alive();
            if is_alive && let Some(pipe) = &line.pipe {
                // A byte left of an earlier call on this line: readable, and means nothing.
                drain(pipe);
            }
            // The byte of this call may have been among those, or the domain may have replied and died: look again.
            if !line.is_over() {
                let works = if is_alive { self.see_whether_it_works() } else { Err(CallError::DomainDied) };
                return works.is_err().then_some(works);
            }
        }
        if let Some(pipe) = &line.pipe {
            drain(pipe);
        }
        let Stage::Sent(mut line, sent) = std::mem::replace(&mut self.stage, Stage::Over) else {
            return None;
        };
        let outcome = match &mut self.charges {
            None => line.take_results(&self.connection, &sent, &mut self.call, usage::add),
            Some(rows) => line
                .take_results(&self.connection, &sent, &mut self.call, |domain, ns| rows.push((domain, ns))),
        };
        self.connection.put_back(line);
        Some(outcome)
    }

    /// Blocks until there is an outcome.
    ///
    /// # Errors
    /// As [`Client::call`](crate::Client::call).
    pub fn wait(mut self) -> Result<(), CallError> {
        loop {
            if let Some(outcome) = self.try_finish() {
                return outcome;
            }
            let Stage::Sent(line, _) = &self.stage else {
                self.connection.wait_a_moment(self.deadline)?;
                continue;
            };
            // A call that is still to be rung for has nobody who would wake us.
            let most = line.owes_ring.then_some(Duration::from_millis(1));
            let left = self.deadline.map_or(Self::LOOK_AGAIN, |d| d.left().unwrap_or_default());
            let left = most.map_or(left, |most| left.min(most));
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let [socket, process] = self.connection.signs_of_death();
            let mut fds = [PollFd::new(&self, PollFlags::IN), socket, process];
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(crate::error::system("poll")(e)),
            }
        }
    }

    fn abandon(&mut self) {
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Setup(setup) => setup.give_up(&self.connection, &self.call),
            Stage::Sent(line, _) => {
                line.cancel();
                self.connection.put_back(line);
            }
            Stage::Over => {}
        }
    }
}

/// Takes the bytes out of a line's pipe, whose writer is not trusted: never waits, however the pipe is set.
fn drain(pipe: impl AsFd) {
    let mut bytes = [0; 64];
    // Not until it is empty: one who keeps it full is looked at again soon enough.
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = rustix::io::ReadWriteFlags::NOWAIT;
    // The offset of what has no offset.
    if rustix::io::preadv2(&pipe, &mut parts, u64::MAX, flags) == Err(rustix::io::Errno::OPNOTSUPP) {
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        if matches!(poll(&mut [PollFd::new(&pipe, PollFlags::IN)], Some(&at_once)), Ok(1)) {
            let _ = rustix::io::read(&pipe, &mut bytes);
        }
    }
}

impl AsFd for Pending<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.stage {
            Stage::Sent(line, _) => match &line.pipe {
                Some(pipe) => pipe.as_fd(),
                None => self.connection.socket.as_fd(),
            },
            _ => self.connection.socket.as_fd(),
        }
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.abandon();
    }
}

impl fmt::Debug for Pending<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending").field("portal", &self.portal).field("deadline", &self.deadline).finish()
    }
}
