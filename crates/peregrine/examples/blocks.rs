//! A thread that blocks its node: it stays where it can't be suspended. `peregrine ps` names it, with its backtrace.
//!
//! With an argument `main` does not wait for it: `runtime` for the same thread, `deaf` for one that waits in the kernel and hears no
//! signal.

use peregrine::{Sender, channel};
use std::hint::black_box;
use std::io::Read;
use std::time::Duration;

/// Never leaves the section in which the runtime may not suspend it.
#[inline(never)]
fn stay_in_the_runtime(ready: Sender<()>) {
    ready.send(&()).expect("main hears it");
    // SAFETY: a Peregrine thread runs. That nothing may take this long inside is the point of the example.
    let _section = unsafe { peregrine_thread::carrier::RuntimeSection::enter() };
    loop {
        black_box(1);
    }
}

/// Reads what nobody writes, with all signals blocked by a bare system call.
fn hear_nothing(ready: Sender<()>) {
    let (mut from, _to) = std::io::pipe().expect("a pipe");
    ready.send(&()).expect("main hears it");
    peregrine_sys::signal::set_mask(!0);
    let _ = from.read(&mut [0]);
}

#[peregrine::main]
fn main() {
    let how = std::env::args().nth(1);
    let (name, entry): (_, fn(Sender<()>)) = match how.as_deref() {
        Some("deaf") => ("deaf", hear_nothing),
        _ => ("stays", stay_in_the_runtime),
    };
    let thread = peregrine::Builder::new().name(name).node(peregrine::node_count() - 1);
    let (ready, is_ready) = channel();
    let handle = thread.spawn(entry, ready).expect("there is room");
    is_ready.recv().expect("it starts");
    if how.is_some() {
        peregrine::sleep(Duration::from_millis(100));
        println!("main is done");
        return;
    }
    handle.join().expect("it never ends");
}
