//! Channels and joins, alone and while nodes are killed at random times.

use peregrine::{
    Builder, Receiver, RecvError, SendError, Sender, channel, node_count, sleep, spawn, yield_now,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

#[derive(Serialize, Deserialize, Debug)]
struct Numbered {
    from: u32,
    number: u64,
    payload: Vec<u8>,
}

fn numbered(from: u32, number: u64) -> Numbered {
    let len = (from as u64 * 31 + number * 17) % 700;
    Numbered { from, number, payload: vec![(from as u64 ^ number) as u8; len as usize] }
}

fn sends((from, how_many, tx): (u32, u64, Sender<Numbered>)) -> u64 {
    let mut sum = 0u64;
    for number in 0..how_many {
        tx.send(&numbered(from, number)).unwrap();
        sum = sum.wrapping_add(number * from as u64);
        match number % 50 {
            0 => yield_now(),
            7 => sleep(Duration::from_micros(300)),
            20 if from % 2 == 0 => peregrine::migrate_to((from + number as u32) % node_count()).unwrap(),
            _ => {}
        }
    }
    sum
}

/// Every message of every sender, once, in order; the join results agree.
fn exactly_once(senders: u32, each: u64) {
    let (tx, rx) = channel();
    let handles: Vec<_> = (1..=senders)
        .map(|from| {
            let node = from % node_count();
            Builder::new()
                .name(format!("sender {from}"))
                .node(node)
                .spawn(sends, (from, each, tx.clone()))
                .unwrap()
        })
        .collect();
    drop(tx);
    let mut next: BTreeMap<u32, u64> = (1..=senders).map(|from| (from, 0)).collect();
    let mut count = 0u64;
    while let Ok(m) = rx.recv() {
        let due = next.get_mut(&m.from).unwrap();
        assert_eq!(m.number, *due, "from sender {}: lost, doubled or out of order", m.from);
        assert_eq!(m.payload, numbered(m.from, m.number).payload);
        *due += 1;
        count += 1;
    }
    assert_eq!(count, senders as u64 * each);
    for (from, h) in (1..=senders as u64).zip(handles) {
        assert_eq!(h.join().unwrap(), from * (each * (each - 1) / 2));
    }
}

#[peregrine::test(nodes = 3, move_every_ms = 1)]
fn messages_arrive_once_and_in_order() {
    exactly_once(6, 1000);
}

#[peregrine::test(nodes = 3, kill_every_ms = 15, move_every_ms = 2, least_kills = 5, timeout_s = 300)]
fn messages_arrive_once_and_in_order_while_nodes_are_killed() {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1500) {
        exactly_once(6, 400);
    }
}

#[peregrine::test(nodes = 3, move_every_ms = 1, timeout_s = 900)]
#[ignore = "the long form"]
fn a_million_messages_arrive_once_and_in_order() {
    exactly_once(8, 125_000);
}

#[peregrine::test(nodes = 4, kill_every_ms = 10, move_every_ms = 1, least_kills = 200, timeout_s = 900)]
#[ignore = "the long form"]
fn messages_arrive_once_through_hundreds_of_kills() {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(60) {
        exactly_once(8, 400);
    }
}

fn relay((mine, rx, tx): (u32, Receiver<u64>, Sender<u64>)) -> u64 {
    let mut passed = 0;
    for token in rx.iter() {
        passed += 1;
        if tx.send(&(token + mine as u64)).is_err() {
            break;
        }
    }
    passed
}

#[peregrine::test(nodes = 2, kill_every_ms = 20, move_every_ms = 2, least_kills = 5, timeout_s = 300)]
fn a_token_goes_round_a_ring_without_being_lost_or_doubled() {
    const LINKS: u32 = 7;
    let (first, mut rx) = channel();
    let mut handles = Vec::new();
    for i in 0..LINKS {
        let (tx, next) = channel();
        handles.push(Builder::new().node(i % 2).spawn(relay, (i, rx, tx)).unwrap());
        rx = next;
    }
    let per_round: u64 = (0..LINKS as u64).sum();
    let begun = Instant::now();
    let mut rounds = 0;
    let mut token = 0;
    while begun.elapsed() < Duration::from_millis(1000) || rounds < 50 {
        first.send(&token).unwrap();
        token = rx.recv().unwrap();
        rounds += 1;
        assert_eq!(token, rounds * per_round);
        assert_eq!(rx.try_recv(), Err(RecvError::Timeout), "the token was doubled");
    }
    drop(first);
    for h in handles {
        assert_eq!(h.join().unwrap(), rounds);
    }
}

