//! The protocols of `peregrine-call` by which callers, activations and the pool wake each other and come to an end, and the looks that come
//! before a sleep, with loom's atomics behind
//! `peregrine_base::sync`. The models are `tests/loom_*.rs` of that crate; the rest of it is memory that a stranger writes and calls into
//! the kernel, of which a checker sees nothing.

#[path = "../../../crates/call/src/domain/ended.rs"]
pub mod ended;
#[path = "../../../crates/call/src/gate.rs"]
pub mod gate;
#[path = "../../../crates/call/src/look.rs"]
pub mod look;
#[path = "../../../crates/call/src/domain/rest.rs"]
pub mod rest;
#[path = "../../../crates/call/src/client/warm.rs"]
pub mod warm;
