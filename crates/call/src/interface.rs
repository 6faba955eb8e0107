//! What `#[interface]` stands on: the values of a typed call packed into the arguments of an untyped one.
//!
//! ```text
//!   client                                       domain
//!   ledger.post(&order, &mut receipt)?           fn post(&self, order: &Order, receipt: &mut Receipt)
//!      │ pack: (method, order)                      ▲ unpack: a private, deep copy
//!      ▼                                            │
//!   argument 0 ───────────────────────────────▶ Handler of LedgerPortal
//!   argument 1 ◀─────────────────────────────── (result, receipt) packed, on success
//! ```
//!
//! **Deep copies.** A value travels as postcard has it, so whatever it points to travels too; what has no serialised form (a raw
//! pointer, a reference inside a value, an `Rc`, a file) is refused by the compiler. **Trust.** The domain unpacks from its
//! private copy, and what does not unpack is the client's fault ([`Failure::ARGUMENTS`]); the client trusts the reply no
//! more: [`CallError::BadReply`]. **Agreement.** [`Interface::VERSION`] is made of the interface's text and its explicit version;
//! a client built from another one is told at once ([`CallError::Version`]).

use crate::{Call, CallError, Client, Deadline, DomainBuilder, Failure, Handler, Invocation, Lent, PortalId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;
use zerocopy::FromBytes;

/// The code of a [`Failure`] whose detail is the callee's own error, packed.
const OWN: u32 = 1;

/// One side of an interface between processes: made by [`#[interface]`](macro@crate::interface).
pub trait Interface {
    /// The portal's name.
    const NAME: &'static str;
    /// What both sides must agree on.
    const VERSION: u64;
}

/// What carries the calls of a generated client to the domain: a connection ([`Found`], the default), or a runtime whose threads wait in
/// their own way (`peregrine::Portal`).
pub trait Carrier {
    /// Why a call did not return its results.
    type Error: From<CallError>;

    /// Makes the call.
    ///
    /// # Errors
    /// As [`Client::call`].
    fn carry(&self, call: Call<'_>) -> Result<(), Self::Error>;

    /// The callee's own failure, if the error is one.
    ///
    /// # Errors
    /// The error, if it is something else.
    fn own(error: Self::Error) -> Result<Failure, Self::Error>;
}

/// An interface found in a domain that a [`Client`] is connected to.
#[derive(Clone, Debug)]
pub struct Found {
    client: Client,
    portal: PortalId,
}

impl Carrier for Found {
    type Error = CallError;

    #[inline]
    fn carry(&self, call: Call<'_>) -> Result<(), CallError> {
        self.client.call(self.portal, call)
    }

    fn own(error: CallError) -> Result<Failure, CallError> {
        match error {
            CallError::Callee(failure) => Ok(failure),
            other => Err(other),
        }
    }
}

/// Why a typed call failed: the callee said so, or the call did not come to an end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Error<E, F = CallError> {
    /// The call itself failed: refused, unreachable, died, terminated, deadline and the rest of them.
    Call(F),
    /// The callee's own error.
    Callee(E),
}

impl<E: DeserializeOwned, F: From<CallError>> Error<E, F> {
    /// Tells the callee's own error from all others.
    #[doc(hidden)]
    pub fn of<C: Carrier<Error = F>>(error: F) -> Self {
        match C::own(error) {
            Ok(Failure { code: OWN, detail }) => match postcard::from_bytes(&detail) {
                Ok(own) => Self::Callee(own),
                Err(_) => Self::from(CallError::BadReply("an error that is not the interface's")),
            },
            Ok(failure) => Self::from(CallError::Callee(failure)),
            Err(other) => Self::Call(other),
        }
    }
}

impl<E, F: From<CallError>> From<CallError> for Error<E, F> {
    fn from(error: CallError) -> Self {
        Self::Call(error.into())
    }
}

impl<E: fmt::Display, F: fmt::Display> fmt::Display for Error<E, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call(e) => e.fmt(f),
            Self::Callee(e) => e.fmt(f),
        }
    }
}

impl<E: std::error::Error + 'static, F: std::error::Error + 'static> std::error::Error for Error<E, F> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Call(e) => Some(e),
            Self::Callee(e) => Some(e),
        }
    }
}

