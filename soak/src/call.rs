//! Calls under attack and under fire: hostile clients, hostile domains, and domains killed at random moments beneath many
//! callers; then ten thousand idle clients of one domain.

// The very code that the tests run, so that the two can't differ.
#[path = "../../crates/call/tests/attack/mod.rs"]
mod attack;

use attack::scene::serve;
use peregrine_call::{Call, CallError, Client, Deadline, Invocation, Limits};
use std::time::{Duration, Instant};
use testkit::Rng;

/// Runs until the time is up; panics at the first broken promise.
pub fn run(seed: u64, seconds: u64) {
    println!("seed {seed}, {seconds} s");
    let mut rng = Rng::new(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut rounds = 0;
    while Instant::now() < end {
        attack::client::fuzz(rng.next_u64(), 4, 20_000);
        attack::domain::fuzz(rng.next_u64(), Duration::from_secs(10));
        let survived = under_fire(&mut rng, 10);
        rounds += 1;
        println!("round {rounds}: {survived} calls around ten deaths");
    }
    idle(10_000);
}

/// Four threads call a domain that is killed at a random moment, `deaths` times; the number of right answers.
fn under_fire(rng: &mut Rng, deaths: usize) -> u64 {
    let mut answered = 0;
    for death in 0..deaths {
        let served = serve(|d| {
            d.activations(3).portal("echo", 1, |call: &mut Invocation<'_>| {
                let bytes = call.input(0)?;
                call.output(1)?.extend_from_slice(bytes);
                Ok(())
            })
        });
        let patience = Duration::from_micros(rng.next_u64() % 30_000);
        let client = served.connect();
        answered += std::thread::scope(|scope| {
            let callers: Vec<_> = (0..4usize)
                .map(|t| {
                    let client = client.clone();
                    scope.spawn(move || until_death(&client, t))
                })
                .collect();
            std::thread::sleep(patience);
            served.kill();
            let killed = Instant::now();
            let answers: u64 = callers.into_iter().map(|c| c.join().expect("a broken promise")).sum();
            assert!(killed.elapsed() < Duration::from_secs(2), "death {death} took {:?}", killed.elapsed());
            answers
        });
    }
    answered
}

fn until_death(client: &Client, thread: usize) -> u64 {
    let mut answered = 0;
    loop {
        let outcome = client.portal("echo", 1).and_then(|echo| {
            let bytes = vec![thread as u8; (answered as usize * 131) % 40_000];
            let mut out = Vec::new();
            let soon = Deadline::after(Duration::from_secs(5));
            client.call(echo, Call::new().input(&bytes).output(&mut out, 40_000).deadline(soon))?;
            assert!(out == bytes, "a wrong answer");
            Ok(())
        });
        match outcome {
            Ok(()) => answered += 1,
            Err(CallError::DomainDied) => return answered,
            Err(e) => panic!("not the error of a death: {e:?}"),
        }
    }
}

fn idle(many: usize) {
    // Each has a socket and a descriptor of the domain's process.
    let allowed =
        |clients: usize| peregrine_sys::process::raise_descriptor_limit(2 * clients as u64 + 100).is_ok();
    let Some(many) = (1..=10).rev().map(|tenths| many / 10 * tenths).find(|&n| allowed(n)) else {
        println!(
            "skipped: not even {} idle clients have descriptors enough in a process (ulimit -Hn)",
            many / 10
        );
        return;
    };
    let served = serve(|d| {
        d.limits(Limits { clients: 1 << 20, ..Limits::default() }).portal(
            "null",
            1,
            |_: &mut Invocation<'_>| Ok(()),
        )
    });
    let before = served.resident_bytes();
    let clients: Vec<_> = (0..many).map(|_| served.connect()).collect();
    let connected = served.resident_bytes();
    for client in &clients {
        let null = client.portal("null", 1).expect("it is there");
        client.call(null, Call::new()).expect("it is served");
    }
    let called = served.resident_bytes();
    println!(
        "{many} clients: {} bytes each in the domain once connected, {} once each has called; {} threads",
        (connected - before) / many,
        (called - before) / many,
        served.holdings().2
    );
}
