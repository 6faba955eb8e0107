//! The two protocols of `peregrine-vm` that threads and signal handlers race on, with loom's atomics behind
//! `peregrine_base::sync`. The models are `tests/loom_*.rs` of that crate; the rest of it is calls into the kernel, of which a
//! checker sees nothing.

#[path = "../../../crates/vm/src/trap/grace.rs"]
pub mod grace;
#[path = "../../../crates/vm/src/dirty/words.rs"]
pub mod words;
