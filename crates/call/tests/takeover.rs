//! Domains that start at once on one path: exactly one is there afterwards, and each of the others was told.

use peregrine_call::{Call, Client, Domain, DomainError, Invocation};
use peregrine_sys::process::{self, ForkFlags, Forked};
use peregrine_sys::rustix;
use std::os::fd::OwnedFd;
use std::path::Path;
use testkit::Outcome;

mod scene;

const AT_ONCE: usize = 16;
const ROUNDS: usize = 25;

/// Starts a process that waits for a byte from `start`, and then tries to serve `path`: it says by `says` what came of it.
fn contender(path: &Path, start: &OwnedFd, says: &OwnedFd) -> i32 {
    // SAFETY: this process has one thread.
    match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
        Forked::Parent(pid) => pid,
        Forked::Child => {
            process::die_with_parent();
            let mut byte = [0];
            rustix::io::read(start, &mut byte).unwrap();
            let domain = Domain::builder()
                .activations(1)
                .portal("who", 1, |call: &mut Invocation<'_>| {
                    call.output(0)?.extend_from_slice(&process::pid().to_ne_bytes());
                    Ok(())
                })
                .serve(path);
            let word: &[u8] = match &domain {
                Ok(_) => b"w",
                Err(DomainError::PathInUse(_)) => b"u",
                Err(_) => b"?",
            };
            rustix::io::write(says, word).unwrap();
            if domain.is_err() {
                process::exit_now(0);
            }
            loop {
                std::thread::park();
            }
        }
    }
}

fn exactly_one_of_many_takes_over_a_dead_domains_path() -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("domain");
    for round in 0..ROUNDS {
        let (ready, go) = rustix::pipe::pipe().unwrap();
        let (said, says) = rustix::pipe::pipe().unwrap();
        let pids: Vec<i32> = (0..AT_ONCE).map(|_| contender(&path, &ready, &says)).collect();
        drop(says);
        rustix::io::write(&go, &[1; AT_ONCE]).unwrap();
        let mut words = Vec::new();
        while words.len() < AT_ONCE {
            let mut some = [0; AT_ONCE];
            let n = rustix::io::read(&said, &mut some).unwrap();
            assert!(n > 0, "round {round}: some ended without a word, after {words:?}");
            words.extend_from_slice(&some[..n]);
        }
        let count = |word| words.iter().filter(|&&w| w == word).count();
        assert_eq!((count(b'w'), count(b'u')), (1, AT_ONCE - 1), "round {round}");
        let client = Client::connect(&path).unwrap();
        let mut who = Vec::new();
        client.call(client.portal("who", 1).unwrap(), Call::new().output(&mut who, 4)).unwrap();
        let winner = i32::from_ne_bytes(who.try_into().unwrap());
        assert!(pids.contains(&winner), "round {round}");
        // Killed, so that the next round finds what a dead domain left.
        pids.into_iter().for_each(scene::kill);
        let left = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(left, 1, "round {round}: nothing but the path is left");
    }
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![exactly_one_of_many_takes_over_a_dead_domains_path])
}
