//! Kill points and long forms, again and again: nodes and supervisors killed at each of their steps, storms of moves, messages by
//! the million, scripts that cross a thousand times. Each form has a seed of its own.
//!
//! ```text
//!   build ─▶ clock starts ─▶ short forms, in random order ─▶ one long form ─▶ short forms ─▶ the next long one ─▶ …
//!                                                time is up: a short form is waited for, a long one is broken off
//! ```
//!
//! The tests do the work, in the very executables that cargo makes of them; here they are chosen, told to be long, and watched. A
//! form that fails, or hangs, ends the run with its output and the line that tries it again.

mod forms;

use forms::{Binaries, FORMS, Form};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use testkit::Rng;

/// A form that takes longer hangs: the slowest takes a tenth on a small machine.
const HANGS_AFTER: Duration = Duration::from_secs(900);
/// Lines of a failed form's output that are shown.
const LINES_SHOWN: usize = 300;
/// By this variable a form's processes are known, whatever group or session they are in.
const MARK: &str = "PEREGRINE_SOAK_FORM";

/// How a form ended.
enum End {
    Passed,
    Failed(String),
    BrokenOff,
}

/// Runs forms for `seconds`, after what it takes to build them; `false` after the first failure.
pub fn run(seed: u64, seconds: u64) -> bool {
    println!("soak kill: seed {seed}, {seconds} s");
    let building = Instant::now();
    let binaries = match Binaries::build() {
        Ok(b) => b,
        Err(why) => {
            println!("FAILED: the tests can't be built: {why}");
            return false;
        }
    };
    println!("built in {:.0} s", building.elapsed().as_secs_f64());
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let begun = Instant::now();
    let until = begun + Duration::from_secs(seconds);
    let mut rng = Rng::new(seed);
    let mut tally = Tally::default();
    'rounds: for round in 0.. {
        for form in plan(&mut rng, round) {
            let seed = rng.next_u64() >> 16;
            if Instant::now() >= until {
                break 'rounds;
            }
            let at = begun.elapsed().as_secs_f64();
            println!("{at:>6.0} s  {} (PEREGRINE_SEED={seed}) …", form.name);
            let started = Instant::now();
            let log = scratch.path().join("log");
            let end = go(form, seed, &binaries, scratch.path(), &log, until);
            let output = String::from_utf8_lossy(&std::fs::read(&log).unwrap_or_default()).into_owned();
            match end {
                End::Passed => tally.passed(form, started.elapsed(), &output),
                End::BrokenOff => {
                    println!("          broken off: the time is up");
                    tally.broken_off += 1;
                }
                End::Failed(why) => {
                    println!("FAILED: {}: {why}\nagain: {}", form.name, form.again(seed, &binaries));
                    let lines: Vec<_> = output.lines().collect();
                    for line in &lines[lines.len().saturating_sub(LINES_SHOWN)..] {
                        println!("  | {line}");
                    }
                    tally.tell(seed, begun);
                    return false;
                }
            }
        }
    }
    tally.tell(seed, begun);
    true
}

/// The forms of a round: the short ones in random order, then one of the long ones by turns.
fn plan(rng: &mut Rng, round: usize) -> Vec<&'static Form> {
    let short: Vec<_> = FORMS.iter().filter(|f| !f.long).collect();
    let long: Vec<_> = FORMS.iter().filter(|f| f.long).collect();
    let mut plan: Vec<_> = rng.permutation(short.len()).into_iter().map(|i| short[i]).collect();
    plan.push(long[round % long.len()]);
    plan
}

