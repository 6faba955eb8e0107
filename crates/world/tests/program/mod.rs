//! A program that uses every structure of the runtime and knows what must come of it.
//!
//! ```text
//!   main ── token ──▶ relay 0 ──▶ relay 1 ──▶ relay 2 ──▶ main       lives as long as the program: lost or doubled
//!     │               (a slot)    (alias)     (copy)                 messages would change the token
//!     ├─ each round: workers, channels, ends in messages, sleeps, moves, output …, all new and all gone at its end
//!     └─ what all threads share: regions by name, what is done about signals, domains of carried calls
//! ```
//!
//! A round's sum depends on its number alone, so each line it prints is known beforehand, however often it was begun.

use peregrine_world::{
    Builder, Config, Receiver, RecvError, Sender, StackKind, TrustedDomain, channel, checkpoint, migrate_to,
    node_count, node_id, region, sleep, spawn, yield_now,
};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::time::Duration;

/// What the token becomes at a relay.
fn turned(token: u64, by: u64) -> u64 {
    token.rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ by
}

#[derive(Serialize, Deserialize)]
struct Relay {
    number: u64,
    from: Receiver<(u64, u64)>,
    to: Sender<(u64, u64)>,
}

/// Passes tokens on, in order, until no more come.
fn relay(me: Relay) -> u64 {
    let mut count = 0;
    while let Ok((serial, token)) = me.from.recv() {
        assert_eq!(serial, count, "a message was lost, doubled or overtaken");
        me.to.send(&(serial, turned(token, me.number))).unwrap();
        count += 1;
        if count.is_multiple_of(3) {
            migrate_to((node_id() + 1) % node_count()).unwrap();
        }
    }
    count
}

#[derive(Serialize, Deserialize)]
struct Work {
    seed: u64,
    answer: Sender<(u64, Sender<u64>)>,
    questions: Receiver<u64>,
}

/// Computes, sleeps, allocates, is asked and answers.
fn worker(work: Work) -> (u64, Vec<u8>) {
    let mut map: HashMap<u64, Vec<u8>> = HashMap::new();
    let mut x = work.seed | 1;
    for i in 0..40 {
        x = turned(x, i);
        map.entry(x % 11).or_default().extend_from_slice(&[x as u8; 700]);
        if i % 16 == 5 {
            yield_now();
        }
    }
    let (tx, rx) = channel::<u64>();
    work.answer.send(&(work.seed, tx)).unwrap();
    drop(work.answer);
    if work.seed.is_multiple_of(3) {
        sleep(Duration::from_micros(300));
    }
    let asked = work.questions.recv().unwrap();
    assert_eq!(work.questions.recv_timeout(Duration::from_micros(200)), Err(RecvError::Timeout));
    let told = rx.recv().unwrap();
    let sum =
        map.iter().fold(0u64, |s, (k, v)| s.wrapping_add(k.wrapping_mul(v.iter().map(|b| *b as u64).sum())));
    (sum ^ turned(asked, told), vec![x as u8; 300])
}

/// What [`worker`] must return, computed apart.
fn expected(seed: u64, asked: u64, told: u64) -> (u64, u8) {
    let mut sums: HashMap<u64, u64> = HashMap::new();
    let mut x = seed | 1;
    for i in 0..40 {
        x = turned(x, i);
        *sums.entry(x % 11).or_default() += (x as u8) as u64 * 700;
    }
    (sums.iter().fold(0u64, |s, (k, v)| s.wrapping_add(k.wrapping_mul(*v))) ^ turned(asked, told), x as u8)
}

fn panics(n: u32) -> u32 {
    std::panic::resume_unwind(Box::new(format!("number {n}")))
}

/// One of many functions: the first thread of each that is packed is a model for others (`models`).
fn idler<const N: u64>(woken: Receiver<u64>) -> u64 {
    let held = [N; 20];
    let n = woken.recv().unwrap_or(0);
    std::hint::black_box(&held).iter().fold(n, |a, b| turned(a, *b))
}

