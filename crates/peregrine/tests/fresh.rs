//! Fresh calls of Peregrine threads: into another process, on a stack of that process's choice, while the caller's node runs others.
//!
//! The domain is the test's own process; the World is its child.

#![allow(missing_docs)]

use peregrine::testing::Program;
use peregrine::{
    Builder, FreshCallError, Loan, Portal, TrustedDomain, channel, checkpoint, node_id, sleep, spawn, tally,
    yield_now,
};
use peregrine_call::interface::Error;
use peregrine_call::{Attributes, Call, Domain, Failure, Gift, Given, Invocation, LentSlice};
use std::process::id;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

const WHERE: &str = "PEREGRINE_TEST_DOMAIN";

/// Slow calls that the domain executes, and the most of them that it did.
static SLOW: Mutex<(u8, u8)> = Mutex::new((0, 0));

/// Turns of a thread that does nothing else.
const TURNS: u64 = 1000;

/// Whether `open` was called since `gate` returned last.
static OPENED: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

fn portal(name: &str) -> Portal {
    Portal::new(std::env::var(WHERE).unwrap(), name, 1)
}

#[derive(serde::Serialize, serde::Deserialize, Debug, PartialEq)]
pub struct Overfull {
    pub by: usize,
}

/// What the typed calls go through.
#[peregrine_call::interface]
pub trait Kitchen {
    fn add(&self, what: &str, #[inout] bowl: &mut Vec<String>) -> Result<usize, Overfull>;
    fn weigh(&self, #[lend] grams: LentSlice<'_, u32>, #[out] heaviest: &mut u32) -> u32;
    fn reverse(&self, #[inout(bytes = 100)] bytes: &mut Vec<u8>);
    /// Bytes and their sum; waits for so many ms first.
    fn eat(&self, #[give] meal: Given, ms: u64) -> (u64, u64);
    /// Uses the processor for a while; how long, by the kernel's clock of this thread, in ns.
    fn cook(&self) -> u64;
    /// The chain that the call belongs to, its depth, and whether it has a deadline.
    fn link(&self, #[context] call: &Invocation<'_>) -> (String, u32, bool);
}

struct Cook;

impl Kitchen for Cook {
    fn add(&self, what: &str, bowl: &mut Vec<String>) -> Result<usize, Overfull> {
        bowl.push(what.to_owned());
        if bowl.len() > 2 { Err(Overfull { by: bowl.len() - 2 }) } else { Ok(bowl.len()) }
    }

    fn weigh(&self, grams: LentSlice<'_, u32>, heaviest: &mut u32) -> u32 {
        *heaviest = grams.iter().max().unwrap_or(0);
        grams.iter().sum()
    }

    fn reverse(&self, bytes: &mut Vec<u8>) {
        bytes.reverse();
    }

    fn eat(&self, meal: Given, ms: u64) -> (u64, u64) {
        std::thread::sleep(Duration::from_millis(ms));
        (meal.len() as u64, meal.iter().map(|&b| u64::from(b)).sum())
    }

    fn cook(&self) -> u64 {
        let now = peregrine_sys::timer::thread_cpu_ns;
        let begun = now();
        while now() - begun < 20_000_000 {
            std::hint::spin_loop();
        }
        now() - begun
    }

    fn link(&self, call: &Invocation<'_>) -> (String, u32, bool) {
        (format!("{:?}", call.link().chain), call.link().depth, call.deadline().is_some())
    }
}

/// Runs the program with a domain in this process.
fn with_domain(program: Program) -> (peregrine::testing::Outcome, Domain) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("domain");
    let domain = Domain::builder()
        .activations(64)
        .limits(peregrine_call::Limits {
            activations_per_client: 64,
            // Less than what is lent in place.
            argument_bytes: 2 << 20,
            ..Default::default()
        })
        .portal("add", 1, |call: &mut Invocation<'_>| {
            let bytes: Vec<u8> = call.input(0)?.iter().map(|b| b.wrapping_add(1)).collect();
            *call.output(1)? = bytes;
            Ok(())
        })
        .portal("joins", 1, |call: &mut Invocation<'_>| {
            let mut joined = call.input(0)?.to_vec();
            (1..4).try_for_each(|index| {
                call.lent(index)?.append_to(&mut joined);
                Ok::<(), Failure>(())
            })?;
            *call.output(4)? = joined;
            Ok(())
        })
        .portal("gate", 1, |_: &mut Invocation<'_>| {
            let opened = OPENED.0.lock().unwrap();
            *OPENED.1.wait_while(opened, |opened| !*opened).unwrap() = false;
            Ok(())
        })
        .portal("open", 1, |_: &mut Invocation<'_>| {
            *OPENED.0.lock().unwrap() = true;
            OPENED.1.notify_all();
            Ok(())
        })
        .portal("most", 1, |call: &mut Invocation<'_>| {
            call.output(1)?.push(SLOW.lock().unwrap().1);
            Ok(())
        })
        .portal("slow", 1, |call: &mut Invocation<'_>| {
            let ms = u64::from(call.input(0)?[0]);
            let enter = |(now, most): (u8, u8)| (now + 1, most.max(now + 1));
            let change = |how: &dyn Fn((u8, u8)) -> (u8, u8)| {
                let mut slow = SLOW.lock().unwrap();
                *slow = how(*slow);
            };
            change(&enter);
            std::thread::sleep(Duration::from_millis(ms));
            change(&|(now, most)| (now - 1, most));
            call.output(1)?.extend_from_slice(&std::process::id().to_ne_bytes());
            Ok(())
        })
        .portal("burn", 1, |call: &mut Invocation<'_>| {
            call.output(0)?.extend_from_slice(&Cook.cook().to_ne_bytes());
            Ok(())
        })
        .portal("fails", 1, |call: &mut Invocation<'_>| {
            let detail = call.input(0)?.to_vec();
            Err(Failure::new(7, detail))
        })
        .interface(KitchenPortal(Cook))
        .serve(&path)
        .unwrap();
    let outcome = program.run_with(&[(WHERE, path.to_str().unwrap())]);
    (outcome, domain)
}

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
    let (outcome, _) = with_domain(calls_of_all_kinds());
    assert!(outcome.success(), "{outcome}");
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
    let (outcome, _) = with_domain(typed());
    assert!(outcome.success(), "{outcome}");
}

