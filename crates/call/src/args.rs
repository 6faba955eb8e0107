//! The arguments of a call, declared one by one.
//!
//! | | who writes it | copies of large ones |
//! |---|---|---|
//! | `input` | the caller, before | into the line or a buffer, and out of it: the domain trusts a private copy only |
//! | `output` | the callee; replaced only on success | likewise, the other way |
//! | `inout` | both; replaced only on success | both ways |
//! | `lend` | the caller, in place | none, unless the callee makes one |
//! | `give` | the caller, before; gone afterwards | none |

use crate::attributes::{Affinity, Attributes};
use crate::chain::Deadline;
use crate::line::MAX_ARGS;
use crate::memory::{Gift, Part};

/// One argument.
#[derive(Debug, Default)]
pub(crate) enum Arg<'a> {
    #[default]
    None,
    In(&'a [u8]),
    Out(&'a mut Vec<u8>, usize),
    InOut(&'a mut Vec<u8>, usize),
    Lend(Part<'a>),
    Give(Gift),
}

/// The arguments and attributes of one call.
///
/// ```
/// use peregrine_call::Call;
/// let (mut value, mut log) = (Vec::new(), b"so far".to_vec());
/// let call = Call::new().input(b"key").output(&mut value, 4096).inout(&mut log, 1024);
/// # drop(call);
/// ```
#[derive(Debug)]
#[must_use = "a call is made by `Client::call`"]
pub struct Call<'a> {
    pub(crate) args: [Arg<'a>; MAX_ARGS],
    pub(crate) count: usize,
    pub(crate) attributes: Attributes,
}

impl<'a> Call<'a> {
    /// No arguments, default attributes.
    pub fn new() -> Self {
        Self { args: Default::default(), count: 0, attributes: Attributes::default() }
    }

    fn push(mut self, arg: Arg<'a>) -> Self {
        assert!(self.count < MAX_ARGS, "a call has {MAX_ARGS} arguments at most: put several in one");
        self.args[self.count] = arg;
        self.count += 1;
        self
    }

    /// Bytes for the callee.
    ///
    /// # Panics
    /// If the call has eight arguments already; so do the other four.
    pub fn input(self, bytes: &'a [u8]) -> Self {
        self.push(Arg::In(bytes))
    }

    /// A result of `max_bytes` at most. Only its length travels and is paid for.
    pub fn output(self, into: &'a mut Vec<u8>, max_bytes: usize) -> Self {
        self.push(Arg::Out(into, max_bytes))
    }

    /// Bytes for the callee, and its result of `max_bytes` at most.
    pub fn inout(self, bytes: &'a mut Vec<u8>, max_bytes: usize) -> Self {
        self.push(Arg::InOut(bytes, max_bytes))
    }

    /// Memory that the callee may read in place until the call returns: a [`Buffer`](crate::Buffer) or a part of one.
    pub fn lend(self, part: impl Into<Part<'a>>) -> Self {
        self.push(Arg::Lend(part.into()))
    }

    /// Memory that becomes the domain's, whatever comes of the call once it has begun.
    pub fn give(self, gift: Gift) -> Self {
        self.push(Arg::Give(gift))
    }

    /// All attributes at once.
    pub const fn attributes(mut self, attributes: Attributes) -> Self {
        self.attributes = attributes;
        self
    }

    /// When the call must be done.
    pub const fn deadline(mut self, deadline: Deadline) -> Self {
        self.attributes.deadline = Some(deadline);
        self
    }

    /// Where the activation runs.
    pub const fn affinity(mut self, affinity: Affinity) -> Self {
        self.attributes.affinity = affinity;
        self
    }
}

impl Default for Call<'_> {
    fn default() -> Self {
        Self::new()
    }
}
