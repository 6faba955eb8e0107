//! Waiting for the reply.
//!
//! A caller sleeps on the line's `reply` word by a shared futex, in slices: after each it looks at its deadline, and whether the
//! domain lives. The kernel wakes nobody when a process that would have woken them dies; a slice of 10, later 50 ms bounds
//! how late that is noticed, and makes a wake-up that a hostile domain stole a delay and nothing more.
//!
//! A caller whose activation runs on another core spins first, as long as that activation says that it is awake.

use super::connection::Connection;
use super::line::{Guard, Line};
use super::transfer::Sent;
use crate::attributes::Affinity;
use crate::error::CallError;
use crate::line::{AWAKE, PARKED};
use crate::step::reach;
use peregrine_base::sync::{Ordering, fence, spin_loop};
use peregrine_sys::futex;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// The longest spin.
const SPIN: Duration = Duration::from_micros(20);
const FIRST_SLICE: Duration = Duration::from_millis(10);
const LONGEST_SLICE: Duration = Duration::from_millis(50);

/// Returns when the reply is there. After an error the call may still be under way: the line is not to be reused.
pub(crate) fn for_reply(connection: &Connection, line: &mut Guard<'_>, sent: &Sent) -> Result<(), CallError> {
    reach("client: waits");
    if sent.attributes.affinity == Affinity::Apart && spin(line) {
        return Ok(());
    }
    let words = line.words();
    if line.is_over() {
        return Ok(());
    }
    words.wait().store(PARKED, Ordering::Relaxed);
    // Pairs with the fence in `execute::answer`, between its store of `reply` and its load of `wait`.
    fence(Ordering::SeqCst);
    let mut slice = FIRST_SLICE;
    loop {
        // Acquire pairs with the domain's Release store of `reply`.
        let reply = words.reply().load(Ordering::Acquire);
        if reply == sent.call {
            return Ok(());
        }
        let nap = match sent.deadline {
            None => slice,
            Some(deadline) => deadline.left().ok_or(CallError::Deadline)?.min(slice),
        };
        futex::wait(words.reply(), reply, Some(nap.as_nanos() as u64));
        if line.is_over() {
            return Ok(());
        }
        if !connection.is_alive() {
            // It may have replied and died after we looked.
            return if line.is_over() { Ok(()) } else { Err(CallError::DomainDied) };
        }
        slice = (slice * 2).min(LONGEST_SLICE);
    }
}

/// Looks for the reply as long as the activation is awake, for a moment; whether it came.
fn spin(line: &Line) -> bool {
    let words = line.words();
    let begun = Instant::now();
    loop {
        for _ in 0..64 {
            if line.is_over() {
                return true;
            }
            spin_loop();
        }
        if words.mode().load(Ordering::Relaxed) != AWAKE || begun.elapsed() >= SPIN {
            return line.is_over();
        }
    }
}

/// Takes the bytes out of a line's pipe.
pub(crate) fn drain(pipe: impl AsFd) {
    let mut bytes = [0; 64];
    while let Ok(n) = peregrine_sys::rustix::io::read(&pipe, &mut bytes)
        && n == bytes.len()
    {}
}
