//! Rows of a sparse matrix, and their product with a vector.
//!
//! Compressed sparse rows: row `first_row + k` has the columns `columns[starts[k]..starts[k + 1]]`, rising and
//! each once, and the values at the same places of `values`.
//!
//! ```text
//!   starts   0        3     5              9
//!            ▼        ▼     ▼              ▼
//!   columns [2  7  8 ][0  7][1  2  5  8  ]
//!   values  [a  b  c ][d  e][f  g  h  i  ]        12 bytes a nonzero
//! ```
//!
//! A [`MatrixBuilder`] is told first how many entries each row will get, then the entries in any order. It
//! holds them where the matrix will be, so building needs no second copy; what fell on one place is summed, in the
//! order of arrival, when it finishes.

use std::ops::Range;

/// A block of consecutive rows of a sparse matrix.
///
/// ```
/// use cg::MatrixBuilder;
/// // Row 4 gets two entries at column 1 and one at column 0.
/// let mut builder = MatrixBuilder::new(4, 2, &[3, 0]);
/// builder.add(4, 1, 2.5);
/// builder.add(4, 0, 1.0);
/// builder.add(4, 1, 0.5);
/// let matrix = builder.finish();
/// assert_eq!(matrix.nonzeros(), 2);
///
/// let mut product = [0.0; 2];
/// matrix.multiply(&[10.0, 100.0], &mut product);
/// assert_eq!(product, [310.0, 0.0]);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    first_row: usize,
    width: usize,
    starts: Vec<usize>,
    columns: Vec<u32>,
    values: Vec<f64>,
}

impl Matrix {
    /// The rows that this block holds.
    pub fn rows(&self) -> Range<usize> {
        self.first_row..self.first_row + self.starts.len() - 1
    }

    /// Columns of the whole matrix.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Entries stored.
    pub fn nonzeros(&self) -> usize {
        self.values.len()
    }

    /// The product of these rows with `vector`, into `product`, one element a row.
    ///
    /// # Panics
    /// If `vector` has not [`Matrix::width`] elements, or `product` not one for each row.
    pub fn multiply(&self, vector: &[f64], product: &mut [f64]) {
        assert_eq!(vector.len(), self.width, "a vector as long as the matrix is wide");
        assert_eq!(product.len(), self.rows().len(), "one element of the product for each row");
        for (sum, row) in product.iter_mut().zip(self.starts.windows(2)) {
            let row = row[0]..row[1];
            *sum = sparse_dot(&self.columns[row.clone()], &self.values[row], vector);
        }
    }
}

/// Sum of `values[i] * vector[columns[i]]`. Four sums run beside each other: one alone would wait for the latency
/// of its addition at every element.
#[inline]
fn sparse_dot(columns: &[u32], values: &[f64], vector: &[f64]) -> f64 {
    let (columns, last_columns) = columns.as_chunks::<4>();
    let (values, last_values) = values.as_chunks::<4>();
    let mut sums = [0.0; 4];
    for (columns, values) in columns.iter().zip(values) {
        for lane in 0..4 {
            sums[lane] += values[lane] * vector[columns[lane] as usize];
        }
    }
    let mut rest = 0.0;
    for (&column, &value) in last_columns.iter().zip(last_values) {
        rest += value * vector[column as usize];
    }
    (sums[0] + sums[1]) + (sums[2] + sums[3]) + rest
}

/// Builds a [`Matrix`] from entries in any order.
#[derive(Debug)]
pub struct MatrixBuilder {
    /// Where the next entry of each row goes; it began at the row's `starts`, and ends at the next row's.
    next: Vec<usize>,
    matrix: Matrix,
}

impl MatrixBuilder {
    /// A builder for as many rows as `counts` has, from `first_row` on, of a matrix with `width` columns; row
    /// `first_row + k` will get exactly `counts[k]` entries.
    ///
    /// # Panics
    /// If `width` columns can't be numbered in 32 bits.
    pub fn new(first_row: usize, width: usize, counts: &[u32]) -> Self {
        assert!(u32::try_from(width).is_ok(), "{width} columns can't be numbered in 32 bits");
        let mut starts = Vec::with_capacity(counts.len() + 1);
        let mut total = 0;
        starts.push(0);
        for &count in counts {
            total += count as usize;
            starts.push(total);
        }
        let next = starts[..counts.len()].to_vec();
        let matrix = Matrix { first_row, width, starts, columns: vec![0; total], values: vec![0.0; total] };
        Self { next, matrix }
    }

    /// Adds `value` at `row`, `column`; entries at the same place add up, in this order.
    ///
    /// # Panics
    /// If the place is outside the matrix, or the row already got all its entries.
    #[inline]
    pub fn add(&mut self, row: usize, column: u32, value: f64) {
        let matrix = &mut self.matrix;
        assert!((column as usize) < matrix.width, "column {column} of a matrix with {}", matrix.width);
        let row = row - matrix.first_row;
        let place = self.next[row];
        assert!(place < matrix.starts[row + 1], "row {} was announced smaller", row + matrix.first_row);
        matrix.columns[place] = column;
        matrix.values[place] = value;
        self.next[row] = place + 1;
    }

    /// Sorts each row, sums what fell on one place, and closes the gaps.
    ///
    /// # Panics
    /// If a row got fewer entries than announced.
    pub fn finish(self) -> Matrix {
        let Self { next, mut matrix } = self;
        // One row at a time through two small buffers: `order` sorts as plain integers (column above, arrival
        // below), which is several times faster than sorting pairs, and keeps the order of arrival.
        let mut order: Vec<u64> = Vec::new();
        let mut arrived: Vec<f64> = Vec::new();
        let mut end = 0;
        let mut begin = 0;
        for (row, &reached) in next.iter().enumerate() {
            let announced = begin..matrix.starts[row + 1];
            assert_eq!(reached, announced.end, "row {} was announced larger", row + matrix.first_row);
            begin = announced.end;
            order.clear();
            order.extend((0..).zip(&matrix.columns[announced.clone()]).map(|(i, &c)| u64::from(c) << 32 | i));
            order.sort_unstable();
            arrived.clear();
            arrived.extend_from_slice(&matrix.values[announced]);

            let start = end;
            for key in &order {
                let (column, value) = ((key >> 32) as u32, arrived[*key as u32 as usize]);
                if end > start && matrix.columns[end - 1] == column {
                    matrix.values[end - 1] += value;
                } else {
                    matrix.columns[end] = column;
                    matrix.values[end] = value;
                    end += 1;
                }
            }
            matrix.starts[row + 1] = end;
        }
        matrix.columns.truncate(end);
        matrix.values.truncate(end);
        matrix
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "row 7 was announced larger")]
    fn a_row_with_too_few_entries_is_named() {
        let mut builder = MatrixBuilder::new(6, 3, &[1, 2]);
        builder.add(6, 0, 1.0);
        builder.add(7, 0, 1.0);
        builder.finish();
    }

    #[test]
    #[should_panic(expected = "row 6 was announced smaller")]
    fn a_row_with_too_many_entries_is_named() {
        let mut builder = MatrixBuilder::new(6, 3, &[1, 2]);
        builder.add(6, 0, 1.0);
        builder.add(6, 1, 1.0);
    }

    #[test]
    #[should_panic(expected = "column 3 of a matrix with 3")]
    fn a_column_outside_the_matrix_is_refused() {
        MatrixBuilder::new(0, 3, &[1]).add(0, 3, 1.0);
    }
}
