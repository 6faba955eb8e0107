//! The shortest way of a call, to an activation that looks for it on another core: it is taken only while nothing has changed, and what
//! changes is seen at the next call.
//!
//! Whether a call takes it depends on whether its reply comes while its caller looks, so each check is made often, and holds either way.

use peregrine_call::chain::current;
use peregrine_call::{
    Affinity, Attributes, Call, CallError, Client, Deadline, DomainBuilder, Failure, Invocation, PortalId,
};
use peregrine_sys::process::{self, CpuSet};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use testkit::Rng;

mod scene;
use scene::serve;

const CALLS: usize = 3000;

/// Who called last, and how deep: told by the portal `last`.
static LAST: Mutex<String> = Mutex::new(String::new());

fn note(text: String) {
    *LAST.lock().unwrap() = text;
}

fn standing() -> String {
    let link = current();
    format!("{:?} {} {:?}", link.chain, link.depth, link.deadline.is_some())
}

fn portals(d: DomainBuilder) -> DomainBuilder {
    d.activations(3)
        .portal("note", 1, |_: &mut Invocation<'_>| {
            note(standing());
            Ok(())
        })
        .portal("other", 1, |_: &mut Invocation<'_>| {
            note(format!("other {}", standing()));
            Ok(())
        })
        .portal("fail", 1, |_: &mut Invocation<'_>| Err(Failure::new(7, *b"no")))
        .portal("panic", 1, |_: &mut Invocation<'_>| panic!("on purpose"))
        .portal("result", 1, |call: &mut Invocation<'_>| {
            call.output(0)?.extend_from_slice(b"here");
            Ok(())
        })
        // Its `out` has as many bytes as the first word of its `in` says, its `inout` comes back reversed, of what is lent it tells the sum.
        .portal("mix", 1, |call: &mut Invocation<'_>| {
            let len =
                usize::from(u16::from_ne_bytes(*call.input(0)?.first_chunk().ok_or(Failure::new(1, ""))?));
            if len == 999 {
                return Err(Failure::new(9, *b"as asked"));
            }
            let rest = call.input(0)?[2..].to_vec();
            for index in 1..call.len() {
                if let Ok(mut out) = call.output(index) {
                    out.extend(rest.iter().cycle().take(len));
                }
                if let Ok(mut inout) = call.inout(index) {
                    inout.reverse();
                }
                if let Ok(lent) = call.lent(index) {
                    let sum = lent.to_vec().iter().map(|&b| u64::from(b)).sum::<u64>();
                    call.output(index + 1)?.extend_from_slice(&sum.to_ne_bytes());
                    break;
                }
            }
            Ok(())
        })
        // The sum of what is lent: four words, so that it has the short form.
        .portal("sum", 1, |call: &mut Invocation<'_>| {
            let sum = call.lent(0)?.to_vec().iter().map(|&b| u64::from(b)).sum::<u64>();
            call.output(1)?.extend_from_slice(&sum.to_ne_bytes());
            Ok(())
        })
        .portal("core", 1, |call: &mut Invocation<'_>| {
            call.output(0)?.extend_from_slice(&(process::current_cpu() as u32).to_ne_bytes());
            Ok(())
        })
        .portal("nap", 1, |call: &mut Invocation<'_>| {
            if call.input(0)? == b"long" {
                std::thread::sleep(Duration::from_secs(2));
            }
            let begun = peregrine_sys::timer::thread_cpu_ns();
            while call.input(0)? == b"busy" && peregrine_sys::timer::thread_cpu_ns() < begun + 1_000_000 {}
            let left = call.deadline().is_some();
            call.output(1)?.push(u8::from(left));
            Ok(())
        })
        .portal("nice", 1, |call: &mut Invocation<'_>| {
            call.output(0)?.push(process::nice_of(0).map_err(|_| Failure::new(1, ""))? as u8);
            Ok(())
        })
        .portal("die", 1, |_: &mut Invocation<'_>| process::exit_now(7))
        .portal("last", 1, |call: &mut Invocation<'_>| {
            let last = LAST.lock().unwrap().clone();
            call.output(0)?.extend_from_slice(last.as_bytes());
            Ok(())
        })
}

fn hot() -> Attributes {
    Attributes { affinity: Affinity::Apart, ..Attributes::default() }
}

fn bare(client: &Client, portal: PortalId) -> Result<(), CallError> {
    client.call(portal, Call::new().attributes(hot()))
}

/// What the domain noted of the last call.
fn last(client: &Client, portal: PortalId) -> String {
    let mut text = Vec::new();
    client.call(portal, Call::new().attributes(hot()).output(&mut text, 4096)).unwrap();
    String::from_utf8(text).unwrap()
}

