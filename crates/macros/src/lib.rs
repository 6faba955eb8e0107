//! The attributes of the `peregrine` crate: `#[peregrine::main]`, `#[peregrine::init]` and `#[peregrine::test]`.
//!
//! They only rename a function and call it; the token streams are handled directly, so that a build of this crate costs next to
//! nothing.

use proc_macro::{Delimiter, Group, Ident, Span, TokenStream, TokenTree};

fn error(message: &str) -> TokenStream {
    format!("::core::compile_error!({message:?});").parse().unwrap_or_default()
}

/// Finds the name in `fn name(...)`, and checks that the function takes nothing and is not async.
fn function_name(item: &TokenStream, attribute: &str) -> Result<Ident, TokenStream> {
    let tokens: Vec<TokenTree> = item.clone().into_iter().collect();
    let at = tokens
        .iter()
        .position(|t| matches!(t, TokenTree::Ident(i) if i.to_string() == "fn"))
        .ok_or_else(|| error(&format!("#[peregrine::{attribute}] belongs on a function")))?;
    if tokens[..at].iter().any(|t| matches!(t, TokenTree::Ident(i) if i.to_string() == "async")) {
        return Err(error(&format!(
            "#[peregrine::{attribute}] takes an ordinary blocking function: threads are cheap here, remove `async`"
        )));
    }
    match (tokens.get(at + 1), tokens.get(at + 2)) {
        (Some(TokenTree::Ident(name)), Some(TokenTree::Group(arguments)))
            if arguments.delimiter() == Delimiter::Parenthesis && arguments.stream().is_empty() =>
        {
            Ok(name.clone())
        }
        (Some(TokenTree::Ident(_)), _) => Err(error(&format!("a #[peregrine::{attribute}] function takes no arguments"))),
        _ => Err(error(&format!("#[peregrine::{attribute}] belongs on a function"))),
    }
}

/// The item with its function renamed.
fn renamed(item: TokenStream, from: &Ident, to: &str) -> TokenStream {
    let from = from.to_string();
    let mut after_fn = false;
    item.into_iter()
        .map(|t| {
            let rename = after_fn && matches!(&t, TokenTree::Ident(i) if i.to_string() == from);
            after_fn = matches!(&t, TokenTree::Ident(i) if i.to_string() == "fn");
            if rename { TokenTree::Ident(Ident::new(to, Span::call_site())) } else { t }
        })
        .collect()
}

fn parse(code: &str) -> TokenStream {
    code.parse().unwrap_or_default()
}

/// Runs `main` as the first thread of a World.
///
/// The process becomes the World's supervisor, starts `PEREGRINE_NODES` node processes (default: one a processor), and runs the
/// function in a thread that is preempted, moved and recovered like any other. Whatever `main` may return in Rust it may return
/// here.
#[proc_macro_attribute]
pub fn main(attribute: TokenStream, item: TokenStream) -> TokenStream {
    if !attribute.is_empty() {
        return error("#[peregrine::main] takes no arguments: settings come from the environment or from peregrine::Config");
    }
    match function_name(&item, "main") {
        Ok(name) => {
            let mut out = renamed(item, &name, "__peregrine_main");
            out.extend(parse("fn main() -> ::std::process::ExitCode { ::peregrine::__private::main(__peregrine_main) }"));
            out
        }
        Err(e) => e,
    }
}

/// Runs the function at the start of every thread, before the thread's own.
///
/// Statics belong to threads, and each thread starts from the statics as they are before `main`; what must be set in all of
/// them is set here. A program may have several; their order is not defined.
#[proc_macro_attribute]
pub fn init(_: TokenStream, item: TokenStream) -> TokenStream {
    match function_name(&item, "init") {
        Ok(name) => {
            let mut out = item;
            let body = parse(&format!(
                "#[used] #[unsafe(link_section = \"peregrine_init\")] static INIT: fn() = {name};"
            ));
            out.extend(parse("const _: () ="));
            out.extend([TokenTree::Group(Group::new(Delimiter::Brace, body))]);
            out.extend(parse(";"));
            out
        }
        Err(e) => e,
    }
}

/// Runs a test function as the `main` of a World of its own, in a process of its own.
#[proc_macro_attribute]
pub fn test(_: TokenStream, item: TokenStream) -> TokenStream {
    match function_name(&item, "test") {
        Ok(name) => {
            let inner = format!("__peregrine_test_{name}");
            let mut out = parse("#[allow(non_snake_case)]");
            out.extend(renamed(item, &name, &inner));
            out.extend(parse(&format!(
                "#[::core::prelude::v1::test] fn {name}() {{ ::peregrine::__private::test(::core::concat!(::core::module_path!(), \"::\", \"{name}\"), {inner}) }}"
            )));
            out
        }
        Err(e) => e,
    }
}
