//! What a call promises, between two real processes.

use peregrine_base::sync::{AtomicBool, AtomicUsize, Ordering};
use peregrine_call::{
    Access, Affinity, Attributes, Call, CallError, Client, Deadline, Failure, Gift, Invocation, Limits,
    PortalId, Refusal,
};
use peregrine_sys::process;
use std::time::{Duration, Instant};

mod scene;
use scene::{Served, serve};

fn echo(call: &mut Invocation<'_>) -> Result<(), Failure> {
    let bytes = call.input(0)?;
    call.output(1)?.extend_from_slice(bytes);
    Ok(())
}

fn echoing() -> Served {
    serve(|d| d.portal("echo", 1, echo))
}

fn call_echo(client: &Client, echo: PortalId, bytes: &[u8]) -> Result<Vec<u8>, CallError> {
    let mut out = Vec::new();
    client.call(echo, Call::new().input(bytes).output(&mut out, bytes.len().max(64)))?;
    Ok(out)
}

fn arguments_of_all_sizes_come_back_as_they_were() -> testkit::Outcome {
    let served = echoing();
    let client = served.connect();
    let echo = client.portal("echo", 1).unwrap();
    for len in [0, 1, 7, 8, 63, 64, 65, 4095, 4096, 65_536, 200_000, 262_144, 1 << 20, (16 << 20) + 3] {
        let bytes: Vec<u8> = (0..len).map(|i| (i * 31 + len) as u8).collect();
        assert!(call_echo(&client, echo, &bytes).unwrap() == bytes, "{len} bytes");
    }
    testkit::Outcome::Passed
}

fn results_beyond_the_line_come_in_memory_of_their_own() -> testkit::Outcome {
    let served = serve(|d| {
        d.portal("fill", 1, |call: &mut Invocation<'_>| {
            let len = u64::from_ne_bytes(call.input(0)?.try_into().unwrap()) as usize;
            call.output(1)?.resize(len, 7);
            *call.output(2)? = vec![8; 3];
            Ok(())
        })
    });
    let client = served.connect();
    let fill = client.portal("fill", 1).unwrap();
    for len in [10usize, 1 << 20, 5 << 20, 5 << 20, 1 << 20, 6 << 20, 10] {
        let (mut a, mut b) = (Vec::new(), vec![1]);
        let arg = (len as u64).to_ne_bytes();
        client.call(fill, Call::new().input(&arg).output(&mut a, 8 << 20).output(&mut b, 8)).unwrap();
        assert!(a.len() == len && a.iter().all(|&x| x == 7));
        assert_eq!(b, [8; 3]);
    }
    testkit::Outcome::Passed
}

fn inout_changes_on_success_only() -> testkit::Outcome {
    let served = serve(|d| {
        d.portal("push", 1, |call: &mut Invocation<'_>| {
            call.inout(0)?.push(9);
            if call.input(1)?.is_empty() { Ok(()) } else { Err(Failure::new(77, *b"no")) }
        })
    });
    let client = served.connect();
    let push = client.portal("push", 1).unwrap();
    let mut list = vec![1, 2];
    client.call(push, Call::new().inout(&mut list, 16).input(b"")).unwrap();
    assert_eq!(list, [1, 2, 9]);
    let failed = client.call(push, Call::new().inout(&mut list, 16).input(b"fail"));
    assert_eq!(failed, Err(CallError::Callee(Failure::new(77, *b"no"))));
    assert_eq!(list, [1, 2, 9]);
    let too_long = client.call(push, Call::new().inout(&mut list, 3).input(b""));
    assert!(
        matches!(too_long, Err(CallError::TooLarge { asked_bytes: 4, limit_bytes: 3, .. })),
        "{too_long:?}"
    );
    assert_eq!(list, [1, 2, 9]);
    testkit::Outcome::Passed
}

