//! Four threads that compute with everything a thread owns: maps, statics, messages. The total is always the same.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex};

static TABLE: LazyLock<Mutex<Vec<u64>>> = LazyLock::new(|| Mutex::new(Vec::new()));

fn work(n: u64) -> u64 {
    let mut map = HashMap::new();
    let mut x = n;
    for i in 0..3_000_000u64 {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let e = map.entry(x >> 52).or_insert(0u64);
        *e = e.wrapping_add(i);
        if i % 100_000 == 0 {
            TABLE.lock().unwrap().push(x);
        }
    }
    let sum: u64 = map.values().chain(TABLE.lock().unwrap().iter()).fold(0u64, |a, b| a.wrapping_add(*b));
    println!("thread {n} on node {} sum {sum}", peregrine::node_id());
    sum
}

#[peregrine::main]
fn main() {
    println!("hello from node {} of {}", peregrine::node_id(), peregrine::node_count());
    let handles: Vec<_> = (0..4).map(|n| peregrine::spawn(work, n)).collect();
    let mut total = 0u64;
    for h in handles {
        total = total.wrapping_add(h.join().unwrap());
    }
    println!("total {total}");
}
