//! Waiting for the reply.
//!
//! A caller sleeps on the line's `reply` word by a shared futex, in slices: after each it looks at its deadline, and whether the
//! domain lives. The kernel wakes nobody when a process that would have woken them dies. A call that outlasts its first slice, of 10 ms, has its
//! domain watched by a thread (`watch.rs`), which wakes it at once; the longer slices that follow are for what that misses.
//!
//! First it looks for a moment. A caller whose activation runs on another core spins, as long as that activation says that it is awake; one whose
//! activation runs on its own core gives that core away, which is a hand-over without a sleep and a wake-up (`look.rs`).

use super::connection::Connection;
use super::line::Line;
use super::transfer::Sent;
use super::watch;
use crate::attributes::Affinity;
use crate::chain::now_ns;
use crate::error::CallError;
use crate::gate::{AWAKE, PARKED, UNBOUND};
use crate::step::reach;
use peregrine_base::sync::Ordering;
use peregrine_sys::futex;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A deadline that is nearer is not put at risk by giving the core away, which can cost a slice or two.
const NEAR: Duration = Duration::from_millis(20);
/// The longest spin.
const SPIN: Duration = Duration::from_micros(20);
/// Longer than the kernel's tick, so that the timer need not be set to something earlier for each call.
const FIRST_SLICE: Duration = Duration::from_millis(10);
/// When nobody watches.
const LONGEST_SLICE: Duration = Duration::from_millis(50);
/// When the domain is watched.
const WATCHED_SLICE: Duration = Duration::from_secs(1);

/// Returns when the reply is there. After an error the call may still be under way: the line is not to be reused.
#[inline]
pub(crate) fn for_reply(connection: &Arc<Connection>, line: &Line, sent: &Sent) -> Result<(), CallError> {
    reach("client: waits");
    let apart = sent.attributes.affinity == Affinity::Apart;
    line.is_hot.set(false);
    if shares_its_core(line, sent) {
        reach("client: looks");
        if apart {
            // When the call was sent this was a guess.
            line.ring(connection, line.words().gate().bell())?;
        }
        if share(line) {
            return Ok(());
        }
    } else if apart {
        let came = spin(connection, line)?;
        line.is_hot.set(came);
        if came {
            return Ok(());
        }
    }
    sleep(connection, line, sent)
}

/// Sleeps until the reply is there.
#[inline(never)]
fn sleep(connection: &Arc<Connection>, line: &Line, sent: &Sent) -> Result<(), CallError> {
    if line.is_over() {
        return Ok(());
    }
    let gate = line.words().gate();
    gate.doze(PARKED);
    let mut slice = FIRST_SLICE;
    loop {
        // Acquire: as in `is_answered`.
        let reply = gate.reply.load(Ordering::Acquire);
        if reply == sent.call {
            return Ok(());
        }
        let nap = match sent.deadline {
            None => slice,
            Some(deadline) => deadline.left().ok_or(CallError::Deadline)?.min(slice),
        };
        futex::wait(gate.reply, reply, Some(nap.as_nanos() as u64));
        if line.is_over() {
            return Ok(());
        }
        if !connection.is_alive() {
            // It may have replied and died after we looked.
            return if line.is_over() { Ok(()) } else { Err(CallError::DomainDied) };
        }
        if sent.deadline.is_none() {
            connection.see_whether_it_works()?;
        }
        slice = if watch::watch(connection) { WATCHED_SLICE } else { (slice * 2).min(LONGEST_SLICE) };
    }
}

/// Whether the activation runs on the caller's core, by its own word, and there is time enough for a third thread to come between.
#[inline]
fn shares_its_core(line: &Line, sent: &Sent) -> bool {
    let words = line.words();
    words.core().load(Ordering::Relaxed) == u32::from(sent.cpu) + 1
        && sent.attributes.affinity != Affinity::Anywhere
        && words.gate().mode.load(Ordering::Relaxed) != UNBOUND
        && sent.deadline.is_none_or(|deadline| deadline.left().is_some_and(|left| left > NEAR))
}

/// Gives the core to the activation until the reply is there, for a moment; whether it came.
fn share(line: &Line) -> bool {
    let mut patience = line.patience.get();
    let give_way = peregrine_sys::io::yield_now;
    let there = patience.look(SPIN.as_nanos() as u64, now_ns, give_way, || line.is_over(), || false);
    line.patience.set(patience);
    there
}

/// Looks for the reply as long as the activation is awake, for a moment; whether it came.
#[inline]
fn spin(connection: &Connection, line: &Line) -> Result<bool, CallError> {
    if line.look() {
        return Ok(true);
    }
    // When the call was sent this was a guess.
    let gate = line.words().gate();
    line.ring(connection, gate.bell())?;
    let begun = Instant::now();
    loop {
        if line.look() {
            return Ok(true);
        }
        if gate.mode.load(Ordering::Relaxed) != AWAKE || begun.elapsed() >= SPIN {
            return Ok(line.is_over());
        }
    }
}
