//! A thread that holds one of each kind of value that ordinary Rust has, and works with all of them.

use peregrine::{Receiver, channel, spawn, tally};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::collections::HashMap;
use std::panic::{catch_unwind, panic_any};
use std::process::Command;
use std::rc::Rc;
use std::sync::{LazyLock, Mutex};
use std::time::Instant;

static TABLE: LazyLock<Mutex<Vec<String>>> = LazyLock::new(|| Mutex::new(vec!["first".into()]));
thread_local! {
    static PLAIN: Cell<u64> = const { Cell::new(7) };
    static DROPPED: Cell<u64> = const { Cell::new(0) };
}

/// Counts itself when it is dropped.
struct Counted(u64);

impl Drop for Counted {
    fn drop(&mut self) {
        DROPPED.set(DROPPED.get().wrapping_add(self.0));
    }
}

/// Waits, with what it holds, until its channel closes: what it dropped then.
fn waits((from, seed): (Receiver<u8>, u64)) -> u64 {
    let held: Vec<Rc<Counted>> = (0..3).map(|i| Rc::new(Counted(seed + i))).collect();
    assert!(from.recv().is_err(), "nothing is sent");
    drop(held);
    DROPPED.get()
}

#[inline(never)]
fn captures_where_it_is() -> Backtrace {
    std::hint::black_box(Backtrace::force_capture())
}

/// Has a program say a number, and reads it. What was under way when its node was killed is lost, the program and what it had said, which
/// the standard library does not expect of them: it panics, or finds nothing said. Then it is started again.
fn said_by_a_child(what: u64) -> u64 {
    let child = || Command::new("echo").arg(what.to_string()).output();
    loop {
        let said = catch_unwind(child).ok().and_then(Result::ok);
        let number = said.and_then(|said| String::from_utf8(said.stdout).ok()?.trim().parse().ok());
        match number {
            Some(number) => return number,
            None => assert!(tally().rollbacks > 0, "a program that nobody disturbed said nothing"),
        }
    }
}

/// A bit of everything, with a checksum that one process alone would give; `pause` is called at each of its 300 steps.
pub fn everything(seed: u64, pause: impl Fn(u64)) -> u64 {
    let mut x = seed | 1;
    let mut step = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    // Panics with a number are part of the game.
    std::panic::set_hook(Box::new(|info| {
        if info.payload().downcast_ref::<u64>().is_none() {
            eprintln!("{info}");
        }
    }));
    let (to, from) = channel();
    let waiting = spawn(waits, (from, seed));
    let (mut seeded, mut twin) = (StdRng::seed_from_u64(seed), StdRng::seed_from_u64(seed));
    let first_random: u64 = rand::rng().random();
    let mut latest = Instant::now();
    let trace = captures_where_it_is();
    let mut map: HashMap<u64, Rc<String>> = HashMap::new();
    let mut list: Vec<Box<dyn Fn(u64) -> u64>> = Vec::new();
    let mut sum = 0u64;
    let mut f = 1.0f64;
    for i in 0..300u64 {
        let r = step();
        map.insert(r % 50, Rc::new(format!("{r} {i}")));
        list.push(Box::new(move |y| y.rotate_left((r % 63) as u32) ^ r));
        if list.len() > 20 {
            drop(list.swap_remove((r % 20) as usize));
        }
        f = (f * 1.000_1 + (r % 7) as f64).sin() + 2.0;
        TABLE.lock().unwrap().push(format!("{i}"));
        PLAIN.set(PLAIN.get().wrapping_mul(31).wrapping_add(r));
        let caught = catch_unwind(|| {
            let _counted = Counted(r % 1000);
            if r % 5 == 0 { panic_any(r) } else { r + 1 }
        });
        sum = sum.wrapping_add(caught.unwrap_or_else(|p| *p.downcast::<u64>().unwrap()));
        sum = list.iter().fold(sum, |s, g| g(s));
        for _ in 0..20 {
            let part: String = map.get(&(step() % 50)).map_or(String::new(), |s| s.chars().rev().collect());
            sum = sum.wrapping_add(part.bytes().map(u64::from).sum::<u64>());
        }
        sum = sum.wrapping_add(seeded.random::<u64>());
        twin.random::<u64>();
        assert_ne!(rand::rng().random::<u64>(), first_random, "the same random number again");
        let now = Instant::now();
        assert!(now >= latest, "the clock went back");
        latest = now;
        if i == 150 {
            sum = sum.wrapping_add(said_by_a_child(r));
        }
        pause(i);
    }
    assert_eq!(seeded, twin, "generators of one seed");
    if seed % 1000 == 1 {
        let text = trace.to_string();
        assert!(text.contains("captures_where_it_is"), "{text}");
    }
    drop(to);
    let dropped = waiting.join().unwrap();
    assert_eq!(dropped, 3 * seed + 3, "what a thread dropped that had waited all the time");
    let keys: u64 = map.iter().fold(0, |a, (k, v)| a ^ k.wrapping_mul(v.len() as u64));
    sum ^ keys ^ f.to_bits() ^ PLAIN.get() ^ DROPPED.get() ^ TABLE.lock().unwrap().len() as u64
}
