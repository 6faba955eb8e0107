//! What is done before anybody is told that memory is used up: threads that wait are packed at once, not after a while.
//!
//! Most of a World's memory may be that of threads which wait, as they were when they began to; packed, it is a few hundred bytes.
//! They are packed by the scheduler, for which a thread that asks makes way. A node packs no threads but its own: where it has none, the
//! others are told that room is wanted ([`want_room`]), and do so for a while.

use super::switch::reschedule;
use super::{in_thread, nudge};
use crate::arena::OutOfMemory;
use crate::context;
use crate::control::world;
use crate::local::Action;
use peregrine_base::sync::Ordering;
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::arch;
use peregrine_thread::carrier::carrier;
use std::time::Duration;

/// How often memory is made room for a single request: a large one may find none however many threads are packed, and others
/// begin to wait all the time.
const MOST_ROUNDS: usize = 4096;

/// Runs `ask` in a runtime section, as [`in_thread`] does, and again each time that it finds no memory and a thread could be packed.
pub fn with_room<T, E: LacksMemory>(mut ask: impl FnMut(u32) -> Result<T, E>) -> Option<Result<T, E>> {
    let mut rounds = 0;
    loop {
        match in_thread(&mut ask)? {
            Err(e) if e.lacks_memory() && rounds < MOST_ROUNDS && make_room() => rounds += 1,
            outcome => return Some(outcome),
        }
    }
}

/// An error that may say that memory is used up.
pub trait LacksMemory {
    /// Whether it does.
    fn lacks_memory(&self) -> bool;
}

impl LacksMemory for OutOfMemory {
    fn lacks_memory(&self) -> bool {
        true
    }
}

/// How long others pack threads once somebody has asked.
const WANTED_FOR_NS: u64 = 20_000_000;

/// Has all other nodes pack idle threads at once, for a while.
pub fn want_room(me: u32) {
    let w = world();
    w.room_wanted_until.store(monotonic_ns() + WANTED_FOR_NS, Ordering::Relaxed);
    for other in (0..w.node_count.load(Ordering::Relaxed)).filter(|i| *i != me) {
        nudge(other);
    }
}

/// Has some threads packed that wait, here or, in a moment, elsewhere; whether any were.
fn make_room() -> bool {
    let packed = || world().packed[0].load(Ordering::Relaxed);
    let before = packed();
    let here = in_thread(|_| {
        let words = arch::ControlWords::aside();
        // SAFETY: a thread runs, in a runtime section.
        unsafe { reschedule(Action::Room) };
        drop(words);
    });
    if here.is_none() || packed() != before {
        return here.is_some();
    }
    // SAFETY: a thread runs, so this is a node.
    in_thread(|_| want_room(unsafe { carrier() }.node));
    let deadline = monotonic_ns() + WANTED_FOR_NS;
    while packed() == before && monotonic_ns() < deadline {
        context::sleep(Duration::from_millis(1));
    }
    packed() != before
}
