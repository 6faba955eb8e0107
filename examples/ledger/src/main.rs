//! A bank in one thread, tellers in others: ordinary blocking Rust, moved between processes and recovered when one is killed.
//!
//! `cargo run` is all it takes. Try `PEREGRINE_KILL_EVERY=30 PEREGRINE_MOVE_EVERY=2 cargo run`: the output is the same.

use peregrine::{Receiver, Sender, channel, checkpoint, migrate_to, node_count, node_id, sleep, spawn, yield_now};
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::Duration;

/// What a teller asks of the bank.
#[derive(Serialize, Deserialize)]
enum Request {
    Transfer { from: String, to: String, cents: u64 },
    Balance { of: String, answer: Sender<u64> },
}

thread_local! {
    static HANDLED: Cell<u64> = const { Cell::new(0) };
}

static CURRENCY: OnceLock<&str> = OnceLock::new();

/// Statics belong to threads; this runs at the start of each.
#[peregrine::init]
fn every_thread_knows_the_currency() {
    CURRENCY.set("cents").unwrap();
}

fn bank(requests: Receiver<Request>) -> (BTreeMap<String, u64>, u64) {
    let mut accounts: BTreeMap<String, u64> =
        ["ann", "bob", "cyd"].into_iter().map(|name| (name.to_owned(), 10_000)).collect();
    for request in requests.iter() {
        HANDLED.set(HANDLED.get() + 1);
        match request {
            Request::Transfer { from, to, cents } => {
                let there = accounts.get_mut(&from).unwrap();
                if *there >= cents {
                    *there -= cents;
                    *accounts.entry(to).or_default() += cents;
                }
            }
            Request::Balance { of, answer } => answer.send(&accounts[&of]).unwrap(),
        }
        if HANDLED.get() % 100 == 0 {
            migrate_to((node_id() + 1) % node_count()).unwrap();
        }
    }
    (accounts, HANDLED.get())
}

fn teller((number, to_bank): (u64, Sender<Request>)) -> u64 {
    let names = ["ann", "bob", "cyd"];
    let mut random = number + 1;
    for _ in 0..200 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let (from, to) = (names[(random % 3) as usize], names[(random / 3 % 3) as usize]);
        to_bank.send(&Request::Transfer { from: from.into(), to: to.into(), cents: random % 50 }).unwrap();
        if random % 16 == 0 {
            sleep(Duration::from_micros(200));
        } else {
            yield_now();
        }
    }
    200
}

#[peregrine::main]
fn main() {
    let (to_bank, requests) = channel();
    let the_bank = spawn(bank, requests);
    let tellers: Vec<_> = (0..4).map(|number| spawn(teller, (number, to_bank.clone()))).collect();
    let asked: u64 = tellers.into_iter().map(|t| t.join().unwrap()).sum();
    println!("{asked} transfers asked for");

    let (answer, balance) = channel();
    let mut total = 0;
    for of in ["ann", "bob", "cyd"] {
        to_bank.send(&Request::Balance { of: of.into(), answer: answer.clone() }).unwrap();
        total += balance.recv().unwrap();
    }
    println!("{total} {} before the books are closed", CURRENCY.get().unwrap());

    checkpoint();
    drop(to_bank);
    let (accounts, handled) = the_bank.join().unwrap();
    assert_eq!(accounts.values().sum::<u64>(), total);
    println!("{handled} requests handled, nothing lost");
}
