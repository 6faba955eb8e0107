//! The client's side: a struct with two methods for each of the interface's, one that waits and one to be awaited.

use crate::model::{Argument, Interface, Method, Mode};
use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::Type;

pub fn generate(i: &Interface) -> TokenStream {
    let (krate, vis, ident) = (&i.krate, &i.vis, &i.ident);
    let client = format_ident!("{ident}Client");
    let about = format!("Calls [`{ident}`] in another process.");
    let (name, version) = (&i.name, i.version);
    let waiting = i.methods.iter().enumerate().map(|(n, m)| method(i, m, n, false));
    let awaited = i.methods.iter().enumerate().map(|(n, m)| method(i, m, n, true));
    quote! {
        #[doc = #about]
        #[derive(Clone, Debug)]
        #vis struct #client<C = #krate::interface::Found> {
            stub: #krate::interface::Stub<C>,
        }

        impl #krate::interface::Interface for #client {
            const NAME: &'static str = #name;
            const VERSION: u64 = #version;
        }

        impl #client {
            /// Connects to the domain at `path` and finds the interface there.
            ///
            /// # Errors
            /// [`CallError::Unreachable`](#krate::CallError::Unreachable), [`CallError::Refused`](#krate::CallError::Refused), and
            /// [`CallError::Version`](#krate::CallError::Version) if the domain was built from another version of the interface.
            #vis fn connect(
                path: impl ::core::convert::AsRef<::std::path::Path>,
            ) -> ::core::result::Result<Self, #krate::CallError> {
                Self::over(#krate::Client::connect(path)?)
            }

            /// Finds the interface in the domain that `client` is connected to.
            ///
            /// # Errors
            /// As [`connect`](Self::connect).
            #vis fn over(client: #krate::Client) -> ::core::result::Result<Self, #krate::CallError> {
                ::core::result::Result::Ok(Self { stub: #krate::interface::Stub::find::<Self>(client)? })
            }

            /// The connection: for buffers to lend.
            #vis fn connection(&self) -> &#krate::Client {
                self.stub.client()
            }
        }

        #[allow(clippy::too_many_arguments)]
        impl<C: #krate::interface::Carrier> #client<C> {
            /// Calls by way of what `carrier` makes of the interface's name and version.
            #vis fn by(carrier: impl ::core::ops::FnOnce(&'static str, u64) -> C) -> Self {
                let carrier = carrier(
                    <#client as #krate::interface::Interface>::NAME,
                    <#client as #krate::interface::Interface>::VERSION,
                );
                Self { stub: #krate::interface::Stub::by(carrier) }
            }

            /// The same, with every call to be done within `time`.
            #[must_use]
            #vis fn within(mut self, time: ::core::time::Duration) -> Self {
                self.stub.set_time(time);
                self
            }

            #(#waiting)*
        }

        #krate::__async! {
            #[allow(clippy::too_many_arguments)]
            impl #client {
                #(#awaited)*
            }
        }
    }
}

