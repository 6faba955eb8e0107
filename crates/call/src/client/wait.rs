//! Waiting for the reply.
//!
//! A caller sleeps on the line's `reply` word by a shared futex, in slices: after each it looks at its deadline, and whether the
//! domain lives. The kernel wakes nobody when a process that would have woken them dies; a slice of 10, later 50 ms bounds
//! how late that is noticed, and makes a wake-up that a hostile domain stole a delay and nothing more.
//!
//! A caller whose activation runs on another core spins first, as long as that activation says that it is awake.
//! A thread of a runtime blocks its OS thread only as long as a switch would take, then parks by way of the line's pipe.

use super::connection::Connection;
use super::line::{Guard, Line};
use super::transfer::Sent;
use crate::attributes::Affinity;
use crate::error::CallError;
use crate::line::{AWAKE, NOTIFY, PARKED};
use crate::runtime::{self, CallerRuntime};
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
    if let Some(runtime) = runtime::of_caller() {
        return park(connection, line, sent, runtime);
    }
    let words = line.words();
    if sent.attributes.affinity == Affinity::Apart {
        words.wait().store(PARKED, Ordering::Relaxed);
        // Pairs with the fence in `execute::answer`, between its store of `reply` and its load of `wait`.
        fence(Ordering::SeqCst);
    }
    let mut slice = FIRST_SLICE;
    loop {
        // Acquire pairs with the domain's Release store of `reply`.
        let reply = words.reply().load(Ordering::Acquire);
        if reply == sent.call {
            return Ok(());
        }
        let (nap, last) = nap(sent, slice)?;
        let begun = last.then(Instant::now);
        futex::wait(words.reply(), reply, Some(nap.as_nanos() as u64));
        let _ = begun;
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

/// How long to sleep, and whether the deadline is what ends it.
fn nap(sent: &Sent, slice: Duration) -> Result<(Duration, bool), CallError> {
    match sent.deadline {
        None => Ok((slice, false)),
        Some(deadline) => {
            let left = deadline.left().ok_or(CallError::Deadline)?;
            Ok((left.min(slice), left <= slice))
        }
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

/// Waits as a thread of a runtime.
fn park(
    connection: &Connection,
    line: &mut Guard<'_>,
    sent: &Sent,
    runtime: &dyn CallerRuntime,
) -> Result<(), CallError> {
    let short = Duration::from_micros(u64::from(runtime.worth_us()));
    let words = line.words();
    words.wait().store(PARKED, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    let reply = words.reply().load(Ordering::Acquire);
    if reply == sent.call {
        return Ok(());
    }
    futex::wait(words.reply(), reply, Some(nap(sent, short)?.0.as_nanos() as u64));
    if line.is_over() {
        return Ok(());
    }
    if line.pipe.is_none() {
        let pipe = connection.open_pipe(line.index, sent.deadline)?;
        line.pipe = Some(pipe);
    }
    line.words().wait().store(NOTIFY, Ordering::Relaxed);
    // Pairs with the fence in `execute::answer`: either it sees NOTIFY and writes a byte, or we see the reply.
    fence(Ordering::SeqCst);
    loop {
        if line.is_over() {
            if let Some(pipe) = &line.pipe {
                drain(pipe);
            }
            return Ok(());
        }
        if sent.deadline.is_some_and(|d| d.left().is_none()) {
            return Err(CallError::Deadline);
        }
        if !connection.is_alive() {
            return if line.is_over() { Ok(()) } else { Err(CallError::DomainDied) };
        }
        if let Some(pipe) = &line.pipe {
            runtime.wait(pipe.as_fd(), sent.deadline);
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
