//! Fresh calls of Peregrine threads: into another process, on a stack of that process's choice, while the caller's node runs others.
//!
//! The domain is the test's own process; the World is its child.

#![allow(missing_docs)]

mod calls;
mod deaths;
mod domain;
mod memory;
mod sees;