impl DomainBuilder {
    /// Exports an interface: `LedgerPortal(service)` for a trait `Ledger`.
    #[must_use]
    pub fn interface<I: Interface + Handler>(self, portal: I) -> Self {
        self.portal(I::NAME, I::VERSION, portal)
    }
}

/// What every generated client holds.
#[doc(hidden)]
#[derive(Clone, Debug)]
pub struct Stub<C = Found> {
    carrier: C,
    time: Option<Duration>,
}

#[doc(hidden)]
impl Stub {
    pub fn find<I: Interface>(client: Client) -> Result<Self, CallError> {
        let portal = client.portal(I::NAME, I::VERSION)?;
        Ok(Self::by(Found { client, portal }))
    }

    pub const fn client(&self) -> &Client {
        &self.carrier.client
    }

    #[cfg(feature = "async")]
    pub async fn call_async(&self, call: Call<'_>) -> Result<(), CallError> {
        self.carrier.client.begin(self.carrier.portal, call)?.finished().await
    }
}

#[doc(hidden)]
impl<C> Stub<C> {
    pub const fn by(carrier: C) -> Self {
        Self { carrier, time: None }
    }

    pub fn set_time(&mut self, time: Duration) {
        self.time = Some(time);
    }

    pub fn prepare<'a>(&self) -> Call<'a> {
        match self.time {
            Some(time) => Call::new().deadline(Deadline::after(time)),
            None => Call::new(),
        }
    }
}

#[doc(hidden)]
impl<C: Carrier> Stub<C> {
    #[inline]
    pub fn call(&self, call: Call<'_>) -> Result<(), C::Error> {
        self.carrier.carry(call)
    }
}

#[doc(hidden)]
pub fn pack<T: Serialize>(value: &T) -> Result<Vec<u8>, CallError> {
    // Sequences of unknown length are all that postcard can't pack: the caller's type is at fault.
    postcard::to_allocvec(value).map_err(|_| CallError::BadArgument("a value that does not serialise"))
}

#[doc(hidden)]
pub fn unpack<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CallError> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        _ => Err(CallError::BadReply("a result that is not the interface's")),
    }
}

#[doc(hidden)]
pub const fn malformed() -> Failure {
    Failure { code: Failure::ARGUMENTS, detail: Vec::new() }
}

#[doc(hidden)]
pub fn method_of<'a>(call: &'a Invocation<'_>) -> Result<(u32, &'a [u8]), Failure> {
    postcard::take_from_bytes(call.input(0)?).map_err(|_| malformed())
}

#[doc(hidden)]
pub fn unpack_from_client<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        _ => Err(malformed()),
    }
}

#[doc(hidden)]
pub fn text<'a>(call: &'a Invocation<'_>, at: usize) -> Result<&'a str, Failure> {
    std::str::from_utf8(call.input(at)?).map_err(|_| malformed())
}

#[doc(hidden)]
pub fn lent<'a, T: FromLent<'a>>(call: &'a Invocation<'_>, at: usize) -> Result<T, Failure> {
    T::from_lent(call.lent(at)?)
}

#[doc(hidden)]
pub fn failure<E: Serialize>(error: &E) -> Failure {
    match postcard::to_allocvec(error) {
        Ok(detail) if detail.len() <= Failure::MAX_DETAIL => Failure { code: OWN, detail },
        Ok(detail) => {
            let text = format!(
                "the callee's error has {} bytes, at most {} travel",
                detail.len(),
                Failure::MAX_DETAIL
            );
            Failure { code: Failure::REPLY, detail: text.into_bytes() }
        }
        Err(e) => Failure { code: Failure::REPLY, detail: e.to_string().into_bytes() },
    }
}

#[doc(hidden)]
pub fn answer<T: Serialize>(call: &Invocation<'_>, results: &T) -> Result<(), Failure> {
    let mut into = call.output(1)?;
    into.clear();
    *into = postcard::to_extend(results, std::mem::take(&mut *into))
        .map_err(|e| Failure { code: Failure::REPLY, detail: e.to_string().into_bytes() })?;
    Ok(())
}

