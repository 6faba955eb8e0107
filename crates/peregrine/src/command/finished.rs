//! What the main thread of each program returns, so that whoever resumes it knows what it was.

use super::cg::Solved;
use super::report::{print, report};
use peregrine::Ended;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::ExitCode;

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Finished {
    /// `run cg`.
    Cg(Solved),
    /// `run js`: the script's error, if it ended with one.
    Js(Option<String>),
}

/// After a signal: how to go on, if its images are on disk.
pub(super) fn tell_how_to_go_on(ended: &Ended, store: Option<&Path>) {
    if let (Some(_), Some(dir)) = (ended.stopped_by, store) {
        eprintln!("peregrine: `peregrine resume {}` goes on with it", dir.display());
    }
}

/// Tells the end of a program, whichever it was.
pub(super) fn tell(ended: &Ended, json: bool, quiet: bool, with_costs: bool) -> ExitCode {
    match ended.value() {
        Some(Finished::Cg(_)) => report(ended, json, quiet),
        Some(Finished::Js(error)) => {
            if with_costs && !quiet {
                let _ = print(&mut std::io::stderr().lock(), &ended.stats, None);
            }
            match error {
                None => ExitCode::SUCCESS,
                Some(e) => {
                    eprintln!("{e}");
                    ExitCode::FAILURE
                }
            }
        }
        None => {
            if let Some(signo) = ended.stopped_by {
                eprintln!("peregrine: stopped by signal {signo}");
            }
            ExitCode::from(ended.code as u8)
        }
    }
}
