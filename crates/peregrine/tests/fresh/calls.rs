//! Calls of all kinds: what goes along, what comes back, and what the node does meanwhile.

use crate::domain::{KitchenClient, Overfull, WHERE, holds, kitchen, portal};
use peregrine::{Builder, FreshCallError, Loan, Portal, channel, node_id, sleep, spawn, yield_now};
use peregrine_call::interface::Error;
use peregrine_call::{Attributes, Call};
use std::process::id;
use std::time::Duration;

/// Turns of a thread that does nothing else.
const TURNS: u64 = 1000;

#[peregrine::test(program, nodes = 1)]
fn calls_of_all_kinds() {
    let add = portal("add");
    for len in [0usize, 1, 100, 70_000, 1 << 20] {
        let bytes = vec![5u8; len];
        assert!(add.call(&bytes, len).unwrap() == vec![6u8; len], "{len} bytes");
    }
    let there = portal("slow").call(&[1], 8).unwrap();
    assert_ne!(there, id().to_ne_bytes(), "another process did it");
    let e = portal("fails").call(b"why", 0).unwrap_err();
    assert_eq!(e, FreshCallError::Callee { code: 7, detail: b"why".to_vec() });
    assert_eq!(portal("panics").call(b"", 0), Err(FreshCallError::Panicked("burnt".into())));
    assert!(matches!(portal("none").call(b"", 0), Err(FreshCallError::Refused(_))));
    let old = Portal::new(std::env::var(WHERE).unwrap(), "add", 9);
    assert!(matches!(old.call(b"", 0), Err(FreshCallError::Version { theirs: 1, ours: 9, .. })));
    let nobody = Portal::new("/nowhere/at/all", "add", 1);
    assert!(matches!(nobody.call(b"", 0), Err(FreshCallError::Unreachable(_))));
    assert_eq!(
        portal("slow").within(Duration::from_millis(20)).call(&[200], 8),
        Err(FreshCallError::Deadline)
    );
    assert_eq!(add.call(b"abc", 3).unwrap(), b"bcd", "the connection serves on");
}

#[test]
fn a_thread_calls_another_process_and_each_failure_has_its_name() {
    holds(calls_of_all_kinds());
}

#[peregrine::test(program, nodes = 2)]
fn typed() {
    let path = std::env::var(WHERE).unwrap();
    let kitchen = KitchenClient::by(|name, version| Portal::new(&path, name, version));
    let mut bowl = vec!["flour".to_owned()];
    assert_eq!(kitchen.add("eggs", &mut bowl), Ok(2));
    assert_eq!(kitchen.add("milk", &mut bowl), Err(Error::Callee(Overfull { by: 1 })));
    assert_eq!(bowl, ["flour", "eggs"], "a failed call changes nothing");
    let mut heaviest = 0;
    let grams = vec![3u32; 100_000];
    assert_eq!(kitchen.weigh(&grams, &mut heaviest), Ok(300_000));
    assert_eq!(heaviest, 3);
    let mut bytes = b"abc".to_vec();
    kitchen.reverse(&mut bytes).unwrap();
    assert_eq!(bytes, b"cba");
    // The identity is the thread's, wherever it runs; the deadline goes along.
    let (mine, depth, timed) = kitchen.link().unwrap();
    assert_eq!((depth, timed), (1, false));
    peregrine::migrate_to(1 - node_id()).unwrap();
    let soon = kitchen.clone().within(Duration::from_secs(60));
    assert_eq!(soon.link(), Ok((mine.clone(), 1, true)));
    let others = spawn(
        |path: String| KitchenClient::by(|name, version| Portal::new(&path, name, version)).link().unwrap().0,
        path,
    );
    assert_ne!(others.join().unwrap(), mine, "another thread is another chain");
    let late = kitchen.within(Duration::ZERO).link();
    assert_eq!(late, Err(Error::Call(FreshCallError::Deadline)));
}

