//! The one door to atomics.
//!
//! No other file in the workspace names `core::sync::atomic` (`clippy.toml` enforces it), so that one
//! switch here can put a model checker's or a recorder's atomics behind all of them.

#[allow(clippy::disallowed_types, clippy::disallowed_methods)]
mod door {
    pub use core::sync::atomic::{
        AtomicBool, AtomicI32, AtomicI64, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize,
        Ordering, compiler_fence, fence,
    };
}
pub use core::hint::spin_loop;
pub use door::*;