fn quiet() {
    std::panic::set_hook(Box::new(|_| {}));
}

fn every_call_is_what_it_says_whatever_the_one_before_was() -> testkit::Outcome {
    quiet();
    let served = serve(portals);
    let client = served.connect();
    let portal = |name| client.portal(name, 1).unwrap();
    let (note, other, fail, panics, result, told) =
        (portal("note"), portal("other"), portal("fail"), portal("panic"), portal("result"), portal("last"));
    let mine = format!("{:?} 1 false", current().chain);
    for i in 0..CALLS {
        bare(&client, note).unwrap();
        if i % 7 == 0 {
            assert_eq!(last(&client, told), mine);
        }
        match i % 11 {
            0 => assert!(matches!(bare(&client, fail), Err(CallError::Callee(f)) if f.code == 7)),
            1 => assert!(matches!(bare(&client, panics), Err(CallError::Panicked(_)))),
            2 => {
                let mut out = Vec::new();
                client.call(result, Call::new().attributes(hot()).output(&mut out, 4)).unwrap();
                assert_eq!(out, b"here");
            }
            3 => {
                bare(&client, other).unwrap();
                assert_eq!(last(&client, told), format!("other {mine}"));
            }
            4 => {
                let soon = Deadline::after(Duration::from_secs(60));
                client.call(note, Call::new().attributes(hot()).deadline(soon)).unwrap();
                assert_eq!(last(&client, told), format!("{:?} 1 true", current().chain));
            }
            5 => client.call(note, Call::new().attributes(Attributes { charge: true, ..hot() })).unwrap(),
            6 => client.call(note, Call::new()).unwrap(),
            8 => {
                // A result that is a byte longer than its bound, and would have room.
                let mut out = b"stays".to_vec();
                let outcome = client.call(result, Call::new().attributes(hot()).output(&mut out, 3));
                assert!(matches!(outcome, Err(CallError::TooLarge { .. })), "{outcome:?}");
                assert_eq!(out, b"stays");
            }
            // A result that nobody declared is no result: the call fails and the line serves on.
            7 => assert!(bare(&client, result).is_err()),
            _ => {}
        }
    }
    let usage = client.usage().unwrap();
    assert!(usage.calls >= CALLS as u64, "each is counted: {usage:?}");
    testkit::Outcome::Passed
}

fn threads_that_take_turns_on_one_line_are_each_themselves() -> testkit::Outcome {
    let served = serve(portals);
    let client = served.connect();
    // Asked by another connection: on the line nothing but who calls changes from call to call.
    let asking = served.connect();
    let (note, told) = (client.portal("note", 1).unwrap(), asking.portal("last", 1).unwrap());
    let turn = Mutex::new(());
    let mut seen = Mutex::new(std::collections::BTreeSet::new());
    std::thread::scope(|s| {
        for _ in 0..3 {
            s.spawn(|| {
                let mine = format!("{:?} 1 false", current().chain);
                for _ in 0..300 {
                    let _turn = turn.lock().unwrap();
                    bare(&client, note).unwrap();
                    assert_eq!(last(&asking, told), mine);
                }
                seen.lock().unwrap().insert(mine);
            });
        }
    });
    assert_eq!(seen.get_mut().unwrap().len(), 3, "each thread is a chain of its own");
    testkit::Outcome::Passed
}

fn a_caller_that_is_moved_while_hot_is_answered() -> testkit::Outcome {
    let served = serve(portals);
    let client = served.connect();
    let note = client.portal("note", 1).unwrap();
    let all = CpuSet::current().unwrap();
    if all.iter().count() < 2 {
        return testkit::Outcome::Skipped("one core".into());
    }
    for _ in 0..100 {
        for cpu in all.iter() {
            process::pin_to_cpu(cpu).unwrap();
            for _ in 0..20 {
                bare(&client, note).unwrap();
            }
        }
    }
    testkit::Outcome::Passed
}

fn what_runs_on_an_activation_between_calls_is_not_the_callers() -> testkit::Outcome {
    let served =
        serve(|d| portals(d).activations(1).on_last_activation(|_| note(format!("told {}", standing()))));
    let client = served.connect();
    let (result, told) = (client.portal("result", 1).unwrap(), client.portal("last", 1).unwrap());
    let mine = format!("{:?}", current().chain);
    for _ in 0..300 {
        let mut out = Vec::new();
        client.call(result, Call::new().attributes(hot()).output(&mut out, 4)).unwrap();
        let text = last(&client, told);
        assert!(text.starts_with("told ") && !text.contains(&mine), "{text}");
    }
    testkit::Outcome::Passed
}

