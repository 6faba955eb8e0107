//! Hostile domains, briefly. `soak call` suffers them for as long as one likes.

use peregrine_call::{Affinity, Attributes, Call, CallError, Client, Deadline};
use std::time::Duration;

mod attack;
use attack::domain::{LineKind, forger, fuzz, hostile};

fn a_hostile_domain_can_neither_crash_nor_hang_its_client() -> testkit::Outcome {
    let seed = u64::from(std::process::id()) * 0x9e37;
    println!("seed {seed:#x}");
    fuzz(seed, Duration::from_secs(8));
    testkit::Outcome::Passed
}

fn memory_that_can_be_taken_away_is_refused() -> testkit::Outcome {
    // A descriptor that is no memory at all breaks the protocol before anybody asks what it was to be.
    for (kind, why) in [
        (LineKind::Unsealed, Some("a line that could be taken away again")),
        (LineKind::Short, Some("a line that could be taken away again")),
        (LineKind::NotMemory, None),
        (LineKind::Missing, Some("a line without memory")),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("domain");
        let pid = hostile(&path, 1, Some(kind));
        let client = Client::connect(&path).unwrap();
        let portal = client.portal("anything", 1).unwrap();
        let refused = client.call(portal, Call::new()).unwrap_err();
        assert!(
            matches!(refused, CallError::BadReply(said) if why.is_none_or(|why| said == why)),
            "{kind:?}: {refused:?}"
        );
        drop(client);
        attack::scene::kill(pid);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("domain");
    let pid = hostile(&path, 1, Some(LineKind::Right));
    let client = Client::connect(&path).unwrap();
    let portal = client.portal("anything", 1).unwrap();
    client.call(portal, Call::new().deadline(Deadline::after(Duration::from_secs(2)))).unwrap();
    attack::scene::kill(pid);
    testkit::Outcome::Passed
}

fn results_of_any_lengths_are_those_that_were_declared_or_an_error() -> testkit::Outcome {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("domain");
    let pid = forger(&path, u64::from(std::process::id()));
    let client = Client::connect(&path).unwrap();
    let portal = client.portal("anything", 1).unwrap();
    let attributes = Attributes { affinity: Affinity::Apart, ..Attributes::default() };
    let (mut returned, mut refused) = (0, 0);
    for i in 0..5000usize {
        let bounds = [(10, 0), (40, 0), (20, 20), (255, 255), (20, 1 << 20)][i % 5];
        let (mut out, mut inout) = (b"as before".to_vec(), b"this too".to_vec());
        let call = Call::new().attributes(attributes).input(&[1; 8]).output(&mut out, bounds.0);
        match client.call(portal, call.inout(&mut inout, bounds.1)) {
            Ok(()) => {
                returned += 1;
                assert!(out.len() <= bounds.0 && inout.len() <= bounds.1, "beyond what was declared");
                assert!(out.len() + inout.len() <= 32 << 10, "beyond the line");
                // Only what lies in the half itself is so long.
                let end = out.len().next_multiple_of(8) + inout.len();
                assert!(out.len() < 12 || end <= 40, "beyond the half: {} {}", out.len(), inout.len());
            }
            Err(CallError::BadReply(_)) => {
                refused += 1;
                assert!(
                    out == b"as before" && inout == b"this too",
                    "a reply that was refused changed something"
                );
            }
            Err(e) => panic!("{e:?}"),
        }
    }
    assert!(returned > 100 && refused > 100, "{returned} {refused}");
    drop(client);
    attack::scene::kill(pid);
    testkit::Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        a_hostile_domain_can_neither_crash_nor_hang_its_client,
        memory_that_can_be_taken_away_is_refused,
        results_of_any_lengths_are_those_that_were_declared_or_an_error,
    ])
}
