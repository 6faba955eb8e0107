//! A domain that has no descriptor left (`RLIMIT_NOFILE`) says so to whoever needs one of it, serves the others, and is whole again when it has some.

#![allow(missing_docs)]

use peregrine_call::{Call, CallError, Client, Failure, Gift, Invocation, Limits, PortalId};
use peregrine_sys::rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};
use std::time::{Duration, Instant};
use testkit::Outcome;

mod scene;
use scene::{Served, serve};

/// `EMFILE`.
const NO_DESCRIPTOR: i32 = 24;
/// More than a line has room for, so that they go in a memfd.
const MANY_BYTES: usize = 1 << 20;

/// As many bytes as it is told.
fn fill(call: &mut Invocation<'_>) -> Result<(), Failure> {
    let len = u64::from_ne_bytes(call.input(0)?.try_into().unwrap());
    call.output(1)?.resize(len as usize, 7);
    Ok(())
}

fn take(call: &mut Invocation<'_>) -> Result<(), Failure> {
    call.take_given(0).map(drop)
}

fn see(call: &mut Invocation<'_>) -> Result<(), Failure> {
    call.input(0).map(drop)
}

fn get(client: &Client, portal: PortalId, bytes: usize) -> Result<Vec<u8>, CallError> {
    let mut result = Vec::new();
    let call = Call::new();
    let asked = (bytes as u64).to_ne_bytes();
    client.call(portal, call.input(&asked).output(&mut result, bytes)).map(|()| result)
}

/// What the domain's process has when those who left have been seen off.
fn settled(served: &Served) -> (usize, usize, usize) {
    loop {
        let before = served.holdings();
        std::thread::sleep(Duration::from_millis(50));
        if served.holdings() == before {
            return before;
        }
    }
}

/// Sets how many descriptors the domain's process may have; how many it might before.
fn limit_descriptors(served: &Served, count: Option<u64>) -> Option<u64> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit { current: count, maximum };
    prlimit(Pid::from_raw(served.pid), Resource::Nofile, limit).unwrap().current
}

/// Lets it have no more than it has.
fn leave_no_descriptor(served: &Served) -> Option<u64> {
    let open = |n: &u64| std::fs::symlink_metadata(format!("/proc/{}/fd/{n}", served.pid)).is_ok();
    limit_descriptors(served, (0..).find(|n| !open(n)))
}

/// The error of who needs what the domain can't make: soon, by its real name, and with what to do.
fn is_short(what: &str, begun: Instant, outcome: Result<(), CallError>) {
    let e = outcome.expect_err(what);
    assert!(begun.elapsed() < Duration::from_secs(5), "{what}: it waited: {:?}", begun.elapsed());
    assert!(matches!(&e, CallError::System { errno, .. } if errno.0 == NO_DESCRIPTOR), "{what}: {e:?}");
    let said = e.to_string();
    for word in ["the domain", "EMFILE", "RLIMIT_NOFILE"] {
        assert!(said.contains(word), "{what}: {said:?} is to say {word:?}");
    }
}

fn results_that_find_no_room_are_told_so_and_not_of_a_limit() -> Outcome {
    let served = serve(|d| d.portal("fill", 1, fill));
    let client = served.connect();
    let fill = client.portal("fill", 1).unwrap();
    assert_eq!(get(&client, fill, 10), Ok(vec![7; 10]));
    let before = settled(&served);
    let usual = leave_no_descriptor(&served);
    for _ in 0..3 {
        is_short("results", Instant::now(), get(&client, fill, MANY_BYTES).map(drop));
        assert_eq!(get(&client, fill, 10), Ok(vec![7; 10]), "what needs no descriptor is served");
    }
    assert_eq!(settled(&served), before);
    limit_descriptors(&served, usual);
    assert_eq!(get(&client, fill, MANY_BYTES), Ok(vec![7; MANY_BYTES]), "it serves on");
    Outcome::Passed
}

