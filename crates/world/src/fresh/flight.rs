//! One call under way: how it gets from a thread's request to being sent, and to its outcome.

use super::connections::{Connection, Connections, PATIENCE};
use super::{MOST_ARGUMENTS, Piece, Portal, Request, What};
use peregrine_call::chain::Caller;
use peregrine_call::{Buffer, Call, CallError, Deadline, Finding, Gift, Offering, Pending};
use peregrine_sys::timer::monotonic_ns;
use std::os::fd::RawFd;
use std::sync::Arc;

/// How often a call without news is looked at for its deadline or its domain's death, in ns.
const LOOK_NS: u64 = 10_000_000;
/// How soon a call that is being set up is looked at again, at first.
const SOON_NS: u64 = 50_000;

/// What a call borrows beyond the memory of its thread. The box is leaked while the call is under way and taken back when it ends.
#[derive(Default)]
struct Home {
    /// Copies of what goes in, if the call could not be sent at once.
    inputs: [Vec<u8>; MOST_ARGUMENTS],
    /// One for each argument that is a result, in their order.
    results: [Vec<u8>; MOST_ARGUMENTS],
    /// By the place among the arguments.
    loans: [Option<Arc<Buffer>>; MOST_ARGUMENTS],
}

/// A call under way, or memory to lend that a domain is being told of.
pub(super) struct Flight {
    pub slot: u32,
    pub connection: usize,
    home: *mut Home,
    stage: Stage,
    deadline: Option<Deadline>,
    begun: u64,
    /// When to look at it next.
    pub look_at: u64,
    /// How often its pipe told of an outcome that was not there.
    pub in_vain: u8,
}

enum Stage {
    /// There is no connection yet, or nobody knows the portal's number.
    Finding {
        name: String,
        version: u64,
        finding: Option<Finding>,
        caller: Caller,
        call: Call<'static>,
    },
    Under(Pending<'static>),
    /// Memory to lend, of so many bytes; offered once there is a connection.
    Lending(usize, Option<Offering>),
    Lent(Buffer),
    /// It could not even be begun.
    Failed(CallError),
    Over,
}

impl Drop for Flight {
    fn drop(&mut self) {
        // The call, which borrows the rest, first.
        self.stage = Stage::Over;
        // SAFETY: made by `Box::into_raw` for this flight alone.
        drop(unsafe { Box::from_raw(self.home) });
    }
}

impl Flight {
    /// Begins the call that `request` asks for; whether it could be begun is told by [`advance`](Self::advance).
    ///
    /// # Safety
    /// The memory that `request` names is in place until this returns.
    pub unsafe fn begin(
        slot: u32,
        at: usize,
        connection: &mut Connection,
        request: &Request,
        loans: [Option<Arc<Buffer>>; MOST_ARGUMENTS],
        deadline: Option<Deadline>,
    ) -> Self {
        let home = Box::into_raw(Box::new(Home { loans, ..Home::default() }));
        let (begun, stage) = (monotonic_ns(), Stage::Over);
        // Looked at once more at once, unless it was sent.
        let mut flight = Self { slot, connection: at, home, stage, deadline, begun, look_at: 0, in_vain: 0 };
        if let What::Lend(len_bytes) = request.what {
            flight.stage = Stage::Lending(len_bytes, None);
            return flight;
        }
        // SAFETY: as promised.
        if let Err(e) = unsafe { flight.prepare(connection, request, &*request.portal) } {
            flight.stage = Stage::Failed(e);
        }
        flight
    }

    /// The results of a call that has ended well.
    pub fn results(&self) -> &[Vec<u8>] {
        // SAFETY: made for this flight alone; the call, which borrows it too, has ended.
        unsafe { &(*self.home).results }
    }

    /// The memory to lend that this was about, once the domain knows of it.
    pub fn take_lent(&mut self) -> Option<Buffer> {
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Lent(buffer) => Some(buffer),
            other => {
                self.stage = other;
                None
            }
        }
    }

    /// Whether a call lends memory that may be of a connection which is no more.
    pub fn has_loans(&self) -> bool {
        // SAFETY: made for this flight alone, and never changed.
        unsafe { (*self.home).loans.iter().any(Option::is_some) }
    }

