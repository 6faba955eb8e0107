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
        (Some(TokenTree::Ident(_)), _) => {
            Err(error(&format!("a #[peregrine::{attribute}] function takes no arguments")))
        }
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
        return error(
            "#[peregrine::main] takes no arguments: settings come from the environment or from peregrine::Config",
        );
    }
    match function_name(&item, "main") {
        Ok(name) => {
            let mut out = renamed(item, &name, "__peregrine_main");
            out.extend(parse(
                "fn main() -> ::std::process::ExitCode { ::peregrine::__private::main(__peregrine_main) }",
            ));
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
///
/// Plain `cargo test` is enough: the harness starts the test's executable again, which enters the function before anything of
/// the test harness runs. The test passes if the function returns `()` or `Ok`, in time; what it printed is shown if it fails.
///
/// Settings, all optional, become the `PEREGRINE_` variable of the same meaning unless that is set already:
/// `nodes`, `move_every_ms`, `kill_every_ms`, `image_interval_ms`, `slice_us`, `memory_mib`, `stack_kib`, `track`, `seed`.
/// `timeout_s` (default 120) bounds the test; `least_moves`, `least_kills`, `least_preemptions` and `least_preempted_moves` (of a
/// thread that was running, and did not ask) are what must have happened for it to count: the function is called again until it
/// has, so that a test holds on any machine, however fast. `program` makes no test of it: another test runs it by name with
/// `peregrine::testing::run`.
///
/// # Examples
/// ```ignore
/// #[peregrine::test(nodes = 2, move_every_ms = 1, kill_every_ms = 50, least_moves = 10)]
/// fn a_sum_survives() {
///     assert_eq!(peregrine::spawn(|n: u64| (0..n).sum::<u64>(), 1000).join().unwrap(), 499_500);
/// }
/// ```
#[proc_macro_attribute]
pub fn test(attribute: TokenStream, item: TokenStream) -> TokenStream {
    let name = match function_name(&item, "test") {
        Ok(name) => name,
        Err(e) => return e,
    };
    let settings = match settings(attribute) {
        Ok(s) => s,
        Err(e) => return e,
    };
    // Attributes such as #[ignore] and #[cfg] belong to what the test harness sees.
    let mut attributes = TokenStream::new();
    let mut function = TokenStream::new();
    let mut tokens = item.into_iter().peekable();
    while let Some(hash) = tokens.next_if(|t| matches!(t, TokenTree::Punct(p) if p.as_char() == '#')) {
        attributes.extend([hash]);
        attributes.extend(tokens.next());
    }
    function.extend(tokens);
    let program = settings.program;
    let full_name = format!("::core::concat!(::core::module_path!(), \"::\", \"{name}\")");
    let mut inner = function;
    inner.extend(parse(&format!(
        "fn enter() {{ ::peregrine::__private::enter_test({full_name}, {name}) }}
         #[used] #[unsafe(link_section = \"peregrine_start\")] static ENTER: fn() = enter;"
    )));
    let list = settings.list;
    let (head, tail) = if program {
        (
            "#[doc(hidden)] #[allow(dead_code)]".to_owned(),
            format!("::peregrine::testing::Program {{ name: {full_name}, settings: &[{list}] }}"),
        )
    } else {
        (
            "#[::core::prelude::v1::test]".to_owned(),
            format!("::peregrine::__private::test({full_name}, &[{list}])"),
        )
    };
    let mut out = parse(&head);
    out.extend(attributes);
    let result = if program { "-> ::peregrine::testing::Program" } else { "" };
    out.extend(parse(&format!("fn {name}() {result}")));
    inner.extend(parse(&tail));
    out.extend([TokenTree::Group(Group::new(Delimiter::Brace, inner))]);
    out
}

struct Settings {
    program: bool,
    /// `("PEREGRINE_…", "value"),` for each.
    list: String,
}

/// Reads `name = literal, …`.
fn settings(attribute: TokenStream) -> Result<Settings, TokenStream> {
    const KNOWN: [(&str, &str); 19] = [
        ("nodes", "PEREGRINE_NODES"),
        ("move_every_ms", "PEREGRINE_MOVE_EVERY"),
        ("kill_every_ms", "PEREGRINE_KILL_EVERY"),
        ("image_interval_ms", "PEREGRINE_IMAGE_INTERVAL"),
        ("slice_us", "PEREGRINE_SLICE"),
        ("memory_mib", "PEREGRINE_MEMORY"),
        ("stack_kib", "PEREGRINE_STACK"),
        ("track", "PEREGRINE_TRACK"),
        ("windows", "PEREGRINE_WINDOWS"),
        ("window_kib", "PEREGRINE_WINDOW"),
        ("window_stack_kib", "PEREGRINE_WINDOW_STACK"),
        ("pack_after_ms", "PEREGRINE_PACK_AFTER"),
        ("slots", "PEREGRINE_SLOTS"),
        ("seed", "PEREGRINE_SEED"),
        ("timeout_s", "PEREGRINE_TEST_TIMEOUT"),
        ("least_moves", "PEREGRINE_TEST_LEAST_MOVES"),
        ("least_kills", "PEREGRINE_TEST_LEAST_KILLS"),
        ("least_preemptions", "PEREGRINE_TEST_LEAST_PREEMPTIONS"),
        ("least_preempted_moves", "PEREGRINE_TEST_LEAST_PREEMPTED_MOVES"),
    ];
    let known = || KNOWN.map(|k| k.0).join(", ");
    let mut settings = Settings { program: false, list: String::new() };
    let mut tokens = attribute.into_iter();
    while let Some(token) = tokens.next() {
        let name = token.to_string();
        if name == "," {
            continue;
        }
        if name == "program" {
            settings.program = true;
            continue;
        }
        let Some((_, variable)) = KNOWN.iter().find(|k| k.0 == name) else {
            return Err(error(&format!(
                "#[peregrine::test] has no setting `{name}`: there are {}, and program",
                known()
            )));
        };
        match (tokens.next(), tokens.next()) {
            (Some(TokenTree::Punct(p)), Some(TokenTree::Literal(value))) if p.as_char() == '=' => {
                let digits = value.to_string().replace('_', "");
                if digits.parse::<u64>().is_err() {
                    return Err(error(&format!("`{name}` takes a whole number, not {value}")));
                }
                settings.list += &format!("(\"{variable}\", \"{digits}\"),");
            }
            _ => return Err(error(&format!("write `{name} = NUMBER`"))),
        }
    }
    Ok(settings)
}
