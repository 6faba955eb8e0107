//! The solver: inverse power iteration around conjugate gradients, for one rank's rows.
//!
//! ```text
//!   x ← 1
//!   repeat `iterations` times:                      every rank holds its own rows of x, z, r, q,
//!       z ≈ A⁻¹·x    25 steps of conjugate          and the whole of p, which `A·p` reads everywhere
//!                    gradients, from z = 0
//!       zeta ← shift + 1 / (x·z)                    a step of conjugate gradients needs one all-gather (p)
//!       x ← z / ‖z‖                                 and two sums (p·q, r·r)
//! ```
//!
//! There is one body of arithmetic, [`Solver`]. What differs between one thread alone and a rank of many is the type
//! [`Exchange`]: [`Alone`] does nothing and compiles to nothing, so the plain function pays nothing for the
//! existence of the other.

use std::ops::Range;
use std::time::Instant;

use crate::generator::{generate, partition, row_weights};
use crate::{Class, Comm, Iteration, Matrix, Outcome, Problem};

/// Steps of conjugate gradients in each outer iteration.
const INNER_ITERATIONS: usize = 25;

/// Runs the whole benchmark on the calling thread, and calls `progress` after each timed iteration.
///
/// ```
/// let outcome = cg::solve_serial(cg::Class::S, &mut |_| ());
/// assert!(outcome.verified);
/// ```
pub fn solve_serial(class: Class, progress: &mut impl FnMut(Iteration)) -> Outcome {
    let started = Instant::now();
    let problem = class.problem();
    let matrix = generate(&problem, &row_weights(&problem), 0..problem.order);
    Solver::new(problem, matrix, Alone).run(class, 1, started, progress)
}

/// Runs rank `rank` of `ranks` of the benchmark on the calling thread, and calls `progress` after each timed
/// iteration. All ranks return the same zeta, to the bit, and for a given number of ranks it is the same in every run.
/// One rank alone does exactly what [`solve_serial`] does, without a message.
///
/// The rank's memory is its share of the matrix (12 bytes a nonzero) and about 60 bytes a row, of which 12 for every
/// row of the matrix and the rest for its own.
///
/// # Panics
/// If `comm` says that it is another rank, or if it panics itself.
pub fn solve_worker(
    class: Class,
    rank: usize,
    ranks: usize,
    comm: &mut impl Comm,
    progress: &mut impl FnMut(Iteration),
) -> Outcome {
    let (of_comm, ranks_of_comm) = (comm.rank(), comm.ranks());
    assert!(
        (of_comm, ranks_of_comm) == (rank, ranks) && rank < ranks,
        "rank {rank} of {ranks} was given the comm of rank {of_comm} of {ranks_of_comm}"
    );
    if ranks == 1 {
        return solve_serial(class, progress);
    }
    let started = Instant::now();
    let problem = class.problem();
    let weights = row_weights(&problem);
    let blocks = partition(&weights, ranks);
    let matrix = generate(&problem, &weights, blocks[rank].clone());
    drop(weights);
    let counts = blocks.iter().map(Range::len).collect();
    let exchange = Together { comm, counts, mine: Vec::with_capacity(blocks[rank].len()) };
    Solver::new(problem, matrix, exchange).run(class, ranks, started, progress)
}

/// What a rank gets from the others.
trait Exchange {
    /// Fills in all of `full` but `own`, which the other ranks get.
    fn gather(&mut self, full: &mut [f64], own: Range<usize>);

    /// Adds up each of `values` over all ranks.
    fn sum<const N: usize>(&mut self, values: [f64; N]) -> [f64; N];
}

/// The only rank: there is nobody to exchange with.
struct Alone;

impl Exchange for Alone {
    fn gather(&mut self, _full: &mut [f64], _own: Range<usize>) {}

    fn sum<const N: usize>(&mut self, values: [f64; N]) -> [f64; N] {
        values
    }
}

/// A rank of many.
struct Together<'a, C> {
    comm: &'a mut C,
    /// How many rows each rank owns.
    counts: Vec<usize>,
    /// A copy of the own part, because [`Comm::all_gather`] writes all of the vector.
    mine: Vec<f64>,
}