/// Runs a form to its end, or, if it is a long one, until the time is up.
fn go(form: &Form, seed: u64, binaries: &Binaries, scratch: &Path, log: &Path, until: Instant) -> End {
    let output = File::create(log).expect("a file for its output");
    let mark = format!("{}-{seed}", std::process::id());
    let mut command: Command = form.command(seed, binaries);
    command.env(MARK, &mark).env("TMPDIR", scratch).stdin(Stdio::null());
    command.stderr(output.try_clone().expect("a descriptor")).stdout(output);
    let mut child = match command.spawn() {
        Ok(c) => c,
        Err(e) => return End::Failed(format!("it can't be started: {e}")),
    };
    let begun = Instant::now();
    let end = loop {
        match child.try_wait().expect("our own child") {
            Some(status) if status.success() => break End::Passed,
            Some(status) => break End::Failed(status.to_string()),
            None if form.long && Instant::now() >= until => break End::BrokenOff,
            None if begun.elapsed() >= HANGS_AFTER => {
                break End::Failed(format!("it hangs: {HANGS_AFTER:?}"));
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    if !matches!(end, End::Passed) {
        end_all(&mark);
        let _ = child.kill();
        let _ = child.wait();
    }
    end
}

/// Kills every process that has the mark, until there is none.
fn end_all(mark: &str) {
    let entry = format!("{MARK}={mark}").into_bytes();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(5) {
        let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let marked: Vec<i32> = all
            .filter_map(|e| {
                let environment = std::fs::read(e.path().join("environ")).ok()?;
                let has = environment.split(|b| *b == 0).any(|v| v == entry);
                has.then(|| e.file_name().to_str()?.parse().ok())?
            })
            .collect();
        if marked.is_empty() {
            return;
        }
        for pid in marked {
            let _ = peregrine_sys::signal::kill(pid, peregrine_sys::signal::number::KILL);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What has been done.
#[derive(Default)]
struct Tally {
    forms: BTreeMap<&'static str, u32>,
    broken_off: u32,
    kills: u64,
}

impl Tally {
    fn passed(&mut self, form: &'static Form, took: Duration, output: &str) {
        *self.forms.entry(form.name).or_default() += 1;
        let kills = kills_told(output);
        self.kills += kills;
        let told = if kills == 0 { String::new() } else { format!(", {kills} kills") };
        println!("          passed in {:.1} s{told}", took.as_secs_f64());
    }

    fn tell(&self, seed: u64, begun: Instant) {
        let passed: u32 = self.forms.values().sum();
        println!(
            "soak kill, last seed {seed}: {passed} forms passed in {:.0} s, {} broken off; {} kills were counted by the tests",
            begun.elapsed().as_secs_f64(),
            self.broken_off,
            self.kills
        );
        for (name, times) in &self.forms {
            println!("{times:>6} × {name}");
        }
    }
}

/// The kills that a test's output tells of: each number before the word.
fn kills_told(output: &str) -> u64 {
    let words: Vec<&str> =
        output.lines().filter(|l| !l.starts_with("seed")).flat_map(str::split_whitespace).collect();
    let before = words.windows(2).filter(|w| w[1].trim_end_matches([',', '.']) == "kills");
    before.filter_map(|w| w[0].parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_added_up_from_what_tests_print() {
        let of_nodes = "seed 7, 2 kills at each place\n  locks:   12 kills at  3 of  3 places\n timers: 3 kills at 3 of 3 places\n";
        assert_eq!(kills_told(of_nodes), 15);
        assert_eq!(kills_told("40 places, 31 kills, not reached this time: []"), 31);
    }

    #[test]
    fn every_round_has_all_short_forms_and_the_long_ones_take_turns() {
        let mut rng = Rng::new(1);
        let long = FORMS.iter().filter(|f| f.long).count();
        let mut seen = std::collections::BTreeSet::new();
        for round in 0..long {
            let plan = plan(&mut rng, round);
            assert_eq!(plan.len(), FORMS.len() - long + 1);
            seen.extend(plan.iter().map(|f| f.name));
        }
        assert_eq!(seen.len(), FORMS.len());
    }

    #[test]
    fn what_a_form_leaves_behind_is_ended_whatever_group_it_is_in() {
        use std::os::unix::process::CommandExt;
        let mark = format!("test-{}", std::process::id());
        let mut other =
            Command::new("sleep").arg("600").env(MARK, &mark).process_group(0).spawn().expect("sleep(1)");
        // Until it has executed `sleep`, its environment is this test's.
        let environment = || std::fs::read(format!("/proc/{}/environ", other.id())).unwrap_or_default();
        while !String::from_utf8_lossy(&environment()).contains(&mark) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let killer = std::thread::spawn(move || end_all(&mark));
        let status = other.wait().expect("our own child");
        killer.join().expect("it ends");
        assert!(!status.success());
    }
}