fn kitchen() -> KitchenClient<Portal> {
    let path = std::env::var(WHERE).unwrap();
    KitchenClient::by(|name, version| Portal::new(&path, name, version))
}

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
    let (outcome, _) = with_domain(gives());
    assert!(outcome.success(), "{outcome}");
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
    let (outcome, _) = with_domain(gives_and_goes_back());
    assert!(outcome.success(), "{outcome}");
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
    let (outcome, _) = with_domain(lends());
    assert!(outcome.success(), "{outcome}");
}

#[peregrine::test(program, nodes = 2, image_interval_ms = 20)]
fn lends_and_goes_back() {
    let path = std::env::var(WHERE).unwrap();
    let lent = Loan::new(&path, 8).unwrap();
    lent.write(0, &7u64.to_ne_bytes()).unwrap();
    let helper = kills_node_1();
    assert_eq!(portal("slow").call(&[250], 8), Err(FreshCallError::RolledBack));
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
    let (outcome, _) = with_domain(lends_and_goes_back());
    assert!(outcome.success(), "{outcome}");
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
    let (outcome, _) = with_domain(charged());
    assert!(outcome.success(), "{outcome}");
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
    let (outcome, _) = with_domain(works_meanwhile());
    assert!(outcome.success(), "{outcome}");
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
    let (outcome, _) = with_domain(many_at_once());
    assert!(outcome.success(), "{outcome}");
}

/// A thread that takes an image while others call, and then kills its node, once.
fn kills_node_1() -> peregrine::JoinHandle<()> {
    Builder::new()
        .node(1)
        .spawn(
            |_: ()| {
                // Long enough for an image that holds the call below.
                sleep(Duration::from_millis(100));
                checkpoint();
                if tally().rollbacks == 0 {
                    let me = id() as i32;
                    peregrine_sys::signal::kill(me, peregrine_sys::signal::number::KILL).unwrap();
                    loop {
                        std::hint::spin_loop();
                    }
                }
            },
            (),
        )
        .unwrap()
}

#[peregrine::test(program, nodes = 2, image_interval_ms = 20)]
fn rolled_back() {
    let slow = portal("slow");
    slow.call(&[0], 8).unwrap();
    let helper = kills_node_1();
    let first = slow.call(&[250], 8);
    assert_eq!(first, Err(FreshCallError::RolledBack), "what became of it nobody here can know");
    assert_eq!(slow.call(&[1], 8).map(|b| b.len()), Ok(4), "the next call is as good as any");
    helper.join().unwrap();
    assert_eq!(tally().rollbacks, 1);
}

#[test]
fn a_caller_that_goes_back_into_a_call_is_told_so() {
    let (outcome, _) = with_domain(rolled_back());
    assert!(outcome.success(), "{outcome}");
}

#[peregrine::test(program, nodes = 2, kill_every_ms = 60, least_kills = 5, timeout_s = 60)]
fn under_fire() {
    let callers: Vec<_> = (0..6u8)
        .map(|i| {
            spawn(
                |i: u8| {
                    let add = portal("add");
                    let mut rolled_back = 0;
                    for n in 0..400u32 {
                        let bytes = [i, n as u8, (n >> 8) as u8];
                        match add.call(&bytes, 8) {
                            Ok(back) => assert_eq!(back, bytes.map(|b| b.wrapping_add(1))),
                            Err(FreshCallError::RolledBack) => rolled_back += 1,
                            Err(e) => panic!("{e}"),
                        }
                        if n % 20 == 0 {
                            sleep(Duration::from_millis(1));
                        }
                    }
                    rolled_back
                },
                i,
            )
        })
        .collect();
    let rolled_back: u32 = callers.into_iter().map(|c| c.join().unwrap()).sum();
    while tally().kills < 5 {
        sleep(Duration::from_millis(20));
    }
    println!("{rolled_back} calls of other lives");
}

#[test]
fn calls_go_on_though_nodes_are_killed_and_the_domain_is_left_with_no_dead_client() {
    let (outcome, domain) = with_domain(under_fire());
    assert!(outcome.success(), "{outcome}");
    let begun = Instant::now();
    while domain.stats().clients != 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", domain.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn outside_a_world_a_portal_is_refused() {
    assert_eq!(Portal::new("/any", "add", 1).call(b"", 0), Err(FreshCallError::NoThread));
    assert_eq!(Loan::new("/any", 1).map(drop), Err(FreshCallError::NoThread));
}