fn arguments_beyond_the_domains_limit_are_refused_before_anything_is_sent() -> testkit::Outcome {
    const LIMIT: usize = 400_000;
    let served =
        serve(|d| d.portal("echo", 1, echo).limits(Limits { argument_bytes: LIMIT, ..Limits::default() }));
    let client = served.connect();
    let echo = client.portal("echo", 1).unwrap();
    assert_eq!(call_echo(&client, echo, &vec![1; LIMIT]).map(|back| back.len()), Ok(LIMIT));
    // It could answer nothing.
    served.stop();
    let (most, mut out) = (vec![1; LIMIT], b"before".to_vec());
    for call in [
        Call::new().input(&most).input(b"x"),
        Call::new().lend(&most).input(b"x"),
        Call::new().input(b"x").inout(&mut out, LIMIT).input(&most),
    ] {
        let refused = client.call(echo, call);
        assert!(
            matches!(refused, Err(CallError::TooLarge { asked_bytes, limit_bytes, .. })
                if asked_bytes > LIMIT as u64 && limit_bytes == LIMIT as u64),
            "{refused:?}"
        );
    }
    assert_eq!(out, b"before");
    served.go_on();
    assert_eq!(call_echo(&client, echo, b"again").unwrap(), b"again");
    testkit::Outcome::Passed
}

fn lent_memory_is_read_in_place_and_gifts_change_hands() -> testkit::Outcome {
    let served = serve(|d| {
        d.portal("sum", 1, |call: &mut Invocation<'_>| {
            let sum: u64 = call.lent(0)?.to_vec().iter().map(|&b| u64::from(b)).sum();
            call.output(1)?.extend_from_slice(&sum.to_ne_bytes());
            Ok(())
        })
        .portal("keep", 1, |call: &mut Invocation<'_>| {
            let given = call.take_given(0)?;
            let sum: u64 = given.iter().map(|&b| u64::from(b)).sum();
            call.output(1)?.extend_from_slice(&sum.to_ne_bytes());
            Ok(())
        })
    });
    let client = served.connect();
    let (sum, keep) = (client.portal("sum", 1).unwrap(), client.portal("keep", 1).unwrap());
    let buffer = client.buffer(100_000).unwrap();
    buffer.write(99_000, &[3; 1000]).unwrap();
    let mut out = Vec::new();
    client.call(sum, Call::new().lend(&buffer).output(&mut out, 8)).unwrap();
    assert_eq!(out, 3000u64.to_ne_bytes());
    client.call(sum, Call::new().lend(buffer.part(99_990, 5).unwrap()).output(&mut out, 8)).unwrap();
    assert_eq!(out, 15u64.to_ne_bytes());
    let mut gift = Gift::new(50_000).unwrap();
    gift.fill(2);
    client.call(keep, Call::new().give(gift).output(&mut out, 8)).unwrap();
    assert_eq!(out, 100_000u64.to_ne_bytes());
    let other = served.connect();
    let refused = other.call(other.portal("sum", 1).unwrap(), Call::new().lend(&buffer).output(&mut out, 8));
    assert!(
        matches!(refused, Err(CallError::Refused(Refusal::NoBuffer(_)))),
        "another connection's: {refused:?}"
    );
    testkit::Outcome::Passed
}

fn an_old_client_gets_a_clear_mismatch() -> testkit::Outcome {
    let served = echoing();
    let client = served.connect();
    let mismatch = client.portal("echo", 2).unwrap_err();
    assert_eq!(mismatch, CallError::Version { portal: "echo".into(), ours: 2, theirs: 1 });
    assert!(
        matches!(client.portal("nothing", 1), Err(CallError::Refused(Refusal::NoPortal(n))) if n == "nothing")
    );
    testkit::Outcome::Passed
}

