//! What a run came to: the verdict, what was done to it, and what that cost.

use super::finished::Finished;
use cg::Outcome;
use peregrine::{Ended, Stats, Tally, median_ms, percentile_ms};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::process::ExitCode;

/// How much had to happen to the threads for the run to count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Demand {
    /// Nodes killed.
    pub kills: u64,
    /// Of those, while a thread ran on them.
    pub hits: u64,
    /// Moves.
    pub moves: u64,
}

impl Demand {
    /// What is missing, in words.
    pub(super) fn missing(self, t: Tally) -> Option<String> {
        if t.resumed {
            // Nobody troubles a resumed World on purpose, and what happened before it is not known to it.
            return None;
        }
        let lacks: Vec<String> = [
            (t.kills, self.kills, "kills"),
            (t.kills_hit, self.hits, "kills of a node that ran a thread"),
            (t.moves, self.moves, "moves"),
        ]
        .into_iter()
        .filter(|(have, want, _)| have < want)
        .map(|(have, want, what)| format!("{have} of {want} {what}"))
        .collect();
        (!lacks.is_empty()).then(|| lacks.join(", "))
    }
}

/// The report as a program reads it.
#[derive(Serialize)]
struct Report<'a> {
    verified: bool,
    /// Why the exit code is not 0.
    trouble: Option<&'a str>,
    runs: &'a [Outcome],
    demand: Demand,
    seconds: f64,
    kills: u64,
    kills_of_a_running_thread: u64,
    nodes_died: u64,
    moves: u64,
    moves_of_a_running_thread: u64,
    images: u64,
    images_given_up: u64,
    rollbacks: u64,
    switches: u64,
    preemptions: u64,
    milliseconds: Costs,
    pages: Pages,
}

#[derive(Serialize)]
struct Costs {
    image_pause_median: f64,
    image_pause_p99: f64,
    image_copy_median: f64,
    rolled_back_median: f64,
    rolled_back_max: f64,
    recovery_median: f64,
    recovery_max: f64,
    restore_median: f64,
    move_mean: f64,
}

#[derive(Serialize)]
struct Pages {
    image_median: u64,
    image_total: u64,
    restored_total: u64,
}

/// Whether there is a result, and each is right.
fn all_verified(runs: &[Outcome]) -> bool {
    !runs.is_empty() && runs.iter().all(|r| r.verified)
}

/// What a run that came to its end lacks to count.
fn lacking(verified: bool, demand: Demand, happened: Tally) -> Option<String> {
    if !verified {
        return Some("the result is wrong".to_owned());
    }
    demand.missing(happened).map(|m| format!("verified, but only {m}"))
}

