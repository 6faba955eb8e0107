//! The arguments of a call, declared one by one.
//!
//! | | who writes it | copies of large ones |
//! |---|---|---|
//! | `input` | the caller, before | into the line or a buffer, and out of it: the domain trusts a private copy only |
//! | `output` | the callee; replaced only on success | likewise, the other way |
//! | `inout` | both; replaced only on success | both ways |
//! | `lend` | the caller, in place | none, unless the callee makes one; of memory that is not a [`Buffer`], one, to where the callee reads it |
//! | `give` | the caller, before; gone afterwards | none; of bytes that are no [`Gift`], one |

use crate::arg_list::ArgList;
use crate::attributes::{Affinity, Attributes};
use crate::chain::Deadline;
use crate::error::CallError;
use crate::memory::{Buffer, Gift, Part};
use std::any::Any;
use std::os::fd::RawFd;
use zerocopy::{Immutable, IntoBytes};

/// What can be lent for the length of a call: a [`Buffer`] or a [`Part`] of one, which crosses in place; or plain data anywhere in the
/// caller's memory, which is copied once, to where the callee reads it.
///
/// ```
/// # fn f(call: peregrine_call::Call<'_>) {
/// let samples = [1.0f64, 2.5, -3.0];
/// let call = call.lend(&samples); // `LentSlice<f64>` for the callee
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Lending<'a>(pub(crate) Lend<'a>);

#[derive(Clone, Copy, Debug)]
pub(crate) enum Lend<'a> {
    Part(Part<'a>),
    Bytes(&'a [u8]),
    /// A runtime's own.
    Elsewhere(&'a (dyn Any + Send + Sync), usize, usize),
}

impl<'a> Lending<'a> {
    /// Memory that a runtime keeps for threads of its own, which only its own [carrier](crate::interface::Carrier) can lend: `of` is what it
    /// knows it by ([`Argument::Elsewhere`]). A [`Client`](crate::Client) refuses it.
    pub const fn elsewhere(of: &'a (dyn Any + Send + Sync), offset_bytes: usize, len_bytes: usize) -> Self {
        Self(Lend::Elsewhere(of, offset_bytes, len_bytes))
    }
}

impl<'a> From<Part<'a>> for Lending<'a> {
    fn from(part: Part<'a>) -> Self {
        Self(Lend::Part(part))
    }
}

impl<'a> From<&'a Buffer> for Lending<'a> {
    fn from(buffer: &'a Buffer) -> Self {
        Part::from(buffer).into()
    }
}

impl<'a, T: IntoBytes + Immutable> From<&'a [T]> for Lending<'a> {
    fn from(values: &'a [T]) -> Self {
        Self(Lend::Bytes(values.as_bytes()))
    }
}

impl<'a, T: IntoBytes + Immutable, const N: usize> From<&'a [T; N]> for Lending<'a> {
    fn from(values: &'a [T; N]) -> Self {
        values.as_slice().into()
    }
}

impl<'a, T: IntoBytes + Immutable> From<&'a Vec<T>> for Lending<'a> {
    fn from(values: &'a Vec<T>) -> Self {
        values.as_slice().into()
    }
}

/// What can be given: a [`Gift`], which crosses without being copied, or bytes anywhere in the caller's memory, which are copied once, into
/// memory that becomes the domain's.
#[derive(Debug)]
pub struct Giving<'a>(pub(crate) Give<'a>);

#[derive(Debug)]
pub(crate) enum Give<'a> {
    Gift(Gift),
    Bytes(&'a [u8]),
}

impl Give<'_> {
    pub fn into_gift(self) -> Result<Gift, CallError> {
        match self {
            Self::Gift(gift) => Ok(gift),
            Self::Bytes(bytes) => {
                let mut gift = Gift::new(bytes.len())?;
                gift.copy_from_slice(bytes);
                Ok(gift)
            }
        }
    }
}

impl From<Gift> for Giving<'_> {
    fn from(gift: Gift) -> Self {
        Self(Give::Gift(gift))
    }
}

impl<'a> From<&'a [u8]> for Giving<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self(Give::Bytes(bytes))
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for Giving<'a> {
    fn from(bytes: &'a [u8; N]) -> Self {
        bytes.as_slice().into()
    }
}

impl<'a> From<&'a Vec<u8>> for Giving<'a> {
    fn from(bytes: &'a Vec<u8>) -> Self {
        bytes.as_slice().into()
    }
}

