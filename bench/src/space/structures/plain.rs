//! Over core's atomics.

pub use peregrine_base as base;
pub use peregrine_space as space;
#[allow(clippy::duplicate_mod, reason = "compiled twice on purpose: over plain and over recording atomics")]
#[path = "counters.rs"]
pub mod counters;
#[allow(clippy::duplicate_mod, reason = "compiled twice on purpose: over plain and over recording atomics")]
#[path = "scene.rs"]
pub mod scene;
