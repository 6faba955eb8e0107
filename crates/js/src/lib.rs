//! Runs a JavaScript file in the unmodified crate `boa_engine`, on the calling thread.
//!
//! ```text
//!   run_script ── parse ── evaluate ── event loop ──▶ Ok, or the ScriptError that ended it
//!                                       │  microtasks until there are none
//!                                       ├─ a rejected promise that nobody handles ends the run
//!                                       ├─ one timer that is due, or a sleep until one is
//!                                       ╰─ again, until nothing is left to do
//! ```
//!
//! ```
//! use std::path::Path;
//! let source = "let squares = [1, 2, 3].map(x => x * x); console.log(squares.join(), ...scriptArgs);";
//! peregrine_js::run_script(Path::new("squares.js"), source, &["done".to_owned()])?;   // prints: 1,4,9 done
//!
//! let error = peregrine_js::run_script(Path::new("bad.js"), "let x = 1;\nnull.field;", &[]).unwrap_err();
//! assert!(error.to_string().starts_with("uncaught TypeError: "));
//! assert!(error.to_string().ends_with("at <main> (bad.js:2:6)"));
//! # Ok::<(), peregrine_js::ScriptError>(())
//! ```
//!
//! # What a script finds
//!
//! The language as the engine has it (ECMAScript 2025 with Annex B, without `Intl` and `Temporal`), as a classic
//! script, not a module. Besides:
//!
//! | name | what it is |
//! |---|---|
//! | `console` | `log`, `info`, `debug`, `table`, … write to standard output, `error`, `warn` to standard error; a line goes out in one write |
//! | `print(…)` | the arguments as strings with a space between, to standard output |
//! | `scriptArgs` | array of the arguments, without the file's name |
//! | `process.argv` | `["peregrine", file, …arguments]`, so `process.argv.slice(2)` works as in node; `process` has nothing else |
//! | `setTimeout`, `setInterval`, `clear…`, `queueMicrotask` | the run ends when no timer is left |
//! | `performance.now()` | milliseconds since the script started, from a monotone clock |
//! | `structuredClone`, `atob`, `btoa`, `TextEncoder`, `TextDecoder` | as in browsers |
//!
//! # What the thread is asked for
//!
//! The engine starts no OS thread; neither does this crate, which has no state of its own outside the call. What the
//! engine keeps in statics and thread-locals (counters of symbols, the collector's roots) it makes on first use.
//! Script functions that call each other use the heap, but a call through the engine (`map`, a getter, a proxy) uses
//! the stack, so recursion is limited by [`Host::stack_bytes`].
#![forbid(unsafe_code)]

mod error;
mod events;
mod globals;

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use boa_engine::{Context, JsResult, Script, Source};

pub use error::ScriptError;
use events::{EventLoop, Failure};

/// What a script gets from the program that runs it.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// How to wait for a timer. It may return early: the wait then goes on.
    pub sleep: fn(Duration),
    /// How much stack the calling thread has left for the script. After the first 128 KiB, it may recurse a level deeper
    /// for each 2,560 bytes (a debug build asks for 768 KiB and 10 KiB), and ends with [`ScriptError::Limit`] if it goes
    /// further. Node allows about 11,000 levels; for as many, say 28 MiB, of which only what is used is ever touched.
    pub stack_bytes: usize,
}

impl Default for Host {
    /// [`std::thread::sleep`], and the 2 MiB that std gives a thread.
    fn default() -> Self {
        Self { sleep: std::thread::sleep, stack_bytes: 2 << 20 }
    }
}

/// Stack that one level of recursion may take. A level is a script function, or a call from the engine into one. The
/// dearest path found, a `JSON.parse` in its own reviver, takes 2,220 bytes (8,490 in a debug build); `map` takes 740,
/// and a plain call none. The test `recursion_ends_with_an_error_before_the_stack_does` walks the dear ones.
const BYTES_A_LEVEL: usize = if cfg!(debug_assertions) { 10 << 10 } else { 5 << 9 };

/// Stack for all else: the parser, and the engine's own functions at the innermost level (85 KiB were seen, 505 in a
/// debug build).
const BYTES_AROUND: usize = if cfg!(debug_assertions) { 768 << 10 } else { 128 << 10 };

/// Values on the engine's own stack (on the heap, 8 bytes each): what `f(...array)` may spread.
const STACK_VALUES: usize = 4 << 20;

/// Runs `source`, the contents of the file `path`, until it ends and all its timers and promises are done.
/// `path` only names the script in errors; nothing is read from it.
///
/// # Errors
/// See [`ScriptError`]. What the script printed before stays printed.
///
/// # Panics
/// Where the engine panics, which is a bug of the engine; one is known for a function expression that names itself in
/// a direct `eval`. Some of the engine's own loops over data recurse without a limit (a text or array nested ten
/// thousand levels deep): they overflow the thread's stack.
///
/// # Examples
/// ```
/// use std::path::Path;
/// let source = "setTimeout(() => console.log('two'), 5); Promise.resolve('one').then(console.log)";
/// peregrine_js::run_script(Path::new("order.js"), source, &[])?;   // prints: one, two
/// # Ok::<(), peregrine_js::ScriptError>(())
/// ```
pub fn run_script(path: &Path, source: &str, args: &[String]) -> Result<(), ScriptError> {
    run_script_on(Host::default(), path, source, args)
}

/// [`run_script`] with another sleep, or another size of stack.
///
/// # Errors
/// As [`run_script`].
pub fn run_script_on(host: Host, path: &Path, source: &str, args: &[String]) -> Result<(), ScriptError> {
    let events = Rc::new(EventLoop::new(host.sleep));
    let mut context = make_context(&events, host.stack_bytes, path, args)
        .map_err(|error| ScriptError::Engine { message: error.to_string() })?;

    let script = match Script::parse(Source::from_bytes(source).with_path(path), None, &mut context) {
        Ok(script) => script,
        Err(error) => return Err(ScriptError::syntax(path, source, &error, &mut context)),
    };
    let run = script.evaluate(&mut context).map_err(Failure::Thrown).and_then(|_| events.run(&mut context));
    run.map_err(|failure| ScriptError::from_failure(failure, &mut context))
}

/// An engine with the globals that the crate's documentation lists.
fn make_context(
    events: &Rc<EventLoop>,
    stack_bytes: usize,
    path: &Path,
    args: &[String],
) -> JsResult<Context> {
    let mut context =
        Context::builder().job_executor(Rc::clone(events)).host_hooks(Rc::clone(events)).build()?;
    let limits = context.runtime_limits_mut();
    limits.set_recursion_limit(stack_bytes.saturating_sub(BYTES_AROUND) / BYTES_A_LEVEL);
    limits.set_stack_size_limit(STACK_VALUES);
    globals::register(path, args, &mut context)?;
    Ok(context)
}
