//! The one door to atomics.
//!
//! No other file in the workspace names `core::sync::atomic` (a test of `testkit` reads the sources), so that one switch
//! here puts a model checker's or a recorder's atomics behind all of them:
//!
//! ```text
//!  cfg                 behind the door        who sets it
//!  none                core::sync::atomic     everybody
//!  peregrine_loom      loom::sync::atomic     checked/base-loom: the same sources as a second package
//!  peregrine_record    record: core's, and every access is noted while a recording runs   checked/base-recorded
//! ```
//!
//! The two configurations are set by build scripts of packages in `checked/` that compile these very sources again under
//! another name, so one program can hold a structure both plain and recorded, and no `RUSTFLAGS` are needed.

#[cfg(peregrine_record)]
pub mod record;

#[cfg(not(any(peregrine_loom, peregrine_record)))]
mod door {
    pub use core::hint::spin_loop;
    pub use core::sync::atomic::{
        AtomicBool, AtomicI32, AtomicI64, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize,
        Ordering, compiler_fence, fence,
    };
}

#[cfg(peregrine_loom)]
mod door {
    pub use core::sync::atomic::compiler_fence;
    pub use loom::sync::atomic::{
        AtomicBool, AtomicI32, AtomicI64, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize,
        Ordering, fence,
    };
    /// A waiting thread lets the others run, or the model would never end.
    pub fn spin_loop() {
        loom::thread::yield_now();
    }
}

#[cfg(peregrine_record)]
mod door {
    pub use super::record::{
        AtomicBool, AtomicI32, AtomicI64, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize,
    };
    pub use core::hint::spin_loop;
    pub use core::sync::atomic::{Ordering, compiler_fence, fence};
}

pub use door::*;
