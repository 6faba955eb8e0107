//! `peregrine run cg`: the NAS benchmark CG on threads that exchange vectors through channels.
//!
//! ```text
//!   main ──spawn──▶ rank 0 ◀──channels, one for each pair and direction──▶ rank 1 … rank T-1
//!     ▲               │                (rank r starts on node r mod N)
//!     └────join───────┘   once more, while too few kills and moves have happened
//! ```

use super::finished::{Finished, tell_how_to_go_on};
use super::report::{Demand, report};
use super::world_options::WorldOptions;
use super::{SYSTEM, fail};
use cg::{Class, MessageComm, Outcome, PointToPoint, solve_worker};
use clap::Args;
use peregrine::{Builder, Receiver, Sender, Tally, channel, node_count, run_with, tally};
use serde::{Deserialize, Serialize};
use std::process::ExitCode;

#[derive(Debug, Args)]
pub(super) struct CgOptions {
    /// Problem size: S, W, A or B
    #[arg(long, default_value = "A", value_parser = |text: &str| text.parse::<Class>())]
    class: Class,
    /// Threads that solve it together, 1 to 64
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    threads: u32,
    /// With --kill-every: how many kills must have happened, half of them on a running thread. The benchmark is
    /// repeated until they have
    #[arg(long, value_name = "N", default_value_t = 20)]
    kills: u64,
    /// When threads are moved: how many moves must have happened
    #[arg(long, value_name = "N", default_value_t = 50)]
    moves: u64,
    /// Never run the benchmark more often than this, whatever has happened by then [default: no limit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    most_runs: Option<u32>,
    #[command(flatten)]
    world: WorldOptions,
}

/// What `main` is told.
#[derive(Debug, Serialize, Deserialize)]
struct Plan {
    class: Class,
    threads: u32,
    most_runs: Option<u32>,
    demand: Demand,
    /// Whether it tells its progress.
    talk: bool,
}

/// What `main` returns.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Solved {
    /// The outcome of each run; the last may be one that failed.
    pub runs: Vec<Outcome>,
    /// Why it gave up, if it did.
    pub trouble: Option<String>,
    /// What had to happen.
    pub demand: Demand,
}

pub(super) fn run(options: &CgOptions) -> ExitCode {
    let config = match options.world.config() {
        Ok(c) => c,
        Err(e) => return fail(2, e),
    };
    let demand = Demand {
        kills: config.kill_every.map_or(0, |_| options.kills),
        hits: config.kill_every.map_or(0, |_| options.kills / 2),
        moves: config.move_every.map_or(0, |_| options.moves),
    };
    let plan = Plan {
        class: options.class,
        threads: options.threads,
        most_runs: options.most_runs,
        demand,
        talk: config.progress,
    };
    match run_with(config, benchmark, &plan) {
        Ok(ended) => {
            let code = report(&ended, options.world.json, options.world.quiet);
            tell_how_to_go_on(&ended, options.world.store.as_deref());
            code
        }
        Err(e) => fail(SYSTEM, e),
    }
}

/// The World's main thread.
fn benchmark(plan: Plan) -> Finished {
    Finished::Cg(solve_until_enough(&plan))
}

fn solve_until_enough(plan: &Plan) -> Solved {
    if plan.talk {
        let problem = plan.class.problem();
        println!(
            "NAS Parallel Benchmark CG, class {}: {} rows, {} iterations; {} threads on {} nodes\n",
            plan.class,
            problem.order,
            problem.iterations,
            plan.threads,
            node_count()
        );
    }
    let mut solved = Solved { runs: Vec::new(), trouble: None, demand: plan.demand };
    loop {
        let first = solved.runs.is_empty();
        match one_run(plan, first) {
            Ok(outcome) => {
                if plan.talk && first {
                    println!("\n{outcome}");
                } else if plan.talk {
                    let verdict = if outcome.verified { "verified" } else { "WRONG" };
                    println!(
                        " run {}: zeta = {:.13}, {verdict}, {:.2} s",
                        solved.runs.len() + 1,
                        outcome.zeta,
                        outcome.seconds
                    );
                }
                solved.runs.push(outcome);
                if !outcome.verified {
                    return solved;
                }
            }
            Err(trouble) => {
                solved.trouble = Some(trouble);
                return solved;
            }
        }
        let so_far = tally();
        let again = plan.most_runs.is_none_or(|most| solved.runs.len() < most as usize);
        if plan.demand.missing(so_far).is_none() || !again {
            return solved;
        }
        if plan.talk && first {
            println!("\n{}; running it again until enough have happened:", so_far_line(so_far));
        }
    }
}

