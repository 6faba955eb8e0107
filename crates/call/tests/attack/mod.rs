//! What hostile peers do: run briefly by the tests, at length by `soak call`.

#![allow(dead_code)]

pub mod client;
pub mod domain;
#[path = "../raw/mod.rs"]
pub mod raw;
#[path = "../scene/mod.rs"]
pub mod scene;
