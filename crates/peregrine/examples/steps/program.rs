//! What the examples `steps` and `fixed` run.

use std::collections::BTreeMap;

fn work((n, rounds): (u64, u64)) -> u64 {
    let mut map: BTreeMap<u64, String> = BTreeMap::new();
    let mut x = n + 1;
    for step in 0..rounds {
        for _ in 0..1_000 {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            map.insert(x >> 50, format!("{x:x}"));
        }
        let sum =
            map.values().flat_map(|s| s.bytes()).fold(0u64, |a, b| a.wrapping_mul(31).wrapping_add(b.into()));
        if n == 0 {
            println!("step {step} sum {sum:x}");
        }
        x ^= sum;
    }
    x
}

/// Three threads that print and compute for a while, for the rounds that the command line names.
pub fn run() {
    let rounds = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(200);
    let handles: Vec<_> = (0..3).map(|n| peregrine::spawn(work, (n, rounds))).collect();
    for h in handles {
        println!("result {:x}", h.join().unwrap());
    }
}