/// Prints it; the exit code is 0 if the result is right and enough has happened.
pub(super) fn report(ended: &Ended, json: bool, quiet: bool) -> ExitCode {
    let s = &ended.stats;
    let solved = match ended.value() {
        Some(Finished::Cg(solved)) => Some(solved),
        _ => None,
    };
    let runs = solved.as_ref().map_or(&[][..], |v| &v.runs);
    let demand = solved.as_ref().map(|v| v.demand).unwrap_or_default();
    let verified = all_verified(runs);
    let happened = Tally {
        kills: s.kills,
        kills_hit: s.kills_hit,
        moves: s.moves,
        preempted_moves: s.preempted_moves,
        preemptions: s.preemptions,
        rollbacks: s.rollbacks,
        resumed: ended.resumed.is_some(),
    };
    let trouble = match &solved {
        _ if ended.stopped_by.is_some() => Some("stopped by a signal before the end".to_owned()),
        None => Some("the main thread ended without a result".to_owned()),
        Some(v) => v.trouble.clone().or_else(|| lacking(verified, demand, happened)),
    };
    let mut out = std::io::stdout().lock();
    let written = if json {
        let report = as_report(s, runs, demand, verified, trouble.as_deref());
        serde_json::to_writer(&mut out, &report).map_err(Into::into).and_then(|()| writeln!(out))
    } else if quiet {
        match &solved {
            None => Ok(()),
            Some(_) if verified => writeln!(out, "VERIFICATION SUCCESSFUL"),
            Some(_) => writeln!(out, "VERIFICATION FAILED"),
        }
    } else {
        print(&mut out, s, Some(runs.len()))
    };
    drop(out);
    if let Some(trouble) = &trouble {
        eprintln!("peregrine: {trouble}");
    }
    match (ended.stopped_by, trouble) {
        (Some(signo), _) => ExitCode::from(128 + signo as u8),
        (None, None) if written.is_ok() => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn max_ms(list: &[u64]) -> f64 {
    percentile_ms(list, 100)
}

fn median(list: &[u64]) -> u64 {
    let mut sorted = list.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

fn move_mean_ms(s: &Stats) -> f64 {
    if s.moves == 0 { 0.0 } else { s.move_ns as f64 / s.moves as f64 / 1e6 }
}

fn as_report<'a>(
    s: &Stats,
    runs: &'a [Outcome],
    demand: Demand,
    verified: bool,
    trouble: Option<&'a str>,
) -> Report<'a> {
    Report {
        verified,
        trouble,
        runs,
        demand,
        seconds: s.ran_ns as f64 / 1e9,
        kills: s.kills,
        kills_of_a_running_thread: s.kills_hit,
        nodes_died: s.deaths,
        moves: s.moves,
        moves_of_a_running_thread: s.preempted_moves,
        images: s.images,
        images_given_up: s.images_given_up,
        rollbacks: s.rollbacks,
        switches: s.switches,
        preemptions: s.preemptions,
        milliseconds: Costs {
            image_pause_median: median_ms(&s.pause_ns),
            image_pause_p99: percentile_ms(&s.pause_ns, 99),
            image_copy_median: median_ms(&s.copy_ns),
            rolled_back_median: median_ms(&s.distance_ns),
            rolled_back_max: max_ms(&s.distance_ns),
            recovery_median: median_ms(&s.recovery_ns),
            recovery_max: max_ms(&s.recovery_ns),
            restore_median: median_ms(&s.restore_ns),
            move_mean: move_mean_ms(s),
        },
        pages: Pages {
            image_median: median(&s.image_pages),
            image_total: s.copied_pages,
            restored_total: s.restored_pages,
        },
    }
}

/// What was done to a program, and what it cost.
pub(super) fn print(out: &mut impl Write, s: &Stats, runs: Option<usize>) -> std::io::Result<()> {
    writeln!(out)?;
    let times = match runs {
        None => "1 program".to_owned(),
        Some(1) => "1 run".to_owned(),
        Some(n) => format!("{n} runs"),
    };
    writeln!(out, " {times} in {:.1} s", s.ran_ns as f64 / 1e9)?;
    writeln!(
        out,
        " kills      {:6}   {} of them on a running thread; all nodes up again after {:.1} ms (median; longest {:.1}), of \
         which memory {:.1} ms",
        s.kills,
        s.kills_hit,
        median_ms(&s.recovery_ns),
        max_ms(&s.recovery_ns),
        median_ms(&s.restore_ns)
    )?;
    writeln!(
        out,
        " rollbacks  {:6}   by {:.1} ms of work (median; longest {:.1}), {} pages restored in all",
        s.rollbacks,
        median_ms(&s.distance_ns),
        max_ms(&s.distance_ns),
        s.restored_pages
    )?;
    writeln!(
        out,
        " images     {:6}   pause {:.2} ms (median; 99 %: {:.2}), {} pages copied (median)",
        s.images,
        median_ms(&s.pause_ns),
        percentile_ms(&s.pause_ns, 99),
        median(&s.image_pages)
    )?;
    if s.images_given_up > 0 {
        writeln!(
            out,
            "            {:6}   more were given up, because a node did not pause in time",
            s.images_given_up
        )?;
    }
    writeln!(
        out,
        " moves      {:6}   {} of them of a running thread; {:.2} ms each from leaving one node to being taken up by the other (mean)",
        s.moves,
        s.preempted_moves,
        move_mean_ms(s)
    )?;
    writeln!(out, " switches   {:6}   {} of them preemptions", s.switches, s.preemptions)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMAND: Demand = Demand { kills: 20, hits: 10, moves: 50 };

    fn happened(kills: u64, kills_hit: u64, moves: u64) -> Tally {
        Tally { kills, kills_hit, moves, preemptions: 0, preempted_moves: 0, rollbacks: 0, resumed: false }
    }

    #[test]
    fn a_run_counts_only_if_enough_has_happened() {
        assert_eq!(lacking(true, DEMAND, happened(20, 10, 50)), None);
        for (few, missing) in [
            (happened(19, 10, 50), "19 of 20 kills"),
            (happened(20, 9, 50), "9 of 10 kills of a node that ran a thread"),
            (happened(20, 10, 49), "49 of 50 moves"),
            (happened(0, 0, 50), "0 of 20 kills, 0 of 10 kills of a node that ran a thread"),
        ] {
            assert_eq!(lacking(true, DEMAND, few), Some(format!("verified, but only {missing}")));
            let resumed = Tally { resumed: true, ..few };
            assert_eq!(lacking(true, DEMAND, resumed), None, "nobody troubles a resumed World on purpose");
        }
    }

    #[test]
    fn a_wrong_result_never_counts() {
        let right = Outcome { verified: true, ..a_run() };
        let wrong = Outcome { verified: false, ..a_run() };
        assert!(all_verified(&[right, right]));
        for runs in [&[][..], &[wrong], &[right, wrong], &[wrong, right]] {
            let verified = all_verified(runs);
            assert_eq!(
                lacking(verified, DEMAND, happened(20, 10, 50)).as_deref(),
                Some("the result is wrong")
            );
        }
    }

    fn a_run() -> Outcome {
        Outcome {
            class: cg::Class::S,
            ranks: 1,
            zeta: 0.0,
            rnorm: 0.0,
            verified: true,
            expected: 0.0,
            error: 0.0,
            iterations: 1,
            seconds: 1.0,
            mflops: 1.0,
            initialisation_seconds: 1.0,
        }
    }
}