fn a_domain_that_dies_while_its_callers_are_hot_is_told_of() -> testkit::Outcome {
    let served = serve(portals);
    let client = served.connect();
    let note = client.portal("note", 1).unwrap();
    for _ in 0..CALLS / 10 {
        bare(&client, note).unwrap();
    }
    std::thread::scope(|s| {
        let caller = s.spawn(|| {
            loop {
                if let Err(e) = bare(&client, note) {
                    return e;
                }
            }
        });
        served.kill();
        assert_eq!(caller.join().unwrap(), CallError::DomainDied);
    });
    assert_eq!(bare(&client, note), Err(CallError::DomainDied));
    testkit::Outcome::Passed
}

fn a_domain_that_dies_within_a_hot_call_is_told_of() -> testkit::Outcome {
    let served: Vec<_> = (0..10).map(|_| serve(portals)).collect();
    for (round, served) in served.iter().enumerate() {
        let client = served.connect();
        let (note, die) = (client.portal("note", 1).unwrap(), client.portal("die", 1).unwrap());
        // A caller that is never told looks for ever: this thread is told of that.
        let (told, tells) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for _ in 0..20 * round {
                bare(&client, note).unwrap();
            }
            told.send(bare(&client, die)).unwrap();
        });
        let outcome = tells.recv_timeout(Duration::from_secs(20)).expect("the caller is told");
        assert_eq!(outcome, Err(CallError::DomainDied));
    }
    testkit::Outcome::Passed
}

fn a_priority_is_lent_after_hot_calls_and_given_back_before_the_next() -> testkit::Outcome {
    let mine = process::nice_of(0).unwrap();
    if !process::is_root() || mine >= 19 {
        return testkit::Outcome::Skipped("only root may become more urgent".into());
    }
    let theirs = (mine + 5).min(19);
    let served =
        scene::serve_with(|d| portals(d).most_urgent_nice(-20), |_| process::set_nice(0, theirs).unwrap());
    let client = served.connect();
    let nice = client.portal("nice", 1).unwrap();
    let mut out = Vec::new();
    let mut served_with = |priority| {
        let attributes = Attributes { priority, ..hot() };
        client.call(nice, Call::new().attributes(attributes).output(&mut out, 1)).unwrap();
        i32::from(out[0] as i8)
    };
    for _ in 0..20 {
        for _ in 0..30 {
            assert_eq!(served_with(false), theirs);
        }
        assert_eq!(served_with(true), mine);
    }
    testkit::Outcome::Passed
}

fn word(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).unwrap().to_ne_bytes()
}

fn arguments_of_every_kind_and_size_cross_whatever_the_call_before_had() -> testkit::Outcome {
    let served = serve(portals);
    let client = served.connect();
    let (mix, note) = (client.portal("mix", 1).unwrap(), client.portal("note", 1).unwrap());
    let seed = u64::from(std::process::id());
    println!("seed {seed:#x}");
    let mut rng = Rng::new(seed);
    let mut out = Vec::new();
    for i in 0..CALLS {
        // Short and long, around what fits beside the reply's head and what is copied by a loop.
        let sizes = [0, 1, 7, 8, 9, 31, 33, 39, 40, 41, 64, 200, 1023, 1024, 1025, 5000];
        let (len, want) = (sizes[rng.below(sizes.len())], sizes[rng.below(sizes.len())]);
        let mut bytes = word(want).to_vec();
        bytes.extend((0..=len).map(|at| (at * 7 + i) as u8));
        let expected: Vec<u8> = bytes[2..].iter().copied().cycle().take(want).collect();
        let attributes = if rng.below(20) == 0 { Attributes::default() } else { hot() };
        let call = Call::new().attributes(attributes).input(&bytes);
        match rng.below(6) {
            0 => {
                let mut inout: Vec<u8> = (0..len).map(|at| at as u8).collect();
                let before = inout.clone();
                client.call(mix, call.inout(&mut inout, 5000).output(&mut out, 5000)).unwrap();
                inout.reverse();
                assert!(inout == before && out == expected, "{len} {want}");
            }
            1 => {
                // Two results, and one that has no room: nothing changes.
                let mut other = b"stays".to_vec();
                let outcome = client.call(mix, call.output(&mut other, 20).output(&mut out, 5000));
                if want > 20 {
                    assert!(matches!(outcome, Err(CallError::TooLarge { .. })), "{outcome:?}");
                    assert_eq!(other, b"stays");
                } else {
                    outcome.unwrap();
                    assert!(other == expected && out == expected, "{want}");
                }
            }
            2 => {
                let failing = word(999);
                let call = Call::new().attributes(hot()).input(&failing).output(&mut out, 10);
                let failure = client.call(mix, call).unwrap_err();
                assert_eq!(failure, CallError::Callee(Failure::new(9, *b"as asked")));
            }
            3 => bare(&client, note).unwrap(),
            // Five arguments have no short form.
            4 => {
                let mut more = [const { Vec::new() }; 3];
                let [a, b, c] = &mut more;
                let call = call.output(&mut out, 5000).output(a, 5000).output(b, 5000).output(c, 5000);
                client.call(mix, call).unwrap();
                assert!(out == expected && more.iter().all(|v| *v == expected), "{want}");
            }
            _ => {
                client.call(mix, call.output(&mut out, 5000)).unwrap();
                assert_eq!(out, expected, "{len} {want}");
            }
        }
    }
    testkit::Outcome::Passed
}