fn a_portal_of_another_domain_is_refused_and_not_mistaken_for_the_one_of_its_number() -> testkit::Outcome {
    // In each the first of its portals.
    let served = echoing();
    let other = serve(|d| d.portal("other", 7, |_: &mut Invocation<'_>| process::exit_now(55)));
    let (client, others) = (served.connect(), other.connect());
    let echo = client.portal("echo", 1).unwrap();
    let refused = Err(CallError::Refused(Refusal::OtherDomain));
    assert_eq!(others.call(echo, Call::new()), refused);
    assert_eq!(others.start(echo, Call::new()).map(drop), refused);
    let caller = peregrine_call::chain::Caller::current();
    assert_eq!(others.start_for(caller, echo, Call::new()).map(drop), refused);
    assert_eq!(others.start_at_once(caller, echo, Call::new()).map(drop), refused);
    assert!(!other.has_ended());
    // Another connection to the same domain may use it.
    assert_eq!(call_echo(&served.connect(), echo, b"mine").unwrap(), b"mine");
    testkit::Outcome::Passed
}

fn the_callers_mappings_stay_as_they_are_while_it_is_away() -> testkit::Outcome {
    fn maps(pid: u32) -> String {
        std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap()
    }
    let served = serve(|d| {
        d.portal("maps", 1, |call: &mut Invocation<'_>| {
            *call.output(0)? = maps(call.caller().pid).into_bytes();
            *call.output(1)? = maps(std::process::id()).into_bytes();
            Ok(())
        })
    });
    let client = served.connect();
    let portal = client.portal("maps", 1).unwrap();
    // The first calls make a line, and room for what comes back.
    for last in [false, false, false, true] {
        let (mut meanwhile, mut theirs) = (Vec::new(), Vec::new());
        let before = maps(std::process::id());
        client
            .call(portal, Call::new().output(&mut meanwhile, 1 << 20).output(&mut theirs, 1 << 20))
            .unwrap();
        if last {
            assert_eq!(String::from_utf8(meanwhile).unwrap(), before);
            // Of the two processes' memory they share the line and what results need, and nothing else that can be written.
            let shared: Vec<String> = std::str::from_utf8(&theirs)
                .unwrap()
                .lines()
                .filter(|line| line.contains("rw-s"))
                .map(|line| line.split_whitespace().skip(5).collect::<Vec<_>>().join(" "))
                .collect();
            assert!(
                !shared.is_empty() && shared.iter().all(|name| name.starts_with("/memfd:peregrine-")),
                "{shared:?}"
            );
        }
    }
    testkit::Outcome::Passed
}

fn a_panic_is_the_callers_error_and_the_domain_lives() -> testkit::Outcome {
    let served = serve(|d| {
        d.portal("echo", 1, echo).portal("panic", 1, |_: &mut Invocation<'_>| panic!("number {}", 5))
    });
    let client = served.connect();
    let panic = client.portal("panic", 1).unwrap();
    for _ in 0..10 {
        assert_eq!(client.call(panic, Call::new()), Err(CallError::Panicked("number 5".into())));
    }
    let echo = client.portal("echo", 1).unwrap();
    assert_eq!(call_echo(&client, echo, b"alive").unwrap(), b"alive");
    testkit::Outcome::Passed
}

fn a_deadline_ends_the_wait_and_the_line_is_used_again() -> testkit::Outcome {
    let served = scene::serve_at(|d, path| {
        let go = path.with_extension("go");
        d.portal("echo", 1, echo)
            .portal("hold", 1, move |_: &mut Invocation<'_>| {
                scene::wait_for(&go);
                Ok(())
            })
            .limits(Limits { calls_in_flight: 1, ..Limits::default() })
    });
    let client = served.connect();
    let (echo, hold) = (client.portal("echo", 1).unwrap(), client.portal("hold", 1).unwrap());
    // The callee goes on until we let it.
    let late = client.call(hold, Call::new().deadline(Deadline::after(Duration::from_millis(30))));
    assert_eq!(late, Err(CallError::Deadline));
    // The only line is still the domain's: the next call waits for it, within its own deadline.
    let busy = client.call(echo, Call::new().deadline(Deadline::after(Duration::from_millis(20))));
    assert_eq!(busy, Err(CallError::Deadline));
    std::fs::write(served.path().with_extension("go"), "").unwrap();
    assert_eq!(call_echo(&client, echo, b"again").unwrap(), b"again");
    testkit::Outcome::Passed
}

/// How often the portal `mark` was served, in the domain's process.
static MARKS: AtomicUsize = AtomicUsize::new(0);

fn a_call_that_its_caller_gave_up_before_its_turn_is_not_executed() -> testkit::Outcome {
    let served = scene::serve_at(|d, path| {
        let (held, go) = (path.with_extension("held"), path.with_extension("go"));
        d.activations(1)
            .limits(Limits { calls_in_flight: 2, ..Limits::default() })
            .portal("hold", 1, move |_: &mut Invocation<'_>| {
                std::fs::write(&held, "").unwrap();
                scene::wait_for(&go);
                Ok(())
            })
            .portal("mark", 1, |call: &mut Invocation<'_>| {
                let before = MARKS.fetch_add(1, Ordering::Relaxed);
                call.output(0)?.push(before as u8);
                Ok(())
            })
    });
    let (holder, client) = (served.connect(), served.connect());
    let (hold, mark) = (holder.portal("hold", 1).unwrap(), client.portal("mark", 1).unwrap());
    // Lines, while there is somebody to open them.
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let two = [&mut a, &mut b].map(|out| client.start(mark, Call::new().output(out, 1)).unwrap());
    two.into_iter().for_each(|pending| pending.wait().unwrap());
    let long = holder.start(hold, Call::new()).unwrap();
    scene::wait_for(&served.path().with_extension("held"));
    // One whose deadline passes, of which the domain knows by its header alone: its caller neither waits nor gives up. One that is given up.
    let mut after = Duration::from_millis(50);
    let (deadline, late) = loop {
        let deadline = Deadline::after(after);
        match client.start(mark, Call::new().deadline(deadline)) {
            Ok(late) => break (deadline, late),
            // It passed before the call was sent.
            Err(e) => assert_eq!(e, CallError::Deadline),
        }
        after *= 2;
    };
    drop(client.start(mark, Call::new()).unwrap());
    while deadline.left().is_some() {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::fs::write(served.path().with_extension("go"), "").unwrap();
    long.wait().unwrap();
    let begun = Instant::now();
    while !late.is_ready() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the domain answers it all the same");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(late.wait(), Err(CallError::Deadline));
    // As many calls as there are lines: the line of the one that was given up is used again when that was answered.
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let two = [&mut a, &mut b].map(|out| client.start(mark, Call::new().output(out, 1)).unwrap());
    two.into_iter().for_each(|pending| pending.wait().unwrap());
    let mut counts = [a[0], b[0]];
    counts.sort_unstable();
    assert_eq!(counts, [2, 3], "two at first and these two, and none between");
    testkit::Outcome::Passed
}