    /// The call, if it has been sent or is about to be.
    pub const fn pending(&self) -> Option<&Pending<'static>> {
        match &self.stage {
            Stage::Under(pending) => Some(pending),
            _ => None,
        }
    }

    /// What it has open, besides what its connection has.
    pub fn descriptors(&self) -> Vec<RawFd> {
        match &self.stage {
            Stage::Finding { call, .. } => call.descriptors(),
            Stage::Under(pending) => pending.descriptors(),
            Stage::Lending(_, offering) => offering.iter().filter_map(Offering::descriptor).collect(),
            Stage::Lent(_) | Stage::Failed(_) | Stage::Over => Vec::new(),
        }
    }

    pub fn is_sent(&self) -> bool {
        self.pending().is_some_and(Pending::is_sent)
    }

    /// Goes on with it; the outcome, if there is one. Never waits.
    pub fn advance(&mut self, connections: &mut Connections, now: u64) -> Option<Result<(), CallError>> {
        let outcome = self.step(connections).transpose();
        let since = now.saturating_sub(self.begun);
        if outcome.is_some() || self.is_sent() {
            self.look_at = now + LOOK_NS;
            return outcome;
        }
        if self.deadline.is_some_and(|d| d.left().is_none()) {
            return Some(Err(CallError::Deadline));
        }
        // A call that waits for another's line is waiting for no answer of the domain's.
        if self.pending().is_none_or(Pending::awaits_answer) {
            if since > PATIENCE.as_nanos() as u64 {
                let at = connections.get(self.connection).map(|c| c.path().to_owned()).unwrap_or_default();
                let reason = format!("it has not answered for {PATIENCE:?}; the call was not sent");
                return Some(Err(CallError::Unreachable { at, reason }));
            }
        } else {
            self.begun = now;
        }
        self.look_at = now + (since / 4).clamp(SOON_NS, LOOK_NS);
        None
    }

    fn step(&mut self, connections: &mut Connections) -> Result<Option<()>, CallError> {
        if let Stage::Finding { name, version, finding, .. } = &mut self.stage {
            let Some(connection) = connections.get(self.connection) else {
                return Err(CallError::DomainDied);
            };
            if let Some(found) = finding.as_mut().and_then(Finding::try_finish) {
                connection.learn(name, *version, found?);
                *finding = None;
            }
            let portal = connection.portal(name, *version);
            let Some(client) = connection.client()? else { return Ok(None) };
            let Some(portal) = portal else {
                if finding.is_none() {
                    // It is asked for at the next look.
                    *finding = Some(client.look_for(name, *version)?);
                }
                return match finding.as_mut().and_then(Finding::try_finish) {
                    Some(Err(e)) => Err(e),
                    Some(Ok(id)) => {
                        connection.learn(name, *version, id);
                        *finding = None;
                        Ok(None)
                    }
                    None => Ok(None),
                };
            };
            let client = client.clone();
            if let Stage::Finding { caller, call, .. } = std::mem::replace(&mut self.stage, Stage::Over) {
                self.stage = Stage::Under(client.start_for(caller, portal, call)?);
            }
        }
        if let Stage::Lending(len_bytes, offering) = &mut self.stage {
            let Some(connection) = connections.get(self.connection) else {
                return Err(CallError::DomainDied);
            };
            let Some(client) = connection.client()? else { return Ok(None) };
            let offering = match offering {
                Some(offering) => offering,
                None => offering.insert(client.offer(*len_bytes)?),
            };
            let Some(buffer) = offering.try_finish().transpose()? else { return Ok(None) };
            self.stage = Stage::Lent(buffer);
            return Ok(Some(()));
        }
        match &mut self.stage {
            Stage::Under(pending) => pending.try_finish().transpose(),
            Stage::Failed(e) => Err(e.clone()),
            Stage::Finding { .. } | Stage::Lending(..) | Stage::Lent(_) | Stage::Over => Ok(None),
        }
    }

    /// Sends the call that `request` asks for, if nothing is missing; otherwise copies what it needs.
    ///
    /// # Safety
    /// The memory that `request` names is in place.
    unsafe fn prepare(
        &mut self,
        connection: &mut Connection,
        request: &Request,
        portal: &Portal,
    ) -> Result<(), CallError> {
        let known = connection.portal(&portal.name, portal.version);
        if let (Some(client), Some(id)) = (connection.client()?, known)
            && !request.gives()
        {
            // SAFETY: as promised. What is sent does not look at the arguments again.
            let call = unsafe { self.call(request, false) }?;
            if let Ok(pending) = client.start_at_once(request.caller, id, call)? {
                self.stage = Stage::Under(pending);
                self.look_at = self.begun + LOOK_NS;
                return Ok(());
            }
        }
        // SAFETY: as promised, for the moment in which it is copied.
        let call = unsafe { self.call(request, true) }?;
        let (name, version) = (portal.name.clone(), portal.version);
        self.stage = Stage::Finding { name, version, finding: None, caller: request.caller, call };
        Ok(())
    }

    /// The call that `request` asks for, of the thread's memory or of copies of it.
    ///
    /// # Safety
    /// That memory is in place; and without `copied` the call is not looked at when it is not any more. The last one that this returned is
    /// gone.
    unsafe fn call(&mut self, request: &Request, copied: bool) -> Result<Call<'static>, CallError> {
        // SAFETY: taken back by the flight's drop, after the call that borrows it.
        let Home { inputs, results, loans } = unsafe { &mut *self.home };
        let (mut inputs, mut results) = (inputs.iter_mut(), results.iter_mut());
        let mut call = Call::new().attributes(request.attributes);
        for (piece, loan) in request.pieces[..request.count].iter().zip(loans) {
            let mut result = || {
                let result = results.next().expect("one an argument");
                result.clear();
                result
            };
            // SAFETY: the thread's memory, in place as promised.
            let bytes = |(at, len): (*const u8, usize)| unsafe { core::slice::from_raw_parts(at, len) };
            let mut input = |piece| -> &'static [u8] {
                if !copied {
                    return bytes(piece);
                }
                let copy = inputs.next().expect("one an argument");
                copy.clear();
                copy.extend_from_slice(bytes(piece));
                copy
            };
            call = match *piece {
                Piece::Input(at) => call.input(input(at)),
                Piece::Lent(at) => call.lend(input(at)),
                Piece::Output(most) => call.output(result(), most),
                Piece::InOut(at, most) => {
                    let home = result();
                    home.extend_from_slice(bytes(at));
                    call.inout(home, most)
                }
                Piece::Loan(_, offset, len) => {
                    let lost = CallError::BadArgument("a loan that is not there");
                    call.lend(loan.as_ref().ok_or(lost)?.part(offset, len)?)
                }
                Piece::Given(at) => {
                    let mut gift = Gift::new(at.1)?;
                    gift.copy_from_slice(bytes(at));
                    call.give(gift)
                }
            };
        }
        Ok(call)
    }
}
