//! A call under way that nobody blocks for: the ground that asynchronous callers stand on.
//!
//! The domain tells of the reply by a byte in the line's pipe, whose read end is readable from then on, and hangs up when the domain
//! dies. So any reactor that watches descriptors can wait for calls, any number of them, without a thread.

use super::connection::Connection;
use super::line::Line;
use super::transfer::Sent;
use super::wait::drain;
use crate::args::Call;
use crate::chain::{Caller, Deadline};
use crate::error::CallError;
use crate::portal::PortalId;
use peregrine_sys::rustix;
use peregrine_sys::rustix::event::{PollFd, PollFlags, poll};
use peregrine_sys::rustix::time::Timespec;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// A call that was begun by [`Client::start`](crate::Client::start).
///
/// Its descriptor is readable when [`try_finish`](Self::try_finish) has something to say. Dropping it gives the call up: a callee that
/// has not begun will not, one that has goes on and its results are dropped.
#[must_use = "a call that is dropped is given up"]
pub struct Pending<'a> {
    connection: Arc<Connection>,
    line: Option<Box<Line>>,
    sent: Sent,
    call: Call<'a>,
}

impl<'a> Pending<'a> {
    pub(super) fn start(
        connection: Arc<Connection>,
        portal: PortalId,
        mut call: Call<'a>,
        caller: Caller,
    ) -> Result<Self, CallError> {
        let deadline = Deadline::earlier(call.attributes.deadline, caller.link.deadline);
        let mut line = connection.acquire(deadline)?;
        if line.pipe.is_none() {
            line.pipe = Some(connection.open_pipe(line.index, deadline)?);
        }
        let sent = line.send(&connection, portal, &mut call, caller, true)?;
        let line = Some(line.detach());
        Ok(Self { connection, line, sent, call })
    }

    /// When the call gives up by itself.
    pub const fn deadline(&self) -> Option<Deadline> {
        self.sent.deadline
    }

    /// Whether the reply is there: one load, no system call. False says nothing about deadline and death.
    pub fn is_ready(&self) -> bool {
        self.line.as_ref().is_none_or(|line| line.is_over())
    }

    fn line(&self) -> &Line {
        self.line.as_ref().expect("taken out at the end only")
    }

    /// The outcome, if there is one: results, failure, death of the domain, deadline.
    pub fn try_finish(&mut self) -> Option<Result<(), CallError>> {
        let Some(line) = &mut self.line else { return Some(Err(CallError::Terminated)) };
        let is_over = line.is_over() || {
            if self.sent.deadline.is_some_and(|d| d.left().is_none()) {
                return Some(Err(CallError::Deadline));
            }
            if self.connection.is_alive() {
                if let Some(pipe) = &line.pipe {
                    // A byte left of an earlier call on this line: readable, and means nothing.
                    drain(pipe);
                }
                // The byte of this call may have been among those: look again.
                line.is_over()
            } else {
                // It may have replied and died after we looked.
                if !line.is_over() {
                    return Some(Err(CallError::DomainDied));
                }
                true
            }
        };
        if !is_over {
            return None;
        }
        if let Some(pipe) = &line.pipe {
            drain(pipe);
        }
        let outcome = line.take_results(&self.connection, &self.sent, &mut self.call);
        if let Some(line) = self.line.take() {
            self.connection.put_back(line);
        }
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
            let left = self.sent.deadline.map(|d| d.left().unwrap_or_default());
            let timeout =
                left.map(|l| Timespec { tv_sec: l.as_secs() as i64, tv_nsec: i64::from(l.subsec_nanos()) });
            let [socket, process] = self.connection.signs_of_death();
            let mut fds = [PollFd::new(&self, PollFlags::IN), socket, process];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(crate::error::system("poll")(e)),
            }
        }
    }
}

impl AsFd for Pending<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.line().pipe.as_ref().expect("opened before the call began").as_fd()
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if let Some(line) = self.line.take() {
            line.cancel();
            self.connection.put_back(line);
        }
    }
}

impl fmt::Debug for Pending<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending")
            .field("portal", &self.sent.portal)
            .field("deadline", &self.sent.deadline)
            .finish()
    }
}
