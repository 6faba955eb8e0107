//! The parallel solver on threads of this process, which stand in for whatever moves messages.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use cg::{Class, Comm, Iteration, MessageComm, Outcome, PointToPoint, solve_serial, solve_worker};

type Message = (u64, Vec<f64>);

/// A rank that talks to each other rank through a channel of their own.
struct Mesh {
    rank: usize,
    to: Vec<Sender<Message>>,
    from: Vec<Receiver<Message>>,
    /// Sleeps a little before some sends, so that messages arrive in another order in each run.
    jitter: Option<u64>,
    sent: usize,
}

impl Mesh {
    fn new(ranks: usize) -> Vec<Mesh> {
        let (mut to, mut from): (Vec<Vec<_>>, Vec<Vec<_>>) = Default::default();
        to.resize_with(ranks, Vec::new);
        from.resize_with(ranks, Vec::new);
        for sender in &mut to {
            for receiver in &mut from {
                let (tx, rx) = channel();
                sender.push(tx);
                receiver.push(rx);
            }
        }
        let ends = to.into_iter().zip(from).enumerate();
        ends.map(|(rank, (to, from))| Mesh { rank, to, from, jitter: None, sent: 0 }).collect()
    }
}

impl PointToPoint for Mesh {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.to.len()
    }

    fn send(&mut self, to: usize, tag: u64, data: Vec<f64>) {
        if let Some(state) = &mut self.jitter {
            *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if *state >> 58 == 0 {
                thread::sleep(std::time::Duration::from_micros(*state >> 50 & 0xff));
            }
        }
        self.sent += 1;
        self.to[to].send((tag, data)).expect("the other rank is running");
    }

    fn recv(&mut self, from: usize, tag: u64) -> Vec<f64> {
        let (sent_as, data) = self.from[from].recv().expect("the other rank is running");
        assert_eq!(sent_as, tag, "rank {} and rank {from} agree which message this is", self.rank);
        data
    }
}

/// Runs `body` as every rank and returns what each gave, in order.
fn on_each_rank<R: Send>(meshes: Vec<Mesh>, body: impl Fn(MessageComm<Mesh>) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let body = &body;
        let threads: Vec<_> =
            meshes.into_iter().map(|mesh| scope.spawn(move || body(MessageComm::new(mesh)))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

/// All iterations and the outcome of each rank.
fn run(class: Class, meshes: Vec<Mesh>) -> Vec<(Vec<Iteration>, Outcome)> {
    on_each_rank(meshes, |mut comm| {
        let mut seen = Vec::new();
        let (rank, ranks) = (comm.rank(), comm.ranks());
        let outcome = solve_worker(class, rank, ranks, &mut comm, &mut |iteration| seen.push(iteration));
        (seen, outcome)
    })
}

#[test]
fn class_s_is_verified_on_any_number_of_ranks_and_all_ranks_agree_to_the_bit() {
    for ranks in [1, 2, 3, 4, 5, 8] {
        let results = run(Class::S, Mesh::new(ranks));
        for (iterations, outcome) in &results {
            assert!(outcome.verified, "{ranks} ranks: {outcome}");
            assert_eq!(outcome.ranks, ranks);
            assert_eq!(iterations, &results[0].0);
        }
    }
}

#[test]
fn the_order_in_which_messages_arrive_does_not_change_a_bit() {
    let expected = run(Class::S, Mesh::new(4))[0].0.clone();
    for seed in 0..3 {
        let mut meshes = Mesh::new(4);
        for mesh in &mut meshes {
            mesh.jitter = Some(seed * 4 + mesh.rank as u64);
        }
        for (iterations, _) in run(Class::S, meshes) {
            assert_eq!(iterations, expected, "seed {seed}");
        }
    }
}

#[test]
fn one_rank_does_the_arithmetic_of_the_plain_function_and_sends_nothing() {
    let mut serial = Vec::new();
    let plain = solve_serial(Class::S, &mut |iteration| serial.push(iteration));
    let mut comm = MessageComm::new(Mesh::new(1).remove(0));
    let mut worker = Vec::new();
    let alone = solve_worker(Class::S, 0, 1, &mut comm, &mut |iteration| worker.push(iteration));
    assert_eq!(plain.zeta.to_bits(), alone.zeta.to_bits());
    assert_eq!(serial, worker);
    assert_eq!(comm.into_inner().sent, 0);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow without optimisation; run it with --release")]
fn class_w_is_verified_alone_and_on_two_ranks() {
    let outcome = solve_serial(Class::W, &mut |_| ());
    assert!(outcome.verified, "{outcome}");
    for (_, outcome) in run(Class::W, Mesh::new(2)) {
        assert!(outcome.verified, "{outcome}");
    }
}

/// `cargo test --release -p cg -- --ignored --nocapture` prints the whole table of this machine.
#[test]
#[ignore = "takes minutes; in a debug build, hours"]
fn every_class_is_verified_alone_and_on_two_ranks() {
    for class in Class::ALL {
        let outcome = solve_serial(class, &mut |_| ());
        println!("{outcome}");
        assert!(outcome.verified, "{outcome}");
        let outcome = run(class, Mesh::new(2))[0].1;
        println!("{outcome}");
        assert!(outcome.verified, "{outcome}");
    }
}

#[test]
fn a_gather_of_uneven_and_empty_blocks_puts_them_in_the_order_of_the_ranks() {
    for ranks in 1..=9 {
        let counts: Vec<usize> = (0..ranks).map(|rank| rank * 5 % 4).collect();
        let block = |rank: usize| (0..counts[rank]).map(move |i| (rank * 10 + i) as f64).collect::<Vec<_>>();
        let expected: Vec<f64> = (0..ranks).flat_map(block).collect();
        let gathered = on_each_rank(Mesh::new(ranks), |mut comm| {
            let mut out = vec![f64::NAN; expected.len()];
            comm.all_gather(&block(comm.rank()), &counts, &mut out);
            out
        });
        for out in gathered {
            assert_eq!(out, expected, "{ranks} ranks");
        }
    }
}

#[test]
fn a_sum_adds_in_the_order_of_the_ranks_on_every_rank() {
    // Terms so different in size that another order gives other bits.
    let term = |rank: usize| [1e16, 1.0, -1e16, 1.0, 3.0][rank % 5] * (1.0 + rank as f64);
    for ranks in 1..=9 {
        let expected = (1..ranks).fold(term(0), |sum, rank| sum + term(rank));
        let sums = on_each_rank(Mesh::new(ranks), |mut comm| {
            let mut values = [-0.0, term(comm.rank())];
            comm.all_sum(&mut values);
            values
        });
        for [zero, sum] in sums {
            assert_eq!(sum.to_bits(), expected.to_bits(), "{ranks} ranks");
            assert!(zero == 0.0 && zero.is_sign_negative());
        }
    }
}

#[test]
#[should_panic(expected = "rank 1 of 2 was given the comm of rank 0 of 1")]
fn a_comm_of_another_rank_is_refused() {
    let mut comm = MessageComm::new(Mesh::new(1).remove(0));
    solve_worker(Class::S, 1, 2, &mut comm, &mut |_| ());
}

#[test]
fn what_crosses_threads_survives_serialisation() {
    let mut last = None;
    let outcome = solve_serial(Class::S, &mut |iteration| last = Some(iteration));
    let bytes = postcard::to_stdvec(&(Class::B, Class::B.problem(), last, outcome)).unwrap();
    let back = postcard::from_bytes(&bytes).unwrap();
    assert_eq!((Class::B, Class::B.problem(), last, outcome), back);
}