fn all_affinities_give_the_same_answers() -> testkit::Outcome {
    let served = echoing();
    let client = served.connect();
    let echo = client.portal("echo", 1).unwrap();
    for affinity in [Affinity::Together, Affinity::Apart, Affinity::Anywhere] {
        for i in 0..2000u32 {
            let mut out = Vec::new();
            let bytes = i.to_ne_bytes();
            let call = Call::new().input(&bytes).output(&mut out, 4).affinity(affinity);
            client.call(echo, call).unwrap();
            assert_eq!(out, bytes);
        }
    }
    testkit::Outcome::Passed
}

fn many_threads_call_through_few_activations() -> testkit::Outcome {
    let served = serve(|d| d.portal("echo", 1, echo).activations(2));
    let clients: Vec<Client> = (0..3).map(|_| served.connect()).collect();
    std::thread::scope(|scope| {
        for t in 0..12usize {
            let client = &clients[t % 3];
            scope.spawn(move || {
                let echo = client.portal("echo", 1).unwrap();
                for i in 0..500 {
                    let bytes = vec![t as u8; (t * 37 + i) % 300];
                    assert!(call_echo(client, echo, &bytes).unwrap() == bytes);
                }
            });
        }
    });
    testkit::Outcome::Passed
}

fn a_client_beyond_its_share_of_activations_waits_and_nobody_starves() -> testkit::Outcome {
    let (inside, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let served = serve(|d| {
        d.portal("echo", 1, echo)
            .activations(4)
            .limits(Limits { activations_per_client: 2, ..Limits::default() })
            .portal("sleep", 1, move |call: &mut Invocation<'_>| {
                let now = inside.fetch_add(1, Ordering::SeqCst) + 1;
                most.fetch_max(now, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(20));
                inside.fetch_sub(1, Ordering::SeqCst);
                call.output(0)?.push(most.load(Ordering::SeqCst) as u8);
                Ok(())
            })
    });
    let greedy = served.connect();
    let modest = served.connect();
    let echo = modest.portal("echo", 1).unwrap();
    let (done, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let at_once = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(|| {
                let sleep = greedy.portal("sleep", 1).unwrap();
                while !is_over.load(Ordering::Relaxed) {
                    let mut most = Vec::new();
                    greedy.call(sleep, Call::new().output(&mut most, 1)).unwrap();
                    at_once.fetch_max(usize::from(most[0]), Ordering::Relaxed);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // Until its share is taken; more would be seen by then as well, for all five call all the time.
        while at_once.load(Ordering::Relaxed) < 2 || done.load(Ordering::Relaxed) < 20 {
            std::thread::yield_now();
        }
        // They never stop before this has returned.
        assert_eq!(call_echo(&modest, echo, b"mine").unwrap(), b"mine");
        is_over.store(true, Ordering::Relaxed);
    });
    assert_eq!(at_once.load(Ordering::Relaxed), 2, "activations of one client at once");
    testkit::Outcome::Passed
}

fn started_calls_run_side_by_side_and_can_be_polled_or_dropped() -> testkit::Outcome {
    let served = serve(|d| {
        // Neither returns before both are there.
        let both = std::sync::Barrier::new(2);
        d.portal("sleep", 1, |call: &mut Invocation<'_>| {
            let ms = call.input(0)?[0];
            std::thread::sleep(Duration::from_millis(u64::from(ms)));
            call.output(1)?.push(ms);
            Ok(())
        })
        .portal("meet", 1, move |call: &mut Invocation<'_>| {
            both.wait();
            call.output(1)?.push(call.input(0)?[0]);
            Ok(())
        })
        .activations(4)
    });
    let client = served.connect();
    let (sleep, meet) = (client.portal("sleep", 1).unwrap(), client.portal("meet", 1).unwrap());
    let (mut a, mut b, mut c) = (Vec::new(), Vec::new(), Vec::new());
    let first = client.start(meet, Call::new().input(&[100]).output(&mut a, 1)).unwrap();
    let second = client.start(meet, Call::new().input(&[100]).output(&mut b, 1)).unwrap();
    let third = client.start(sleep, Call::new().input(&[50]).output(&mut c, 1)).unwrap();
    drop(third);
    first.wait().unwrap();
    second.wait().unwrap();
    assert_eq!((a, b, c), (vec![100], vec![100], vec![]));
    for _ in 0..300 {
        let mut out = Vec::new();
        client.start(sleep, Call::new().input(&[0]).output(&mut out, 1)).unwrap().wait().unwrap();
        assert_eq!(out, [0]);
    }
    let late =
        client.start(sleep, Call::new().input(&[200]).deadline(Deadline::after(Duration::from_millis(20))));
    assert_eq!(late.unwrap().wait(), Err(CallError::Deadline));
    testkit::Outcome::Passed
}

