//! The domain's side: a handler that takes a call apart and dispatches it to an implementation of the trait.

use crate::client::{held, is_packed_result};
use crate::model::{Interface, Method, Mode};
use proc_macro2::TokenStream;
use quote::{format_ident, quote, quote_spanned};
use syn::spanned::Spanned;

pub fn generate(i: &Interface) -> TokenStream {
    let (krate, vis, ident) = (&i.krate, &i.vis, &i.ident);
    let portal = format_ident!("{ident}Portal");
    let about = format!("Serves calls of [`{ident}`] with the implementation in it.");
    let (name, version) = (&i.name, i.version);
    let arms = i.methods.iter().enumerate().map(|(n, m)| arm(krate, ident, m, n as u32));
    let checks = i.methods.iter().map(checks);
    quote! {
        #[doc = #about]
        #[derive(Clone, Debug)]
        #vis struct #portal<S>(
            /// The implementation, which all activations share.
            pub S,
        );

        impl<S: #ident> #krate::interface::Interface for #portal<S> {
            const NAME: &'static str = #name;
            const VERSION: u64 = #version;
        }

        impl<S: #ident> #krate::Handler for #portal<S> {
            fn serve(
                &self,
                __call: &mut #krate::Invocation<'_>,
            ) -> ::core::result::Result<(), #krate::Failure> {
                let __call = &*__call;
                let (__method, __packed) = #krate::interface::method_of(__call)?;
                match __method {
                    #(#arms)*
                    _ => ::core::result::Result::Err(#krate::interface::malformed()),
                }
            }
        }

        const _: () = {
            // A name of one word, so that all of a check is where the type is.
            #[allow(unused_imports)]
            use #krate::interface as __interface;
            #(#checks)*
        };
    }
}

/// Has the compiler say which type can't cross, and why, where it is written.
fn checks(m: &Method) -> TokenStream {
    let types = m.arguments.iter().filter_map(|a| held(&a.mode)).chain([&m.value]).chain(&m.error);
    let outs = m.arguments.iter().filter_map(|a| match &a.mode {
        Mode::Out { held } => Some(held),
        _ => None,
    });
    let of = |mode: fn(&Mode) -> bool| m.arguments.iter().filter(move |a| mode(&a.mode)).map(|a| &a.ty);
    let lent = of(|mode| matches!(mode, Mode::Lend { .. }));
    let given = of(|mode| matches!(mode, Mode::Give { .. }));
    let crosses = types.map(|ty| quote_spanned!(ty.span()=> __interface::crosses::<#ty>();));
    let begins = outs.map(|ty| quote_spanned!(ty.span()=> __interface::begins_empty::<#ty>();));
    let is_lent = lent.map(|ty| quote_spanned!(ty.span()=> __interface::is_lent::<#ty>();));
    let is_given = given.map(|ty| quote_spanned!(ty.span()=> __interface::is_given::<#ty>();));
    let ident = &m.ident;
    quote! {
        #[allow(non_snake_case, dead_code)]
        fn #ident() {
            #(#crosses)*
            #(#begins)*
            #(#is_lent)*
            #(#is_given)*
        }
    }
}

fn arm(krate: &syn::Path, interface: &syn::Ident, m: &Method, number: u32) -> TokenStream {
    let packed: Vec<_> =
        m.arguments.iter().filter(|a| matches!(a.mode, Mode::In { .. } | Mode::InOut { .. })).collect();
    let names = packed.iter().map(|a| &a.ident);
    let mutable = packed.iter().map(|a| matches!(a.mode, Mode::InOut { .. }).then(|| quote!(mut)));
    let types = packed.iter().map(|a| held(&a.mode));
    let others = m.arguments.iter().filter_map(|a| {
        let ident = &a.ident;
        match &a.mode {
            Mode::RawIn { at, text: true } => {
                Some(quote!(let #ident = #krate::interface::text(__call, #at)?;))
            }
            Mode::RawIn { at, text: false } => Some(quote!(let #ident = __call.input(#at)?;)),
            Mode::Out { held } => {
                Some(quote!(let mut #ident = <#held as ::core::default::Default>::default();))
            }
            Mode::RawOut { at, .. } => Some(quote!(let mut #ident = __call.output(#at)?;)),
            Mode::RawInOut { at, .. } => Some(quote!(let mut #ident = __call.inout(#at)?;)),
            Mode::Lend { at } => Some(quote!(let #ident = #krate::interface::lent(__call, #at)?;)),
            Mode::Give { at } => Some(quote!(let #ident = __call.take_given(#at)?;)),
            _ => None,
        }
    });
    let passed = m.arguments.iter().map(|a| {
        let ident = &a.ident;
        match &a.mode {
            Mode::In { by_ref: false, .. } | Mode::RawIn { .. } | Mode::Lend { .. } | Mode::Give { .. } => {
                quote!(#ident)
            }
            Mode::In { by_ref: true, .. } => quote!(&#ident),
            Mode::Out { .. } | Mode::InOut { .. } => quote!(&mut #ident),
            Mode::RawOut { .. } | Mode::RawInOut { .. } => quote!(&mut *#ident),
            Mode::Context => quote!(__call),
        }
    });
    let name = &m.ident;
    let called = quote!(<S as #interface>::#name(&self.0, #(#passed),*));
    let value =
        if m.error.is_some() { quote!(#called.map_err(|e| #krate::interface::failure(&e))?) } else { called };
    let results = m.arguments.iter().filter(|a| is_packed_result(&a.mode)).map(|a| &a.ident);
    quote! {
        #number => {
            let (#(#mutable #names,)*): (#(#types,)*) = #krate::interface::unpack_from_client(__packed)?;
            #(#others)*
            let __value = #value;
            #krate::interface::answer(__call, &(&__value, #(&#results,)*))
        }
    }
}
