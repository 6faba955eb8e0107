//! From the trait's tokens to the model, with a refusal for each thing that can't cross.

use crate::model::{Argument, Interface, MOST_ARGUMENTS, Method, Mode};
use proc_macro2::TokenStream;
use quote::{ToTokens, quote};
use syn::parse::Parser;
use syn::spanned::Spanned;
use syn::{
    Attribute, Error, Expr, FnArg, GenericArgument, ItemTrait, Pat, PathArguments, Result, ReturnType,
    TraitItem, TraitItemFn, Type,
};

/// What the attribute says.
struct Settings {
    version: u64,
    name: Option<String>,
    krate: syn::Path,
    reply_bytes: TokenStream,
}

pub fn interface(attribute: TokenStream, item: TokenStream) -> Result<Interface> {
    let settings = settings(attribute)?;
    let mut cleaned: ItemTrait = syn::parse2(item)?;
    if let Some(token) = cleaned.unsafety {
        return Err(Error::new(
            token.span(),
            "an interface can't be unsafe: its callers are other processes",
        ));
    }
    if !cleaned.generics.params.is_empty() {
        let span = cleaned.generics.span();
        return Err(Error::new(
            span,
            "an interface has no type parameters: both processes must know what travels",
        ));
    }
    let mut methods = Vec::new();
    for item in &mut cleaned.items {
        let TraitItem::Fn(f) = item else {
            return Err(Error::new(item.span(), "an interface has methods only"));
        };
        methods.push(method(f, &settings)?);
    }
    let name = settings.name.unwrap_or_else(|| cleaned.ident.to_string());
    let hash = hash(&name, &methods);
    // What is served is shared by all activations and outlives the call.
    cleaned.supertraits.push(syn::parse_quote!(::core::marker::Send));
    cleaned.supertraits.push(syn::parse_quote!(::core::marker::Sync));
    cleaned.supertraits.push(syn::parse_quote!('static));
    Ok(Interface {
        vis: cleaned.vis.clone(),
        ident: cleaned.ident.clone(),
        krate: settings.krate,
        version: hash ^ settings.version.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        name,
        methods,
        cleaned,
    })
}

fn settings(attribute: TokenStream) -> Result<Settings> {
    let mut s = Settings {
        version: 0,
        name: None,
        krate: syn::parse_quote!(::peregrine_call),
        reply_bytes: quote!(65536),
    };
    let parser = syn::meta::parser(|meta| {
        if meta.path.is_ident("version") {
            s.version = meta.value()?.parse::<syn::LitInt>()?.base10_parse()?;
        } else if meta.path.is_ident("name") {
            s.name = Some(meta.value()?.parse::<syn::LitStr>()?.value());
        } else if meta.path.is_ident("crate") {
            s.krate = meta.value()?.parse::<syn::LitStr>()?.parse()?;
        } else if meta.path.is_ident("reply_bytes") {
            s.reply_bytes = meta.value()?.parse::<Expr>()?.to_token_stream();
        } else {
            return Err(meta.error("expected version, name, reply_bytes or crate"));
        }
        Ok(())
    });
    parser.parse2(attribute)?;
    Ok(s)
}

fn method(f: &mut TraitItemFn, settings: &Settings) -> Result<Method> {
    let sig = &mut f.sig;
    if let Some(token) = sig.asyncness {
        let m = "a method of an interface is an ordinary function: the client has an `_async` one for each";
        return Err(Error::new(token.span(), m));
    }
    if let Some(body) = &f.default {
        return Err(Error::new(
            body.span(),
            "a method of an interface has no body: the domain implements it",
        ));
    }
    if !sig.generics.params.is_empty() {
        return Err(Error::new(
            sig.generics.span(),
            "a method of an interface has no type or lifetime parameters",
        ));
    }
    match sig.receiver() {
        Some(r) if r.reference.is_some() && r.mutability.is_none() => {}
        _ => {
            let m = "a method of an interface takes `&self`: many activations may run it at once";
            return Err(Error::new(sig.span(), m));
        }
    }
    let mut arguments = Vec::new();
    let mut wire = 2;
    for input in sig.inputs.iter_mut().skip(1) {
        let FnArg::Typed(typed) = input else { continue };
        let Pat::Ident(pat) = &*typed.pat else {
            return Err(Error::new(typed.pat.span(), "an argument of an interface has a plain name"));
        };
        let ident = pat.ident.clone();
        let modes: Vec<Attribute> = typed.attrs.drain(..).collect();
        let mode = mode(&modes, &typed.ty, &mut wire, settings)?;
        arguments.push(Argument { ident, ty: (*typed.ty).clone(), mode });
    }
    let (value, error) = outcome(&sig.output)?;
    Ok(Method {
        ident: sig.ident.clone(),
        docs: f.attrs.iter().filter(|a| a.path().is_ident("doc")).cloned().collect(),
        arguments,
        value,
        error,
        reply_bytes: settings.reply_bytes.clone(),
    })
}

fn mode(attributes: &[Attribute], ty: &Type, wire: &mut usize, settings: &Settings) -> Result<Mode> {
    let mut next = || {
        let at = *wire;
        *wire += 1;
        (at < MOST_ARGUMENTS).then_some(at)
    };
    let too_many = || {
        let m = format!("at most {} arguments of a method can be lent or given", MOST_ARGUMENTS - 2);
        Error::new(ty.span(), m)
    };
    let Some(attribute) = attributes.first() else {
        return plain_in(ty, next);
    };
    if let Some(second) = attributes.get(1) {
        return Err(Error::new(second.span(), "an argument has one mode"));
    }
    let path = attribute.path();
    if path.is_ident("input") {
        return plain_in(ty, next);
    }
    if path.is_ident("context") {
        return Ok(Mode::Context);
    }
    if path.is_ident("lend") {
        return next().map(|at| Mode::Lend { at }).ok_or_else(too_many);
    }
    if path.is_ident("give") {
        return next().map(|at| Mode::Give { at }).ok_or_else(too_many);
    }
    let both = path.is_ident("inout");
    if !both && !path.is_ident("out") {
        let m = "expected #[input], #[out], #[inout], #[lend], #[give] or #[context]";
        return Err(Error::new(attribute.span(), m));
    }
    let held = match ty {
        Type::Reference(r) if r.mutability.is_some() => (*r.elem).clone(),
        _ => return Err(Error::new(ty.span(), "a result goes through `&mut`: write `&mut T`")),
    };
    refuse_pointers(&held)?;
    let most = most_bytes(attribute)?.unwrap_or_else(|| settings.reply_bytes.clone());
    let raw = is_byte_vector(&held).then(&mut next).flatten();
    Ok(match (raw, both) {
        (Some(at), true) => Mode::RawInOut { at, most },
        (Some(at), false) => Mode::RawOut { at, most },
        (None, true) => Mode::InOut { held },
        (None, false) => Mode::Out { held },
    })
}

/// `#[out(bytes = N)]`.
fn most_bytes(attribute: &Attribute) -> Result<Option<TokenStream>> {
    if matches!(attribute.meta, syn::Meta::Path(_)) {
        return Ok(None);
    }
    let mut most = None;
    attribute.parse_nested_meta(|meta| {
        if !meta.path.is_ident("bytes") {
            return Err(meta.error("expected bytes = N, the most that the caller takes"));
        }
        most = Some(meta.value()?.parse::<Expr>()?.to_token_stream());
        Ok(())
    })?;
    Ok(most)
}

fn plain_in(ty: &Type, mut next: impl FnMut() -> Option<usize>) -> Result<Mode> {
    let Type::Reference(r) = ty else {
        refuse_pointers(ty)?;
        return Ok(Mode::In { held: ty.clone(), by_ref: false });
    };
    refuse_pointers(&r.elem)?;
    if r.mutability.is_some() {
        let m = "say how it crosses: #[out] (comes back) or #[inout] (goes and comes back, on success only)";
        return Err(Error::new(ty.span(), m));
    }
    let text = is_named(&r.elem, "str");
    let bytes = matches!(&*r.elem, Type::Slice(s) if is_named(&s.elem, "u8"));
    if (text || bytes)
        && let Some(at) = next()
    {
        return Ok(Mode::RawIn { at, text });
    }
    let held = match &*r.elem {
        Type::Slice(s) => {
            let item = &s.elem;
            syn::parse_quote!(::std::vec::Vec<#item>)
        }
        _ if text => syn::parse_quote!(::std::string::String),
        other => other.clone(),
    };
    Ok(Mode::In { held, by_ref: true })
}

fn is_named(ty: &Type, name: &str) -> bool {
    matches!(ty, Type::Path(p) if p.path.is_ident(name))
}

fn is_byte_vector(ty: &Type) -> bool {
    let Type::Path(p) = ty else { return false };
    let Some(last) = p.path.segments.last().filter(|s| s.ident == "Vec") else { return false };
    let PathArguments::AngleBracketed(a) = &last.arguments else { return false };
    matches!(a.args.first(), Some(GenericArgument::Type(t)) if is_named(t, "u8"))
}

/// Refuses what is an address on its face. A pointer inside a named type has no `Serialize` and is refused by the compiler.
fn refuse_pointers(ty: &Type) -> Result<()> {
    let refuse = |what: &str| {
        let m = format!(
            "{what} means nothing in another process: pass the value (it is copied deeply), lend a Buffer, or give a Gift"
        );
        Err(Error::new(ty.span(), m))
    };
    match ty {
        Type::Ptr(_) => refuse("a raw pointer"),
        Type::BareFn(_) => refuse("a function's address"),
        Type::TraitObject(_) | Type::ImplTrait(_) => refuse("a trait object"),
        Type::Reference(r) => Err(Error::new(
            r.span(),
            "a reference inside a value can't cross: use the owned type (String, Vec)",
        )),
        Type::Slice(s) => refuse_pointers(&s.elem),
        Type::Array(a) => refuse_pointers(&a.elem),
        Type::Paren(p) => refuse_pointers(&p.elem),
        Type::Tuple(t) => t.elems.iter().try_for_each(refuse_pointers),
        Type::Path(p) => {
            for segment in &p.path.segments {
                if let PathArguments::AngleBracketed(a) = &segment.arguments {
                    for argument in &a.args {
                        if let GenericArgument::Type(t) = argument {
                            refuse_pointers(t)?;
                        }
                    }
                }
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// `T` or `Result<T, E>`.
fn outcome(output: &ReturnType) -> Result<(Type, Option<Type>)> {
    let ReturnType::Type(_, ty) = output else { return Ok((syn::parse_quote!(()), None)) };
    if let Type::Reference(r) = &**ty {
        return Err(Error::new(
            r.span(),
            "a result is a value of its own: nothing in another process can be borrowed",
        ));
    }
    refuse_pointers(ty)?;
    if let Type::Path(p) = &**ty
        && let Some(last) = p.path.segments.last().filter(|s| s.ident == "Result")
        && let PathArguments::AngleBracketed(a) = &last.arguments
    {
        let types: Vec<&Type> = a
            .args
            .iter()
            .filter_map(|g| if let GenericArgument::Type(t) = g { Some(t) } else { None })
            .collect();
        return match types[..] {
            [value, error] => Ok((value.clone(), Some(error.clone()))),
            _ => Err(Error::new(ty.span(), "write both types of the Result: the error crosses too")),
        };
    }
    Ok(((**ty).clone(), None))
}

/// What both sides must agree on: names, order, modes and types as written (FNV-1a). The inside of a named type is not seen: for that
/// there is `version`.
fn hash(name: &str, methods: &[Method]) -> u64 {
    let mut text = format!("{name};");
    for m in methods {
        text += &format!("{}(", m.ident);
        for a in &m.arguments {
            let mode = match a.mode {
                Mode::In { .. } | Mode::RawIn { .. } => "in",
                Mode::Out { .. } | Mode::RawOut { .. } => "out",
                Mode::InOut { .. } | Mode::RawInOut { .. } => "inout",
                Mode::Lend { .. } => "lend",
                Mode::Give { .. } => "give",
                Mode::Context => continue,
            };
            text += &format!("{mode} {}: {},", a.ident, a.ty.to_token_stream());
        }
        let error = m.error.as_ref().map(|e| e.to_token_stream().to_string()).unwrap_or_default();
        text += &format!(")->{}!{error};", m.value.to_token_stream());
    }
    text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}
