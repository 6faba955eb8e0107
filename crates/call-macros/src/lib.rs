//! The attribute of `peregrine-call`: `#[interface]` makes a trait the interface between two processes.
//!
//! ```text
//!   trait ──▶ parse: methods and argument modes ──▶ client: a struct whose methods call
//!                                               └─▶ portal: a handler that dispatches to an implementation
//! ```
//!
//! What it generates, and what may be an argument, is documented where it is re-exported: `peregrine_call::interface`.

mod client;
mod model;
mod parse;
mod portal;

use proc_macro::TokenStream;

/// See `peregrine_call::interface`.
#[proc_macro_attribute]
pub fn interface(attribute: TokenStream, item: TokenStream) -> TokenStream {
    parse::interface(attribute.into(), item.into())
        .map(|i| {
            let (cleaned, client, portal) = (&i.cleaned, client::generate(&i), portal::generate(&i));
            quote::quote!(#cleaned #client #portal)
        })
        .unwrap_or_else(|e| e.to_compile_error())
        .into()
}
