//! A World around one typed function, and what a program can ask about its World.

use crate::control::world;
use crate::error::SpawnError;
use crate::spawn;
use crate::{Config, Ended, WorldError};
use peregrine_base::sync::Ordering;
use serde::{Serialize, de::DeserializeOwned};

/// Runs `entry(argument)` as the first thread of a World of its own, until it returns.
///
/// The argument is serialised on the way in and the result on the way out, as in [`spawn`](crate::spawn()). What the
/// function returned is in [`Ended::value`].
///
/// # Errors
/// [`WorldError`]: the World could not be made, or lost what it stands on.
///
/// # Panics
/// If the process has more than one thread: nodes are forked from it.
pub fn run_with<A, R>(config: Config, entry: fn(A) -> R, argument: &A) -> Result<Ended, WorldError>
where
    A: Serialize + DeserializeOwned,
    R: Serialize + DeserializeOwned,
{
    let bytes = postcard::to_allocvec(argument).map_err(|e| SpawnError::Argument(e.to_string()))?;
    crate::run(config, body::<A, R>, entry as usize, &bytes)
}

/// The body of a main thread that returns a value: exit code 0, then the value.
fn body<A, R>(function: usize, bytes: Vec<u8>, ends: Vec<u32>) -> Result<(Vec<u8>, Vec<u32>), String>
where
    A: DeserializeOwned,
    R: Serialize,
{
    let (value, ends) = spawn::body::<A, R>(function, bytes, ends)?;
    let mut result = Vec::with_capacity(value.len() + 1);
    result.push(0);
    result.extend_from_slice(&value);
    Ok((result, ends))
}

impl Ended {
    /// What the function given to [`run_with`] returned; `None` if it panicked, was stopped, ended the process itself,
    /// or returned something else.
    pub fn value<R: DeserializeOwned>(&self) -> Option<R> {
        postcard::from_bytes(self.result.get(1..)?).ok()
    }
}

/// What has happened in this World so far. It only grows: a rollback of the threads does not take it back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Nodes killed on purpose.
    pub kills: u64,
    /// Of those, how many ran a thread.
    pub kills_hit: u64,
    /// Threads that moved from one node to another.
    pub moves: u64,
    /// Of those, how many took a running thread from its computation.
    pub preempted_moves: u64,
    /// Times that the timer took a node from its thread.
    pub preemptions: u64,
    /// Times that all threads went back to the last image.
    pub rollbacks: u64,
    /// Whether the World was resumed from disk: then these are the counts since.
    pub resumed: bool,
}

/// What has been done with idle threads so far: see [`packing`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packing {
    /// Threads packed.
    pub packed: u64,
    /// Bytes that these took then, all together: what a thread holds, compressed, and what is told of it.
    pub packed_bytes: u64,
    /// Threads unpacked again.
    pub unpacked: u64,
}

/// How often threads of the calling thread's World were packed, and unpacked again, so far. Nothing of it is taken back by a rollback.
///
/// # Panics
/// Outside a Peregrine thread.
pub fn packing() -> Packing {
    assert!(crate::current().is_some(), "packing() was called outside a Peregrine thread");
    let w = world();
    Packing {
        packed: w.packed[0].load(Ordering::Relaxed),
        packed_bytes: w.packed_bytes.load(Ordering::Relaxed),
        unpacked: w.packed[1].load(Ordering::Relaxed),
    }
}

/// What windows have cost so far: how often a thread was put into a window of alias threads, and into one of copy threads, in the
/// calling thread's World; and how often the statics window's owner was saved, in its present node (pauses save it too). A thread
/// that finds its window as it left it adds nothing.
///
/// # Panics
/// Outside a Peregrine thread.
pub fn window_costs() -> [u64; 3] {
    assert!(crate::current().is_some(), "window_costs() was called outside a Peregrine thread");
    let of = |kind: usize| world().nodes.iter().map(|n| n.window_entries[kind].load(Ordering::Relaxed)).sum();
    // SAFETY: a thread runs on a node, whose carrier is mapped; one word of it, that changes between two threads only, is read.
    let statics = unsafe { (&raw const peregrine_thread::carrier::carrier().window_saves).read_volatile() };
    [of(0), of(1), statics]
}

/// The [`Tally`] of the calling thread's World.
///
/// # Panics
/// Outside a Peregrine thread.
pub fn tally() -> Tally {
    assert!(crate::current().is_some(), "tally() was called outside a Peregrine thread");
    let w = world();
    Tally {
        kills: w.kills[0].load(Ordering::Relaxed),
        kills_hit: w.kills[1].load(Ordering::Relaxed),
        moves: w.nodes.iter().map(|n| n.arrivals.load(Ordering::Relaxed)).sum(),
        preempted_moves: w.nodes.iter().map(|n| n.preempted_moves.load(Ordering::Relaxed)).sum(),
        preemptions: w.nodes.iter().map(|n| n.preemptions.load(Ordering::Relaxed)).sum(),
        rollbacks: w.rollbacks.load(Ordering::Relaxed),
        resumed: w.resumed.load(Ordering::Relaxed),
    }
}
