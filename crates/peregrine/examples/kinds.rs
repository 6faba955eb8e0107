//! Threads of all three kinds that wait for each other in a ring, each with something of its own in all that it owns: something to
//! kill and resume. `kinds [ROUNDS]`
use peregrine::{Builder, Receiver, Sender, StackKind, channel};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

static COUNT: AtomicU64 = AtomicU64::new(0);
thread_local! { static LOCAL: Cell<u64> = const { Cell::new(0) }; }

/// Threads in the ring.
const STATIONS: u64 = 24;

/// The stack protector's canary, which C code compares before it returns: it belongs to the thread, in whatever process it runs.
fn canary() -> u64 {
    let canary: u64;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a word of the thread's control block.
    unsafe {
        std::arch::asm!("mov {}, fs:[0x28]", out(reg) canary, options(nostack, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        canary = 0;
    }
    canary
}

fn station((seed, from, to): (u64, Receiver<u64>, Sender<u64>)) {
    let deep: [u64; 300] = std::array::from_fn(|i| seed + i as u64);
    let heap: BTreeMap<u64, String> = (0..30).map(|i| (i, format!("{seed}/{i}"))).collect();
    let first = canary();
    COUNT.store(seed, Ordering::Relaxed);
    LOCAL.set(seed);
    for token in from.iter() {
        let sum = std::hint::black_box(&deep).iter().sum::<u64>();
        assert_eq!(sum, 300 * seed + 300 * 299 / 2);
        assert!(heap.iter().all(|(i, s)| *s == format!("{seed}/{i}")));
        assert_eq!(COUNT.fetch_add(1, Ordering::Relaxed), LOCAL.get());
        LOCAL.set(LOCAL.get() + 1);
        assert_eq!(canary(), first, "a thread keeps its canary");
        // Some are found asleep, not waiting for a message.
        if token % 7 == seed % 7 {
            peregrine::sleep(Duration::from_millis(1));
        }
        let next = token.wrapping_mul(6364136223846793005).wrapping_add(seed * LOCAL.get());
        if to.send(&next).is_err() {
            break;
        }
    }
}

#[peregrine::main]
fn main() {
    let rounds = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(50);
    let (first, mut last) = channel::<u64>();
    for seed in 0..STATIONS {
        let (to, from) = channel();
        let from = std::mem::replace(&mut last, from);
        let kind = StackKind::ALL[seed as usize % 3];
        Builder::new()
            .kind(kind)
            .node(seed as u32 % peregrine::node_count())
            .spawn(station, (seed, from, to))
            .unwrap();
    }
    let mut token = 1;
    for round in 0..rounds {
        first.send(&token).unwrap();
        token = last.recv().unwrap();
        println!("round {round} {token:x}");
        // Long enough for all of them to be packed.
        if round % 4 == 0 {
            peregrine::sleep(Duration::from_millis(20));
        }
    }
}
