//! Wiring: a domain with user-level threads of its own binds one to each call.

/// Binds a user-level thread of the domain's own to each call.
///
/// A domain that multiplexes threads of its own over activations can't let a call run on whatever user-level thread is at hand: the
/// call has its own priority and must return on the OS thread that it came in on. The activation calls
/// [`run`](Self::run), which makes one user-level thread current on this OS thread, runs `call` on it to its end, and returns.
pub trait Wire: Send + Sync + 'static {
    /// Runs `call` exactly once, on the calling OS thread, before returning. If it does not, the caller is told that the handler
    /// panicked.
    fn run(&self, call: &mut dyn FnMut());
}
