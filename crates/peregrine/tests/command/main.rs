//! The command as a user has it: what it prints, its exit codes, and what it leaves behind.

mod control;
mod offers;
mod runs;
mod scene;
