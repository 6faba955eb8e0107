//! Over recording atomics.

pub use base_recorded as base;
pub use space_recorded as space;
#[allow(clippy::duplicate_mod, reason = "compiled twice on purpose: over plain and over recording atomics")]
#[path = "counters.rs"]
pub mod counters;
#[allow(clippy::duplicate_mod, reason = "compiled twice on purpose: over plain and over recording atomics")]
#[path = "scene.rs"]
pub mod scene;
