//! Memory that is given, and memory that is lent in place.

use crate::domain::{Cook, KitchenPortal, WHERE, holds, kills_node_1, kitchen, portal};
use peregrine::{FreshCallError, Loan, Portal, TrustedDomain, node_id, sleep, spawn};
use peregrine_call::interface::Error;
use peregrine_call::{Call, Domain, Gift};
use std::time::{Duration, Instant};

#[peregrine::test(program, nodes = 2, move_every_ms = 5)]
fn gives() {
    for len in [1usize, 5000, 300_000] {
        let meal = vec![3u8; len];
        assert_eq!(kitchen().eat(&meal, 0), Ok((len as u64, 3 * len as u64)));
        peregrine::migrate_to(1 - node_id()).unwrap();
        // The same bytes, from another node, which moves the thread while the callee has them.
        assert_eq!(kitchen().eat(&meal, 20), Ok((len as u64, 3 * len as u64)));
        assert_eq!(meal, vec![3; len], "what was given was a copy");
    }
    let e = kitchen().eat(&[][..], 0).unwrap_err();
    assert!(matches!(e, Error::Call(FreshCallError::Other(_))), "no bytes are no gift: {e}");
    // More than the domain keeps for a client at once.
    for _ in 0..300 {
        kitchen().eat(&[1u8, 2][..], 0).unwrap();
    }
    // Gifts that are another kind of memory, and late ones.
    let gift = Gift::new(10).unwrap();
    assert!(matches!(portal("add").invoke(Call::new().give(gift)), Err(FreshCallError::Other(_))));
    let late = kitchen().within(Duration::from_millis(20)).eat(&[1u8][..], 200);
    assert_eq!(late, Err(Error::Call(FreshCallError::Deadline)));
}

#[test]
fn a_thread_gives_memory_wherever_it_runs() {
    holds(gives());
}

#[peregrine::test(program, nodes = 2, image_interval_ms = 20)]
fn gives_and_goes_back() {
    let meal = vec![7u8; 200_000];
    kitchen().eat(&meal, 0).unwrap();
    let helper = kills_node_1();
    let first = kitchen().eat(&meal, 250);
    assert_eq!(first, Err(Error::Call(FreshCallError::RolledBack)));
    assert_eq!(kitchen().eat(&meal, 0), Ok((200_000, 1_400_000)), "the bytes went back with the thread");
    helper.join().unwrap();
}

#[test]
fn a_thread_that_goes_back_while_it_gives_still_has_what_it_gave() {
    holds(gives_and_goes_back());
}

#[peregrine::test(program, nodes = 2, move_every_ms = 5)]
fn lends() {
    const CELLS: usize = 600_000;
    let path = std::env::var(WHERE).unwrap();
    let grams = Loan::new(&path, 4 * CELLS).unwrap();
    let mut heaviest = 0;
    assert_eq!(kitchen().weigh(&grams, &mut heaviest), Ok(0), "zeros at first");
    // Beyond what a call may bring by copying.
    let copied = kitchen().weigh(&vec![0u32; CELLS], &mut heaviest);
    assert!(matches!(copied, Err(Error::Call(FreshCallError::Other(_)))), "{copied:?}");
    let whole: Vec<u8> = (0..CELLS as u32).flat_map(|i| (i % 3).to_ne_bytes()).collect();
    grams.write(0, &whole).unwrap();
    let sum = (0..CELLS as u32).map(|i| i % 3).sum::<u32>();
    for round in 1..20u32 {
        peregrine::migrate_to(round % 2).unwrap();
        // A cell at a time, wherever the thread is; and the rest stays.
        grams.write(4 * round as usize * 3, &(100 * round).to_ne_bytes()).unwrap();
        let expected = sum + 100 * round * (round + 1) / 2;
        assert_eq!(kitchen().weigh(&grams, &mut heaviest), Ok(expected), "round {round}");
        assert_eq!(heaviest, 100 * round);
    }
    let mut back = [0; 8];
    grams.read(12, &mut back).unwrap();
    assert_eq!(back, [100, 0, 0, 0, 1, 0, 0, 0]);
    // Parts, more than one loan of one call, and bytes beside them.
    assert_eq!(kitchen().weigh(grams.part(12, 8).unwrap(), &mut heaviest), Ok(101));
    assert!(grams.part(4 * CELLS, 1).is_err() && grams.write(usize::MAX, &[1]).is_err());
    peregrine::migrate_to(1).unwrap();
    let other = Loan::new(&path, 5).unwrap();
    other.write(0, b"abcde").unwrap();
    let mut out = Vec::new();
    let call = Call::new().input(b"z").lend(&other).lend(grams.part(12, 1).unwrap()).lend(b"xy");
    portal("joins").invoke(call.output(&mut out, 64)).unwrap();
    assert_eq!(out, b"zabcdedxy");
    // What is dropped is given back: a client may have 256 at once.
    for len in 1..300 {
        Loan::new(&path, len).unwrap();
    }
    // Nobody else's: another domain's, a plain client's, a carried call's.
    let elsewhere = Portal::new("/nowhere/at/all", "any", 1).invoke(Call::new().lend(&other));
    assert!(matches!(elsewhere, Err(FreshCallError::Other(_))), "{elsewhere:?}");
    assert!(matches!(Loan::new("/nowhere/at/all", 5), Err(FreshCallError::Unreachable(_))));
    fn nothing() {}
    let trusted = TrustedDomain::open("trusted", nothing).unwrap();
    let (made, used) = trusted.run(|| (Loan::new(&path, 5).map(drop), other.write(0, b"x"))).unwrap();
    assert!(matches!((made, used), (Err(FreshCallError::Other(_)), Err(FreshCallError::Other(_)))));
    let others: Vec<_> = (0..40u32)
        .map(|i| {
            let lend = |(path, i): (String, u32)| {
                let own = Loan::new(path, 4000).unwrap();
                for n in 0..5 {
                    own.write(4 * n, &i.to_ne_bytes()).unwrap();
                    sleep(Duration::from_millis(1));
                }
                kitchen().weigh(&own, &mut 0).unwrap()
            };
            spawn(lend, (path.clone(), i))
        })
        .collect();
    for (i, other) in others.into_iter().enumerate() {
        assert_eq!(other.join().unwrap(), 5 * i as u32);
    }
}