/// What the client passes for an argument of the trait.
fn parameter(krate: &syn::Path, a: &Argument) -> Option<TokenStream> {
    let (ident, ty) = (&a.ident, &a.ty);
    match a.mode {
        Mode::Context => None,
        Mode::Lend { .. } => Some(quote!(#ident: impl ::core::convert::Into<#krate::Lending<'lent>>)),
        Mode::Give { .. } => Some(quote!(#ident: impl ::core::convert::Into<#krate::Giving<'lent>>)),
        _ => Some(quote!(#ident: #ty)),
    }
}

fn method(i: &Interface, m: &Method, number: usize, awaited: bool) -> TokenStream {
    let (krate, vis, docs) = (&i.krate, &i.vis, &m.docs);
    let number = number as u32;
    let parameters = m.arguments.iter().filter_map(|a| parameter(krate, a));
    let value = &m.value;
    let error: Type = m.error.clone().unwrap_or_else(|| syn::parse_quote!(::core::convert::Infallible));
    let name = if awaited { format_ident!("{}_async", m.ident) } else { m.ident.clone() };
    // A method without an error of its own has nothing to tell apart.
    let carrier = if awaited { quote!(#krate::interface::Found) } else { quote!(C) };
    let told = if m.error.is_some() {
        quote!(#krate::interface::Error::of::<#carrier>)
    } else {
        quote!(#krate::interface::Error::Call)
    };
    let failed =
        if awaited { quote!(#krate::CallError) } else { quote!(<C as #krate::interface::Carrier>::Error) };
    let keyword = awaited.then(|| quote!(async));
    let reply_bytes = &m.reply_bytes;
    let lends = m.arguments.iter().any(|a| matches!(a.mode, Mode::Lend { .. } | Mode::Give { .. }));
    let lifetime = lends.then(|| quote!(<'lent>));

    // (number, in and inout values) packed; the same order is taken apart in `portal`.
    let packed = m.arguments.iter().filter_map(|a| {
        let ident = &a.ident;
        match a.mode {
            Mode::In { by_ref: false, .. } => Some(quote!(&#ident)),
            Mode::In { by_ref: true, .. } => Some(quote!(#ident)),
            Mode::InOut { .. } => Some(quote!(&*#ident)),
            _ => None,
        }
    });
    // Results are set aside until all of them are there: a failed call changes nothing.
    let aside = m.arguments.iter().filter_map(|a| {
        let ident = &a.ident;
        let held = format_ident!("__{}", ident);
        match a.mode {
            // Now, so that what is lent or given may outlive the rest of the call's arguments.
            Mode::Lend { .. } => {
                Some(quote!(let #held: #krate::Lending<'lent> = ::core::convert::Into::into(#ident);))
            }
            Mode::Give { .. } => {
                Some(quote!(let #held: #krate::Giving<'lent> = ::core::convert::Into::into(#ident);))
            }
            Mode::RawOut { .. } => Some(quote!(let mut #held = ::std::vec::Vec::new();)),
            Mode::RawInOut { .. } => Some(quote!(let mut #held = ::core::clone::Clone::clone(#ident);)),
            _ => None,
        }
    });
    let wired = m.arguments.iter().filter_map(|a| {
        let ident = &a.ident;
        let held = format_ident!("__{}", ident);
        match &a.mode {
            Mode::RawIn { text: true, .. } => Some(quote!(.input(#ident.as_bytes()))),
            Mode::RawIn { text: false, .. } => Some(quote!(.input(#ident))),
            Mode::RawOut { most, .. } => Some(quote!(.output(&mut #held, #most))),
            Mode::RawInOut { most, .. } => {
                Some(quote!(.inout(&mut #held, ::core::cmp::max(#ident.len(), #most))))
            }
            Mode::Lend { .. } => Some(quote!(.lend(#held))),
            Mode::Give { .. } => Some(quote!(.give(#held))),
            _ => None,
        }
    });
    let packed_results: Vec<_> = m.arguments.iter().filter(|a| is_packed_result(&a.mode)).collect();
    let result_names = packed_results.iter().map(|a| format_ident!("__{}", a.ident));
    let result_types = packed_results.iter().map(|a| held(&a.mode));
    let assigned = m.arguments.iter().filter_map(|a| {
        let ident = &a.ident;
        let held = format_ident!("__{}", ident);
        let comes_back =
            is_packed_result(&a.mode) || matches!(a.mode, Mode::RawOut { .. } | Mode::RawInOut { .. });
        comes_back.then(|| quote!(*#ident = #held;))
    });
    let send =
        if awaited { quote!(self.stub.call_async(__call).await) } else { quote!(self.stub.call(__call)) };
    let errors = [
        " # Errors",
        " [`Error::Callee`](#krate::interface::Error::Callee): the callee's own. [`Error::Call`](#krate::interface::Error::Call): the call",
        " itself failed; no `out` or `inout` argument has changed in either case.",
    ]
    .map(|l| l.replace("#krate", &quote!(#krate).to_string().replace(' ', "")));
    quote! {
        #(#docs)*
        #[doc = ""]
        #(#[doc = #errors])*
        #vis #keyword fn #name #lifetime(
            &self, #(#parameters),*
        ) -> ::core::result::Result<#value, #krate::interface::Error<#error, #failed>> {
            let __packed = #krate::interface::pack(&(#number, #(#packed,)*))?;
            let mut __reply = ::std::vec::Vec::new();
            #(#aside)*
            let __call =
                self.stub.prepare().input(&__packed).output(&mut __reply, #reply_bytes)#(#wired)*;
            #send.map_err(#told)?;
            let (__value, #(#result_names,)*): (#value, #(#result_types,)*) =
                #krate::interface::unpack(&__reply)?;
            #(#assigned)*
            ::core::result::Result::Ok(__value)
        }
    }
}

/// Whether it comes back in the packed reply.
pub fn is_packed_result(mode: &Mode) -> bool {
    matches!(mode, Mode::Out { .. } | Mode::InOut { .. })
}

/// The type that a packed argument has on the wire.
pub fn held(mode: &Mode) -> Option<&Type> {
    match mode {
        Mode::In { held, .. } | Mode::Out { held } | Mode::InOut { held } => Some(held),
        _ => None,
    }
}
