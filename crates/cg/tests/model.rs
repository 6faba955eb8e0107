//! The sparse matrix against a dense one.

use cg::MatrixBuilder;
use proptest::prelude::*;

/// A block of rows of a matrix: its first row, the rows, the width, and entries as (row in the block, column, value).
type Block = (usize, usize, usize, Vec<(usize, u32, i8)>);

fn blocks() -> impl Strategy<Value = Block> {
    (0..5usize, 1..12usize, 1..24usize).prop_flat_map(|(first, rows, width)| {
        let entries = prop::collection::vec((0..rows, 0..width as u32, any::<i8>()), 0..150);
        (Just(first), Just(rows), Just(width), entries)
    })
}

proptest! {
    /// Values are small integers, so sums are exact in any order and the two must be equal.
    #[test]
    fn a_sparse_product_equals_the_dense_one((first, rows, width, entries) in blocks(), seed in any::<u32>()) {
        let vector: Vec<f64> = (0..width).map(|i| f64::from((seed.rotate_left(i as u32) & 0xff) as i8)).collect();

        let mut dense = vec![vec![0.0; width]; rows];
        for &(row, column, value) in &entries {
            dense[row][column as usize] += f64::from(value);
        }
        let expected: Vec<f64> =
            dense.iter().map(|row| row.iter().zip(&vector).map(|(a, x)| a * x).sum()).collect();

        let mut counts = vec![0; rows];
        for &(row, ..) in &entries {
            counts[row] += 1;
        }
        let mut builder = MatrixBuilder::new(first, width, &counts);
        for &(row, column, value) in &entries {
            builder.add(first + row, column, f64::from(value));
        }
        let matrix = builder.finish();
        let mut product = vec![f64::NAN; rows];
        matrix.multiply(&vector, &mut product);
        prop_assert_eq!(product, expected);

        let mut places: Vec<_> = entries.iter().map(|&(row, column, _)| (row, column)).collect();
        places.sort_unstable();
        places.dedup();
        prop_assert_eq!(matrix.nonzeros(), places.len());
        prop_assert_eq!(matrix.rows(), first..first + rows);
    }
}
