//! Large arguments that travel in pieces: the domain copies one while the caller writes the next.
//!
//! ```text
//! caller   header ─▶ publish ─▶ piece 0 ─▶ written = 1 ─▶ piece 1 ─▶ written = 2 ─▶ …   ─▶ waits for the reply
//! domain                └▶ sees the call ─▶ written ≥ 1? ─▶ copies 0 ─▶ written ≥ 2? ─▶ copies 1 ─▶ …  ─▶ handler
//! ```
//!
//! (`written` counts bytes of the payload.) One copy after the other takes three times as long between two cores: see `docs/costs.md`. It is for
//! calls of which both sides are known to be on cores of their own ([`Affinity::Apart`](crate::Affinity::Apart)), with a payload in the spill buffer, and
//! nobody charged, whose words the counter lies in.
//!
//! **What the peers can make of it.** Once such a call is published its caller has nothing left to do that could fail. The domain takes any number: bytes
//! that were not written are what was there before, of this client's. For a caller that is stopped, or never writes on, it waits asleep and not long, and
//! not at all when the activation is wanted elsewhere (`domain/arrival.rs`). Then it answers [`Stalled`](crate::reply::Status::Stalled): nothing was
//! executed, and the caller, if it goes on, sends the call once more, whole. Leaving the call there for whoever takes it up is no way out: callers that
//! never write would hand the activation to each other for ever.

use crate::line::{Words, domains};
use peregrine_base::sync::AtomicU64;

/// Bytes that are written or copied at a time: of the sizes from 16 to 64 KiB none was better than another.
pub(crate) const PIECE_BYTES: usize = 32 * 1024;
/// The least payload that is worth it.
pub(crate) const LEAST_BYTES: usize = 4 * PIECE_BYTES;

/// How many bytes of the payload the caller has written.
#[inline]
pub(crate) fn written(words: Words<'_>) -> &AtomicU64 {
    words.word64(domains::CHARGES)
}
