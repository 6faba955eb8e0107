//! The shortest way: a call of the short form (`short.rs`) to an activation that looks for it on another core.
//!
//! Caller and activation are awake, and what takes time is that cache lines change cores: the first of the line, there and back, and those that
//! the arguments fill. All that is added to that is on the critical path of both sides, so a call is looked at once for whether it needs more, and goes
//! without what it does not need: no plan for its arguments, no clock, and no question on which core it is. The last is known from the call before: a line
//! is *hot* when its last call was answered while its caller looked. A thread that was moved since finds out when the reply does not come at once, and
//! from then on the call is as any other (`transfer.rs`, `wait.rs`, `results.rs`).
//!
//! What the other side sees is the same, word for word.

use super::connection::Connection;
use super::line::{Guard, Line};
use super::results::copy_here;
use super::transfer::{Manner, Sent};
use super::wait;
use crate::args::Call;
use crate::attributes::Affinity;
use crate::chain::{Caller, ChainLink, Deadline};
use crate::error::CallError;
use crate::gate::{AWAKE, Bell};
use crate::header::Header;
use crate::line::{SHORT_PAYLOAD_AT, results_at};
use crate::portal::PortalId;
use crate::reply::ReplyHead;
use crate::short::Shortened;
use crate::step::reach;
use peregrine_sys::process;
use std::sync::Arc;

impl Connection {
    /// Makes a call, from beginning to end.
    pub fn call(self: &Arc<Self>, portal: PortalId, call: &mut Call<'_>) -> Result<(), CallError> {
        let caller = Caller::current();
        if is_plain(call, &caller)
            && let Some(line) = self.warm.reserve()
        {
            if line.is_hot.get() && call.args.is_empty() {
                return self.call_hot(line, portal, call, caller, &Shortened::default());
            }
            if line.is_hot.get()
                && let Some(shortened) = line.fill_short(self, call)
            {
                return self.call_hot(line, portal, call, caller, &shortened);
            }
            self.warm.unreserve();
            return self.call_on(Guard::new(self, line), portal, call, caller);
        }
        let deadline = Deadline::earlier(call.attributes.deadline, caller.link.deadline);
        self.call_on(self.acquire(deadline)?, portal, call, caller)
    }

    /// Makes a call on a line.
    #[inline]
    fn call_on(
        self: &Arc<Self>,
        mut line: Guard<'_>,
        portal: PortalId,
        call: &mut Call<'_>,
        caller: Caller,
    ) -> Result<(), CallError> {
        let mut sent = line.send(self, portal, call, caller, Manner::Quick)?;
        wait::for_reply(self, &line, &sent)?;
        if line.has_stalled(&sent) {
            reach("client: sends it again");
            sent = line.send(self, portal, call, caller, Manner::Whole)?;
            wait::for_reply(self, &line, &sent)?;
        }
        let outcome = line.take_results(self, &sent, call, crate::usage::add);
        line.release();
        outcome
    }

    /// Makes a call of the short form on a line that is hot.
    #[inline(always)]
    fn call_hot(
        self: &Arc<Self>,
        mut line: Box<Line>,
        portal: PortalId,
        call: &mut Call<'_>,
        caller: Caller,
        shortened: &Shortened,
    ) -> Result<(), CallError> {
        reach("client: arguments written");
        let bell = line.send_hot(portal, &caller.link, call.args.len(), shortened);
        if bell == Bell::Nothing
            && line.look()
            && let Some(here) = ReplyHead::done_here(line.words(), call.args.len())
        {
            let outcome = if call.args.is_empty() { Ok(()) } else { copy_here(line.words(), here, call) };
            self.put_back_reserved(line);
            return outcome;
        }
        self.warm.unreserve();
        self.finish(Guard::new(self, line), bell, portal, call, caller, shortened)
    }

    /// Goes on with a call that was not done at once.
    #[cold]
    fn finish(
        self: &Arc<Self>,
        mut line: Guard<'_>,
        bell: Bell,
        portal: PortalId,
        call: &mut Call<'_>,
        caller: Caller,
        shortened: &Shortened,
    ) -> Result<(), CallError> {
        let sent = Sent {
            portal,
            call: line.call,
            cpu: process::current_cpu() as u16,
            deadline: None,
            attributes: call.attributes,
            results_at: results_at(SHORT_PAYLOAD_AT, shortened.payload_bytes),
            spilled: false,
            count: call.args.len(),
            charge: false,
            depth: caller.link.depth.saturating_add(1),
            in_pieces: false,
        };
        line.due = None;
        line.ring(self, bell)?;
        if !line.is_over() {
            wait::for_reply(self, &line, &sent)?;
        }
        let outcome = line.take_results(self, &sent, call, crate::usage::add);
        line.release();
        outcome
    }
}

/// Whether there is nothing to it but portal and arguments.
#[inline]
fn is_plain(call: &Call<'_>, caller: &Caller) -> bool {
    matches!(call.attributes.affinity, Affinity::Apart)
        && call.attributes.are_free()
        && caller.link.deadline.is_none()
        && !caller.charge
}

impl Line {
    /// Hands the line over with a call whose arguments are there; what is to be done for the activation to notice it, by a guess.
    #[inline]
    fn send_hot(&mut self, portal: PortalId, link: &ChainLink, args: usize, shortened: &Shortened) -> Bell {
        let header = Header {
            portal: portal.0,
            args: args as u8,
            charge: false,
            priority: false,
            affinity: Affinity::Apart,
            deadline: None,
            chain: link.chain,
            depth: link.depth.saturating_add(1),
            cpu: self.cpu,
            nice: 0,
            payload_bytes: shortened.payload_bytes as u32,
            spill: 0,
            short: Some(shortened.short),
            in_pieces: false,
        };
        self.head(&header);
        self.call = self.call.wrapping_add(1);
        let gate = self.words().gate();
        gate.publish(self.call, AWAKE);
        reach("client: call published");
        reach("client: waits");
        gate.guess()
    }
}