fn counts_down(depth: u32) -> u64 {
    if depth == 0 {
        return 1;
    }
    let a = spawn(counts_down, depth - 1);
    let b = Builder::new().node(depth % node_count()).spawn(counts_down, depth - 1).unwrap();
    a.join().unwrap() + b.join().unwrap()
}

#[peregrine::test(nodes = 3, kill_every_ms = 20, move_every_ms = 1, least_kills = 2, timeout_s = 300)]
fn a_tree_of_threads_is_joined_rightly_while_nodes_are_killed() {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(500) {
        assert_eq!(counts_down(6), 64);
    }
}

#[peregrine::test(nodes = 2)]
fn ends_travel_in_messages_arguments_and_results() {
    let (tx, rx) = channel::<(Sender<String>, Receiver<u32>)>();
    let (answers, answered) = channel::<String>();
    let (numbers, numbered) = channel::<u32>();
    numbers.send(&5).unwrap();
    let h = spawn(
        |rx: Receiver<(Sender<String>, Receiver<u32>)>| -> (Receiver<u32>, Sender<String>) {
            let (to, from) = rx.recv().unwrap();
            to.send(&format!("got {}", from.recv().unwrap())).unwrap();
            (from, to)
        },
        rx,
    );
    tx.send(&(answers, numbered)).unwrap();
    assert_eq!(answered.recv().unwrap(), "got 5");
    let (from, to) = h.join().unwrap();
    numbers.send(&6).unwrap();
    assert_eq!(from.recv().unwrap(), 6);
    to.send(&"again".to_owned()).unwrap();
    assert_eq!(answered.recv().unwrap(), "again");
    drop(to);
    assert_eq!(answered.recv(), Err(RecvError::Closed), "the last sender is known to be gone");
}

#[peregrine::test(nodes = 2)]
fn a_handle_can_be_sent_to_another_thread_that_joins() {
    let h = spawn(
        |_: ()| {
            sleep(Duration::from_millis(20));
            7u32
        },
        (),
    );
    let joins = spawn(|h: peregrine::JoinHandle<u32>| h.join().unwrap(), h);
    assert_eq!(joins.join().unwrap(), 7);
}

#[peregrine::test(nodes = 2)]
fn a_channel_closes_when_the_other_side_is_gone() {
    let (tx, rx) = channel::<u32>();
    let more = tx.clone();
    tx.send(&1).unwrap();
    drop(tx);
    more.send(&2).unwrap();
    drop(more);
    assert_eq!((rx.recv(), rx.recv(), rx.recv()), (Ok(1), Ok(2), Err(RecvError::Closed)));
    let (tx, rx) = channel::<u32>();
    drop(rx);
    assert_eq!(tx.send(&1), Err(SendError::Closed));
    // An end inside a message that nobody reads is given up with it.
    let (tx, rx) = channel::<Sender<u32>>();
    let (inner, inner_rx) = channel::<u32>();
    tx.send(&inner).unwrap();
    drop((inner, rx));
    assert_eq!(inner_rx.recv(), Err(RecvError::Closed));
    // A thread that panics gives up its ends.
    let (tx, rx) = channel::<u32>();
    let h = spawn(|_tx: Sender<u32>| -> () { std::panic::resume_unwind(Box::new("quietly")) }, tx);
    assert_eq!(rx.recv(), Err(RecvError::Closed));
    assert!(h.join().is_err());
}

#[peregrine::test(nodes = 2)]
fn a_receive_waits_no_longer_than_it_was_told() {
    let (tx, rx) = channel::<u32>();
    assert_eq!(rx.try_recv(), Err(RecvError::Timeout));
    let begun = Instant::now();
    assert_eq!(rx.recv_timeout(Duration::from_millis(30)), Err(RecvError::Timeout));
    assert!(begun.elapsed() >= Duration::from_millis(30));
    let h = spawn(
        |tx: Sender<u32>| {
            sleep(Duration::from_millis(20));
            tx.send(&9).unwrap();
            sleep(Duration::from_millis(20));
        },
        tx,
    );
    assert_eq!(rx.recv_timeout(Duration::from_secs(20)), Ok(9));
    assert_eq!(rx.recv_timeout(Duration::from_secs(20)), Err(RecvError::Closed));
    h.join().unwrap();
}

