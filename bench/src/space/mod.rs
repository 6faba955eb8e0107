//! RadixVM's evaluation, on processes: the paper's programs beside bare calls and beside Linux threads.

mod micro;

use crate::measure::Options;
use crate::report::Report;

/// The whole suite.
pub fn run(report: &mut Report, options: &Options) {
    micro::run(report, options);
}