#[test]
fn typed_calls_go_through_a_portal_with_identity_and_deadline() {
    holds(typed());
}

#[peregrine::test(program, nodes = 2, move_every_ms = 5)]
fn charged() {
    let spent = || peregrine_call::usage::charges().iter().map(|row| row.1).sum::<u64>();
    let charge = Attributes { charge: true, ..Attributes::default() };
    assert_eq!(spent(), 0);
    let cook = kitchen();
    let (mut burnt, mut free) = (0, 0);
    for round in 0..6 {
        free += cook.cook().unwrap();
        let mut out = Vec::new();
        portal("burn").invoke(Call::new().output(&mut out, 8).attributes(charge)).unwrap();
        burnt += u64::from_ne_bytes(out.try_into().unwrap());
        if round % 2 == 0 {
            peregrine::migrate_to(1 - node_id()).unwrap();
        }
    }
    let charged = spent();
    // What the handler measured of itself, and what is around it; and nothing of the calls that were not charged.
    assert!(charged >= burnt && charged < burnt + free, "{charged} charged, {burnt} and {free} used");
    let others = spawn(|_: ()| peregrine_call::usage::charges().len(), ());
    assert_eq!(others.join().unwrap(), 0, "the account is the thread's");
}

#[test]
fn processor_time_is_charged_to_the_thread_wherever_it_runs() {
    holds(charged());
}

#[peregrine::test(program, nodes = 1)]
fn works_meanwhile() {
    portal("slow").call(&[0], 8).unwrap();
    let (tx, rx) = channel::<u64>();
    let worker = Builder::new()
        .spawn(
            |tx: peregrine::Sender<u64>| {
                let mut n = 0u64;
                while n < TURNS {
                    n += 1;
                    yield_now();
                }
                tx.send(&n).unwrap();
                // The call above returns when this one has been made.
                portal("open").call(b"", 8).unwrap();
                n
            },
            tx,
        )
        .unwrap();
    // Until the worker has come to its end, on the only node there is.
    portal("gate").call(b"", 8).unwrap();
    assert_eq!((rx.recv().unwrap(), worker.join().unwrap()), (TURNS, TURNS));
    // A message from elsewhere than a call wakes the node as well: a sleeper's timer.
    let sleeper = spawn(
        |_: ()| {
            sleep(Duration::from_millis(30));
            portal("open").call(b"", 8).unwrap();
        },
        (),
    );
    portal("gate").call(b"", 8).unwrap();
    sleeper.join().unwrap();
}

#[test]
fn a_node_runs_its_other_threads_while_one_calls() {
    holds(works_meanwhile());
}

#[peregrine::test(program, nodes = 2, move_every_ms = 2)]
fn many_at_once() {
    let callers: Vec<_> = (0..40u32)
        .map(|i| {
            spawn(
                |i: u32| {
                    let slow = portal("slow");
                    for _ in 0..3 {
                        slow.call(&[40], 8).unwrap();
                    }
                    let back = portal("add").call(&i.to_ne_bytes(), 4).unwrap();
                    (back, node_id())
                },
                i,
            )
        })
        .collect();
    for (i, caller) in callers.into_iter().enumerate() {
        let (back, _) = caller.join().unwrap();
        let expected: Vec<u8> = (i as u32).to_ne_bytes().iter().map(|b| b.wrapping_add(1)).collect();
        assert_eq!(back, expected);
    }
    // Which of them were under way at once, the domain has counted.
    let most = portal("most").call(b"", 8).unwrap();
    assert!(most[0] > 1, "{most:?} calls at once");
}

#[test]
fn many_threads_of_a_node_call_at_once_and_may_be_moved_meanwhile() {
    holds(many_at_once());
}

#[test]
fn outside_a_world_a_portal_is_refused() {
    assert_eq!(Portal::new("/any", "add", 1).call(b"", 0), Err(FreshCallError::NoThread));
    assert_eq!(Loan::new("/any", 1).map(drop), Err(FreshCallError::NoThread));
}