fn so_far_line(t: Tally) -> String {
    format!("{} kills ({} on a running thread) and {} moves so far", t.kills, t.kills_hit, t.moves)
}

/// What a rank is given.
#[derive(Serialize, Deserialize)]
struct Seat {
    class: Class,
    rank: usize,
    /// To each rank, and from each rank; a rank's own place holds a channel that nobody uses.
    to: Vec<Sender<Message>>,
    from: Vec<Receiver<Message>>,
    talk: bool,
}

/// A vector and its tag.
type Message = (u64, Vec<f64>);

fn one_run(plan: &Plan, show_iterations: bool) -> Result<Outcome, String> {
    let ranks = plan.threads as usize;
    let (mut to, mut from): (Vec<Vec<_>>, Vec<Vec<_>>) =
        ((0..ranks).map(|_| Vec::new()).collect(), (0..ranks).map(|_| Vec::new()).collect());
    for sender in &mut to {
        for receiver in &mut from {
            let (tx, rx) = channel();
            sender.push(tx);
            receiver.push(rx);
        }
    }
    let mut handles = Vec::new();
    for (rank, (to, from)) in to.into_iter().zip(from).enumerate() {
        let seat =
            Seat { class: plan.class, rank, to, from, talk: plan.talk && show_iterations && rank == 0 };
        let builder = Builder::new().name(format!("rank {rank}")).node(rank as u32 % node_count());
        handles.push(builder.spawn(solve, seat).map_err(|e| format!("can't start rank {rank}: {e}"))?);
    }
    let mut outcomes = Vec::new();
    for handle in handles {
        outcomes.push(handle.join().map_err(|e| e.to_string())?);
    }
    if outcomes.iter().any(|o| o.zeta.to_bits() != outcomes[0].zeta.to_bits()) {
        return Err("the ranks disagree about zeta".to_owned());
    }
    Ok(outcomes[0])
}

/// One rank.
fn solve(seat: Seat) -> Outcome {
    let Seat { class, rank, to, from, talk } = seat;
    let ranks = to.len();
    if talk {
        println!("    iteration           ||r||                 zeta");
    }
    let mut comm = MessageComm::new(Mesh { rank, to, from });
    solve_worker(class, rank, ranks, &mut comm, &mut |iteration| {
        if talk {
            println!("{iteration}");
        }
    })
}

/// A rank that has a channel to each other.
struct Mesh {
    rank: usize,
    to: Vec<Sender<Message>>,
    from: Vec<Receiver<Message>>,
}

impl PointToPoint for Mesh {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.to.len()
    }

    fn send(&mut self, to: usize, tag: u64, data: Vec<f64>) {
        if let Err(e) = self.to[to].send(&(tag, data)) {
            panic!("rank {} can't send to rank {to}: {e}", self.rank);
        }
    }

    fn recv(&mut self, from: usize, tag: u64) -> Vec<f64> {
        match self.from[from].recv() {
            Ok((sent_as, data)) if sent_as == tag => data,
            Ok((sent_as, _)) => panic!("rank {from} sent message {sent_as} where {tag} was due"),
            Err(e) => panic!("rank {} hears nothing from rank {from}: {e}", self.rank),
        }
    }
}
