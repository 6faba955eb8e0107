//! A thread that blocks its node: it stays where it can't be suspended. `peregrine ps` names it, with its backtrace.

use std::hint::black_box;

/// Never leaves the section in which the runtime may not suspend it.
#[inline(never)]
fn stay_in_the_runtime(_: ()) {
    // SAFETY: a Peregrine thread runs. That nothing may take this long inside is the point of the example.
    let _section = unsafe { peregrine_thread::carrier::RuntimeSection::enter() };
    loop {
        black_box(1);
    }
}

#[peregrine::main]
fn main() {
    let thread = peregrine::Builder::new().name("stays").node(peregrine::node_count() - 1);
    let handle = thread.spawn(stay_in_the_runtime, ()).expect("there is room");
    handle.join().expect("it never ends");
}
