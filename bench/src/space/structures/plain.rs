//! Over core's atomics.

pub use peregrine_base as base;
pub use peregrine_space as space;
#[path = "counters.rs"]
pub mod counters;
#[path = "scene.rs"]
pub mod scene;
