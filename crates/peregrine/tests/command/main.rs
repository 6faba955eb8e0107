//! The command as a user has it: what it prints, its exit codes, and what it leaves behind.

mod control;
#[path = "../examples/mod.rs"]
mod examples;
mod offers;
mod runs;
mod scene;
mod waits;