#[peregrine::test(nodes = 2, move_every_ms = 2)]
fn large_messages_arrive_whole() {
    let (tx, rx) = channel::<Vec<u8>>();
    let h = spawn(
        |tx: Sender<Vec<u8>>| {
            for i in 0..3u8 {
                let v: Vec<u8> = (0..16 << 20).map(|k| (k as u8).wrapping_mul(i)).collect();
                tx.send(&v).unwrap();
            }
        },
        tx,
    );
    for i in 0..3u8 {
        let v = rx.recv().unwrap();
        assert_eq!(v.len(), 16 << 20);
        assert!(v.iter().enumerate().all(|(k, b)| *b == (k as u8).wrapping_mul(i)));
    }
    h.join().unwrap();
}

#[peregrine::test(nodes = 2, timeout_s = 300)]
fn many_small_messages_arrive() {
    let how_many: u64 = if std::env::var_os("PEREGRINE_LONG").is_some() { 1_000_000 } else { 100_000 };
    let (tx, rx) = channel::<u64>();
    let h = spawn(
        |(tx, n): (Sender<u64>, u64)| {
            for i in 0..n {
                tx.send(&i).unwrap();
            }
        },
        (tx, how_many),
    );
    assert!(rx.iter().eq(0..how_many));
    h.join().unwrap();
}

#[peregrine::test(nodes = 2, move_every_ms = 5, timeout_s = 300)]
fn ten_thousand_threads_park_and_are_woken_and_joined() {
    fn waits((rx, tx): (Receiver<u32>, Sender<u32>)) -> u32 {
        let n = rx.recv().unwrap();
        tx.send(&n).unwrap();
        n
    }
    let threads = 10_000;
    let (results, all) = channel();
    let mut started = Vec::new();
    for _ in 0..threads {
        let (tx, rx) = channel();
        let h = Builder::new().stack_size(64 << 10).spawn(waits, (rx, results.clone())).unwrap();
        started.push((tx, h));
    }
    for (i, (tx, _)) in started.iter().enumerate() {
        tx.send(&(i as u32)).unwrap();
    }
    let mut seen: Vec<u32> = (0..threads).map(|_| all.recv().unwrap()).collect();
    seen.sort_unstable();
    assert!(seen.iter().copied().eq(0..threads));
    for (i, (_, h)) in started.into_iter().enumerate() {
        assert_eq!(h.join().unwrap(), i as u32);
    }
}

#[peregrine::test(nodes = 2)]
fn a_detached_thread_runs_on_and_its_slot_is_used_again() {
    let (tx, rx) = channel();
    let first = spawn(|_: ()| (), ()).thread().slot;
    for i in 0..200u32 {
        drop(spawn(|(i, tx): (u32, Sender<u32>)| tx.send(&i).unwrap(), (i, tx.clone())));
        assert_eq!(rx.recv(), Ok(i));
    }
    let h = spawn(|_: ()| (), ());
    assert!(
        h.thread().slot < first + 100,
        "slots of ended threads are not used again: this is slot {}, the first was {first}",
        h.thread().slot
    );
}

fn half_done((tx, rx): (Sender<u32>, Receiver<u32>)) -> u32 {
    let mut n = 0;
    while let Ok(k) = rx.recv() {
        n += k;
        tx.send(&n).unwrap();
    }
    n
}

#[peregrine::test(nodes = 2, kill_every_ms = 25, least_kills = 3, timeout_s = 300)]
fn a_conversation_is_consistent_on_both_sides_after_each_rollback() {
    let (to, their_rx) = channel();
    let (their_tx, from) = channel();
    let h = Builder::new().node(1).spawn(half_done, (their_tx, their_rx)).unwrap();
    let begun = Instant::now();
    let mut sum = 0u32;
    while begun.elapsed() < Duration::from_millis(500) {
        for k in 0..100u32 {
            to.send(&k).unwrap();
            sum = sum.wrapping_add(k);
            assert_eq!(from.recv().unwrap(), sum);
        }
        if sum > 1 << 30 {
            break;
        }
    }
    drop(to);
    assert_eq!(h.join().unwrap(), sum);
}

#[peregrine::test(nodes = 1)]
fn a_value_that_panics_while_it_is_sent_gives_its_ends_back() {
    struct Explosive(Sender<u32>);
    impl Serialize for Explosive {
        fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
            let _ = self.0.serialize(s)?;
            panic!("in the middle")
        }
    }
    let (out, _in) = channel::<Explosive>();
    let (tx, rx) = channel();
    let sent = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| out.send(&Explosive(tx))));
    assert!(sent.is_err());
    assert_eq!(rx.recv_timeout(Duration::from_secs(5)), Err(RecvError::Closed), "an end travels nowhere");
    let (tx, _rx) = channel::<u32>();
    assert!(
        serde_json::to_string(&tx).is_err(),
        "no value is on its way, and an end can't be written elsewhere"
    );
}