fn what_is_lent_is_what_the_client_has_now() -> testkit::Outcome {
    let served = serve(portals);
    let client = served.connect();
    let (mix, sums) = (client.portal("mix", 1).unwrap(), client.portal("sum", 1).unwrap());
    let mut out = Vec::new();
    let two = word(2);
    let mut sum = |buffer: &peregrine_call::Buffer, from: usize, len: usize| {
        let part = buffer.part(from, len).unwrap();
        // In the general form and in the short one.
        let call = Call::new().attributes(hot()).input(&two).lend(part).output(&mut out, 8);
        client.call(mix, call).unwrap();
        let general = u64::from_ne_bytes(out[..].try_into().unwrap());
        client.call(sums, Call::new().attributes(hot()).lend(part).output(&mut out, 8)).unwrap();
        client.call(sums, Call::new().attributes(hot()).lend(part).output(&mut out, 8)).unwrap();
        assert_eq!(u64::from_ne_bytes(out[..].try_into().unwrap()), general);
        general
    };
    let resident = served.holdings();
    for round in 0..60u64 {
        // Another of the same size, and after it is gone another again: what the domain kept of the one before is no use.
        let buffer = client.buffer(8192).unwrap();
        for i in 0..20 {
            let byte = (round * 3 + i) as u8;
            buffer.write(100, &[byte; 50]).unwrap();
            assert_eq!(sum(&buffer, 0, 8192), 50 * u64::from(byte));
            assert_eq!(sum(&buffer, 110, 30), 30 * u64::from(byte));
        }
    }
    // The activation that served them keeps none of them, though it is on its line still.
    client.usage().unwrap();
    let begun = Instant::now();
    while served.holdings().1 > resident.1 + 1 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{resident:?} {:?}", served.holdings());
        bare(&client, client.portal("note", 1).unwrap()).unwrap();
        client.usage().unwrap();
    }
    testkit::Outcome::Passed
}

