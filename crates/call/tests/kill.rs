//! Kill -9 before every step of a call that the other side can see, on either side, and look at what the other side makes of it.
//!
//! A first run counts the steps; then the same scenario runs once for each step, with one process killed there. The oracle for
//! a dead domain: each call returned its right result or, from some call on, `DomainDied` (or the connection's `Unreachable`),
//! within a second, and the client holds nothing of it afterwards. For a dead client: the domain serves another client rightly, and holds
//! what it held before: descriptors, mappings, threads, lines, running calls.

use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_call::{
    Affinity, Attributes, Call, CallError, Client, Deadline, DomainBuilder, Failure, Gift, Invocation,
    Limits, step,
};
use peregrine_sys::process::{self, ForkFlags, Forked};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

mod scene;
use scene::{Served, serve_with};

fn portals(d: DomainBuilder) -> DomainBuilder {
    d.activations(2)
        .limits(Limits { argument_stack_bytes: 16 * 1024, ..Limits::default() })
        .portal("echo", 1, |call: &mut Invocation<'_>| {
            let bytes = call.input(0)?;
            call.output(1)?.extend_from_slice(bytes);
            Ok(())
        })
        .portal("total", 1, |call: &mut Invocation<'_>| {
            let sum: u64 = call.lent(0)?.to_vec().iter().map(|&b| u64::from(b)).sum();
            call.output(1)?.extend_from_slice(&sum.to_ne_bytes());
            Ok(())
        })
        .portal("sum", 1, |call: &mut Invocation<'_>| {
            let sum: u64 = call.lent(0)?.to_vec().iter().map(|&b| u64::from(b)).sum();
            let given: u64 = call.take_given(1)?.iter().map(|&b| u64::from(b)).sum();
            call.output(2)?.extend_from_slice(&(sum + given).to_ne_bytes());
            Err(Failure::new(sum as u32, *b"all the same"))
        })
}

/// Dies before its `at`-th step from now on; counts them.
fn die_at(at: u64) -> Arc<AtomicU64> {
    let steps = Arc::new(AtomicU64::new(0));
    let counted = steps.clone();
    step::watch(move |_| {
        // Relaxed: only the number counts.
        if counted.fetch_add(1, Ordering::Relaxed) == at {
            let me = peregrine_sys::rustix::process::getpid();
            let _ = peregrine_sys::rustix::process::kill_process(
                me,
                peregrine_sys::rustix::process::Signal::KILL,
            );
            loop {
                std::thread::park();
            }
        }
    });
    steps
}

/// A bit of everything: connect, resolve, a small call, one that spills, one with results elsewhere, lend and give, a pending
/// call, a call given up. Stops at the first error.
fn scenario(path: &Path) -> Result<(), CallError> {
    let client = Client::connect(path)?;
    let (echo, sum, total) =
        (client.portal("echo", 1)?, client.portal("sum", 1)?, client.portal("total", 1)?);
    let bound = Deadline::after(Duration::from_secs(8));
    for len in [0usize, 64, 3000, 30_000, 15_900] {
        let bytes: Vec<u8> = (0..len).map(|i| (i * 13 + len) as u8).collect();
        let mut out = b"before".to_vec();
        let outcome = client.call(echo, Call::new().input(&bytes).output(&mut out, 1 << 20).deadline(bound));
        if outcome.is_err() {
            assert_eq!(out, b"before", "results change on success only");
        }
        outcome?;
        assert!(out == bytes, "{len} bytes");
    }
    // The short form: on this core, and apart, where each that follows one answered at once goes the shortest way.
    for affinity in [Affinity::Together, Affinity::Apart] {
        let attributes = Attributes { affinity, ..Attributes::default() };
        for len in [8usize, 40, 64, 3000, 16, 0] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 11 + len) as u8).collect();
            let mut out = b"before".to_vec();
            let outcome =
                client.call(echo, Call::new().attributes(attributes).input(&bytes).output(&mut out, 4096));
            if outcome.is_err() {
                assert_eq!(out, b"before", "results change on success only");
            }
            outcome?;
            assert!(out == bytes, "{len} bytes, {affinity:?}");
        }
    }
    // In pieces.
    for len in [140_000usize, 150_000] {
        let bytes: Vec<u8> = (0..len).map(|i| (i * 5 + len) as u8).collect();
        let attributes = Attributes { affinity: Affinity::Apart, ..Attributes::default() };
        let mut out = Vec::new();
        client.call(echo, Call::new().attributes(attributes).input(&bytes).output(&mut out, 1 << 20))?;
        assert!(out == bytes, "{len} bytes");
    }
    let buffer = client.buffer(5000)?;
    buffer.write(0, &[1; 5000])?;
    for _ in 0..3 {
        let mut out = Vec::new();
        let attributes = Attributes { affinity: Affinity::Apart, ..Attributes::default() };
        client.call(total, Call::new().attributes(attributes).lend(&buffer).output(&mut out, 8))?;
        assert_eq!(out, 5000u64.to_ne_bytes());
    }
    let mut gift = Gift::new(100)?;
    gift.fill(2);
    let mut out = Vec::new();
    let outcome = client.call(sum, Call::new().lend(&buffer).give(gift).output(&mut out, 8).deadline(bound));
    match outcome {
        Err(CallError::Callee(failure)) => assert_eq!(failure, Failure::new(5000, *b"all the same")),
        other => return other.map(|()| unreachable!("it always fails")),
    }
    let pending = client.start(echo, Call::new().input(b"later").output(&mut out, 8).deadline(bound))?;
    let _descriptor = pending.as_fd();
    pending.wait()?;
    assert_eq!(out, b"later");
    drop(client.start(echo, Call::new().input(b"never mind").output(&mut out, 16).deadline(bound))?);
    client.usage()?;
    Ok(())
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|l| l.contains("peregrine-")).count()
}

