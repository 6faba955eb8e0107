//! Holds more than a small process has room for, says so, and waits to be killed. `holds heap|arena|slots`

use peregrine::{Builder, StackKind, region, sleep};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(600);

#[peregrine::main]
fn main() {
    let what = std::env::args().nth(1).unwrap_or_default();
    let heap: Vec<u8> = Vec::with_capacity(if what == "heap" { 400 << 20 } else { 0 });
    let arena = (what == "arena").then(|| region::create("much", 160 << 20).unwrap());
    let threads: Vec<_> = (0..if what == "slots" { 3 } else { 0 })
        .map(|_| Builder::new().kind(StackKind::Isomalloc).spawn(|_: ()| sleep(LONG), ()).unwrap())
        .collect();
    println!("holds {what}");
    sleep(LONG);
    drop((heap, arena, threads));
}
