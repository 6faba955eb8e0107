//! Filling a line with a call.

use super::connection::{Connection, buffer_of, hands_over};
use super::line::{Line, Spill};
use crate::args::{Arg, Call, Lend};
use crate::attributes::{Affinity, Attributes};
use crate::chain::{Caller, Deadline};
use crate::error::{CallError, Refusal};
use crate::gate::{AWAKE, Bell, NOTIFY};
use crate::header::Header;
use crate::line::{Descriptor, Kind, PAYLOAD_AT, SHORT_PAYLOAD_AT, align_argument, results_at};
use crate::memory::Forget;
use crate::pieces::{LEAST_BYTES, PIECE_BYTES, written};
use crate::portal::PortalId;
use crate::shared::Shared;
use crate::short::Shortened;
use crate::socket::FromClient;
use crate::step::reach;
use peregrine_base::sync::Ordering;
use peregrine_sys::{futex, process};
use std::sync::Arc;

/// A call that is under way on a line.
pub(crate) struct Sent {
    pub portal: PortalId,
    pub call: u32,
    /// The caller's core when it was sent.
    pub cpu: u16,
    pub deadline: Option<Deadline>,
    pub attributes: Attributes,
    /// Where results go, and whether that is the spill buffer.
    pub results_at: usize,
    pub spilled: bool,
    /// Arguments.
    pub count: usize,
    pub charge: bool,
    pub depth: u32,
    pub in_pieces: bool,
}

/// How a call is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Manner {
    /// Its caller waits for the reply, and may write arguments when it is published already.
    Quick,
    /// Its caller waits, and has written all of it before.
    Whole,
    /// The reply is told by the line's pipe.
    Told,
}

/// When the bytes of a call are written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bytes {
    Now,
    /// By [`Line::write_pieces`], after the call is published.
    Later,
}

/// Where the bytes of a call go.
pub(crate) struct Plan {
    payload_bytes: usize,
    /// Whether to the spill buffer.
    spilled: bool,
    /// Bytes of a spill buffer to be had first.
    pub room: Option<usize>,
}

impl Line {
    /// Fills the line and rings.
    #[inline]
    pub fn send(
        &mut self,
        connection: &Arc<Connection>,
        portal: PortalId,
        call: &mut Call<'_>,
        caller: Caller,
        manner: Manner,
    ) -> Result<Sent, CallError> {
        let deadline = Deadline::earlier(call.attributes.deadline, caller.link.deadline);
        if deadline.is_some_and(|d| d.left().is_none()) {
            return Err(CallError::Deadline);
        }
        let Plan { payload_bytes, spilled, room } = self.plan(connection, call)?;
        if let Some(bytes) = room {
            let (shared, id) = connection.register_buffer(bytes, true, deadline)?;
            self.take_room(connection, shared, id);
        }
        let link = caller.link;
        let attributes = call.attributes;
        let charge = attributes.charge || caller.charge;
        let may_be_short = !spilled && !charge && deadline.is_none() && attributes.are_free();
        let short = if may_be_short { Shortened::of(&call.args, |_, _| Some(()), |_| true) } else { None };
        let short = short.map(|shortened| shortened.short);
        let payload_at = match short {
            _ if spilled => 0,
            Some(_) => SHORT_PAYLOAD_AT,
            None => PAYLOAD_AT,
        };
        let notify = manner == Manner::Told;
        let in_pieces =
            spilled && manner == Manner::Quick && !charge && self.is_worth_pieces(call, payload_bytes);
        let bytes = if in_pieces { Bytes::Later } else { Bytes::Now };
        self.fill(connection, call, deadline, payload_at, spilled, short.is_none(), bytes)?;
        reach("client: arguments written");
        let header = Header {
            portal: portal.0,
            args: call.args.len() as u8,
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
            short,
            in_pieces,
        };
        self.head(&header);
        if in_pieces {
            // Published with the call.
            written(self.words()).store(0, Ordering::Relaxed);
        }
        self.call = self.call.wrapping_add(1);
        self.cpu = header.cpu;
        let sent = Sent {
            portal,
            call: self.call,
            cpu: header.cpu,
            deadline,
            attributes,
            results_at: results_at(payload_at, payload_bytes),
            spilled,
            count: call.args.len(),
            charge,
            depth: header.depth,
            in_pieces,
        };
        // Not asleep yet: an activation that takes the core at once and replies before we sleep saves its wake-up.
        let gate = self.words().gate();
        gate.publish(self.call, if notify { NOTIFY } else { AWAKE });
        reach("client: call published");
        // Who spins for the reply asks properly when it does not come at once: see `gate.rs`.
        let spins = !notify && attributes.affinity == Affinity::Apart;
        let bell = if spins { gate.guess() } else { gate.bell() };
        self.due = deadline;
        if notify {
            self.owes_ring = !self.try_ring(connection, bell)?;
            return Ok(sent);
        }
        let rung = self.ring(connection, bell);
        if in_pieces {
            // Whatever became of the ring: who takes the call up waits for all of it.
            self.write_pieces(call, payload_bytes);
        }
        rung.map(|()| sent)
    }

