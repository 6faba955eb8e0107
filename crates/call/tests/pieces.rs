//! Large arguments between cores: the domain copies one piece while the caller writes the next, and nobody depends on that a next one comes.

use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_call::{Affinity, Attributes, Call, Client, DomainBuilder, Failure, Invocation, step};
use peregrine_sys::other::{self, Condition};
use peregrine_sys::process::{self, ChildEnd, CpuSet, ForkFlags, Forked};
use peregrine_sys::signal::{self, number};
use std::path::Path;
use std::time::{Duration, Instant};
use testkit::Rng;

mod scene;
use scene::{Served, serve};

const LONG: Duration = Duration::from_secs(30);

fn portals(d: DomainBuilder) -> DomainBuilder {
    d.portal("echo", 1, |call: &mut Invocation<'_>| {
        let bytes = call.input(0)?;
        call.output(1)?.extend_from_slice(bytes);
        Ok(())
    })
    // All of what goes in, by kind: an `in`, an `inout` that comes back reversed, and bytes that are lent.
    .portal("mix", 1, |call: &mut Invocation<'_>| {
        call.inout(1)?.reverse();
        let mut all = call.input(0)?.to_vec();
        all.extend(call.lent(2)?.to_vec());
        call.output(3)?.extend_from_slice(&all);
        Ok(())
    })
    .portal("fail", 1, |call: &mut Invocation<'_>| {
        Err(Failure::new(call.input(0)?.iter().map(|&b| u32::from(b)).sum(), ""))
    })
}

fn apart() -> Attributes {
    Attributes { affinity: Affinity::Apart, ..Attributes::default() }
}

fn echo(client: &Client, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let portal = client.portal("echo", 1).unwrap();
    client.call(portal, Call::new().attributes(apart()).input(bytes).output(&mut out, 8 << 20)).unwrap();
    out
}

fn has_two_cores() -> bool {
    CpuSet::current().is_ok_and(|cpus| cpus.iter().count() > 1)
}

/// Pieces that this process has written.
static WRITTEN: AtomicU64 = AtomicU64::new(0);

fn what_arrives_in_pieces_is_what_was_sent() -> testkit::Outcome {
    if !has_two_cores() {
        testkit::skip!("needs two processors");
    }
    let served = serve(|d| portals(d.activations(2)));
    step::watch(|step| {
        // Now and then the domain is faster.
        if step == "client: piece written" && WRITTEN.fetch_add(1, Ordering::Relaxed).is_multiple_of(5) {
            std::thread::sleep(Duration::from_micros(300));
        }
    });
    let client = served.connect();
    let mut rng = Rng::new(35);
    let (mix, fail) = (client.portal("mix", 1).unwrap(), client.portal("fail", 1).unwrap());
    let mut random = |len: usize| (0..len).map(|_| rng.next_u64() as u8).collect::<Vec<u8>>();
    for len in [5, 131_071, 131_072, 131_073, 1 << 20, 300_001, (1 << 20) + 3, 200_000, 5_000_000, 131_072] {
        for _ in 0..5 {
            let bytes = random(len);
            assert!(echo(&client, &bytes) == bytes, "{len} bytes");
        }
    }
    for lens in [[1, 400_000, 7], [200_000, 0, 200_001], [32_768, 32_769, 98_303], [0, 0, 150_000]] {
        for _ in 0..5 {
            let [a, mut b, c] = lens.map(&mut random);
            let (mut expected, mut all) = (b.clone(), Vec::new());
            expected.reverse();
            let call = Call::new().attributes(apart()).input(&a).inout(&mut b, 1 << 20).lend(&c[..]);
            client.call(mix, call.output(&mut all, 1 << 20)).unwrap();
            assert!(b == expected && all == [a, c].concat(), "{lens:?}");
        }
    }
    let bytes = random(1 << 20);
    let outcome = client.call(fail, Call::new().attributes(apart()).input(&bytes));
    let sum = bytes.iter().map(|&b| u32::from(b)).sum();
    assert_eq!(outcome, Err(peregrine_call::CallError::Callee(Failure::new(sum, ""))));
    assert!(WRITTEN.load(Ordering::Relaxed) > 500, "calls did go in pieces");
    testkit::Outcome::Passed
}

/// A process that calls, and is stopped when it has written a piece.
fn stops_in_the_middle(path: &Path) -> i32 {
    // SAFETY: this process has one thread.
    match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
        Forked::Parent(pid) => pid,
        Forked::Child => {
            process::die_with_parent();
            step::watch(|step| {
                if step == "client: piece written" && WRITTEN.fetch_add(1, Ordering::Relaxed) == 0 {
                    let _ = signal::kill(process::pid(), number::STOP);
                }
            });
            let client = Client::connect(path).unwrap();
            let bytes: Vec<u8> = (0..1 << 20).map(|i: u32| ((i * 7) >> 3) as u8).collect();
            // The first call of a line does not know where its activation is.
            let is_well =
                (0..3).all(|_| echo(&client, b"small") == b"small" && echo(&client, &bytes) == bytes);
            process::exit_now(i32::from(!is_well || WRITTEN.load(Ordering::Relaxed) == 0));
        }
    }
}

fn until_stopped(pid: i32) {
    let begun = Instant::now();
    while other::stat(pid as u32).is_some_and(|stat| stat.condition != Condition::Stopped) {
        assert!(begun.elapsed() < LONG, "it never stops in the middle of a call");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The one activation there is waits for what the stopped one writes, and is everybody else's meanwhile.
fn serves_another(served: &Served) {
    let begun = Instant::now();
    let client = served.connect();
    for i in 0..20u8 {
        assert_eq!(echo(&client, &[i; 100]), [i; 100]);
    }
    assert!(begun.elapsed() < LONG, "others had to wait: {:?}", begun.elapsed());
}

fn a_caller_that_stops_in_the_middle_holds_up_nobody_and_loses_nothing() -> testkit::Outcome {
    if !has_two_cores() {
        testkit::skip!("needs two processors");
    }
    let served = serve(|d| portals(d.activations(1)));
    let pid = stops_in_the_middle(&served.path());
    until_stopped(pid);
    serves_another(&served);
    // Let it wait asleep, with nobody else about.
    std::thread::sleep(Duration::from_millis(50));
    let before = served.cpu_ns();
    std::thread::sleep(Duration::from_millis(400));
    let used = Duration::from_nanos(served.cpu_ns() - before);
    assert!(used < Duration::from_millis(60), "it waits awake: {used:?} of 400 ms");
    serves_another(&served);
    signal::kill(pid, number::CONT).unwrap();
    assert_eq!(process::wait_for(pid), Ok(ChildEnd::Exited(0)), "its own call is done rightly");
    testkit::Outcome::Passed
}

fn a_caller_killed_in_the_middle_leaves_the_activation_to_others() -> testkit::Outcome {
    if !has_two_cores() {
        testkit::skip!("needs two processors");
    }
    let served = serve(|d| portals(d.activations(1)));
    for _ in 0..3 {
        let pid = stops_in_the_middle(&served.path());
        until_stopped(pid);
        scene::kill(pid);
        // Nobody else wants the activation, and it lets go all the same.
        let begun = Instant::now();
        while served.holdings().1 > 0 {
            assert!(begun.elapsed() < LONG, "it holds what was the dead one's");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!served.has_ended());
    }
    serves_another(&served);
    testkit::Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        what_arrives_in_pieces_is_what_was_sent,
        a_caller_that_stops_in_the_middle_holds_up_nobody_and_loses_nothing,
        a_caller_killed_in_the_middle_leaves_the_activation_to_others,
    ])
}