/// Idlers, and in every how many rounds there is a new one: fewer than a World keeps models of.
const IDLERS: [fn(Receiver<u64>) -> u64; 20] = [
    idler::<0>,
    idler::<1>,
    idler::<2>,
    idler::<3>,
    idler::<4>,
    idler::<5>,
    idler::<6>,
    idler::<7>,
    idler::<8>,
    idler::<9>,
    idler::<10>,
    idler::<11>,
    idler::<12>,
    idler::<13>,
    idler::<14>,
    idler::<15>,
    idler::<16>,
    idler::<17>,
    idler::<18>,
    idler::<19>,
];
const IDLER_EVERY: u64 = 5;

/// Workers of a round.
const WORKERS: u64 = 5;

fn one_round(round: u64) -> u64 {
    let mut total = round;
    // Workers on all nodes, or all on one, which must then give some away.
    let mut open = Vec::new();
    let (answer, answers) = channel();
    for k in 0..WORKERS {
        let (ask, questions) = channel();
        let seed = round * 100 + k;
        // Workers of all kinds, and as many more in windows as make them conflict.
        let kind =
            [StackKind::Isomalloc, StackKind::Alias, StackKind::Copy, StackKind::Copy, StackKind::Alias]
                [k as usize];
        let builder = Builder::new().name(format!("worker {k}")).stack_size(128 << 10).kind(kind);
        let builder = if round.is_multiple_of(2) { builder.node(k as u32 % node_count()) } else { builder };
        let handle = builder.spawn(worker, Work { seed, answer: answer.clone(), questions }).unwrap();
        open.push((seed, ask, handle));
    }
    drop(answer);
    for _ in 0..WORKERS {
        let (seed, reply) = answers.recv().unwrap();
        reply.send(&(seed * 5)).unwrap();
    }
    assert_eq!(answers.recv().err(), Some(RecvError::Closed), "the last sender is gone");
    for (seed, ask, handle) in open {
        ask.send(&(seed * 3)).unwrap();
        let (sum, bytes) = handle.join().unwrap();
        let (expected, byte) = expected(seed, seed * 3, seed * 5);
        assert_eq!(sum, expected, "seed {seed}");
        assert!(bytes.len() == 300 && bytes.iter().all(|b| *b == byte));
        total = turned(total, sum);
    }
    // Let go: before its end, and after it, with a result that nobody reads and a channel end in it.
    drop(spawn(|_: ()| sleep(Duration::from_micros(100)), ()));
    let gone = spawn(|_: ()| channel::<u8>(), ());
    while !gone.is_finished() {
        yield_now();
    }
    sleep(Duration::from_micros(50));
    drop(gone);
    let e = spawn(panics, round as u32).join().unwrap_err();
    assert!(e.to_string().contains(&format!("number {round}")), "{e}");
    // A queue that is dropped unread, ends within.
    let (tx, rx) = channel::<(Vec<u8>, Sender<u8>)>();
    let (inner, inner_rx) = channel::<u8>();
    for _ in 0..3 {
        tx.send(&(vec![1; 500], inner.clone())).unwrap();
    }
    drop(inner);
    // A receiver goes to a thread and comes back.
    let back = spawn(|rx: Receiver<(Vec<u8>, Sender<u8>)>| rx, rx).join().unwrap();
    drop(back);
    assert_eq!(inner_rx.recv(), Err(RecvError::Closed));
    assert!(tx.send(&(Vec::new(), channel().0)).is_err());
    // More than there is.
    let mut much: Vec<u8> = Vec::new();
    assert!(much.try_reserve_exact(700 << 20).is_err());
    total
}

