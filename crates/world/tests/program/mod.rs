//! A program that uses every structure of the runtime and knows what must come of it.
//!
//! ```text
//!   main ── token ──▶ relay 0 ──▶ relay 1 ──▶ relay 2 ──▶ main       lives as long as the program: lost or doubled
//!     │               (a slot)    (alias)     (copy)                 messages would change the token
//!     └─ each round: workers, channels, ends in messages, sleeps, moves, output …, all new and all gone at its end
//! ```
//!
//! A round's sum depends on its number alone, so each line it prints is known beforehand, however often it was begun.

use peregrine_world::{
    Builder, Config, Receiver, RecvError, Sender, StackKind, channel, checkpoint, migrate_to, node_count,
    node_id, sleep, spawn, yield_now,
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

const SIGUSR1: i32 = 10;

unsafe extern "C" {
    fn signal(signo: i32, handler: usize) -> usize;
}

extern "C" fn hears<const WHICH: u8>(_: i32) {
    std::hint::black_box(WHICH);
}

/// Puts another handler in the place of the last round's: whatever node the caller is on from then on does that about the signal.
/// None is sent: it would be the node's, and the caller may be another's by then.
fn handle(round: u64) {
    let handlers = [hears::<0> as *const () as usize, hears::<1> as *const () as usize];
    assert_ne!(handlers[0], handlers[1]);
    let which = round as usize % 2;
    // SAFETY: the handlers do nothing.
    let before = unsafe { signal(SIGUSR1, handlers[which]) };
    assert_eq!(before, if round == 0 { 0 } else { handlers[1 - which] }, "what was done about it before");
    for _ in 0..node_count() {
        // SAFETY: nothing is changed.
        let here = unsafe { peregrine_sys::signal::change(SIGUSR1, None) }.unwrap();
        assert_eq!(here.handler, handlers[which], "what the kernel was told");
        migrate_to((node_id() + 1) % node_count()).unwrap();
    }
}

/// Workers of a round.
const WORKERS: u64 = 5;

fn one_round(round: u64) -> u64 {
    let mut total = round;
    handle(round);
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
    // Messages that pile up, so that the arena grows.
    let (keep, kept) = channel::<Vec<u8>>();
    let mut piled = 0;
    // Entries that no round before used.
    let mut held = Vec::new();
    let mut round = 0;
    let mut token = 1;
    loop {
        first.send(&(round, token)).unwrap();
        let total = one_round(round);
        let (serial, turned) = last.recv().unwrap();
        assert_eq!(serial, round);
        token = turned;
        println!("{}", line(round, total, token));
        keep.send(&vec![round as u8; 300 << 10]).unwrap();
        piled += 1;
        held.push(channel::<u8>());
        if piled == 60 {
            for k in (0..piled).rev() {
                let bytes = kept.recv().unwrap();
                assert!(bytes.iter().all(|b| *b == (round - k) as u8));
            }
            piled = 0;
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
