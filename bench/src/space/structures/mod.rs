//! The structures by themselves, on simulated cores and in one process: sharing counted, the paper's ablations, instructions.
//!
//! The subjects are compiled twice, over plain atomics and over recording ones: the very same sources.

mod ablation;
mod counted;
pub mod path;
pub mod trace;

use crate::measure::Options;
use crate::report::Report;

pub mod plain;
pub mod recorded;

pub fn run(report: &mut Report, options: &Options) {
    if options.wants("counted") {
        counted::run(report);
        trace::run(report);
    }
    if options.wants("ablation") {
        ablation::run(report, options);
    }
    if options.wants("instructions") {
        path::run(report);
    }
}
