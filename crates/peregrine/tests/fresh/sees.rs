//! What a domain sees of the World that calls it: what it was given, and nothing else.

use crate::domain::{WHERE, holds, kitchen, portal};
use peregrine::{Loan, spawn};
use peregrine_call::{Call, Failure, Invocation};
use std::collections::BTreeSet;
use std::io::Read;
use std::os::unix::fs::FileExt;

/// Served as `sees`: the names of all memory of files that this process has, mapped or open, after whether the bytes whose complement is
/// argument 0 are in any of it. (Their complement, for what it was given it has.)
pub fn look(call: &mut Invocation<'_>) -> Result<(), Failure> {
    let needle: Vec<u8> = call.input(0)?.iter().map(|byte| !byte).collect();
    let (mut names, mut is_there) = (BTreeSet::new(), false);
    let mut look_at = |name: &str, bytes: &[u8]| {
        names.insert(name.trim_end_matches(" (deleted)").to_owned());
        is_there |= bytes.windows(needle.len()).any(|window| window == needle);
    };
    // Other tests' calls come and go meanwhile: what is gone when it is read is none of ours.
    let memory = std::fs::File::open("/proc/self/mem").unwrap();
    for line in std::fs::read_to_string("/proc/self/maps").unwrap().lines() {
        let Some(name) = line.find("/memfd:").map(|at| &line[at..]) else { continue };
        let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let [from, to] = [from, to].map(|at| u64::from_str_radix(at, 16).unwrap());
        let mut bytes = vec![0; (to - from) as usize];
        let read = memory.read_at(&mut bytes, from).unwrap_or(0);
        look_at(name, &bytes[..read]);
    }
    for fd in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let Ok(name) = std::fs::read_link(fd.path()) else { continue };
        let Some(name) = name.to_str().filter(|name| name.starts_with("/memfd:")) else { continue };
        let mut bytes = Vec::new();
        let _ = std::fs::File::open(fd.path()).and_then(|file| file.take(64 << 20).read_to_end(&mut bytes));
        look_at(name, &bytes);
    }
    let said: Vec<String> = names.into_iter().collect();
    call.output(1)?.extend_from_slice(format!("{is_there} {}", said.join(" ")).as_bytes());
    Ok(())
}

#[peregrine::test(program, nodes = 2, move_every_ms = 5)]
fn has_a_secret() {
    // In its heap right behind what it passes, on its stack, in the stack of another thread, and in every image.
    let secret: [u8; 64] = core::array::from_fn(|i| (i as u8).wrapping_mul(37) ^ std::process::id() as u8);
    let both = [secret.map(|byte| !byte), secret].concat();
    let sees = || {
        let said = String::from_utf8(portal("sees").call(&both[..64], 4096).unwrap()).unwrap();
        let (is_there, names) = said.split_once(' ').unwrap();
        let own = ["line", "buffer", "results", "gift"].map(|kind| format!("/memfd:peregrine-{kind}"));
        assert!(!names.is_empty() && names.split(' ').all(|name| own.iter().any(|o| o == name)), "{names}");
        is_there == "true"
    };
    // Memory of every kind: a line, room for large arguments and results, what is lent in place and copied, what is given.
    let lent = Loan::new(std::env::var(WHERE).unwrap(), 4096).unwrap();
    for round in 0..5 {
        let hidden = &both[..64];
        for len in [1, 70_000, 1 << 20] {
            portal("add").call(&hidden.repeat(len / 64), len).unwrap();
        }
        lent.write(round * 64, hidden).unwrap();
        let mut joined = Vec::new();
        let call = Call::new().input(b"z").lend(&lent).lend(lent.part(0, 64).unwrap()).lend(hidden);
        portal("joins").invoke(call.output(&mut joined, 8192)).unwrap();
        kitchen().eat(hidden, 0).unwrap();
        assert!(!sees(), "a domain sees memory of the World, round {round}");
        peregrine::migrate_to((round % 2) as u32).unwrap();
    }
    let other = spawn(|secret: Vec<u8>| portal("sees").call(&secret, 4096).unwrap(), both[..64].to_vec());
    assert!(other.join().unwrap().starts_with(b"false"));
    // That it would have been found: now it is given.
    lent.write(1000, &secret).unwrap();
    assert!(sees(), "what is given is seen");
    assert_eq!(std::hint::black_box(&secret)[1], both[65]);
}

#[test]
fn a_domain_sees_what_it_is_given_and_nothing_else_of_the_world() {
    holds(has_a_secret());
}