/// A region that lives for a round, opened by another thread by its name.
fn shares_a_region(round: u64) -> u64 {
    let name = format!("of round {round}");
    let made = region::create(&name, 9000).unwrap();
    let cells = made.cells::<u64>();
    cells.set(1100, round).unwrap();
    let add = |(name, k): (String, u64)| {
        let opened = region::open(&name).unwrap();
        let found = opened.cells::<u64>().get(1100).unwrap();
        opened.cells::<u64>().set(k as usize, found + k).unwrap();
    };
    let adders: Vec<_> = (0..2).map(|k| spawn(add, (name.clone(), k))).collect();
    adders.into_iter().for_each(|h| h.join().unwrap());
    let sum = cells.get(0).unwrap() + cells.get(1).unwrap();
    assert_eq!(sum, 2 * round + 1);
    drop(made);
    region::remove(&name).unwrap();
    assert!(region::open(&name).is_err());
    sum
}

unsafe extern "C" {
    fn signal(signo: i32, handler: usize) -> usize;
}

/// SIGUSR1 and SIGUSR2.
const SIGNALS: [i32; 2] = [10, 12];

extern "C" fn handler_of_odd(_: i32) {}
extern "C" fn handler_of_even(_: i32) {}

/// What is done about signals from this round on, if `round` is one.
fn handler_of(round: Option<u64>) -> usize {
    match round {
        None => 0,
        Some(r) if r % 2 == 1 => handler_of_odd as *const () as usize,
        Some(_) => handler_of_even as *const () as usize,
    }
}

/// What this node's kernel was told.
fn told(signo: i32) -> usize {
    // SAFETY: nothing is changed.
    unsafe { peregrine_sys::signal::change(signo, None) }.unwrap().handler
}

/// Changes what is done about signals, on one node, and finds on the next what was done on the last.
fn changes_signals(round: u64) {
    // Nobody has changed it since the last round: what a node was told that a rollback took back is forgotten there.
    for _ in 0..node_count() {
        for signo in SIGNALS {
            assert_eq!(told(signo), handler_of(round.checked_sub(1)), "signal {signo} in round {round}");
        }
        migrate_to((node_id() + 1) % node_count()).unwrap();
    }
    for signo in SIGNALS {
        // SAFETY: the handlers do nothing.
        let was = unsafe { signal(signo, handler_of(Some(round))) };
        assert_eq!(was, handler_of(round.checked_sub(1)), "of signal {signo} in round {round}");
        migrate_to((node_id() + 1) % node_count()).unwrap();
        assert_eq!(
            told(signo),
            handler_of(Some(round)),
            "what this node's kernel was told of signal {signo}"
        );
    }
}

/// Borrows in a domain what lies on its caller's stack.
fn calls_a_domain(domain: TrustedDomain, round: u64) -> u64 {
    let mut rows = vec![round];
    let here = std::process::id();
    let sum = domain.run(|| {
        assert_ne!(std::process::id(), here);
        rows.push(7);
        rows.iter().sum::<u64>()
    });
    assert_eq!((sum, rows.len()), (Ok(round + 7), 2));
    round + 7
}

/// The settings of every World that runs it: two windows, from which threads are packed as soon as they wait elsewhere.
pub fn config() -> Config {
    Config {
        memory_bytes: 600 << 20,
        windows: 2,
        pack_after: Some(Duration::from_millis(1)),
        ..Config::default()
    }
}

/// What `main` is told.
#[derive(Serialize, Deserialize)]
pub struct Plan {
    /// Rounds at least, and at most.
    pub rounds: (u64, u64),
    /// Seconds at most, as the first life sees them.
    pub seconds: f64,
    /// Whether more than the least are wanted: asked after each round.
    pub more: bool,
}

/// The line that a round prints.
pub fn line(round: u64, total: u64, token: u64) -> String {
    format!("round {round} total {total:016x} token {token:016x}")
}

