//! Starting a thread and waiting for it; a message there and back.

use super::{CPU, in_world, middle, quiet_world, rounds};
use crate::measure::{Options, versus};
use crate::report::Report;
use peregrine_sys::process::pin_to_cpu;
use peregrine_world::{Builder, Receiver, Sender, channel, spawn};
use std::io::{Read, Write};
use std::sync::mpsc;
use std::time::Instant;

const SAMPLES: usize = 15;
const TURNS: usize = 1000;
const SPAWNS: usize = 50;

pub fn run(report: &mut Report, options: &Options) {
    report.section("Spawn and join, messages, us");
    let row = |case: &str, ours: &str, baseline: &str, of: &str| {
        if options.wants(case) {
            let pair = versus(rounds(options, 7), || middle(ours), || middle(of));
            report.pair(case, "round", "us", baseline, SAMPLES, &pair);
        }
    };
    row("spawn and join, one node", "spawn", "std::thread, one processor", "os-spawn");
    row("message there and back, one node", "ping one", "std mpsc, one processor", "os-ping one");
    row("message there and back, one node", "ping one", "pipes, one processor", "pipe-ping one");
    row("message there and back, two nodes", "ping two", "std mpsc, two processors", "os-ping two");
    row("message there and back, two nodes", "ping two", "pipes, two processors", "pipe-ping two");
}

pub fn case(name: &str, words: &[&str]) -> bool {
    let two = words.contains(&"two");
    match name {
        "spawn" => {
            let _ = pin_to_cpu(CPU);
            in_world(quiet_world(1), start, "");
        }
        "os-spawn" => {
            let _ = pin_to_cpu(CPU);
            samples(SPAWNS, || drop(std::thread::spawn(|| 7u64).join()));
        }
        "ping" => {
            if !two {
                let _ = pin_to_cpu(CPU);
            }
            in_world(quiet_world(1 + u32::from(two)), ping, words[0]);
        }
        "os-ping" => os_ping(two),
        "pipe-ping" => pipe_ping(two),
        _ => return false,
    }
    true
}

/// Prints microseconds of each `f`, `times` at a time.
fn samples(times: usize, mut f: impl FnMut()) {
    for _ in 0..times {
        f();
    }
    for _ in 0..SAMPLES {
        let begun = Instant::now();
        for _ in 0..times {
            f();
        }
        println!("{}", begun.elapsed().as_nanos() as f64 / 1000.0 / times as f64);
    }
}

fn start(_: &str) {
    samples(SPAWNS, || assert_eq!(spawn(|n: u64| n, 7).join().expect("its result"), 7));
}

fn ping(place: &str) {
    let two = place == "two";
    let (to, there) = channel::<u64>();
    let (back, from) = channel::<u64>();
    if two {
        let _ = pin_to_cpu(0);
    }
    let echo = |(there, back, two): (Receiver<u64>, Sender<u64>, bool)| {
        if two {
            let _ = pin_to_cpu(1);
        }
        while let Ok(n) = there.recv() {
            if back.send(&n).is_err() {
                return;
            }
        }
    };
    let echo = Builder::new().node(u32::from(two)).spawn(echo, (there, back, two)).expect("a thread");
    samples(TURNS, || {
        to.send(&7).expect("a receiver");
        assert_eq!(from.recv().expect("a message"), 7);
    });
    drop(to);
    echo.join().expect("no panic");
}

fn os_ping(two: bool) {
    let _ = pin_to_cpu(CPU);
    let (to, there) = mpsc::channel::<u64>();
    let (back, from) = mpsc::channel::<u64>();
    let echo = std::thread::spawn(move || {
        if two {
            let _ = pin_to_cpu(0);
        }
        while let Ok(n) = there.recv() {
            if back.send(n).is_err() {
                return;
            }
        }
    });
    samples(TURNS, || {
        to.send(7).expect("a receiver");
        assert_eq!(from.recv().expect("a message"), 7);
    });
    drop(to);
    let _ = echo.join();
}

fn pipe_ping(two: bool) {
    let _ = pin_to_cpu(CPU);
    let (mut there, mut to) = std::io::pipe().expect("a pipe");
    let (mut from, mut back) = std::io::pipe().expect("a pipe");
    let echo = std::thread::spawn(move || {
        if two {
            let _ = pin_to_cpu(0);
        }
        let mut word = [0u8; 8];
        while there.read_exact(&mut word).is_ok() && back.write_all(&word).is_ok() {}
    });
    let mut word = [7u8; 8];
    samples(TURNS, || {
        to.write_all(&word).expect("a reader");
        from.read_exact(&mut word).expect("a writer");
    });
    drop(to);
    let _ = echo.join();
}
