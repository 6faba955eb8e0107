//! Filling a line with a call, and taking the results out.
//!
//! What the domain wrote is copied once and checked against what was declared before anything of the caller's changes: a
//! result that is longer than its bound, or lies outside the memory, makes the whole reply invalid.

use super::connection::Connection;
use super::line::{Line, Spill};
use crate::args::{Arg, Call};
use crate::attributes::Attributes;
use crate::chain::{Caller, Deadline};
use crate::domain::execute::about;
use crate::error::{CallError, Failure, Refusal};
use crate::line::{
    self, AWAKE, Descriptor, Header, Kind, MAX_ARGS, MAX_CHARGES, NOTIFY, PARKED, PAYLOAD_AT, ReplyHead,
    Status, Words, align_argument, read_charge, results_at,
};
use crate::memory::Forget;
use crate::portal::PortalId;
use crate::shared::{Shared, map_from_peer};
use crate::socket::FromClient;
use crate::step::reach;
use crate::usage;
use peregrine_base::Protection;
use peregrine_base::sync::{Ordering, fence};
use peregrine_sys::{futex, process};
use std::os::fd::AsFd;
use std::sync::Arc;

/// A call that is under way on a line.
pub(crate) struct Sent {
    pub portal: PortalId,
    pub call: u32,
    pub deadline: Option<Deadline>,
    pub attributes: Attributes,
    /// Where results go, and whether that is the spill buffer.
    results_at: usize,
    spilled: bool,
    count: usize,
    charge: bool,
    depth: u32,
}

impl Line {
    /// Fills the line and rings; with `notify` the reply is to be told by the line's pipe.
    pub fn send(
        &mut self,
        connection: &Arc<Connection>,
        portal: PortalId,
        call: &mut Call<'_>,
        caller: Caller,
        notify: bool,
    ) -> Result<Sent, CallError> {
        let deadline = Deadline::earlier(call.attributes.deadline, caller.link.deadline);
        if deadline.is_some_and(|d| d.left().is_none()) {
            return Err(CallError::Deadline);
        }
        let (payload_bytes, result_bytes) = sizes(call);
        let limit = connection.argument_bytes;
        if payload_bytes as u64 > limit {
            return Err(CallError::TooLarge {
                what: "arguments",
                asked_bytes: payload_bytes as u64,
                limit_bytes: limit,
            });
        }
        let room = self.shared.len_bytes();
        let must_spill = payload_bytes > room - PAYLOAD_AT;
        // Results that once did not fit the line will again: memory that is kept beats memory made for each reply.
        let expected = result_bytes.min(self.grown);
        let spilled = must_spill || results_at(PAYLOAD_AT, payload_bytes) + expected > room;
        if spilled {
            self.make_room(connection, payload_bytes, result_bytes)?;
        }
        let payload_at = if spilled { 0 } else { PAYLOAD_AT };
        self.fill(connection, call, deadline, payload_at, spilled)?;
        reach("client: arguments written");
        let link = caller.link;
        let attributes = call.attributes;
        let charge = attributes.charge || caller.charge;
        let header = Header {
            portal: portal.0,
            args: call.count as u8,
            charge,
            priority: attributes.priority,
            affinity: attributes.affinity,
            deadline,
            chain: link.chain,
            depth: link.depth.saturating_add(1),
            cpu: process::current_cpu() as u16,
            nice: if attributes.priority { process::nice_of(0).unwrap_or(0) as i8 } else { 0 },
            payload_bytes: payload_bytes as u32,
            spill: if spilled { self.spill.as_ref().map_or(0, |s| s.id) } else { 0 },
        };
        header.write(self.words());
        self.call = self.call.wrapping_add(1);
        let sent = Sent {
            portal,
            call: self.call,
            deadline,
            attributes,
            results_at: results_at(payload_at, payload_bytes),
            spilled,
            count: call.count,
            charge,
            depth: header.depth,
        };
        // Not asleep yet: an activation that takes the core at once and replies before we sleep saves its wake-up.
        let wait = if notify { NOTIFY } else { AWAKE };
        self.ring(connection, wait)?;
        Ok(sent)
    }

    /// Publishes the call and wakes whoever waits for it.
    fn ring(&self, connection: &Connection, wait: u32) -> Result<(), CallError> {
        let words = self.words();
        words.wait().store(wait, Ordering::Relaxed);
        // Release: the activation's Acquire load of `call` sees our half.
        words.call().store(self.call, Ordering::Release);
        reach("client: call published");
        // Pairs with the fence in the activation's `sleep`, and in `Pool::leave`: see the top of `line.rs`.
        fence(Ordering::SeqCst);
        match words.mode().load(Ordering::Relaxed) {
            PARKED => {
                let _ = futex::wake(words.call(), 1);
            }
            AWAKE => {}
            _ => connection.tell(&FromClient::Ring { line: self.index }, None)?,
        }
        reach("client: rang");
        Ok(())
    }