/// A reactor sleeps until the descriptor is readable, and nothing else wakes it: those that look by themselves now and then would not notice
/// that nobody told them.
fn a_started_call_makes_its_descriptor_readable() -> testkit::Outcome {
    use peregrine_sys::rustix::event::{PollFd, PollFlags, Timespec, poll};
    let served = serve(|d| {
        d.activations(1).portal("sleep", 1, |call: &mut Invocation<'_>| {
            let bytes = call.input(0)?;
            std::thread::sleep(Duration::from_millis(u64::from(bytes[0])));
            call.output(1)?.extend_from_slice(bytes);
            Ok(())
        })
    });
    let client = served.connect();
    let sleep = client.portal("sleep", 1).unwrap();
    let long = Timespec { tv_sec: 30, tv_nsec: 0 };
    // The reply comes before the look at the descriptor or after; results lie in the line, or elsewhere.
    for (ms, len) in [(50, 1), (0, 1), (50, 1000), (0, 1000), (50, 300_000), (0, 300_000)] {
        let (input, mut out) = (vec![ms; len], Vec::new());
        let mut pending = client.start(sleep, Call::new().input(&input).output(&mut out, len)).unwrap();
        // Until then there is no descriptor that tells.
        while !pending.is_sent() {
            std::thread::sleep(Duration::from_millis(1));
            assert!(pending.try_finish().is_none(), "an outcome of a call that is not sent");
        }
        let outcome = loop {
            let told = poll(&mut [PollFd::new(&pending, PollFlags::IN)], Some(&long)).unwrap();
            assert_eq!(
                told,
                1,
                "nobody told of the reply: {ms} ms, {len} bytes; is it there? {}",
                pending.is_ready()
            );
            if let Some(outcome) = pending.try_finish() {
                break outcome;
            }
        };
        drop(pending);
        assert_eq!(outcome, Ok(()));
        assert!(out == input, "{ms} ms, {len} bytes");
    }
    testkit::Outcome::Passed
}

