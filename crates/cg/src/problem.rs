//! The official problem sizes, with the zeta that each must give.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A problem size of the benchmark, from the sample size S to the workstation-hour of 1994, B.
///
/// ```
/// use cg::Class;
/// assert_eq!("a".parse(), Ok(Class::A));
/// assert_eq!(Class::B.problem().order, 75_000);
/// assert_eq!("Z".parse::<Class>().unwrap_err().to_string(), "no CG class \"Z\": use S, W, A or B");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Class {
    /// Sample: 1,400 rows; a few hundredths of a second.
    S,
    /// Workstation: 7,000 rows.
    W,
    /// 14,000 rows, 1.9 million nonzeros; about a second.
    A,
    /// 75,000 rows, 13.7 million nonzeros (165 MB); about a minute.
    B,
}

impl Class {
    /// All classes, smallest first.
    pub const ALL: [Class; 4] = [Class::S, Class::W, Class::A, Class::B];

    /// The parameters that the specification gives this class.
    pub const fn problem(self) -> Problem {
        let (order, nonzer, iterations, shift, zeta) = match self {
            Class::S => (1_400, 7, 15, 10.0, 8.597_177_507_864_8),
            Class::W => (7_000, 8, 15, 12.0, 10.362_595_087_124),
            Class::A => (14_000, 11, 15, 20.0, 17.130_235_054_029),
            Class::B => (75_000, 13, 75, 60.0, 22.712_745_482_631),
        };
        Problem { order, nonzer, iterations, shift, zeta }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl FromStr for Class {
    type Err = ParseClassError;

    fn from_str(text: &str) -> Result<Self, ParseClassError> {
        Class::ALL
            .into_iter()
            .find(|class| class.to_string().eq_ignore_ascii_case(text))
            .ok_or_else(|| ParseClassError(text.to_owned()))
    }
}

/// A text that names no [`Class`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseClassError(String);

impl fmt::Display for ParseClassError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no CG class {:?}: use S, W, A or B", self.0)
    }
}

impl std::error::Error for ParseClassError {}

/// The numbers that define one instance of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Problem {
    /// Rows and columns of the matrix (`na`).
    pub order: usize,
    /// Random nonzeros of each vector whose outer product goes into the matrix (`nonzer`).
    pub nonzer: usize,
    /// Outer iterations that are timed (`niter`).
    pub iterations: u32,
    /// What is subtracted from the diagonal (`shift`, lambda).
    pub shift: f64,
    /// The zeta that a right implementation ends with.
    pub zeta: f64,
}

impl Problem {
    /// Relative distance from [`Problem::zeta`] at which a result still counts as verified.
    pub const EPSILON: f64 = 1e-10;

    /// Floating-point operations of the timed part, by the benchmark's own formula (it counts the nonzeros
    /// before those that fall on one place are summed).
    pub fn operations(&self) -> f64 {
        let row = (self.nonzer * (self.nonzer + 1)) as f64;
        2.0 * f64::from(self.iterations) * self.order as f64 * (3.0 + row + 25.0 * (5.0 + row) + 3.0)
    }
}
