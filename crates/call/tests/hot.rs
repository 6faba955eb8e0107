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
use std::time::Duration;

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

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        every_call_is_what_it_says_whatever_the_one_before_was,
        threads_that_take_turns_on_one_line_are_each_themselves,
        a_caller_that_is_moved_while_hot_is_answered,
        what_runs_on_an_activation_between_calls_is_not_the_callers,
        a_domain_that_dies_while_its_callers_are_hot_is_told_of,
    ])
}