/// One argument.
#[derive(Debug, Default)]
pub(crate) enum Arg<'a> {
    #[default]
    None,
    In(&'a [u8]),
    Out(&'a mut Vec<u8>, usize),
    InOut(&'a mut Vec<u8>, usize),
    Lend(Lend<'a>),
    Give(Give<'a>),
    /// A gift that the domain has, by its number there, and its bytes.
    Given(u32, usize),
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
    pub(crate) args: ArgList<'a>,
    pub(crate) attributes: Attributes,
}

impl<'a> Call<'a> {
    /// No arguments, default attributes.
    #[inline]
    pub fn new() -> Self {
        Self { args: ArgList::new(), attributes: Attributes::NONE }
    }

    /// The descriptors of its gifts, until they are handed over.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let gift = |arg: &Arg<'_>| match arg {
            Arg::Give(Give::Gift(gift)) => Some(gift.descriptor()),
            _ => None,
        };
        self.args.iter().filter_map(gift).collect()
    }

    #[inline]
    fn push(mut self, arg: Arg<'a>) -> Self {
        self.args.push(arg);
        self
    }

    /// Bytes for the callee.
    ///
    /// # Panics
    /// If the call has eight arguments already; so do the other four.
    #[inline]
    pub fn input(self, bytes: &'a [u8]) -> Self {
        self.push(Arg::In(bytes))
    }

    /// A result of `max_bytes` at most. Only its length travels and is paid for.
    #[inline]
    pub fn output(self, into: &'a mut Vec<u8>, max_bytes: usize) -> Self {
        self.push(Arg::Out(into, max_bytes))
    }

    /// Bytes for the callee, and its result of `max_bytes` at most.
    #[inline]
    pub fn inout(self, bytes: &'a mut Vec<u8>, max_bytes: usize) -> Self {
        self.push(Arg::InOut(bytes, max_bytes))
    }

    /// Memory that the callee may read until the call returns: a [`Buffer`] or a part of one, in place, or a slice of plain data, copied once.
    #[inline]
    pub fn lend(self, what: impl Into<Lending<'a>>) -> Self {
        self.push(Arg::Lend(what.into().0))
    }

    /// Memory that becomes the domain's, whatever comes of the call once it has begun: a [`Gift`], or a copy of bytes.
    #[inline]
    pub fn give(self, what: impl Into<Giving<'a>>) -> Self {
        self.push(Arg::Give(what.into().0))
    }

    /// All attributes at once.
    #[inline]
    pub const fn attributes(mut self, attributes: Attributes) -> Self {
        self.attributes = attributes;
        self
    }

    /// When the call must be done.
    #[inline]
    pub const fn deadline(mut self, deadline: Deadline) -> Self {
        self.attributes.deadline = Some(deadline);
        self
    }

    /// Where the activation runs.
    #[inline]
    pub const fn affinity(mut self, affinity: Affinity) -> Self {
        self.attributes.affinity = affinity;
        self
    }
}

/// An argument of a call, for a runtime that carries calls of threads of its own: see [`Call::argument`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Argument<'b> {
    /// Bytes for the callee.
    Input(&'b [u8]),
    /// Plain data that is lent.
    Lent(&'b [u8]),
    /// Bytes that are given.
    Given(&'b [u8]),
    /// A result, and its bound in bytes.
    Output(&'b mut Vec<u8>, usize),
    /// Bytes for the callee, and its result with its bound.
    InOut(&'b mut Vec<u8>, usize),
    /// Memory of a runtime's own that is lent: what it knows it by, and the part of it, in bytes ([`Lending::elsewhere`]).
    Elsewhere(&'b (dyn Any + Send + Sync), usize, usize),
    /// Memory that is lent without being copied, or given: of a connection of the caller's own.
    Memory,
}

impl Call<'_> {
    /// How many arguments there are.
    pub const fn len(&self) -> usize {
        self.args.len()
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Argument `index`. What a runtime needs to carry the call by a connection that is not its caller's; everybody else passes the whole call on.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn argument(&mut self, index: usize) -> Argument<'_> {
        match &mut self.args[index] {
            Arg::In(bytes) => Argument::Input(bytes),
            Arg::Lend(Lend::Bytes(bytes)) => Argument::Lent(bytes),
            Arg::Lend(Lend::Elsewhere(of, offset, len)) => Argument::Elsewhere(*of, *offset, *len),
            Arg::Give(Give::Bytes(bytes)) => Argument::Given(bytes),
            Arg::Out(into, most) => Argument::Output(into, *most),
            Arg::InOut(bytes, most) => Argument::InOut(bytes, *most),
            _ => Argument::Memory,
        }
    }

    /// Its attributes.
    pub const fn get_attributes(&self) -> Attributes {
        self.attributes
    }
}

impl Default for Call<'_> {
    fn default() -> Self {
        Self::new()
    }
}