#[test]
fn a_thread_lends_memory_in_place_call_after_call_wherever_it_runs() {
    holds(lends());
}

/// How many buffers of calls this node has mapped.
fn mapped() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("/memfd:peregrine-buffer")).count()
}

#[peregrine::test(program, nodes = 2, image_interval_ms = 20)]
fn lends_and_goes_back() {
    lends_on(0);
}

#[peregrine::test(program, nodes = 2, image_interval_ms = 20)]
fn lends_on_the_node_that_dies() {
    lends_on(1);
}

fn lends_on(node: u32) {
    peregrine::migrate_to(node).unwrap();
    let path = std::env::var(WHERE).unwrap();
    let lent = Loan::new(&path, 8).unwrap();
    lent.write(0, &7u64.to_ne_bytes()).unwrap();
    let helper = kills_node_1();
    assert_eq!(portal("slow").call(&[250], 8), Err(FreshCallError::RolledBack));
    assert_eq!((node_id(), mapped()), (node, 0), "a node that goes back keeps none");
    let lost = Err(FreshCallError::LoanLost);
    assert_eq!((lent.write(0, &[1]), lent.read(0, &mut [0])), (lost.clone(), lost.clone()));
    assert_eq!(kitchen().weigh(&lent, &mut 0), Err(Error::Call(FreshCallError::LoanLost)));
    let again = Loan::new(&path, 8).unwrap();
    again.write(0, &9u64.to_ne_bytes()).unwrap();
    assert_eq!(lent.write(0, &[1]), lost, "whatever number the new one has");
    drop(lent);
    assert_eq!(kitchen().weigh(&again, &mut 0), Ok(9));
    helper.join().unwrap();
}

#[test]
fn a_thread_that_goes_back_finds_nothing_in_place_of_what_it_lent() {
    holds(lends_and_goes_back());
    holds(lends_on_the_node_that_dies());
}

#[peregrine::test(program, nodes = 1)]
fn lends_to_a_successor() {
    let path = std::env::var(WHERE).unwrap();
    let lent = Loan::new(&path, 8).unwrap();
    assert_eq!(kitchen().weigh(&lent, &mut 0), Ok(0));
    std::fs::write(format!("{path}.end"), "").unwrap();
    let begun = Instant::now();
    loop {
        match kitchen().weigh(&lent, &mut 0) {
            Err(Error::Call(FreshCallError::LoanLost)) => break,
            // Until the old one has gone, and the new one is there.
            Ok(_) | Err(Error::Call(FreshCallError::DomainDied | FreshCallError::Unreachable(_))) => {}
            Err(Error::Call(FreshCallError::Terminated)) => {}
            other => panic!("{other:?}"),
        }
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
    let again = Loan::new(&path, 8).unwrap();
    again.write(0, &[5]).unwrap();
    assert_eq!(kitchen().weigh(&again, &mut 0), Ok(5));
}

#[test]
fn what_was_lent_to_a_domain_is_not_lent_to_its_successor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("domain");
    let served = path.clone();
    std::thread::spawn(move || {
        let domain = Domain::builder().interface(KitchenPortal(Cook)).serve(&served).unwrap();
        while !served.with_extension("end").exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        domain.shutdown();
        let _successor = Domain::builder().interface(KitchenPortal(Cook)).serve(&served).unwrap();
        loop {
            std::thread::park();
        }
    });
    while !path.exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let outcome = lends_to_a_successor().run_with(&[(WHERE, path.to_str().unwrap())]);
    assert!(outcome.success(), "{outcome}");
}
