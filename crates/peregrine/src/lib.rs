//! Peregrine: threads that move between processes, go to disk, and survive `kill -9`.
pub use peregrine_macros::{init, main, test};
pub use peregrine_world::*;

#[doc(hidden)]
pub mod __private;
pub mod testing;
