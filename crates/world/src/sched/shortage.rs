//! What is done before anybody is told that memory is used up: threads that wait are packed at once, not after a while.
//!
//! Most of a World's memory may be that of threads which wait, as they were when they began to; packed, it is a few hundred bytes.
//! They are packed by the scheduler, for which a thread that asks makes way.

use super::in_thread;
use super::switch::reschedule;
use crate::arena::OutOfMemory;
use crate::control::world;
use crate::local::Action;
use peregrine_base::sync::Ordering;
use peregrine_thread::arch;

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

/// Has the scheduler pack some threads that wait; whether it did.
fn make_room() -> bool {
    let packed = || world().packed[0].load(Ordering::Relaxed);
    let before = packed();
    let asked = in_thread(|_| {
        let words = arch::ControlWords::aside();
        // SAFETY: a thread runs, in a runtime section.
        unsafe { reschedule(Action::Room) };
        drop(words);
    });
    asked.is_some() && packed() != before
}
