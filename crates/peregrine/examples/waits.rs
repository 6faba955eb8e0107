//! Threads that wait for what others do outside of them: for room for output, an image, the reply of a domain that says nothing, and the
//! process of a domain; and one that is inside a domain. `waits output`, `waits call SOCKET`, `waits domain FILE [FILE]`: it is set up when
//! the first file is there, and opened when the second is.

use peregrine::{Builder, Portal, TrustedDomain, checkpoint, sleep};
use std::path::Path;
use std::time::Duration;

/// More than the World keeps of what nobody reads.
fn writes(_: ()) {
    let line = "x".repeat(1 << 10);
    loop {
        println!("{line}");
    }
}

/// While output is stuck there are no images.
fn asks(_: ()) {
    sleep(Duration::from_millis(500));
    loop {
        checkpoint();
    }
}

fn calls(socket: String) {
    loop {
        let _ = Portal::new(&socket, "any", 1).call(b"", 0);
    }
}

/// Returns when the file is there.
fn set_up_when_told() {
    let file = std::env::args().nth(2).expect("a file");
    while !Path::new(&file).exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn enters(_: ()) {
    while std::env::args().nth(3).is_some_and(|file| !Path::new(&file).exists()) {
        sleep(Duration::from_millis(5));
    }
    let domain = TrustedDomain::open("slow", set_up_when_told).expect("it is set up");
    let stay = || loop {
        std::hint::black_box(1);
    };
    domain.run(stay).expect("it stays inside")
}

fn start<A: serde::Serialize + serde::de::DeserializeOwned + 'static>(name: &str, entry: fn(A), argument: A) {
    let _ = Builder::new().name(name).spawn(entry, argument).expect("there is room");
}

#[peregrine::main]
fn main() {
    let mut args = std::env::args().skip(1);
    match args.next().as_deref() {
        Some("output") => {
            start("writes", writes, ());
            start("asks", asks, ());
        }
        Some("call") => start("calls", calls, args.next().expect("a socket")),
        _ => start("enters", enters, ()),
    }
    sleep(Duration::from_secs(3600));
}
