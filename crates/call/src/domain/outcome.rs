//! What came of a call, on its way into the domain's half of the line, and how the line goes back to its caller.

use super::peer::{Line, notify};
use crate::error::Failure;
use crate::gate::Tell;
use crate::line::PAYLOAD_AT;
use crate::reply::{ReplyHead, Status};
use crate::step::reach;
use peregrine_base::sync::Ordering;
use peregrine_sys::futex;
use peregrine_sys::raw::Errno;

/// What is said of a call with the word that ends it: by [`answer`], for a caller that spins looks at the same cache line, and takes it
/// away between two stores that are not close together.
///
/// Two words, so that it is returned in registers; a head is left with the executor.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reply {
    /// Done, and there are no results.
    Done,
    /// Done, and the results, of these lengths, are few enough to go with the word.
    Here(u32),
    /// Anything else: what the head says, so many of whose lengths mean something.
    Head(u32),
}

/// What went wrong in the handler.
pub(super) enum Fault {
    Failed(Failure),
    Panicked(String),
}

/// How a call goes wrong before its handler: what the caller is told.
pub(crate) struct Wrong(pub ReplyHead);

impl From<Status> for Wrong {
    fn from(status: Status) -> Self {
        Self(ReplyHead::new(status, 0))
    }
}

/// `code` of [`Status::Malformed`] and [`Status::TooLarge`], first length of [`Status::Short`]: what it is about.
pub(crate) mod about {
    pub const COUNT: u32 = 1;
    pub const KIND: u32 = 2;
    pub const PAYLOAD: u32 = 3;
    pub const PART: u32 = 4;
    pub const RESULT: u32 = 5;
    pub const ARGUMENTS: u32 = 6;
    pub const SENDING: u32 = 7;
    pub const GIFT: u32 = 8;

    pub const fn name(code: u32) -> &'static str {
        match code {
            COUNT => "number of arguments",
            KIND => "kind of an argument",
            PAYLOAD => "payload",
            PART => "part of a buffer",
            RESULT => "result",
            ARGUMENTS => "arguments",
            _ => "call",
        }
    }

    /// As [`name`], of [`Status::Short`](super::Status::Short): what the domain lacked something for.
    pub const fn lacking(code: u32) -> &'static str {
        match code {
            RESULT => "the domain executed the call and can't make memory for its results",
            SENDING => {
                "the domain executed the call and can't send its results, for others wait to be fetched"
            }
            GIFT => "the domain can't map what it was given",
            _ => "the domain lacks memory or descriptors",
        }
    }
}

pub(crate) fn malformed(code: u32) -> Wrong {
    Wrong(ReplyHead::new(Status::Malformed, code))
}

pub(crate) fn too_large(code: u32, asked: u64, limit: u64) -> Wrong {
    let mut head = ReplyHead::new(Status::TooLarge, code);
    head.lengths[0] = u32::try_from(asked).unwrap_or(u32::MAX);
    head.lengths[1] = u32::try_from(limit).unwrap_or(u32::MAX);
    Wrong(head)
}

/// The domain could not do `what`.
#[cold]
pub(crate) fn short(what: u32, errno: Errno) -> Wrong {
    let mut head = ReplyHead::new(Status::Short, errno.0.cast_unsigned());
    head.lengths[0] = what;
    Wrong(head)
}

/// Writes what went wrong in the handler.
#[cold]
pub(super) fn put_fault(line: &Line, fault: Fault, charge_rows: u32) -> Result<ReplyHead, Wrong> {
    let (mut head, mut detail) = match fault {
        Fault::Failed(failure) => (ReplyHead::new(Status::Failed, failure.code), failure.detail),
        Fault::Panicked(message) => (ReplyHead::new(Status::Panicked, 0), message.into_bytes()),
    };
    head.charge_rows = charge_rows;
    // Always into the line itself, whose argument stack has room for it by construction.
    detail.truncate(Failure::MAX_DETAIL.min(line.shared.len_bytes() - PAYLOAD_AT));
    head.lengths[0] = detail.len() as u32;
    line.shared.write(PAYLOAD_AT, &detail).ok_or_else(|| malformed(about::RESULT))?;
    Ok(head)
}

pub(super) fn message_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

/// Gives the line back to its caller. [`tell`] follows, unless the caller is known to be awake.
#[inline(always)]
pub(super) fn give_back(line: &Line, call: u32) {
    // Relaxed: read by whoever has the line, under the binding's handing over.
    line.served.store(call, Ordering::Relaxed);
    line.words().gate().answer(call);
    reach("domain: replied, before the wake-up");
}

/// Tells the caller, if it sleeps, that the reply is there.
#[inline]
pub(crate) fn tell(line: &Line) {
    let gate = line.words().gate();
    match gate.whom_to_tell() {
        Tell::Nothing => {}
        Tell::Wake => {
            let _ = futex::wake(gate.reply, 1);
        }
        Tell::Pipe => notify(line),
    }
    reach("domain: woke the caller");
}

/// Answers a call that will not be executed.
pub(crate) fn terminate(line: &Line, call: u32) {
    ReplyHead::new(Status::Terminated, 0).write(line.words(), 0);
    give_back(line, call);
    tell(line);
}