fn an_activation_that_sleeps_holds_nothing_that_was_lent_to_it() -> testkit::Outcome {
    let served = serve(portals);
    let client = served.connect();
    let sums = client.portal("sum", 1).unwrap();
    let mut out = Vec::new();
    for round in 0..20 {
        let buffer = client.buffer(8192).unwrap();
        for _ in 0..20 {
            client.call(sums, Call::new().attributes(hot()).lend(&buffer).output(&mut out, 8)).unwrap();
        }
        drop(buffer);
        // No call follows that would have it look again.
        let begun = Instant::now();
        // One line is all that it has mapped.
        while served.holdings().1 > 1 {
            assert!(begun.elapsed() < Duration::from_secs(20), "round {round}: {:?}", served.holdings());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    testkit::Outcome::Passed
}

/// What calls of this thread have cost.
fn charged_ns() -> u64 {
    peregrine_call::usage::charges().iter().map(|row| row.1).sum()
}

fn what_a_call_asks_for_beyond_its_arguments_it_gets_though_the_ones_before_were_hot() -> testkit::Outcome {
    let served = serve(portals);
    let client = served.connect();
    let (nap, core) = (client.portal("nap", 1).unwrap(), client.portal("core", 1).unwrap());
    let mut out = Vec::new();
    let two_cores = CpuSet::current().unwrap().iter().count() > 1;
    for _ in 0..20 {
        for _ in 0..30 {
            client.call(nap, Call::new().attributes(hot()).input(b"no").output(&mut out, 1)).unwrap();
            assert_eq!(out, [0]);
        }
        // A deadline is the callee's too.
        let soon = Deadline::after(Duration::from_secs(60));
        client
            .call(nap, Call::new().attributes(hot()).deadline(soon).input(b"no").output(&mut out, 1))
            .unwrap();
        assert_eq!(out, [1]);
        // What it costs is counted.
        let charged = Attributes { charge: true, ..hot() };
        let before = charged_ns();
        client.call(nap, Call::new().attributes(charged).input(b"busy").output(&mut out, 1)).unwrap();
        let after = charged_ns();
        assert!(after >= before + 1_000_000, "{before} {after}");
        client.call(nap, Call::new().attributes(hot()).input(b"busy").output(&mut out, 1)).unwrap();
        assert_eq!(charged_ns(), after, "nobody asked");
        // Where it runs: here, or not here.
        process::pin_to_cpu(process::current_cpu()).unwrap();
        for (affinity, here) in
            [(Affinity::Apart, false), (Affinity::Together, true), (Affinity::Apart, false)]
        {
            let attributes = Attributes { affinity, ..Attributes::default() };
            client.call(core, Call::new().attributes(attributes).output(&mut out, 4)).unwrap();
            let at = u32::from_ne_bytes(out[..].try_into().unwrap());
            assert!(!two_cores || (at == process::current_cpu() as u32) == here, "{affinity:?}: {at}");
        }
    }
    for _ in 0..30 {
        client.call(nap, Call::new().attributes(hot()).input(b"no").output(&mut out, 1)).unwrap();
    }
    // Nobody waits for longer than was said.
    let soon = Deadline::after(Duration::from_millis(50));
    let late =
        client.call(nap, Call::new().attributes(hot()).deadline(soon).input(b"long").output(&mut out, 1));
    assert_eq!(late, Err(CallError::Deadline));
    testkit::Outcome::Passed
}

fn a_hot_caller_of_a_domain_that_is_stopped_is_told() -> testkit::Outcome {
    let served = serve(portals);
    let client = served.connect();
    client.set_patience(Duration::from_millis(600));
    let mix = client.portal("mix", 1).unwrap();
    let (bytes, mut out) = ([2, 0, 5], Vec::new());
    let mut call = || client.call(mix, Call::new().attributes(hot()).input(&bytes).output(&mut out, 8));
    for _ in 0..100 {
        call().unwrap();
    }
    served.stop();
    let stopped = call();
    served.go_on();
    assert!(matches!(stopped, Err(CallError::Stopped { .. })), "{stopped:?}");
    // And the one after it is served.
    for _ in 0..100 {
        call().unwrap();
    }
    testkit::Outcome::Passed
}

fn hot_callers_with_fewer_lines_than_they_are_all_come_through() -> testkit::Outcome {
    for lines in [1, 2] {
        let limits = peregrine_call::Limits { calls_in_flight: lines, ..peregrine_call::Limits::default() };
        let served = serve(|d| portals(d).limits(limits));
        let client = served.connect();
        let mix = client.portal("mix", 1).unwrap();
        std::thread::scope(|s| {
            for me in 0..3u8 {
                let client = &client;
                s.spawn(move || {
                    for i in 0..CALLS {
                        let (given, mut out) = ([4, 0, me, i as u8], Vec::new());
                        let call = Call::new().affinity(Affinity::Apart);
                        client.call(mix, call.input(&given).output(&mut out, 8)).unwrap();
                        assert_eq!(out, [me, i as u8, me, i as u8]);
                    }
                });
            }
        });
        assert_eq!(client.usage().unwrap().calls, 3 * CALLS as u64);
    }
    testkit::Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        every_call_is_what_it_says_whatever_the_one_before_was,
        threads_that_take_turns_on_one_line_are_each_themselves,
        a_caller_that_is_moved_while_hot_is_answered,
        what_runs_on_an_activation_between_calls_is_not_the_callers,
        a_domain_that_dies_while_its_callers_are_hot_is_told_of,
        a_domain_that_dies_within_a_hot_call_is_told_of,
        a_priority_is_lent_after_hot_calls_and_given_back_before_the_next,
        arguments_of_every_kind_and_size_cross_whatever_the_call_before_had,
        what_is_lent_is_what_the_client_has_now,
        an_activation_that_sleeps_holds_nothing_that_was_lent_to_it,
        what_a_call_asks_for_beyond_its_arguments_it_gets_though_the_ones_before_were_hot,
        a_hot_caller_of_a_domain_that_is_stopped_is_told,
        hot_callers_with_fewer_lines_than_they_are_all_come_through,
    ])
}
