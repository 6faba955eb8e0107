//! The names that a script finds besides the language: see the table in the crate's documentation.

use std::io::{self, Write};
use std::path::Path;

use boa_engine::object::ObjectInitializer;
use boa_engine::object::builtins::JsArray;
use boa_engine::property::Attribute;
use boa_engine::{Context, JsError, JsResult, JsString, JsValue, NativeFunction, js_string};
use boa_gc::{Finalize, Trace};
use boa_runtime::extensions::ConsoleExtension;
use boa_runtime::{ConsoleState, Logger};

/// Adds all of them to `context`.
pub(crate) fn register(path: &Path, args: &[String], context: &mut Context) -> JsResult<()> {
    boa_runtime::register(ConsoleExtension(Streams), None, context)?;

    let args = args.iter().map(|arg| JsString::from(arg.as_str()));
    let file = JsString::from(path.to_string_lossy().as_ref());
    let argv = [js_string!("peregrine"), file].into_iter().chain(args.clone()).map(JsValue::from);
    let argv = JsArray::from_iter(argv, context);
    let process =
        ObjectInitializer::new(context).property(js_string!("argv"), argv, Attribute::all()).build();
    let script_args = JsArray::from_iter(args.map(JsValue::from), context);
    let performance = ObjectInitializer::new(context)
        .function(NativeFunction::from_fn_ptr(now), js_string!("now"), 0)
        .build();

    let hidden = Attribute::WRITABLE | Attribute::CONFIGURABLE;
    context.register_global_property(js_string!("process"), process, hidden)?;
    context.register_global_property(js_string!("scriptArgs"), script_args, hidden)?;
    context.register_global_property(js_string!("performance"), performance, hidden)?;
    context.register_global_callable(js_string!("print"), 0, NativeFunction::from_fn_ptr(print))
}

/// `print(…)`.
fn print(_this: &JsValue, args: &[JsValue], context: &mut Context) -> JsResult<JsValue> {
    let words: Vec<String> =
        args.iter().map(|arg| Ok(arg.to_string(context)?.to_std_string_lossy())).collect::<JsResult<_>>()?;
    write_line(io::stdout(), words.join(" "))?;
    Ok(JsValue::undefined())
}

/// `performance.now()`.
fn now(_this: &JsValue, _args: &[JsValue], context: &mut Context) -> JsResult<JsValue> {
    Ok(JsValue::from(context.clock().now().nanos_since_epoch() as f64 / 1e6))
}

/// Where `console` writes to.
#[derive(Debug, Trace, Finalize)]
struct Streams;

impl Logger for Streams {
    fn log(&self, text: String, state: &ConsoleState, _: &mut Context) -> JsResult<()> {
        write_line(io::stdout(), indent(text, state))
    }

    fn info(&self, text: String, state: &ConsoleState, context: &mut Context) -> JsResult<()> {
        self.log(text, state, context)
    }

    fn warn(&self, text: String, state: &ConsoleState, context: &mut Context) -> JsResult<()> {
        self.error(text, state, context)
    }

    fn error(&self, text: String, state: &ConsoleState, _: &mut Context) -> JsResult<()> {
        write_line(io::stderr(), indent(text, state))
    }
}

/// Two spaces for each `console.group`, before each line.
fn indent(text: String, state: &ConsoleState) -> String {
    match " ".repeat(state.indent()) {
        none if none.is_empty() => text,
        spaces => format!("{spaces}{}", text.replace('\n', &format!("\n{spaces}"))),
    }
}

/// One `write` for text and newline together: std's stdout passes a buffer that ends a line on as a whole, so no
/// other process's line, and no crash, comes between the two.
fn write_line(mut stream: impl Write, mut text: String) -> JsResult<()> {
    text.push('\n');
    stream.write_all(text.as_bytes()).map_err(JsError::from_rust)
}
