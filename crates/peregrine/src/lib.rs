#![doc = include_str!("../../../README.md")]

pub use peregrine_macros::{init, main, test};
pub use peregrine_world::*;

#[doc(hidden)]
pub mod __private;
pub mod testing;