fn a_domain_killed_at_any_step_is_an_error_in_time_and_leaves_nothing_behind() -> testkit::Outcome {
    let mut at = 0;
    let mut killed = 0;
    loop {
        let dir = tempfile::tempdir().unwrap();
        let count_path = dir.path().join("steps");
        let told = count_path.clone();
        // The watcher counts from the first connection of this test's scenario on: `serve_with` looks whether the domain is
        // up by connecting, so that is a few steps earlier, which does no harm.
        let served = serve_with(portals, move |_| {
            let steps = die_at(at);
            std::thread::spawn(move || {
                loop {
                    std::fs::write(&told, steps.load(Ordering::Relaxed).to_string()).unwrap();
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
        });
        let before = (descriptors(), mappings());
        let begun = Instant::now();
        let outcome = scenario(&served.path());
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(20), "step {at}: {took:?}");
        // The first long call of this process makes the set of descriptors by which domains are watched, which stays; and the thread
        // that watches may hold the connection a moment longer than we.
        let watch = (before.0 + 1, before.1);
        loop {
            let after = (descriptors(), mappings());
            if after == before || after == watch {
                break;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(40),
                "step {at}: something is left: {before:?} became {after:?}"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        match outcome {
            Ok(()) => {
                // Whether it died after our last call or the steps are exhausted.
                std::thread::sleep(Duration::from_millis(5));
                let steps: u64 = std::fs::read_to_string(&count_path).unwrap().parse().unwrap_or(0);
                if steps <= at {
                    println!("{killed} steps of the domain, killed at each");
                    assert!(killed > 40, "the scenario reaches many steps: {killed}");
                    return testkit::Outcome::Passed;
                }
            }
            Err(CallError::DomainDied | CallError::Unreachable { .. }) => {}
            Err(other) => panic!("step {at}: {other:?}"),
        }
        killed += 1;
        at += 1;
    }
}

fn a_client_killed_at_any_step_costs_the_domain_nothing() -> testkit::Outcome {
    let served = serve_with(portals, |_| {});
    let control = served.connect();
    let echo = control.portal("echo", 1).unwrap();
    let mut out = Vec::new();
    control.call(echo, Call::new().input(b"first").output(&mut out, 16)).unwrap();
    let before = settled(&served, |_| true);
    let mut at = 0;
    loop {
        // SAFETY: this process has one thread.
        let pid = match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
            Forked::Child => {
                process::die_with_parent();
                die_at(at);
                let code = match scenario(&served.path()) {
                    Ok(()) => 0,
                    Err(e) => {
                        eprintln!("client: {e}");
                        1
                    }
                };
                process::exit_now(code);
            }
            Forked::Parent(pid) => pid,
        };
        let status = peregrine_sys::rustix::process::waitpid(
            peregrine_sys::rustix::process::Pid::from_raw(pid),
            peregrine_sys::rustix::process::WaitOptions::empty(),
        );
        let status = status.unwrap().unwrap().1;
        out.clear();
        let bytes = (at as u32).to_ne_bytes();
        let soon = Deadline::after(Duration::from_secs(20));
        control.call(echo, Call::new().input(&bytes).output(&mut out, 16).deadline(soon)).unwrap();
        assert_eq!(out, bytes, "step {at}");
        let after = settled(&served, |now| *now == before);
        assert_eq!(after, before, "step {at}: the domain keeps something of a client that died");
        match status.exit_status() {
            Some(0) => break,
            Some(code) => panic!("step {at}: exit {code}"),
            None => assert_eq!(status.terminating_signal(), Some(9)),
        }
        at += 1;
    }
    println!("{at} steps of the client, killed at each");
    assert!(at > 30, "{at}");
    testkit::Outcome::Passed
}

/// What the domain holds, once it is `enough`, or after a time that is long for any machine.
fn settled(served: &Served, enough: impl Fn(&(usize, usize, usize)) -> bool) -> (usize, usize, usize) {
    let begun = Instant::now();
    loop {
        let now = served.holdings();
        if enough(&now) || begun.elapsed() > Duration::from_secs(20) {
            return now;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A → B → C → A: this process is A, its home and the last link; B and C are others. One of them dies at each of its steps.
fn a_link_of_a_chain_killed_at_any_step_is_the_error_of_the_link_below() -> testkit::Outcome {
    const DIED: u32 = 41;
    for victim in ["B", "C"] {
        let mut at = 0;
        let mut ended_well = 0;
        loop {
            let dir = tempfile::tempdir().unwrap();
            let (a_path, reached) = (dir.path().join("a"), dir.path().join("steps"));
            let link = |name: &'static str, next: std::path::PathBuf, portal: &'static str| {
                let told = reached.clone();
                serve_with(
                    move |d| {
                        let client = Mutex::new(None::<Client>);
                        d.name(name).activations(2).portal("pass", 1, move |call: &mut Invocation<'_>| {
                            let to_failure = |e: CallError| match e {
                                CallError::Callee(f) => f,
                                CallError::DomainDied | CallError::Unreachable { .. } => {
                                    Failure::new(DIED, name)
                                }
                                e => Failure::new(1, e.to_string()),
                            };
                            let mut client = client.lock().unwrap();
                            if client.is_none() {
                                *client = Some(Client::connect(&next).map_err(to_failure)?);
                            }
                            let client = client.as_ref().unwrap();
                            let pass = client.portal(portal, 1).map_err(to_failure)?;
                            let mut out = call.output(1)?;
                            client
                                .call(pass, Call::new().input(call.input(0)?).output(&mut out, 64))
                                .map_err(to_failure)
                        })
                    },
                    move |_| {
                        if name == victim {
                            let steps = die_at(at);
                            std::thread::spawn(move || {
                                loop {
                                    std::fs::write(&told, steps.load(Ordering::Relaxed).to_string()).unwrap();
                                    std::thread::sleep(Duration::from_millis(1));
                                }
                            });
                        }
                    },
                )
            };
            let c = link("C", a_path.clone(), "home");
            let b = link("B", c.path(), "pass");
            let domain = peregrine_call::Domain::builder()
                .activations(2)
                .portal("home", 1, |call: &mut Invocation<'_>| {
                    let bytes = call.input(0)?;
                    call.output(1)?.extend(bytes.iter().rev());
                    Ok(())
                })
                .serve(&a_path)
                .unwrap();
            let begun = Instant::now();
            let outcome = (|| {
                let client = Client::connect(b.path())?;
                let pass = client.portal("pass", 1)?;
                for _ in 0..2 {
                    let mut out = Vec::new();
                    client.call(pass, Call::new().input(b"abc").output(&mut out, 64))?;
                    assert_eq!(out, b"cba");
                }
                Ok(())
            })();
            assert!(begun.elapsed() < Duration::from_secs(20), "{victim} at {at}: {:?}", begun.elapsed());
            match (victim, &outcome) {
                (_, Ok(())) => {}
                ("B", Err(CallError::DomainDied | CallError::Unreachable { .. })) => {}
                ("C", Err(CallError::Callee(f))) if f.code == DIED && f.detail == b"B" => {}
                other => panic!("{victim} at {at}: {other:?}"),
            }
            if victim == "C" && outcome.is_err() {
                // B lives, and says the same again: its own error, at its level.
                let client = b.connect();
                let again = client.call(
                    client.portal("pass", 1).unwrap(),
                    Call::new().input(b"x").output(&mut Vec::new(), 64),
                );
                assert!(matches!(&again, Err(CallError::Callee(f)) if f.code == DIED), "{again:?}");
            }
            // A's own activations are all back.
            let begun = Instant::now();
            while domain.stats().running > 0 {
                assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", domain.stats());
                std::thread::sleep(Duration::from_millis(1));
            }
            domain.shutdown();
            std::thread::sleep(Duration::from_millis(2));
            let steps: u64 = std::fs::read_to_string(&reached).unwrap_or_default().parse().unwrap_or(0);
            if outcome.is_ok() {
                ended_well += 1;
                if steps <= at || ended_well > 20 {
                    break;
                }
            }
            at += 1;
        }
        println!("{victim} killed at each of {at} steps");
        assert!(at > 15, "{at}");
    }
    testkit::Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        a_domain_killed_at_any_step_is_an_error_in_time_and_leaves_nothing_behind,
        a_client_killed_at_any_step_costs_the_domain_nothing,
        a_link_of_a_chain_killed_at_any_step_is_the_error_of_the_link_below,
    ])
}
