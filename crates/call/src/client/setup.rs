//! What a call needs before it can be sent, got step by step by who must not wait: a line, its pipe, room for what is too large for it,
//! the numbers of gifts.
//!
//! Most calls need nothing: the line that was used last has it all. What is missing is asked of the domain, one question after the other;
//! a call that is given up meanwhile leaves what it got for the next.

use super::connection::{Connection, buffer_of, hands_over, offers_buffer};
use super::line::Line;
use super::lines::{asks_for_pipe, pipe_of};
use super::questions::Inquiry;
use crate::args::{Arg, Call};
use crate::error::CallError;
use crate::shared::Shared;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

/// How far the preparations of a call are.
#[derive(Default)]
pub(super) struct Setup {
    line: Option<Box<Line>>,
    asked: Option<(Inquiry, For)>,
}

/// What is asked for.
enum For {
    Line,
    Pipe,
    Room(Shared),
    /// The number of the gift that is argument `index`, of so many bytes.
    Gift(usize, usize),
}

impl Setup {
    /// Goes on as far as it can; the line when nothing is missing any more.
    pub fn step(
        &mut self,
        connection: &Arc<Connection>,
        call: &mut Call<'_>,
    ) -> Result<Option<Box<Line>>, CallError> {
        loop {
            if let Some((inquiry, what)) = &mut self.asked {
                let answer = connection.pursue(inquiry);
                let is_line = matches!(what, For::Line);
                let answer = match answer {
                    Ok(None) => return Ok(None),
                    Ok(Some(answer)) => answer,
                    Err(e) => {
                        self.asked = None;
                        // One of those that there are will be free.
                        if is_line && connection.line_failed(&e) {
                            continue;
                        }
                        return Err(e);
                    }
                };
                let Some((_, what)) = self.asked.take() else { continue };
                match (what, &mut self.line) {
                    (For::Line, _) => {
                        let line = connection.line_of(answer).inspect_err(|e| {
                            connection.line_failed(e);
                        })?;
                        self.line = Some(line);
                    }
                    (For::Pipe, Some(line)) => line.pipe = Some(pipe_of(answer)?),
                    (For::Room(shared), Some(line)) => {
                        line.take_room(connection, shared, buffer_of(&answer)?);
                    }
                    (For::Gift(index, len), _) => call.args[index] = Arg::Given(buffer_of(&answer)?, len),
                    (For::Pipe | For::Room(_), None) => {}
                }
                continue;
            }
            let Some(line) = &mut self.line else {
                match connection.try_acquire()? {
                    Ok(line) => self.line = Some(line),
                    Err(Some(inquiry)) => self.asked = Some((inquiry, For::Line)),
                    Err(None) => return Ok(None),
                }
                continue;
            };
            let Some(missing) = missing(connection, line, call)? else { return Ok(self.line.take()) };
            self.asked = Some(missing);
        }
    }

    /// Whether a question is under way.
    pub const fn awaits_answer(&self) -> bool {
        self.asked.is_some()
    }

    /// The line's pipe, and what is about to be sent.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        let pipe = self.line.as_ref().and_then(|line| line.pipe.as_ref()).map(AsRawFd::as_raw_fd);
        pipe.into_iter().chain(self.asked.as_ref().and_then(|(inquiry, _)| inquiry.descriptor()))
    }

    /// The call will not be made.
    pub fn give_up(self, connection: &Arc<Connection>, call: &Call<'_>) {
        if let Some((inquiry, what)) = self.asked {
            if matches!(what, For::Line) {
                // It is counted again when it comes.
                connection.line_failed(&CallError::Terminated);
            }
            connection.forsake(inquiry);
        }
        if let Some(line) = self.line {
            connection.put_back(line);
        }
        for arg in &*call.args {
            if let Arg::Given(id, _) = arg {
                connection.owe(*id);
            }
        }
    }
}

/// A line on which `call` can be sent at once, if there is one.
pub(super) fn at_once(connection: &Arc<Connection>, call: &Call<'_>) -> Option<Box<Line>> {
    let line = connection.take_free()?;
    let gives = call.args.iter().any(|arg| matches!(arg, Arg::Give(_)));
    // What is refused needs no room.
    let has_room = line.plan(connection, call).map_or(true, |plan| plan.room.is_none());
    if line.pipe.is_some() && has_room && !gives {
        return Some(line);
    }
    connection.put_back(line);
    None
}

/// The next thing that `call` lacks on `line`, and the question for it.
fn missing(
    connection: &Connection,
    line: &Line,
    call: &mut Call<'_>,
) -> Result<Option<(Inquiry, For)>, CallError> {
    if line.pipe.is_none() {
        return Ok(Some((asks_for_pipe(line.index), For::Pipe)));
    }
    if let Some(bytes) = line.plan(connection, call)?.room {
        let (shared, inquiry) = offers_buffer(bytes, true)?;
        return Ok(Some((inquiry, For::Room(shared))));
    }
    for (index, arg) in call.args.iter_mut().enumerate() {
        if let Arg::Give(_) = arg
            && let Arg::Give(giving) = std::mem::take(arg)
        {
            let (inquiry, len) = hands_over(giving.into_gift()?);
            return Ok(Some((inquiry, For::Gift(index, len))));
        }
    }
    Ok(None)
}