    /// Whether the activation is on another core, by what it said, and there is enough to write for it to begin meanwhile.
    fn is_worth_pieces(&self, call: &Call<'_>, payload_bytes: usize) -> bool {
        let core = self.words().core().load(Ordering::Relaxed);
        call.attributes.affinity == Affinity::Apart
            && payload_bytes >= LEAST_BYTES
            && self.words().gate().guess() != Bell::Ring
            && core != 0
            && core != u32::from(process::current_cpu() as u16) + 1
            && self.spill.as_ref().is_some_and(|spill| spill.shared.len_bytes() >= payload_bytes)
            && !call.args.iter().any(|arg| matches!(arg, Arg::Give(_) | Arg::Given(..)))
    }

    /// Writes the payload of a call that is published, to the spill buffer. Nothing of it can fail: what is missing would be waited for.
    fn write_pieces(&self, call: &Call<'_>, payload_bytes: usize) {
        let Some(spill) = &self.spill else { return };
        let written = written(self.words());
        let mut at = 0;
        for arg in &*call.args {
            let bytes: &[u8] = match arg {
                Arg::In(bytes) | Arg::Lend(Lend::Bytes(bytes)) => bytes,
                Arg::InOut(bytes, _) => bytes,
                _ => continue,
            };
            at = align_argument(at);
            for piece in bytes.chunks(PIECE_BYTES) {
                // There is room: `is_worth_pieces`.
                let _ = spill.shared.write(at, piece);
                at += piece.len();
                // Release pairs with the Acquire in `Arrival::look`.
                written.store(at as u64, Ordering::Release);
                reach("client: piece written");
            }
        }
        written.store(payload_bytes as u64, Ordering::Release);
    }

    /// Writes the arguments of a call of the short form. `None`: it has none, or does not fit in the line, with results as they are to be expected;
    /// then what was written means nothing.
    #[inline(always)]
    pub fn fill_short(&self, connection: &Connection, call: &Call<'_>) -> Option<Shortened> {
        let id = std::ptr::from_ref(connection).addr() as u64;
        let put = |at, bytes: &[u8]| self.shared.write(SHORT_PAYLOAD_AT + at, bytes);
        let shortened = Shortened::of(&call.args, put, |buffer| buffer.home.is(id))?;
        // Results that once did not fit the line are given room elsewhere.
        (self.grown == 0 || !shortened.returns).then_some(shortened)
    }

    /// Where the bytes of `call` go, and what room that takes.
    pub fn plan(&self, connection: &Connection, call: &Call<'_>) -> Result<Plan, CallError> {
        let (payload_bytes, result_bytes) = sizes(call);
        let limit = connection.argument_bytes;
        if payload_bytes as u64 > limit {
            return Err(CallError::TooLarge {
                what: "arguments",
                asked_bytes: payload_bytes as u64,
                limit_bytes: limit,
            });
        }
        let in_line = self.shared.len_bytes();
        let must_spill = payload_bytes > in_line - PAYLOAD_AT;
        // Results that once did not fit the line will again: memory that is kept beats memory made for each reply.
        let expected = result_bytes.min(self.grown);
        let spilled = must_spill || results_at(PAYLOAD_AT, payload_bytes) + expected > in_line;
        // A bound may be generous: as much as came before, or as much as goes in, is a better guess at what will come.
        let wanted = results_at(0, payload_bytes) + result_bytes.min(self.grown.max(payload_bytes));
        let has_room = self.spill.as_ref().is_some_and(|spill| spill.shared.len_bytes() >= wanted);
        let room = (spilled && !has_room).then(|| wanted.next_power_of_two().max(1 << 20));
        Ok(Plan { payload_bytes, spilled, room })
    }

