//! Waiting on a shared core: who looks for a moment before it sleeps stops when that does not pay, and misses nothing by it.

use peregrine_call::{Affinity, Call, CallError, Deadline, DomainBuilder, Failure, Invocation};
use peregrine_sys::process::{self, CpuSet, ForkFlags, Forked};
use std::time::{Duration, Instant};

mod scene;
use scene::serve;

/// This thread on one core, where its calls' activations come to; the set that it had.
fn pin() -> CpuSet {
    let all = CpuSet::current().unwrap();
    process::pin_to_cpu(all.iter().last().unwrap()).unwrap();
    all
}

fn portals(d: DomainBuilder) -> DomainBuilder {
    d.activations(3)
        .portal("double", 1, |call: &mut Invocation<'_>| {
            let word = u64::from_ne_bytes(call.input(0)?.try_into().map_err(|_| Failure::new(1, *b""))?);
            call.output(1)?.extend_from_slice(&(word * 2).to_ne_bytes());
            Ok(())
        })
        .portal("burn", 1, |_: &mut Invocation<'_>| {
            // Until it is told, or whoever would tell it is gone.
            let begun = Instant::now();
            while burns().exists() && begun.elapsed() < Duration::from_secs(60) {}
            Ok(())
        })
}

/// While this file exists, `burn` goes on. The domain is forked from the test.
fn burns() -> std::path::PathBuf {
    let name = std::env::var("PEREGRINE_TEST_BURNS").expect("set by the test");
    std::env::temp_dir().join(name)
}

/// Makes calls and checks each answer, `pause` after each.
fn double(client: &peregrine_call::Client, calls: u64, affinity: Affinity, pause: Duration) {
    let portal = client.portal("double", 1).unwrap();
    for i in 0..calls {
        let (word, mut out) = (i.to_ne_bytes(), Vec::new());
        client.call(portal, Call::new().affinity(affinity).input(&word).output(&mut out, 8)).unwrap();
        assert_eq!(out, (2 * i).to_ne_bytes());
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
}

fn an_idle_domain_uses_no_processor_time() -> testkit::Outcome {
    let served = serve(portals);
    let client = served.connect();
    pin();
    for affinity in [Affinity::Together, Affinity::Apart, Affinity::Anywhere] {
        double(&client, 2000, affinity, Duration::ZERO);
        // It is allowed 20 us; a loaded machine may take a while to give it those.
        std::thread::sleep(Duration::from_millis(50));
        let (before, mine) = (served.cpu_ns(), peregrine_sys::timer::process_cpu_ns());
        std::thread::sleep(Duration::from_millis(500));
        let (used, mine) = (served.cpu_ns() - before, peregrine_sys::timer::process_cpu_ns() - mine);
        println!("{affinity:?}: idle for 500 ms, the domain used {used} ns, its client {mine} ns");
        assert!(used < 2_000_000 && mine < 20_000_000, "it goes on looking");
    }
    testkit::Outcome::Passed
}

fn calls_now_and_then_are_not_looked_for_all_the_time() -> testkit::Outcome {
    let served = serve(portals);
    let client = served.connect();
    pin();
    double(&client, 10, Affinity::Together, Duration::ZERO);
    let before = served.cpu_ns();
    double(&client, 200, Affinity::Together, Duration::from_millis(2));
    let used = served.cpu_ns() - before;
    println!("200 calls, 2 ms after each: the domain used {used} ns");
    // One that looked from call to call would have used 400 ms.
    assert!(used < 100_000_000, "it goes on looking");
    testkit::Outcome::Passed
}

fn a_third_thread_on_the_core_delays_calls_and_loses_none() -> testkit::Outcome {
    let served = serve(portals);
    let client = served.connect();
    pin();
    // SAFETY: the child runs a loop of its own and nothing else; the tests run in a process of one thread each.
    let busy = match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
        Forked::Child => {
            process::die_with_parent();
            loop {
                std::hint::black_box(());
            }
        }
        Forked::Parent(pid) => pid,
    };
    for affinity in [Affinity::Together, Affinity::Apart] {
        double(&client, 3000, affinity, Duration::ZERO);
    }
    peregrine_sys::signal::kill(busy, peregrine_sys::signal::number::KILL).unwrap();
    process::wait_for(busy).unwrap();
    double(&client, 3000, Affinity::Together, Duration::ZERO);
    testkit::Outcome::Passed
}

fn a_deadline_is_kept_though_the_activation_burns_the_callers_core() -> testkit::Outcome {
    // SAFETY: this process has one thread.
    unsafe { std::env::set_var("PEREGRINE_TEST_BURNS", format!("peregrine-burns-{}", std::process::id())) };
    let served = serve(portals);
    let client = served.connect();
    pin();
    double(&client, 100, Affinity::Together, Duration::ZERO);
    let burn = client.portal("burn", 1).unwrap();
    for ms in [5, 60] {
        std::fs::write(burns(), b"").unwrap();
        let begun = Instant::now();
        let outcome = client.call(burn, Call::new().deadline(Deadline::after(Duration::from_millis(ms))));
        // It burns to this day.
        assert_eq!(outcome.unwrap_err(), CallError::Deadline);
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(ms) && took < Duration::from_secs(50), "{ms}: {took:?}");
        std::fs::remove_file(burns()).unwrap();
    }
    double(&client, 100, Affinity::Together, Duration::ZERO);
    testkit::Outcome::Passed
}

fn a_caller_that_changes_cores_is_followed_and_answered() -> testkit::Outcome {
    let served = serve(portals);
    let client = served.connect();
    let all = CpuSet::current().unwrap();
    if all.iter().count() < 2 {
        return testkit::Outcome::Skipped("one core".into());
    }
    for _ in 0..20 {
        for cpu in all.iter() {
            process::pin_to_cpu(cpu).unwrap();
            double(&client, 50, Affinity::Together, Duration::ZERO);
            double(&client, 50, Affinity::Apart, Duration::ZERO);
        }
        all.bind().unwrap();
        double(&client, 50, Affinity::Together, Duration::ZERO);
    }
    testkit::Outcome::Passed
}

fn an_activation_that_looks_is_had_by_others_who_want_it() -> testkit::Outcome {
    let served = serve(|d| portals(d).activations(1));
    pin();
    // More clients than activations, each of which keeps its activation looking.
    let clients: Vec<_> = (0..4).map(|_| served.connect()).collect();
    std::thread::scope(|s| {
        for client in &clients {
            s.spawn(|| double(client, 500, Affinity::Together, Duration::ZERO));
        }
    });
    testkit::Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        an_idle_domain_uses_no_processor_time,
        calls_now_and_then_are_not_looked_for_all_the_time,
        a_third_thread_on_the_core_delays_calls_and_loses_none,
        a_deadline_is_kept_though_the_activation_burns_the_callers_core,
        a_caller_that_changes_cores_is_followed_and_answered,
        an_activation_that_looks_is_had_by_others_who_want_it,
    ])
}
