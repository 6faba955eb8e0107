//! The header of a line's last call, and what was found of it.
//!
//! Who calls again and again sends the same header again and again. What is found of one depends on nothing but its words, the
//! domain's portals and limits, and who the client is, none of which change while the activation has the line. So it is found once:
//! a call whose header is the same, word for word, is not decoded and checked again, nor is its thread's identity entered again.
//!
//! It is the private copy that is compared, never the line; and what does change from call to call is asked each time: the deadline,
//! whether the caller gave up, the arguments' bytes. A call of the short form has its descriptors in the header
//! (`short.rs`), so what they mean is found once too: a plan by which the next such call has its arguments copied at once. Of that, one thing can
//! change: what is lent may have been taken back. It is held as long as the activation is awake, weakly while it sleeps, and looked for again when it was
//! taken back.

use super::Inner;
use super::arguments::Plan;
use super::outcome::{Wrong, about, malformed, too_large};
use super::peer::Line;
use crate::chain::{ChainLink, Entered};
use crate::header::{Header, RawHeader};
use crate::line::MAX_ARGS;
use crate::portal::Handler;
use crate::reply::{ReplyHead, Status};

/// A header that was found to be in order, on the line that the activation has.
pub(crate) struct Known<'a> {
    raw: RawHeader,
    pub header: Header,
    pub handler: &'a dyn Handler,
    pub link: ChainLink,
    /// How the arguments are taken, of a call of the short form.
    pub plan: Option<Plan>,
    /// A call of the short form, with none of the attributes that cost something.
    pub is_quick: bool,
    /// The activation's thread is the caller's as long as nobody else's call comes: between two calls it runs nothing that asks.
    _entered: Entered,
}

impl<'a> Known<'a> {
    /// Checks a header, and makes its thread the running one. The last one known has been dropped.
    pub fn meet(domain: &'a Inner, line: &Line, raw: RawHeader, header: Header) -> Result<Self, Wrong> {
        let limits = &domain.limits;
        let Some(portal) = domain.portals.get(header.portal as usize) else {
            return Err(Status::NoPortal.into());
        };
        if line.peer.may_call.get(header.portal as usize) != Some(&true) {
            return Err(Status::Access.into());
        }
        if header.depth > limits.depth {
            return Err(Wrong(ReplyHead::new(Status::Depth, limits.depth)));
        }
        if usize::from(header.args) > MAX_ARGS {
            return Err(malformed(about::COUNT));
        }
        let payload_bytes = header.payload_bytes as usize;
        if payload_bytes > limits.argument_bytes {
            return Err(too_large(about::ARGUMENTS, payload_bytes as u64, limits.argument_bytes as u64));
        }
        let link = ChainLink { chain: header.chain, depth: header.depth, deadline: header.deadline };
        let costs = header.charge || header.priority || header.deadline.is_some() || header.spill != 0;
        let plan = header.short.map(|short| Plan::of(line, &header, short)).transpose()?;
        Ok(Self {
            raw,
            header,
            handler: &*portal.handler,
            link,
            is_quick: plan.is_some() && !costs,
            plan,
            _entered: Entered::new(link),
        })
    }

    /// Whether these are its words.
    #[inline(always)]
    pub fn is(&self, raw: &RawHeader) -> bool {
        self.raw.is(raw)
    }
}