impl<C: Comm> Exchange for Together<'_, C> {
    fn gather(&mut self, full: &mut [f64], own: Range<usize>) {
        self.mine.clear();
        self.mine.extend_from_slice(&full[own]);
        self.comm.all_gather(&self.mine, &self.counts, full);
    }

    fn sum<const N: usize>(&mut self, mut values: [f64; N]) -> [f64; N] {
        self.comm.all_sum(&mut values);
        values
    }
}

/// One rank's part of the computation. All vectors but `full` have an element for each own row.
struct Solver<E> {
    problem: Problem,
    matrix: Matrix,
    exchange: E,
    /// The current estimate of the eigenvector.
    x: Vec<f64>,
    /// The solution of `A·z = x`.
    z: Vec<f64>,
    /// The residual of that.
    r: Vec<f64>,
    /// A product with the matrix.
    q: Vec<f64>,
    /// What the matrix is multiplied with, whole: the direction `p`, and at last `z`.
    full: Vec<f64>,
}

impl<E: Exchange> Solver<E> {
    fn new(problem: Problem, matrix: Matrix, exchange: E) -> Self {
        let own = || vec![0.0; matrix.rows().len()];
        let (x, z, r, q) = (own(), own(), own(), own());
        Self { problem, matrix, exchange, x, z, r, q, full: vec![0.0; problem.order] }
    }

    /// One iteration to touch all memory, untimed and then forgotten, as the specification has it; then the
    /// timed ones.
    fn run(
        mut self,
        class: Class,
        ranks: usize,
        started: Instant,
        progress: &mut impl FnMut(Iteration),
    ) -> Outcome {
        self.x.fill(1.0);
        self.iterate(0);
        self.x.fill(1.0);
        let initialisation = started.elapsed();

        let timed = Instant::now();
        let mut last = Iteration { number: 0, of: self.problem.iterations, rnorm: f64::NAN, zeta: f64::NAN };
        for number in 1..=self.problem.iterations {
            last = self.iterate(number);
            progress(last);
        }
        Outcome::new(class, ranks, last, timed.elapsed().as_secs_f64(), initialisation.as_secs_f64())
    }

    /// One outer iteration.
    fn iterate(&mut self, number: u32) -> Iteration {
        let rnorm = self.solve();
        let [xz, zz] = self.exchange.sum([dot(&self.x, &self.z), dot(&self.z, &self.z)]);
        let inverse_norm = 1.0 / zz.sqrt();
        for (x, z) in self.x.iter_mut().zip(&self.z) {
            *x = inverse_norm * z;
        }
        Iteration { number, of: self.problem.iterations, rnorm, zeta: self.problem.shift + 1.0 / xz }
    }

    /// `z ≈ A⁻¹·x` by conjugate gradients; returns `‖x − A·z‖`.
    fn solve(&mut self) -> f64 {
        let Self { matrix, exchange, x, z, r, q, full, .. } = self;
        let own = matrix.rows();
        z.fill(0.0);
        r.copy_from_slice(x);
        full[own.clone()].copy_from_slice(x);
        let [mut rho] = exchange.sum([dot(r, r)]);

        for step in 1..=INNER_ITERATIONS {
            exchange.gather(full, own.clone());
            matrix.multiply(full, q);
            let p = &mut full[own.clone()];
            let [pq] = exchange.sum([dot(p, q)]);
            let alpha = rho / pq;
            add_scaled(z, alpha, p);
            add_scaled(r, -alpha, q);
            if step == INNER_ITERATIONS {
                // Nobody will ask for the next direction.
                break;
            }
            let [next] = exchange.sum([dot(r, r)]);
            let beta = next / rho;
            rho = next;
            for (p, r) in p.iter_mut().zip(&*r) {
                *p = r + beta * *p;
            }
        }

        full[own.clone()].copy_from_slice(z);
        exchange.gather(full, own);
        matrix.multiply(full, q);
        let distance = x.iter().zip(&*q).map(|(x, q)| (x - q) * (x - q)).sum();
        let [distance] = exchange.sum([distance]);
        distance.sqrt()
    }
}

/// `a·b`, in eight sums beside each other: one alone would wait for the latency of its addition at every element.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a, last_a) = a.as_chunks::<8>();
    let (b, last_b) = b.as_chunks::<8>();
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f64 = last_a.iter().zip(last_b).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

/// `y ← y + factor·x`.
fn add_scaled(y: &mut [f64], factor: f64, x: &[f64]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}
