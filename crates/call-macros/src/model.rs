//! An interface, taken apart.
//!
//! ```text
//!   wire argument   0            1             2 …
//!                   packed in    packed reply  one each for raw bytes, lent and given memory
//!                   (method, a, b, inout…)     (result, out…, inout…)
//! ```
//!
//! Most values travel packed: serialised together, which is a deep copy. Bytes (`&[u8]`, `&str`, and `Vec<u8>` as a result) have an
//! argument of their own while there are any left, so that nobody copies them once more to serialise them.

use proc_macro2::TokenStream;
use syn::{Attribute, Ident, ItemTrait, Path, Type, Visibility};

/// Arguments of one call, as `peregrine-call` has it.
pub const MOST_ARGUMENTS: usize = 8;

/// A trait that is an interface.
pub struct Interface {
    /// The trait without our attributes.
    pub cleaned: ItemTrait,
    pub vis: Visibility,
    pub ident: Ident,
    /// Path of `peregrine-call`.
    pub krate: Path,
    /// The portal's name.
    pub name: String,
    /// What client and domain must agree on.
    pub version: u64,
    pub methods: Vec<Method>,
}

/// One method.
pub struct Method {
    pub ident: Ident,
    /// Its documentation, for the client's method.
    pub docs: Vec<Attribute>,
    pub arguments: Vec<Argument>,
    /// What it returns on success.
    pub value: Type,
    /// Its own error, if it returns a `Result`.
    pub error: Option<Type>,
    /// Most bytes of the packed reply.
    pub reply_bytes: TokenStream,
}

/// One argument.
pub struct Argument {
    pub ident: Ident,
    /// As written.
    pub ty: Type,
    pub mode: Mode,
}

/// How an argument crosses.
pub enum Mode {
    /// Packed; `held` is what the callee deserialises, `by_ref` whether it gets a reference to it.
    In { held: Type, by_ref: bool },
    /// Bytes or a string, as wire argument `at`.
    RawIn { at: usize, text: bool },
    /// Packed in the reply; begins as the default.
    Out { held: Type },
    /// `Vec<u8>`, as wire argument `at`.
    RawOut { at: usize, most: TokenStream },
    /// Packed both ways.
    InOut { held: Type },
    /// `Vec<u8>`, as wire argument `at`.
    RawInOut { at: usize, most: TokenStream },
    /// The client's buffer in place.
    Lend { at: usize },
    /// The client's memory for good.
    Give { at: usize },
    /// Not an argument: the callee sees the call itself.
    Context,
}