    /// Takes the memory that the domain has been told of, in place of what there was.
    pub fn take_room(&mut self, connection: &Connection, shared: Shared, id: u32) {
        if let Some(old) = self.spill.replace(Spill { shared, id }) {
            connection.forget(old.id);
        }
    }

    /// As [`ring`](Self::ring), without waiting for a domain that does not read; whether it is done.
    pub fn try_ring(&self, connection: &Connection, bell: Bell) -> Result<bool, CallError> {
        match bell {
            Bell::Ring => connection.post(&FromClient::Ring { line: self.index }, None),
            _ => self.ring(connection, bell).map(|()| true),
        }
    }

    /// Has the activation notice the call.
    #[inline]
    pub fn ring(&self, connection: &Connection, bell: Bell) -> Result<(), CallError> {
        match bell {
            Bell::Nothing => {}
            Bell::Wake => {
                let _ = futex::wake(self.words().gate().call, 1);
            }
            Bell::Ring => connection.tell(&FromClient::Ring { line: self.index }, self.due)?,
        }
        reach("client: rang");
        Ok(())
    }

    /// Writes the arguments, or leaves room for them, and if `describe` what they are.
    #[inline]
    #[expect(clippy::too_many_arguments, reason = "where they go, and what is written")]
    fn fill(
        &self,
        connection: &Connection,
        call: &mut Call<'_>,
        deadline: Option<Deadline>,
        payload_at: usize,
        spilled: bool,
        describe: bool,
        now: Bytes,
    ) -> Result<(), CallError> {
        let short = || CallError::BadReply("memory shorter than was agreed");
        let memory =
            if spilled { self.spill.as_ref().map_or(&*self.shared, |s| &s.shared) } else { &*self.shared };
        let mut at = payload_at;
        for (index, arg) in call.args.iter_mut().enumerate() {
            let d = |kind, id, len: usize, bound: usize| Descriptor {
                kind,
                id,
                len: len as u64,
                bound: bound as u64,
            };
            let mut put = |bytes: &[u8]| {
                let begin = align_argument(at);
                at = begin + bytes.len();
                match now {
                    Bytes::Now => memory.write(begin, bytes).ok_or_else(short),
                    Bytes::Later => Ok(()),
                }
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
                Arg::Lend(Lend::Bytes(bytes)) => {
                    put(bytes)?;
                    d(Kind::Lend, 0, bytes.len(), 0)
                }
                Arg::Lend(Lend::Elsewhere(..)) => {
                    return Err(CallError::BadArgument(
                        "it is memory of a runtime's own, and can be lent by that runtime's threads only",
                    ));
                }
                Arg::Lend(Lend::Part(part)) => {
                    if !part.buffer.home.is(std::ptr::from_ref(connection).addr() as u64) {
                        return Err(Refusal::NoBuffer(part.buffer.id).into());
                    }
                    d(Kind::Lend, part.buffer.id, part.len_bytes, part.offset_bytes)
                }
                Arg::Give(_) => {
                    let Arg::Give(giving) = std::mem::take(arg) else { continue };
                    let (inquiry, len) = hands_over(giving.into_gift()?);
                    d(Kind::Give, buffer_of(&connection.question(inquiry, deadline)?)?, len, 0)
                }
                Arg::Given(id, len) => d(Kind::Give, *id, *len, 0),
            };
            if describe {
                descriptor.write(self.words(), index);
            }
        }
        Ok(())
    }
}

/// Bytes of payload, aligned as they will lie, and the sum of the declared bounds of results.
#[inline]
fn sizes(call: &Call<'_>) -> (usize, usize) {
    let (mut payload, mut results) = (0usize, 0usize);
    for arg in &*call.args {
        match arg {
            Arg::In(bytes) | Arg::Lend(Lend::Bytes(bytes)) => payload = align_argument(payload) + bytes.len(),
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
