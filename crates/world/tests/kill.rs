//! Kill -9 of a node at every step that leaves a shared structure changed.
//!
//! A first World only counts who comes by; a second kills its own nodes, at each place several times, while it recovers too.
//! What the program computes, says and prints must be what an undisturbed one does (`program`). How often each structure was
//! left half done is printed. The number of kills a place and the seed are `PEREGRINE_KILL_POINTS` and `PEREGRINE_SEED`.

mod program;

use peregrine_world::killpoint::{self, Tallied};
use peregrine_world::{Config, TrustedDomain, median_ms, run_with, sleep};
use program::{Plan, config, oracle};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;
use testkit::Outcome;

/// Places that only a race of two nodes, or of a kill with a wake-up, leads to; and those of which there are so many and no more.
const RARE: [&str; 6] =
    ["QueueStale", "LockFreed", "MailForwarded", "DomainEntered", "DomainListed", "DomainAsked"];

/// Runs the program that uses everything.
fn run(kills: &str, plan: &Plan) -> Vec<Tallied> {
    run_program(program::main, oracle, kills, plan)
}

/// Runs a program in a World of this process, and compares what it printed.
fn run_program(
    program: fn(Plan) -> u64,
    oracle: fn(u64) -> String,
    kills: &str,
    plan: &Plan,
) -> Vec<Tallied> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let output = dir.path().join("output");
    // SAFETY: the process has one thread.
    unsafe { std::env::set_var("PEREGRINE_KILL_POINTS", kills) };
    let seed =
        std::env::var("PEREGRINE_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(std::process::id);
    let config = Config {
        nodes: 3,
        image_interval: Some(Duration::from_millis(3)),
        slice: Duration::from_micros(500),
        move_every: Some(Duration::from_millis(2)),
        output: Some(output.clone()),
        seed: seed.into(),
        ..config()
    };
    println!("seed {seed}, {kills} kills at each place");
    let ended = run_with(config, program, plan).expect("a World");
    assert_eq!(ended.code, 0);
    let rounds: u64 = ended.value().expect("main returned");
    let found = std::fs::read_to_string(&output).expect("the output");
    assert!(found == oracle(rounds), "the output differs from an undisturbed run's:\n{found}");
    let s = &ended.stats;
    println!(
        "recovery {:.1} ms, of which memory {:.1} ms (medians)",
        median_ms(&ended.stats.recovery_ns),
        median_ms(&ended.stats.restore_ns)
    );
    println!(
        "{rounds} rounds in {:.1} s, {} deaths, {} rollbacks, {} images, {} moves, {} quarantined",
        s.ran_ns as f64 / 1e9,
        s.deaths,
        s.rollbacks,
        s.images,
        s.moves,
        s.quarantined
    );
    assert_eq!(
        killpoint::differences(),
        0,
        "after an image or a rollback, memory was not what the image says"
    );
    assert_eq!((s.crashes, s.quarantined), (0, 0), "no thread is to blame for a kill");
    assert_eq!(s.gave_up, 0, "a survivor has all that it had");
    killpoint::table()
}

fn every_place_is_reached_by_a_program_that_uses_everything() -> Outcome {
    let table = run("count", &Plan { rounds: (40, 40), seconds: 100.0, more: false });
    for t in &table {
        println!("{:>20} {:<20} {:>9} times", t.structure, t.name, t.hits);
    }
    let missed: Vec<_> = table
        .iter()
        .filter(|t| t.hits == 0 && !RARE[..3].contains(&t.name))
        // Without a death there is no recovery.
        .filter(|t| !["rollback handshake", "rebuild"].contains(&t.structure))
        .collect();
    assert!(missed.is_empty(), "never reached: {missed:?}");
    Outcome::Passed
}

fn a_node_killed_at_any_step_leaves_every_structure_to_be_put_right() -> Outcome {
    let kills = std::env::var("PEREGRINE_KILL_POINTS").unwrap_or_else(|_| "2".to_owned());
    // It ends when all have been: this is for a slow machine.
    let seconds = 50.0 * kills.parse::<f64>().unwrap_or(2.0);
    let table = run(&kills, &Plan { rounds: (20, 100_000), seconds, more: true });
    let mut structures: BTreeMap<&str, (usize, usize, u32)> = BTreeMap::new();
    for t in &table {
        let s = structures.entry(t.structure).or_default();
        *s = (s.0 + 1, s.1 + usize::from(t.kills != 0), s.2 + t.kills);
    }
    for (structure, (places, reached, kills)) in &structures {
        println!("{structure:>20}: {kills:>4} kills at {reached:>2} of {places:>2} places");
    }
    // `main` ends once, and new entries of tables are first used once.
    let missed: Vec<_> =
        table.iter().filter(|t| t.kills == 0 && !RARE.contains(&t.name)).map(|t| (t.name, t.hits)).collect();
    println!("never killed at: {missed:?}");
    // Time may be up on a slow machine before a place had its turn; a whole structure is never missed.
    assert!(missed.len() <= 3 && structures.values().all(|s| s.2 > 0), "never killed at: {missed:?}");
    Outcome::Passed
}

/// Who survives is dropped in the middle of whatever it does. What it holds of its own, and of what it told its kernel, no rollback
/// brings back.
fn a_node_reset_at_any_step_holds_what_the_image_says() -> Outcome {
    let table = run("others-1", &Plan { rounds: (20, 100_000), seconds: 60.0, more: true });
    let resets = |t: &&Tallied| t.kills != 0;
    println!("reset at {} of {} places", table.iter().filter(resets).count(), table.len());
    for name in ["DispositionTold", "DispositionSet", "DispositionCounted", "DispositionFollowed"] {
        assert!(table.iter().filter(resets).any(|t| t.name == name), "nobody was reset at {name}");
    }
    Outcome::Passed
}

/// Opens as many domains as a World can have, each when a node that comes by would be killed.
fn opens_domains(_: Plan) -> u64 {
    for k in 0..8u64 {
        while !killpoint::is_open() {
            sleep(Duration::from_millis(1));
        }
        let domain = TrustedDomain::open(&format!("number {k}"), || {}).unwrap();
        assert_eq!(domain.run(|| k + 7), Ok(k + 7));
    }
    println!("8 domains");
    0
}

/// There are so many domains and no more, so the program that uses everything comes by too few times.
fn a_node_killed_while_it_makes_a_domain_leaves_the_table_of_domains_right() -> Outcome {
    const PLACES: [&str; 3] = ["DomainEntered", "DomainListed", "DomainAsked"];
    let plan = Plan { rounds: (0, 0), seconds: 0.0, more: false };
    let oracle = |_| "8 domains\n".to_owned();
    let table = run_program(opens_domains, oracle, &format!("2@{}", PLACES.join(",")), &plan);
    for t in table.iter().filter(|t| PLACES.contains(&t.name)) {
        println!("{}: {} hits, {} kills", t.name, t.hits, t.kills);
        assert!(t.kills > 0, "never killed at {}", t.name);
    }
    Outcome::Passed
}

fn main() -> ExitCode {
    testkit::main(testkit::tests![
        every_place_is_reached_by_a_program_that_uses_everything,
        a_node_killed_at_any_step_leaves_every_structure_to_be_put_right,
        a_node_reset_at_any_step_holds_what_the_image_says,
        a_node_killed_while_it_makes_a_domain_leaves_the_table_of_domains_right,
    ])
}
