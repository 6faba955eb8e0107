//! Threads in every state that `peregrine ps` tells of: one waits for a message, one sleeps, one has ended, and some
//! compute. `poses [COMPUTE]`

use peregrine::{Builder, Receiver, channel};
use std::hint::black_box;
use std::time::Duration;

fn hears(from: Receiver<u32>) {
    // Its sender lives, and says nothing.
    let _ = from.recv();
}

fn sleeps(_: ()) {
    peregrine::sleep(Duration::from_secs(3600));
}

fn works(_: ()) {
    loop {
        black_box(1);
    }
}

#[peregrine::main]
fn main() {
    let count: u32 = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(1);
    let (_to, from) = channel();
    let hears = Builder::new().name("hears").spawn(hears, from).expect("there is room");
    for i in 0..count {
        Builder::new().name(format!("works {i}")).spawn(works, ()).expect("there is room");
    }
    let _ended = Builder::new().name("ended").spawn(|_: ()| 7, ()).expect("there is room");
    Builder::new().name("sleeps").spawn(sleeps, ()).expect("there is room");
    hears.join().expect("it never ends");
}