fn who_may_not_connect_or_call_is_refused() -> testkit::Outcome {
    let served =
        serve(|d| d.portal("echo", 1, echo).portal_for("secret", 1, Access::Users(vec![12_345]), echo));
    let client = served.connect();
    assert!(matches!(client.portal("secret", 1), Err(CallError::Refused(Refusal::Access(_)))));
    let nobody = serve(|d| d.access(Access::Users(vec![12_345])).portal("echo", 1, echo));
    let refused = Client::connect(nobody.path()).unwrap_err();
    assert_eq!(refused, CallError::Refused(Refusal::NotAdmitted));
    let missing = Client::connect("/nowhere/at/all").unwrap_err();
    assert!(matches!(missing, CallError::Unreachable { .. }), "{missing:?}");
    testkit::Outcome::Passed
}

fn charged_calls_show_where_the_time_went() -> testkit::Outcome {
    let served = serve(|d| {
        d.portal("burn", 1, |_: &mut Invocation<'_>| {
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(30) {}
            Ok(())
        })
    });
    let client = served.connect();
    let burn = client.portal("burn", 1).unwrap();
    let charge = Attributes { charge: true, ..Attributes::default() };
    let before = served.cpu_ns();
    client.call(burn, Call::new().attributes(charge)).unwrap();
    client.call(burn, Call::new().attributes(charge)).unwrap();
    let by_kernel = served.cpu_ns() - before;
    let charges = peregrine_call::usage::charges();
    assert_eq!(charges.len(), 1);
    let (domain, ns) = charges[0];
    assert_eq!(domain, client.domain_id());
    let usage = client.usage().unwrap();
    // All that the domain has done so far, its start included.
    let in_all = served.cpu_ns();
    println!("kernel {by_kernel} thread {ns} connection {usage:?}");
    // The kernel counts what the whole process used: the handler, and microseconds around it.
    assert!(ns > by_kernel / 10 * 8 && ns <= by_kernel, "{ns} of {by_kernel}");
    assert!(usage.cpu_ns >= ns && usage.cpu_ns <= in_all, "{usage:?}: {in_all} in all");
    assert_eq!(usage.calls, 2);
    testkit::Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        arguments_of_all_sizes_come_back_as_they_were,
        results_beyond_the_line_come_in_memory_of_their_own,
        inout_changes_on_success_only,
        arguments_beyond_the_domains_limit_are_refused_before_anything_is_sent,
        lent_memory_is_read_in_place_and_gifts_change_hands,
        an_old_client_gets_a_clear_mismatch,
        a_portal_of_another_domain_is_refused_and_not_mistaken_for_the_one_of_its_number,
        the_callers_mappings_stay_as_they_are_while_it_is_away,
        a_panic_is_the_callers_error_and_the_domain_lives,
        a_deadline_ends_the_wait_and_the_line_is_used_again,
        a_call_that_its_caller_gave_up_before_its_turn_is_not_executed,
        all_affinities_give_the_same_answers,
        many_threads_call_through_few_activations,
        a_client_beyond_its_share_of_activations_waits_and_nobody_starves,
        started_calls_run_side_by_side_and_can_be_polled_or_dropped,
        a_started_call_makes_its_descriptor_readable,
        who_may_not_connect_or_call_is_refused,
        charged_calls_show_where_the_time_went,
    ])
}
