//! Over recording atomics.

pub use base_recorded as base;
pub use space_recorded as space;
#[path = "counters.rs"]
pub mod counters;
#[path = "scene.rs"]
pub mod scene;