fn whatever_needs_a_descriptor_fails_by_its_name_and_nothing_leaks() -> Outcome {
    let served =
        serve(|d| d.activations(2).portal("fill", 1, fill).portal("take", 1, take).portal("see", 1, see));
    let client = served.connect();
    let portal = |name| client.portal(name, 1).unwrap();
    let (fill, take, see) = (portal("fill"), portal("take"), portal("see"));
    assert_eq!(get(&client, fill, 10), Ok(vec![7; 10]));
    let before = settled(&served);
    let usual = leave_no_descriptor(&served);

    let lend = || client.buffer(10_000).map(drop);
    let give = || client.call(take, Call::new().give(Gift::new(100)?));
    // The room for arguments that are too large for the line.
    let send = || client.call(see, Call::new().input(&vec![1; MANY_BYTES]));
    let start = || {
        client.start(see, Call::new().input(b"some")).and_then(|mut pending| {
            loop {
                if let Some(outcome) = pending.try_finish() {
                    return outcome;
                }
            }
        })
    };
    let connect = || Client::connect(served.path()).map(drop);
    for round in 0..3 {
        is_short("a buffer", Instant::now(), lend());
        is_short("a gift", Instant::now(), give());
        is_short("large arguments", Instant::now(), send());
        is_short("a pipe", Instant::now(), start());
        is_short("a client", Instant::now(), connect());
        assert_eq!(
            get(&client, fill, 10),
            Ok(vec![7; 10]),
            "round {round}: what needs no descriptor is served"
        );
    }
    assert_eq!(settled(&served), before);

    limit_descriptors(&served, usual);
    for again in [&lend as &dyn Fn() -> Result<(), CallError>, &give, &send, &start, &connect] {
        again().unwrap();
    }
    assert_eq!(get(&client, fill, MANY_BYTES), Ok(vec![7; MANY_BYTES]), "it serves on");
    assert!(!served.has_ended());
    Outcome::Passed
}

fn a_client_without_descriptors_is_told_that_it_is_its_own_lack() -> Outcome {
    let served = serve(|d| d.portal("fill", 1, fill));
    let usual = getrlimit(Resource::Nofile);
    for _ in 0..3 {
        let client = served.connect();
        let fill = client.portal("fill", 1).unwrap();
        assert_eq!(get(&client, fill, 10), Ok(vec![7; 10]));
        setrlimit(Resource::Nofile, Rlimit { current: Some(3), ..usual }).unwrap();
        for outcome in [
            get(&client, fill, MANY_BYTES).map(drop),
            client.buffer(100).map(drop),
            client.start(fill, Call::new()).and_then(|mut pending| {
                loop {
                    if let Some(outcome) = pending.try_finish() {
                        return outcome;
                    }
                }
            }),
        ] {
            let e = outcome.unwrap_err();
            assert!(matches!(&e, CallError::System { errno, .. } if errno.0 == NO_DESCRIPTOR), "{e:?}");
            assert!(!e.to_string().contains("the domain lacks"), "{e}");
        }
        assert_eq!(get(&client, fill, 10), Ok(vec![7; 10]), "what needs no descriptor goes on");
        setrlimit(Resource::Nofile, usual).unwrap();
        assert_eq!(get(&client, fill, MANY_BYTES), Ok(vec![7; MANY_BYTES]));
    }
    Outcome::Passed
}

fn a_line_whose_descriptor_was_lost_is_opened_again() -> Outcome {
    let served =
        serve(|d| d.limits(Limits { calls_in_flight: 1, ..Limits::default() }).portal("fill", 1, fill));
    let usual = getrlimit(Resource::Nofile);
    let client = served.connect();
    let fill = client.portal("fill", 1).unwrap();
    for round in 0..3 {
        setrlimit(Resource::Nofile, Rlimit { current: Some(3), ..usual }).unwrap();
        let e = get(&client, fill, 10).unwrap_err();
        setrlimit(Resource::Nofile, usual).unwrap();
        assert!(
            matches!(&e, CallError::System { errno, .. } if errno.0 == NO_DESCRIPTOR),
            "round {round}: {e:?}"
        );
    }
    let (_, lines, _) = served.holdings();
    assert_eq!(lines, 1, "the domain has it once");
    assert_eq!(get(&client, fill, 10), Ok(vec![7; 10]));
    assert_eq!(
        get(&client, fill, MANY_BYTES),
        Ok(vec![7; MANY_BYTES]),
        "results are known to be that line's"
    );
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        results_that_find_no_room_are_told_so_and_not_of_a_limit,
        whatever_needs_a_descriptor_fails_by_its_name_and_nothing_leaks,
        a_client_without_descriptors_is_told_that_it_is_its_own_lack,
        a_line_whose_descriptor_was_lost_is_opened_again,
    ])
}
