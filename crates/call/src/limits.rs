//! What one client may take of a domain.
//!
//! A domain's memory, threads and time are finite and its clients are strangers. Each limit bounds what a client can
//! take by any behaviour whatever, so that a hostile one exhausts its own share and nobody else's.

use std::time::Duration;

/// Limits of a domain; the defaults suit a service with some hundred clients.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Clients connected at once.
    pub clients: usize,
    /// Calls in flight of one client: the lines that it may open.
    pub calls_in_flight: usize,
    /// Activations that work for one client at once; calls beyond it wait.
    pub activations_per_client: usize,
    /// Bytes of one line's argument stack: arguments and results that fit are passed in it. Address space until touched.
    pub argument_stack_bytes: usize,
    /// Bytes of copied arguments of one call.
    pub argument_bytes: usize,
    /// Bytes of buffers that one client may have registered, for lending and for large arguments.
    pub buffer_bytes: u64,
    /// Buffers, and gifts on their way, that one client may have registered.
    pub buffers: usize,
    /// Depth of a chain of nested calls.
    pub depth: u32,
    /// How long an activation may look for the next call before it sleeps: spinning for a client that runs on another core, giving the core
    /// away for one that runs on its own. Zero: it sleeps at once. The caller looks for its reply by itself.
    pub spin: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            clients: 16 * 1024,
            calls_in_flight: 32,
            activations_per_client: 8,
            argument_stack_bytes: 256 * 1024,
            argument_bytes: 64 << 20,
            buffer_bytes: 1 << 30,
            buffers: 256,
            depth: 64,
            spin: Duration::from_micros(18),
        }
    }
}