/// A type that can cross to another process: it is serialised, with all that it points to, and made anew. Here so that the compiler names
/// a type that can't: with a pointer inside,
///
/// ```compile_fail,E0277
/// pub struct Node {
///     pub next: *mut Node,
/// }
/// #[peregrine_call::interface]
/// pub trait Graph {
///     fn walk(&self, from: Node) -> u32;
/// }
/// ```
///
/// bound to a lock of this process,
///
/// ```compile_fail,E0277
/// #[peregrine_call::interface]
/// pub trait Locked {
///     fn count(&self, held: std::sync::MutexGuard<'static, u32>) -> u32;
/// }
/// ```
///
/// open in a process,
///
/// ```compile_fail,E0277
/// #[peregrine_call::interface]
/// pub trait Files {
///     fn open(&self, file: std::fs::File) -> u32;
/// }
/// ```
///
/// or lent as bytes though not every pattern of bytes is one.
///
/// ```compile_fail,E0277
/// #[peregrine_call::interface]
/// pub trait Lists {
///     fn sum(&self, #[lend] list: peregrine_call::LentSlice<'_, String>) -> u32;
/// }
/// ```
#[doc(hidden)]
pub const fn crosses<T: Serialize + DeserializeOwned>() {}

/// An `out` argument begins as the default on the callee's side.
#[doc(hidden)]
pub const fn begins_empty<T: Default>() {}

/// What is lent arrives as such.
#[doc(hidden)]
pub const fn is_lent<'a, T: FromLent<'a>>() {}

/// What is given arrives as such.
#[doc(hidden)]
pub const fn is_given<T: FromGiven>() {}

/// What a `give` argument can be for the callee: [`Given`](crate::Given).
#[doc(hidden)]
#[diagnostic::on_unimplemented(
    message = "`{Self}` can't be given: an argument that is given is a `Given`",
    label = "bytes change hands, and nothing else"
)]
pub trait FromGiven {}
impl FromGiven for crate::Given {}

/// What a `lend` argument can be for the callee.
#[diagnostic::on_unimplemented(
    message = "`{Self}` can't be lent: an argument that is lent is a `Lent` or a `LentSlice`",
    label = "bytes are lent, or plain data, and nothing else"
)]
pub trait FromLent<'a>: Sized {
    /// Takes the lent memory.
    ///
    /// # Errors
    /// [`Failure::ARGUMENTS`]: it does not hold whole values.
    fn from_lent(lent: Lent<'a>) -> Result<Self, Failure>;
}

impl<'a> FromLent<'a> for Lent<'a> {
    fn from_lent(lent: Lent<'a>) -> Result<Self, Failure> {
        Ok(lent)
    }
}

/// Values of type `T` that a client lends for the length of a call. The client may change them at any moment, so each is read out
/// whole and none is referred to.
///
/// Any bit pattern must be a value of `T`: the client is not trusted to write others.
pub struct LentSlice<'a, T> {
    bytes: Lent<'a>,
    of: PhantomData<fn() -> T>,
}

impl<'a, T: FromBytes> FromLent<'a> for LentSlice<'a, T> {
    fn from_lent(bytes: Lent<'a>) -> Result<Self, Failure> {
        match size_of::<T>() {
            0 => Err(malformed()),
            size if bytes.len_bytes().is_multiple_of(size) => Ok(Self { bytes, of: PhantomData }),
            _ => Err(malformed()),
        }
    }
}

impl<T: FromBytes> LentSlice<'_, T> {
    /// How many values there are.
    pub const fn len(&self) -> usize {
        self.bytes.len_bytes() / size_of::<T>()
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The value at `index`, as it is now.
    pub fn get(&self, index: usize) -> Option<T> {
        let mut some = self.read(index, 1).ok()?;
        some.pop()
    }

    /// The values one after the other, each as it is when its turn comes; read out some hundred at a time.
    pub fn iter(&self) -> impl Iterator<Item = T> {
        let step = (4096 / size_of::<T>()).max(1);
        (0..self.len())
            .step_by(step)
            .flat_map(move |from| self.read(from, step.min(self.len() - from)).unwrap_or_default())
    }

    /// A private copy: what can be trusted not to change.
    pub fn to_vec(&self) -> Vec<T> {
        self.read(0, self.len()).unwrap_or_default()
    }

    fn read(&self, from: usize, count: usize) -> Result<Vec<T>, Failure> {
        let size = size_of::<T>();
        let mut bytes = vec![0; count * size];
        self.bytes.read(from * size, &mut bytes)?;
        Ok(bytes.chunks_exact(size).filter_map(|b| T::read_from_bytes(b).ok()).collect())
    }
}

impl<T> fmt::Debug for LentSlice<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LentSlice({} bytes)", self.bytes.len_bytes())
    }
}
