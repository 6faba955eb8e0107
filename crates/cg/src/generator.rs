//! The benchmark's matrix, made row block by row block from one random stream.
//!
//! The specification defines the matrix as a sum of outer products of sparse random vectors, weighted so that
//! the condition number is about 10, with the diagonal shifted:
//!
//! ```text
//!   A = Σᵢ ωⁱ · vᵢ·vᵢᵀ + (0.1 − shift)·I       ω = 0.1^(1/order),  i = 0 … order − 1
//!   vᵢ: `nonzer` random values at distinct random places, and vᵢ[i] = 0.5
//! ```
//!
//! The stream behind the vectors is sequential, but short (a few million draws for class B, against the 15 million
//! entries made from them). So every rank replays all of it and keeps what falls in its own rows: once to count,
//! once to fill. Nobody ever holds the whole matrix or even all vectors, and nothing is sent.

use std::ops::Range;

use crate::{Matrix, MatrixBuilder, Problem};

/// The generator of the NAS benchmarks: `x ← 5¹³·x mod 2⁴⁶`, read as `x·2⁻⁴⁶`.
struct Randlc(u64);

impl Randlc {
    const BITS: u32 = 46;
    const MULTIPLIER: u64 = 1_220_703_125;
    const SEED: u64 = 314_159_265;

    /// The next `x`. Wrapping at 64 bits loses nothing, for 2⁴⁶ divides 2⁶⁴.
    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(Self::MULTIPLIER) & ((1 << Self::BITS) - 1);
        self.0
    }

    /// The next number in (0, 1); exact, for 46 bits fit the mantissa.
    fn unit(&mut self) -> f64 {
        self.draw() as f64 / (1u64 << Self::BITS) as f64
    }

    /// The first `bits` bits of the next number's fraction.
    fn bits(&mut self, bits: u32) -> u64 {
        self.draw() >> (Self::BITS - bits)
    }
}

/// Calls `visit(i, weight, vector)` for each vᵢ in order, `weight` being ωⁱ, and the vector a list of places and
/// values in the order in which the specification draws them.
fn for_each_vector(problem: &Problem, mut visit: impl FnMut(u32, f64, &[(u32, f64)])) {
    let mut random = Randlc(Randlc::SEED);
    // The benchmark's main program draws once before it makes the matrix.
    random.draw();
    let place_bits = problem.order.next_power_of_two().trailing_zeros();
    let ratio = 0.1_f64.powf(1.0 / problem.order as f64);
    let mut weight = 1.0;
    let mut vector: Vec<(u32, f64)> = Vec::with_capacity(problem.nonzer + 1);
    for i in 0..problem.order as u32 {
        vector.clear();
        while vector.len() < problem.nonzer {
            let value = random.unit();
            let place = random.bits(place_bits) as u32;
            if (place as usize) < problem.order && vector.iter().all(|&(taken, _)| taken != place) {
                vector.push((place, value));
            }
        }
        match vector.iter_mut().find(|(place, _)| *place == i) {
            Some((_, value)) => *value = 0.5,
            None => vector.push((i, 0.5)),
        }
        visit(i, weight, &vector);
        weight *= ratio;
    }
}

/// How many entries fall in each row of `problem`'s matrix, before those at one place are summed (about 8 %
/// more than its nonzeros). This is what a row costs, and what [`partition`] balances.
pub fn row_weights(problem: &Problem) -> Vec<u32> {
    let mut weights = vec![0; problem.order];
    for_each_vector(problem, |_, _, vector| {
        for &(row, _) in vector {
            weights[row as usize] += vector.len() as u32;
        }
    });
    weights
}

/// Splits rows of these weights into `ranks` consecutive blocks of nearly equal weight. The blocks cover
/// all rows, in order; some are empty if there are more ranks than rows.
///
/// ```
/// assert_eq!(cg::partition(&[5, 1, 1, 1, 1, 1], 2), [0..1, 1..6]);
/// ```
///
/// # Panics
/// If `ranks` is 0.
pub fn partition(weights: &[u32], ranks: usize) -> Vec<Range<usize>> {
    assert!(ranks > 0, "a run has at least one rank");
    let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
    let mut blocks = Vec::with_capacity(ranks);
    let (mut row, mut reached) = (0, 0);
    for rank in 1..=ranks as u64 {
        let start = row;
        let goal = total * rank / ranks as u64;
        while row < weights.len() && reached < goal {
            reached += u64::from(weights[row]);
            row += 1;
        }
        if rank == ranks as u64 {
            row = weights.len();
        }
        blocks.push(start..row);
    }
    blocks
}