    fn fill(
        &self,
        connection: &Connection,
        call: &mut Call<'_>,
        deadline: Option<Deadline>,
        payload_at: usize,
        spilled: bool,
    ) -> Result<(), CallError> {
        let short = CallError::BadReply("memory shorter than was agreed");
        let memory =
            if spilled { self.spill.as_ref().map_or(&self.shared, |s| &s.shared) } else { &self.shared };
        let mut at = payload_at;
        for (index, arg) in call.args[..call.count].iter_mut().enumerate() {
            let d = |kind, id, len: usize, bound: usize| Descriptor {
                kind,
                id,
                len: len as u64,
                bound: bound as u64,
            };
            let mut put = |bytes: &[u8]| {
                let begin = align_argument(at);
                at = begin + bytes.len();
                memory.write(begin, bytes).ok_or(short.clone())
            };
            let descriptor = match arg {
                Arg::None => continue,
                Arg::In(bytes) => {
                    put(bytes)?;
                    d(Kind::In, 0, bytes.len(), 0)
                }
                Arg::Out(_, bound) => d(Kind::Out, 0, 0, *bound),
                Arg::InOut(bytes, bound) => {
                    put(bytes)?;
                    d(Kind::InOut, 0, bytes.len(), *bound)
                }
                Arg::Lend(part) => {
                    if !part.buffer.home.is(std::ptr::from_ref(connection).addr() as u64) {
                        return Err(Refusal::NoBuffer(part.buffer.id).into());
                    }
                    d(Kind::Lend, part.buffer.id, part.len_bytes, part.offset_bytes)
                }
                Arg::Give(_) => {
                    let Arg::Give(gift) = std::mem::take(arg) else { continue };
                    let (id, len) = connection.register_gift(gift, deadline)?;
                    d(Kind::Give, id, len, 0)
                }
            };
            descriptor.write(self.words(), index);
        }
        Ok(())
    }

    /// Sees to a spill buffer that holds the payload, and the declared results if they are not excessive.
    fn make_room(
        &mut self,
        connection: &Arc<Connection>,
        payload_bytes: usize,
        result_bytes: usize,
    ) -> Result<(), CallError> {
        // A bound may be generous: as much as came before, or as much as goes in, is a better guess at what will come.
        let wanted = results_at(0, payload_bytes) + result_bytes.min(self.grown.max(payload_bytes));
        if self.spill.as_ref().is_some_and(|spill| spill.shared.len_bytes() >= wanted) {
            return Ok(());
        }
        if let Some(old) = self.spill.take() {
            connection.forget(old.id);
        }
        let (shared, id) = connection.register_buffer(wanted.next_power_of_two().max(1 << 20), true)?;
        self.spill = Some(Spill { shared, id });
        Ok(())
    }

    /// Reads what came of a call whose reply is there.
    pub fn take_results(
        &mut self,
        connection: &Connection,
        sent: &Sent,
        call: &mut Call<'_>,
    ) -> Result<(), CallError> {
        let words = self.words();
        let head = ReplyHead::read(words, sent.count.max(2));
        let status = head.status.ok_or(CallError::BadReply("a status that stands for nothing"))?;
        if sent.charge {
            take_charges(words, connection.id, &head);
        }
        match status {
            Status::Done => {
                let memory = match (sent.spilled, &self.spill) {
                    (true, Some(spill)) => &spill.shared,
                    _ => &self.shared,
                };
                copy_out(memory, sent.results_at, &head, call)
            }
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
        }
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

/// Bytes of payload, aligned as they will lie, and the sum of the declared bounds of results.
fn sizes(call: &Call<'_>) -> (usize, usize) {
    let (mut payload, mut results) = (0usize, 0usize);
    for arg in &call.args[..call.count] {
        match arg {
            Arg::In(bytes) => payload = align_argument(payload) + bytes.len(),
            Arg::InOut(bytes, bound) => {
                payload = align_argument(payload) + bytes.len();
                results = with_bound(results, *bound);
            }
            Arg::Out(_, bound) => results = with_bound(results, *bound),
            _ => {}
        }
    }
    (payload, results)
}

/// `results` and one more of at most `bound` bytes; a caller that takes whatever comes says `usize::MAX`, each time.
fn with_bound(results: usize, bound: usize) -> usize {
    results.checked_next_multiple_of(8).map_or(usize::MAX, |at| at.saturating_add(bound))
}

/// Checks all lengths, then copies all results.
fn copy_out(
    memory: &Shared,
    results_at: usize,
    head: &ReplyHead,
    call: &mut Call<'_>,
) -> Result<(), CallError> {
    let args = &mut call.args[..call.count];
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
            memory
                .append_to(at, len as usize, into)
                .ok_or(CallError::BadReply("results outside their memory"))?;
        }
        at += len as usize;
    }
    Ok(())
}

fn take_charges(words: Words<'_>, domain: u64, head: &ReplyHead) {
    usage::add(domain, line::cpu_ns(words).load(Ordering::Relaxed));
    for row in 0..(head.charge_rows as usize).min(MAX_CHARGES) {
        let (domain, ns) = read_charge(words, row);
        usage::add(domain, ns);
    }
}

const _: () = assert!(MAX_ARGS >= 2, "errors use two lengths");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_without_a_bound_add_up_to_no_bound() {
        let (mut a, mut b, mut c) = (Vec::new(), b"abc".to_vec(), Vec::new());
        let call = Call::new().output(&mut a, usize::MAX).inout(&mut b, usize::MAX).output(&mut c, 8);
        assert_eq!(sizes(&call), (3, usize::MAX));
    }
}