/// Runs rounds; how many.
pub fn main(plan: Plan) -> u64 {
    let begun = std::time::Instant::now();
    let mut ends: Vec<_> = (0..4).map(|_| channel::<(u64, u64)>()).map(|(t, r)| (Some(t), Some(r))).collect();
    let relays: Vec<_> = (0..3)
        .map(|k| {
            let (from, to) = (ends[k].1.take().unwrap(), ends[k + 1].0.take().unwrap());
            Builder::new()
                .name(format!("relay {k}"))
                .kind(StackKind::ALL[k])
                .spawn(relay, Relay { number: k as u64, from, to })
                .unwrap()
        })
        .collect();
    let (first, last) = (ends[0].0.take().unwrap(), ends[3].1.take().unwrap());
    // Messages that pile up, each time higher than the last, so that the arena grows.
    let (keep, kept) = channel::<Vec<u8>>();
    let (mut piled, mut most) = (0, 20);
    // Entries that no round before used.
    let mut held = Vec::new();
    let mut idle = Vec::new();
    let mut round = 0;
    let mut token = 1;
    let mut domains = Vec::new();
    // What all rounds add up.
    let tally = region::open_or_create("tally", 64).unwrap();
    let mut sum = 0;
    loop {
        // Two rounds are long enough to be packed, and on each node there are more of them than windows.
        let number = round / IDLER_EVERY % IDLERS.len() as u64;
        if round % IDLER_EVERY == 0 {
            let kind = [StackKind::Alias, StackKind::Copy][(round / IDLER_EVERY % 2) as usize];
            for k in 0..3 * node_count() {
                let (wake, woken) = channel::<u64>();
                let builder = Builder::new().kind(kind).node(k % node_count());
                idle.push((wake, builder.spawn(IDLERS[number as usize], woken).unwrap()));
            }
        } else if round % IDLER_EVERY == 3 {
            for (wake, idler) in idle.drain(..) {
                wake.send(&round).unwrap();
                assert_eq!(idler.join().unwrap(), (0..20).fold(round, |a, _| turned(a, number)));
            }
        }
        if [0, 3].contains(&round) {
            // Nobody is killed for a while after a kill, and this is not to come by meanwhile.
            sleep(Duration::from_millis(10));
            domains.push(TrustedDomain::open(&format!("of round {round}"), || {}).unwrap());
        }
        first.send(&(round, token)).unwrap();
        let total = one_round(round);
        let (serial, turned) = last.recv().unwrap();
        assert_eq!(serial, round);
        token = turned;
        sum += shares_a_region(round) + calls_a_domain(domains[round as usize % domains.len()], round);
        tally.cells::<u64>().set(0, sum).unwrap();
        changes_signals(round);
        println!("{}", line(round, total, token));
        keep.send(&vec![round as u8; 300 << 10]).unwrap();
        piled += 1;
        held.push(channel::<u8>());
        if piled == most {
            for k in (0..piled).rev() {
                let bytes = kept.recv().unwrap();
                assert!(bytes.iter().all(|b| *b == (round - k) as u8));
            }
            (piled, most) = (0, most + 5);
        }
        if round % 8 == 3 {
            assert!(checkpoint() > 0);
        }
        round += 1;
        let enough = round >= plan.rounds.0 && (!plan.more || peregrine_world::killpoint::left() == 0);
        if enough || round >= plan.rounds.1 || begun.elapsed().as_secs_f64() > plan.seconds {
            break;
        }
    }
    if plan.more {
        // The end too is to be hit, a while after the last hit.
        sleep(Duration::from_millis(30));
    }
    drop(first);
    for r in relays {
        assert_eq!(r.join().unwrap(), round);
    }
    assert_eq!(tally.cells::<u64>().get(0), Ok((0..round).map(|r| 2 * r + 1 + r + 7).sum()));
    println!("{round} rounds");
    round
}

/// The lines of so many undisturbed rounds.
pub fn oracle(rounds: u64) -> String {
    let mut text = String::new();
    let mut token = 1;
    for round in 0..rounds {
        let mut total = round;
        for seed in (0..WORKERS).map(|k| round * 100 + k) {
            total = turned(total, expected(seed, seed * 3, seed * 5).0);
        }
        token = (0..3).fold(token, turned);
        text += &line(round, total, token);
        text.push('\n');
    }
    text + &format!("{rounds} rounds\n")
}
