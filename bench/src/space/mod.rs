//! RadixVM's evaluation, on processes: the paper's programs beside bare calls and beside Linux threads.

pub mod index;
pub mod memory;
mod micro;
pub mod structures;
mod zeroing;

use crate::measure::Options;
use crate::report::Report;

/// The whole suite.
pub fn run(report: &mut Report, options: &Options) {
    if options.wants("memory") {
        memory::run(report);
    }
    if options.wants("zeroing") {
        zeroing::run(report, options);
    }
    micro::run(report, options);
    structures::run(report, options);
}
