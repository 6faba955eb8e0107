#![doc = include_str!("../README.md")]

mod arg_list;
mod args;
pub mod attributes;
#[cfg(feature = "async")]
mod awaited;
pub mod chain;
mod client;
pub mod costs {
    #![doc = include_str!("../docs/costs.md")]
}
mod credentials;
mod domain;
mod error;
mod gate;
mod header;
pub mod interface;
mod limits;
mod line;
mod listener;
mod look;
mod memory;
mod pieces;
mod portal;
mod reply;
mod shared;
mod short;
mod socket;
pub mod step;
mod strays;
pub mod usage;
mod wire;

pub use args::{Argument, Call, Giving, Lending};
pub use attributes::{Affinity, Attributes};
pub use chain::Deadline;
pub use client::{Client, Finding, Offering, Opening, Pending};
pub use credentials::Credentials;
pub use domain::{Activations, Domain, DomainBuilder, DomainStats, Invocation};
pub use error::{CallError, DomainError, Failure, Refusal};
pub use interface::LentSlice;
pub use limits::Limits;
/// Makes a trait the interface between two processes.
///
/// For `trait Ledger` it makes `LedgerClient`, whose methods call, and `LedgerPortal`, which serves calls with an implementation of the
/// trait. A method takes `&self`, and each argument crosses in a *mode*:
///
/// | mode | in the trait | the client passes | |
/// |---|---|---|---|
/// | in (no attribute, or `#[input]`) | `T`, `&T`, `&[T]`, `&str` | the same | a deep copy, private to the callee |
/// | `#[out]` | `&mut T` | `&mut T` | begins as the default; written on success only |
/// | `#[inout]` | `&mut T` | `&mut T` | goes and comes back; written on success only |
/// | `#[lend]` | [`Lent`] or [`LentSlice`] | a [`Buffer`], a [`Part`] of one, or a slice of plain data | read-only, for the call; a buffer in place, and the client can still write it |
/// | `#[give]` | [`Given`] | a [`Gift`], or bytes | for good; a gift without copying, bytes copied once |
/// | `#[context]` | `&Invocation<'_>` | nothing | who calls, and the deadline |
///
/// `T` is anything that serde serialises and deserialises: what it points to is copied with it, and what has no serialised form (pointers,
/// references inside, `Rc`, files) does not compile. (Where serde's feature `rc` is on, an `Rc` has one: the callee's is another.) `#[out(bytes = N)]` and `#[inout(bytes = N)]` bound a `Vec<u8>` that comes back.
///
/// The client is made by `LedgerClient::connect(path)`, or `over(client)` a [`Client`] that is connected already; `connection()` is its
/// [`Client`], which makes the [`Buffer`]s that it lends (`ledger.connection().buffer(bytes)`), and `within(time)` gives every call of a clone that
/// long. An empty slice that is lent says what it is of: `&[] as &[f64]`.
///
/// A method may return `T` or `Result<T, E>`. The client's returns `Result<T, `[`interface::Error`]`<E>>`, which tells the callee's own
/// error from a call that failed. With the feature `async` the client has an `_async` method for each, to be awaited under any
/// executor.
///
/// Settings: `version = N` (count it up when a type changes inside: the text of the trait is part of the version by itself), `name =
/// "…"` of the portal (default: the trait's), `reply_bytes = N` (most bytes of a packed reply; default 65536), `crate = "…"` (where this
/// crate is).
///
/// # Examples
/// ```
/// use peregrine_call::{Domain, interface};
///
/// #[derive(serde::Serialize, serde::Deserialize, Debug, PartialEq)]
/// pub struct Overdrawn {
///     pub by: u64,
/// }
///
/// /// Accounts.
/// #[interface(version = 1)]
/// pub trait Ledger {
///     /// Takes from an account and notes it in the log.
///     fn withdraw(&self, account: &str, amount: u64, #[inout] log: &mut Vec<String>) -> Result<u64, Overdrawn>;
/// }
///
/// struct Flat;
/// impl Ledger for Flat {
///     fn withdraw(&self, account: &str, amount: u64, log: &mut Vec<String>) -> Result<u64, Overdrawn> {
///         log.push(format!("{account}: {amount}"));
///         100u64.checked_sub(amount).ok_or_else(|| Overdrawn { by: amount - 100 })
///     }
/// }
///
/// let path = std::env::temp_dir().join(format!("peregrine-ledger-{}", std::process::id()));
/// let domain = Domain::builder().interface(LedgerPortal(Flat)).serve(&path)?;
///
/// let ledger = LedgerClient::connect(&path)?;
/// let mut log = vec![];
/// assert_eq!(ledger.withdraw("ann", 30, &mut log).unwrap(), 70);
/// let e = ledger.withdraw("ann", 130, &mut log).unwrap_err();
/// assert_eq!(e, peregrine_call::interface::Error::Callee(Overdrawn { by: 30 }));
/// assert_eq!(log, ["ann: 30"]); // the failed call changed nothing here
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub use peregrine_call_macros::interface;

pub use memory::{Buffer, Gift, Given, Lent, Part};

/// What goes from thread to thread, and what several may use at once.
const _: () = {
    const fn goes<T: Send>() {}
    const fn is_shared<T: Send + Sync>() {}
    is_shared::<Client>();
    is_shared::<Domain>();
    is_shared::<Buffer>();
    is_shared::<Given>();
    is_shared::<CallError>();
    goes::<Gift>();
    goes::<Opening>();
    goes::<Finding>();
    goes::<Offering>();
    goes::<Pending<'static>>();
    goes::<Call<'static>>();
};

pub use portal::{Access, Handler, PortalId};
pub use socket::pair as socket_pair;
pub use wire::{Wire, WiredCall};

/// Passes its items on if calls can be awaited here: the feature is this crate's, not its user's.
#[cfg(feature = "async")]
#[doc(hidden)]
#[macro_export]
macro_rules! __async {
    ($($item:item)*) => { $($item)* };
}

/// Drops its items: calls can't be awaited here.
#[cfg(not(feature = "async"))]
#[doc(hidden)]
#[macro_export]
macro_rules! __async {
    ($($item:item)*) => {};
}
