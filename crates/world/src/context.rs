//! What a thread can ask of the runtime about itself.

use crate::control::{NONE, imaged, is_domain, record, request, wait, world};
use crate::killpoint::{Point, at};
use crate::local::{Action, local};
use crate::sched::{self, in_thread};
use crate::thread::{self, ThreadId};
use peregrine_base::sync::Ordering;
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::carrier::carrier;
use std::time::Duration;

/// Lets other threads of this node run.
pub fn yield_now() {
    in_thread(|_| {
        // SAFETY: in a section.
        unsafe { sched::yield_to_next() }
    });
}

/// Parks the thread for at least `time`; its node runs others meanwhile.
pub fn sleep(time: Duration) {
    let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 2);
    sleep_until(monotonic_ns().saturating_add(ns));
}

/// Parks until the monotonic clock shows `deadline` (ns).
pub fn sleep_until(deadline: u64) {
    let deadline = deadline.max(1);
    in_thread(|_| {
        while monotonic_ns() < deadline {
            // SAFETY: in a section. A stray wake-up only makes the loop look again.
            unsafe { sched::park(deadline, wait::SLEEP, 0) };
        }
    });
}

/// The node that the thread runs on now; it may change at any instruction. During a carried call it is the domain's number, which
/// lies beyond the nodes'.
pub fn node_id() -> u32 {
    // SAFETY: in a section, on a node.
    in_thread(|_| unsafe { carrier() }.node).unwrap_or(0)
}

/// Number of nodes.
pub fn node_count() -> u32 {
    world().node_count.load(Ordering::Relaxed)
}

/// The running thread; `None` outside of any.
pub fn current() -> Option<ThreadId> {
    in_thread(|slot| ThreadId { slot, generation: record(slot).generation.load(Ordering::Relaxed) })
}

/// Why a thread stayed where it was.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum MoveError {
    /// No such node.
    #[error("there is no node {asked}: this World has nodes 0 to {last}")]
    NoNode {
        /// The node asked for.
        asked: u32,
        /// The highest there is.
        last: u32,
    },
    /// The call came from outside.
    #[error("not in a Peregrine thread: start the program with #[peregrine::main]")]
    NoThread,
    /// The thread is on a carried call, and belongs to that domain until the closure returns.
    #[error("a thread can't leave a carried call: return from the closure first")]
    Carried,
}

/// Moves the running thread to `node`; the call returns there.
///
/// # Errors
/// [`MoveError`].
pub fn migrate_to(node: u32) -> Result<(), MoveError> {
    let count = node_count();
    if node >= count {
        return Err(MoveError::NoNode { asked: node, last: count.saturating_sub(1) });
    }
    in_thread(|_| {
        // SAFETY: in a section, on a node.
        if is_domain(unsafe { carrier() }.node) {
            return Err(MoveError::Carried);
        }
        // SAFETY: as above.
        unsafe { go_to(node) };
        Ok(())
    })
    .unwrap_or(Err(MoveError::NoThread))
}

/// Moves the running thread to `node`, which may be a domain.
///
/// # Safety
/// In a runtime section of the running thread; the node exists.
pub(crate) unsafe fn go_to(node: u32) {
    // SAFETY: as promised.
    unsafe {
        if carrier().node != node {
            at(Point::MoveAsked);
            if !sched::lend(carrier(), local(), node) {
                sched::announce(carrier().current.load(Ordering::Relaxed), node);
            }
            let words = peregrine_thread::arch::ControlWords::aside();
            sched::reschedule(Action::Move(node));
            drop(words);
        }
    }
}

/// Waits until an image has been taken that includes this call: whatever fails after it, the program goes on from here or
/// later. With a store the image is on disk when the call returns. Returns the image's sequence number.
pub fn checkpoint() -> u64 {
    in_thread(|_| {
        // The first image after this one holds this very wait; `committed` says when it is safe.
        let from = imaged().sequence.load(Ordering::Acquire);
        imaged().checkpoints_asked.fetch_add(1, Ordering::Relaxed);
        at(Point::CheckpointAsked);
        loop {
            let done = world().committed.load(Ordering::Acquire);
            if done > from {
                return done;
            }
            // It is woken for other reasons too, and one that asks again must not get an image of whatever it does by then.
            world().image_wanted.fetch_max(from + 1, Ordering::Release);
            thread::notify(request::CHECKPOINT);
            // SAFETY: in a section. The supervisor wakes all that wait so after each commit.
            unsafe { sched::park(monotonic_ns() + 50_000_000, wait::CHECKPOINT, NONE) };
        }
    })
    .unwrap_or(0)
}

/// Moves to the next node; `false` if there is no other.
pub(crate) fn next_node() -> bool {
    let count = node_count();
    count > 1 && migrate_to((node_id() + 1) % count).is_ok()
}
