//! Wiring: a domain with user-level threads of its own binds one to each call.

use std::fmt;

/// Binds a user-level thread of the domain's own to each call.
///
/// A domain that multiplexes threads of its own over activations can't let a call run on whatever user-level thread is at hand: the
/// call has its own priority and must return on the OS thread that it came in on. The activation calls
/// [`run`](Self::run), which makes one user-level thread current on this OS thread, runs the call on it to its end, and returns.
///
/// # Examples
/// ```
/// use peregrine_call::{Wire, WiredCall};
///
/// struct Inline;
/// impl Wire for Inline {
///     fn run(&self, call: WiredCall<'_>) {
///         // Here: take a user-level thread, make it current, and run this on its stack.
///         call.run();
///     }
/// }
/// ```
///
/// A call can't be run twice, for running it takes it:
/// ```compile_fail
/// # use peregrine_call::{Wire, WiredCall};
/// struct Twice;
/// impl Wire for Twice {
///     fn run(&self, call: WiredCall<'_>) {
///         call.run();
///         call.run();
///     }
/// }
/// ```
/// nor on another OS thread:
/// ```compile_fail
/// # use peregrine_call::{Wire, WiredCall};
/// struct Away;
/// impl Wire for Away {
///     fn run(&self, call: WiredCall<'_>) {
///         std::thread::scope(|scope| scope.spawn(move || call.run()).join()).ok();
///     }
/// }
/// ```
pub trait Wire: Send + Sync + 'static {
    /// Runs `call` on the calling OS thread before returning. If it drops it instead, or panics, the caller is told that the handler
    /// panicked, and why.
    fn run(&self, call: WiredCall<'_>);
}

/// A call that is to be run by the domain's [`Wire`]: once, and on the OS thread that it came in on.
#[must_use = "a call that is dropped is not executed, and its caller is told of a panic"]
pub struct WiredCall<'a> {
    /// Neither `Send`, nor to be had twice.
    serve: &'a mut dyn FnMut(),
}

impl<'a> WiredCall<'a> {
    pub(crate) const fn new(serve: &'a mut dyn FnMut()) -> Self {
        Self { serve }
    }

    /// Executes it: the portal's handler runs on the stack that this is called on. What the handler panics with is caught here.
    pub fn run(self) {
        (self.serve)();
    }
}

impl fmt::Debug for WiredCall<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WiredCall")
    }
}
