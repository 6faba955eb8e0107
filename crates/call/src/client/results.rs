//! Taking the results of a call out of its line.
//!
//! What the domain wrote is copied once and checked against what was declared before anything of the caller's changes: a
//! result that is longer than its bound, or lies outside the memory, makes the whole reply invalid.

use super::connection::Connection;
use super::line::Line;
use super::transfer::Sent;
use crate::args::{Arg, Call};
use crate::domain::outcome::about;
use crate::error::{CallError, Failure, Refusal};
use crate::line::{MAX_ARGS, PAYLOAD_AT, Words, align_argument};
use crate::reply::{self, HERE, HERE_BYTES, Here, MAX_CHARGES, ReplyHead, Status, read_charge};
use crate::shared::{Shared, map_from_peer};
use peregrine_base::Protection;
use peregrine_base::sync::Ordering;
use peregrine_sys::raw::Errno;
use std::os::fd::AsFd;

impl Line {
    /// Reads what came of a call whose reply is there; `charge` is told what it cost, by domain, if it is charged.
    pub fn take_results(
        &mut self,
        connection: &Connection,
        sent: &Sent,
        call: &mut Call<'_>,
        charge: impl FnMut(u64, u64),
    ) -> Result<(), CallError> {
        let words = self.words();
        if !sent.charge
            && let Some(here) = ReplyHead::done_here(words, sent.count)
        {
            return copy_here(words, here, call);
        }
        let head = ReplyHead::read(words, sent.count);
        let Some(status) = head.status else {
            return Err(CallError::BadReply("a status that stands for nothing"));
        };
        if sent.charge {
            take_charges(words, connection.id, &head, charge);
        }
        match status {
            Status::Done => {
                let memory = match (sent.spilled, &self.spill) {
                    (true, Some(spill)) => &spill.shared,
                    _ => &self.shared,
                };
                copy_out(memory, sent.results_at, &head, call)
            }
            Status::DoneHere => copy_here(words, Here(head.code), call),
            Status::DoneElsewhere => {
                let (len, fd) = connection.results_of(self.index, sent.call)?;
                let len =
                    usize::try_from(len).map_err(|_| CallError::BadReply("results of impossible size"))?;
                let memory = map_from_peer(fd.as_fd(), len, Protection::Read)
                    .map_err(|_| CallError::BadReply("results that could be taken away again"))?;
                self.grown = self.grown.max(len);
                copy_out(&memory, 0, &head, call)
            }
            Status::Failed => {
                let detail = self.detail(&head)?;
                Err(CallError::Callee(Failure { code: head.code, detail }))
            }
            Status::Panicked => {
                let message = self.detail(&head)?;
                Err(CallError::Panicked(String::from_utf8_lossy(&message).into_owned()))
            }
            Status::Access => Err(Refusal::Access(sent.portal).into()),
            Status::NoPortal => Err(Refusal::NoPortal(format!("number {}", sent.portal.0)).into()),
            Status::Malformed => {
                Err(Refusal::Protocol(format!("{} is not valid", about::name(head.code))).into())
            }
            Status::TooLarge => Err(CallError::TooLarge {
                what: about::name(head.code),
                asked_bytes: u64::from(head.lengths[0]),
                limit_bytes: u64::from(head.lengths[1]),
            }),
            Status::Depth => Err(Refusal::Depth { depth: sent.depth, limit: head.code }.into()),
            Status::NoBuffer => Err(Refusal::NoBuffer(head.code).into()),
            Status::GiftInUse => Err(Refusal::GiftInUse.into()),
            Status::Terminated => Err(CallError::Terminated),
            Status::Late => Err(CallError::Deadline),
            Status::Short => Err(CallError::System {
                what: about::lacking(head.lengths[0]),
                errno: Errno(head.code.cast_signed()),
            }),
            // Those that are in pieces are sent again instead.
            Status::Stalled => Err(CallError::BadReply("arguments that were there did not come")),
        }
    }

    /// Whether the domain gave up waiting for the pieces of a call: it is to be sent once more, whole.
    pub fn has_stalled(&self, sent: &Sent) -> bool {
        sent.in_pieces && ReplyHead::read(self.words(), 0).status == Some(Status::Stalled)
    }

    fn detail(&self, head: &ReplyHead) -> Result<Vec<u8>, CallError> {
        let len = head.lengths[0] as usize;
        let mut detail = Vec::new();
        if len > Failure::MAX_DETAIL {
            return Err(CallError::BadReply("detail beyond its bound"));
        }
        self.shared
            .append_to(PAYLOAD_AT, len, &mut detail)
            .ok_or(CallError::BadReply("detail outside the line"))?;
        Ok(detail)
    }
}

/// As [`copy_out`], of results that lie in the domain's half itself.
#[inline]
pub(super) fn copy_here(words: Words<'_>, here: Here, call: &mut Call<'_>) -> Result<(), CallError> {
    let args = &mut *call.args;
    let mut end = 0;
    for (index, arg) in args.iter().enumerate() {
        let bound = match arg {
            Arg::Out(_, bound) | Arg::InOut(_, bound) => *bound,
            _ => 0,
        };
        if here.len(index) > bound {
            return Err(CallError::BadReply("a result beyond its bound"));
        }
        end = align_argument(end) + here.len(index);
    }
    if end > HERE_BYTES {
        return Err(CallError::BadReply("results outside their memory"));
    }
    let mut at = HERE;
    for (index, arg) in args.iter_mut().enumerate() {
        at = align_argument(at);
        let len = here.len(index);
        if let Arg::Out(into, _) | Arg::InOut(into, _) = arg {
            into.clear();
            // Checked above.
            let _ = words.0.append_to(at, len, into);
        }
        at += len;
    }
    Ok(())
}

/// Checks all lengths, then copies all results.
#[inline]
fn copy_out(
    memory: &Shared,
    results_at: usize,
    head: &ReplyHead,
    call: &mut Call<'_>,
) -> Result<(), CallError> {
    let args = &mut *call.args;
    let mut end = results_at;
    for (arg, &len) in args.iter().zip(&head.lengths) {
        let bound = match arg {
            Arg::Out(_, bound) | Arg::InOut(_, bound) => *bound,
            _ => 0,
        };
        if len as usize > bound {
            return Err(CallError::BadReply("a result beyond its bound"));
        }
        end = align_argument(end) + len as usize;
    }
    if end > memory.len_bytes() {
        return Err(CallError::BadReply("results outside their memory"));
    }
    let mut at = results_at;
    for (arg, &len) in args.iter_mut().zip(&head.lengths) {
        at = align_argument(at);
        if let Arg::Out(into, _) | Arg::InOut(into, _) = arg {
            into.clear();
            if memory.append_to(at, len as usize, into).is_none() {
                return Err(CallError::BadReply("results outside their memory"));
            }
        }
        at += len as usize;
    }
    Ok(())
}

fn take_charges(words: Words<'_>, domain: u64, head: &ReplyHead, mut charge: impl FnMut(u64, u64)) {
    charge(domain, reply::cpu_ns(words).load(Ordering::Relaxed));
    for row in 0..(head.charge_rows as usize).min(MAX_CHARGES) {
        let (domain, ns) = read_charge(words, row);
        charge(domain, ns);
    }
}

const _: () = assert!(MAX_ARGS >= 2, "errors use two lengths");
