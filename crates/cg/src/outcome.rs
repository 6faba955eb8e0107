//! What a run reports: a line for each outer iteration, and the verdict.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Class, Problem};

/// One outer iteration, just done. Its `Display` is a row of the benchmark's table.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Iteration {
    /// Its number, from 1.
    pub number: u32,
    /// How many there will be.
    pub of: u32,
    /// Norm of the residual, `‖x − A·z‖`.
    pub rnorm: f64,
    /// The estimate so far.
    pub zeta: f64,
}

impl fmt::Display for Iteration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "    {:5}       {:20.14E}{:20.13}", self.number, self.rnorm, self.zeta)
    }
}

/// The result of a whole run. Every rank of a parallel run ends with the same numbers, times apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The class that was run.
    pub class: Class,
    /// How many ranks ran it.
    pub ranks: usize,
    /// The estimate.
    pub zeta: f64,
    /// Norm of the last residual.
    pub rnorm: f64,
    /// Whether `error` is within [`Problem::EPSILON`]; never for a NaN.
    pub verified: bool,
    /// The zeta that the specification gives.
    pub expected: f64,
    /// Relative distance between the two.
    pub error: f64,
    /// Outer iterations.
    pub iterations: u32,
    /// Wall time of the timed iterations on this rank, in seconds.
    pub seconds: f64,
    /// Millions of floating-point operations a second, all ranks together.
    pub mflops: f64,
    /// Wall time before those: making the matrix, and one iteration to warm up, in seconds.
    pub initialisation_seconds: f64,
}

impl Outcome {
    pub(crate) fn new(
        class: Class,
        ranks: usize,
        last: Iteration,
        seconds: f64,
        initialisation: f64,
    ) -> Self {
        let problem = class.problem();
        let error = ((last.zeta - problem.zeta) / problem.zeta).abs();
        Self {
            class,
            ranks,
            zeta: last.zeta,
            rnorm: last.rnorm,
            verified: error <= Problem::EPSILON,
            expected: problem.zeta,
            error,
            iterations: last.number,
            seconds,
            mflops: if seconds > 0.0 { problem.operations() / seconds / 1e6 } else { 0.0 },
            initialisation_seconds: initialisation,
        }
    }
}

impl fmt::Display for Outcome {
    /// The benchmark's closing block; the last line is `VERIFICATION SUCCESSFUL` or `VERIFICATION FAILED`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, " CG Benchmark Completed.")?;
        writeln!(f, " Class           = {:>24}", self.class.to_string())?;
        writeln!(f, " Size            = {:>24}", self.class.problem().order)?;
        writeln!(f, " Iterations      = {:>24}", self.iterations)?;
        writeln!(f, " Ranks           = {:>24}", self.ranks)?;
        writeln!(f, " Initialisation  = {:>22.2} s", self.initialisation_seconds)?;
        writeln!(f, " Time in seconds = {:>24.2}", self.seconds)?;
        writeln!(f, " Mop/s total     = {:>24.2}", self.mflops)?;
        writeln!(f, " Residual        = {:>24.14E}", self.rnorm)?;
        writeln!(f, " Zeta            = {:>24.13}", self.zeta)?;
        writeln!(f, " Expected zeta   = {:>24.13}", self.expected)?;
        writeln!(f, " Relative error  = {:>24.14E}", self.error)?;
        f.write_str(if self.verified { " VERIFICATION SUCCESSFUL" } else { " VERIFICATION FAILED" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended_with(zeta: f64) -> Outcome {
        Outcome::new(Class::S, 1, Iteration { number: 15, of: 15, rnorm: 1e-13, zeta }, 1.0, 0.1)
    }

    #[test]
    fn a_zeta_just_outside_the_tolerance_fails() {
        let right = Class::S.problem().zeta;
        assert!(ended_with(right * (1.0 + 0.9e-10)).verified);
        let wrong = ended_with(right * (1.0 + 1.1e-10));
        assert!(!wrong.verified);
        assert!(wrong.to_string().ends_with("VERIFICATION FAILED"));
    }

    #[test]
    fn a_nan_is_never_verified() {
        assert!(!ended_with(f64::NAN).verified);
    }

    #[test]
    fn a_clock_that_did_not_advance_gives_no_infinite_rate() {
        let last = Iteration { number: 15, of: 15, rnorm: 0.0, zeta: 1.0 };
        assert_eq!(Outcome::new(Class::S, 1, last, 0.0, 0.0).mflops, 0.0);
    }
}
