//! The NAS Parallel Benchmark CG, alone and on any message-passing system.
//!
//! CG estimates the smallest eigenvalue of a large sparse symmetric matrix by inverse power iteration; each outer
//! step solves a linear system with 25 steps of conjugate gradients. It is a good witness for a system that
//! moves running threads: every rank talks to every other many times a second, the authors of the benchmark
//! published the *zeta* that it must end with, and the arithmetic is deterministic. So a damaged run differs from a
//! sound one in the bits of some [`Iteration`], even where conjugate gradients mend the damage and the verification,
//! to one part in 10¹⁰, forgives it. Specification: D. Bailey et al., *The NAS Parallel Benchmarks*, RNR-94-007,
//! section 2.4.
//!
//! ```text
//!   generator ──entries──▶ Matrix (own rows, CSR) ──┐
//!   (sequential stream, replayed by every rank)     ├─▶ solve: 1 warm-up, then niter × (25 × A·p)
//!                        Comm (all_gather, all_sum) ─┘        │
//!            MessageComm over PointToPoint                   ▼
//!                                                 Iteration …  Outcome (zeta, verified)
//! ```
//!
//! One function runs it on the calling thread, as fast as one thread goes:
//!
//! ```
//! use cg::{Class, solve_serial};
//!
//! let outcome = solve_serial(Class::S, &mut |iteration| println!("{iteration}"));
//! assert!(outcome.verified);
//! assert!((outcome.zeta - 8.5971775078648).abs() < 1e-9);
//! assert!(outcome.to_string().ends_with("VERIFICATION SUCCESSFUL"));
//! ```
//!
//! The other, [`solve_worker`], is one rank of many. It needs a [`Comm`], or any [`PointToPoint`] inside a
//! [`MessageComm`]. The crate starts no thread, has no static, and keeps all its state on the stack and heap
//! of the caller, so the caller may be moved at any instruction.
#![forbid(unsafe_code)]

mod comm;
mod generator;
mod matrix;
mod outcome;
mod problem;
mod solve;

pub use comm::{Comm, MessageComm, PointToPoint};
pub use generator::{partition, row_weights};
pub use matrix::{Matrix, MatrixBuilder};
pub use outcome::{Iteration, Outcome};
pub use problem::{Class, ParseClassError, Problem};
pub use solve::{solve_serial, solve_worker};