/// Rows `rows` of `problem`'s matrix; `weights` are its [`row_weights`].
pub(crate) fn generate(problem: &Problem, weights: &[u32], rows: Range<usize>) -> Matrix {
    let mut builder = MatrixBuilder::new(rows.start, problem.order, &weights[rows.clone()]);
    for_each_vector(problem, |i, weight, vector| {
        for &(row, row_value) in vector {
            if !rows.contains(&(row as usize)) {
                continue;
            }
            let scale = weight * row_value;
            for &(column, column_value) in vector {
                let mut value = column_value * scale;
                if row == i && column == i {
                    value += 0.1 - problem.shift;
                }
                builder.add(row as usize, column, value);
            }
        }
    });
    builder.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Class;

    #[test]
    fn the_stream_is_the_one_of_the_specification() {
        // 5^13 * 314159265 mod 2^46, worked out with big integers.
        let mut random = Randlc(Randlc::SEED);
        assert_eq!(u128::from(random.draw()), 1_220_703_125u128 * 314_159_265 % (1 << 46));
        let mut naive = 314_159_265u128;
        let mut random = Randlc(Randlc::SEED);
        for _ in 0..1000 {
            naive = naive * 1_220_703_125 % (1 << 46);
            assert_eq!(random.unit(), naive as f64 * 2f64.powi(-46));
        }
    }

    #[test]
    fn blocks_generated_apart_are_the_whole_matrix() {
        let problem = Class::S.problem();
        let weights = row_weights(&problem);
        let whole = generate(&problem, &weights, 0..problem.order);
        let vector: Vec<f64> = (0..problem.order).map(|i| (i as f64).sin()).collect();
        let mut expected = vec![0.0; problem.order];
        whole.multiply(&vector, &mut expected);

        let mut nonzeros = 0;
        for rows in partition(&weights, 3) {
            let block = generate(&problem, &weights, rows.clone());
            nonzeros += block.nonzeros();
            let mut product = vec![0.0; rows.len()];
            block.multiply(&vector, &mut product);
            assert_eq!(product, expected[rows]);
        }
        assert_eq!(nonzeros, whole.nonzeros());
    }

    #[test]
    fn the_matrix_is_symmetric_and_has_the_published_number_of_nonzeros() {
        let problem = Class::S.problem();
        let matrix = generate(&problem, &row_weights(&problem), 0..problem.order);
        assert_eq!(matrix.nonzeros(), 78_148);
        let column = |j: usize| {
            let mut unit = vec![0.0; problem.order];
            unit[j] = 1.0;
            let mut product = vec![0.0; problem.order];
            matrix.multiply(&unit, &mut product);
            product
        };
        let columns: Vec<_> = (0..problem.order).map(column).collect();
        for (i, column) in columns.iter().enumerate() {
            for (j, row) in columns.iter().enumerate().take(i) {
                let (upper, lower) = (row[i], column[j]);
                assert!((upper - lower).abs() <= 1e-15 * upper.abs(), "A[{i},{j}] {upper} and {lower}");
            }
        }
    }

    #[test]
    fn every_row_belongs_to_exactly_one_rank_and_no_rank_gets_much_more_than_its_share() {
        let weights = row_weights(&Class::S.problem());
        let (total, heaviest) = (weights.iter().sum::<u32>(), *weights.iter().max().unwrap());
        for ranks in [1, 2, 3, 7, 64] {
            let blocks = partition(&weights, ranks);
            assert_eq!(blocks.len(), ranks);
            let mut next = 0;
            for block in blocks {
                assert_eq!(block.start, next);
                next = block.end;
                assert!(weights[block].iter().sum::<u32>() <= total / ranks as u32 + 1 + heaviest);
            }
            assert_eq!(next, weights.len());
        }
    }

    #[test]
    fn more_ranks_than_rows_leave_some_empty() {
        let blocks = partition(&[3, 3], 5);
        assert_eq!(blocks.iter().map(|block| block.len()).sum::<usize>(), 2);
        assert_eq!(blocks.len(), 5);
    }
}
