//! The entries of the World's tables: threads, channels and their ends, and what their words mean.
//!
//! An entry is found by its number ([`crate::control::record`], `channel`, `end`); who may write which word is said at the word,
//! and how it is repaired after a death in ARCHITECTURE.md.

use crate::lock::Lock;
use peregrine_base::sync::{AtomicU32, AtomicU64, AtomicUsize};

/// States of a thread.
pub mod state {
    /// The record and slot are free.
    pub const FREE: u32 = 0;
    /// May run.
    pub const RUNNABLE: u32 = 1;
    /// Runs on `node`.
    pub const RUNNING: u32 = 2;
    /// Waits to be woken.
    pub const PARKED: u32 = 3;
    /// Waits to be woken, or for `wake_at`.
    pub const SLEEPING: u32 = 4;
    /// Has ended; its result waits to be joined.
    pub const ENDED: u32 = 5;
    /// Its slot is being filled for a new thread, or emptied after the last: what lies there means nothing. Never at a safe
    /// point; a node that dies or is reset in the middle leaves it so, and a rollback then takes nothing there for granted.
    pub const IN_TRANSIT: u32 = 6;

    /// Whether a thread lives in a slot of this state.
    pub const fn is_alive(state: u32) -> bool {
        !matches!(state, FREE | ENDED | IN_TRANSIT)
    }
}

/// Bits of [`ThreadRecord::mail`].
pub mod mail {
    /// Become runnable.
    pub const WAKE: u32 = 1;
    /// Changes nodes: `node` is new.
    pub const ARRIVE: u32 = 2;
    /// Look at `move_to`.
    pub const MOVE: u32 = 4;
    /// Is on some node's inbox.
    pub const POSTED: u32 = 8;
}

/// How a thread ended.
pub mod ending {
    /// Its function returned; the result is a blob.
    pub const RETURNED: u32 = 1;
    /// It panicked; the blob is the message.
    pub const PANICKED: u32 = 2;
    /// It brought down every node it ran on.
    pub const QUARANTINED: u32 = 3;
}

/// What a thread waits for; for people.
pub mod wait {
    /// A message.
    pub const RECEIVE: u32 = 1;
    /// Another thread's end.
    pub const JOIN: u32 = 2;
    /// Time.
    pub const SLEEP: u32 = 3;
    /// An image.
    pub const CHECKPOINT: u32 = 4;
    /// Room for output.
    pub const OUTPUT: u32 = 5;
    /// A domain's process.
    pub const DOMAIN: u32 = 6;
    /// The reply to a fresh call.
    pub const CALL: u32 = 7;
}

/// One thread.
#[repr(C, align(128))]
pub struct ThreadRecord {
    /// See [`state`]. Written by the owning node.
    pub state: AtomicU32,
    /// The owning node.
    pub node: AtomicU32,
    /// See [`mail`].
    pub mail: AtomicU32,
    /// Link in an inbox.
    pub inbox_next: AtomicU32,
    /// How often this slot was used.
    pub generation: AtomicU32,
    /// Link in the free list.
    pub next_free: u32,
    /// Where somebody wants it: node, or [`NONE`].
    pub move_to: AtomicU32,
    /// Distinguishes the waits of a thread, so that a timer of an old one is not taken for a new one's.
    pub waits: AtomicU32,
    /// Deadline while SLEEPING (monotonic ns).
    pub wake_at: AtomicU64,
    /// What it waits for: [`wait`], and the channel or thread.
    pub waiting: AtomicU32,
    /// See `waiting`.
    pub waiting_on: AtomicU32,
    /// Join cell.
    pub join: Lock<JoinCell>,
    /// Moves so far.
    pub moves: AtomicU64,
    /// When it left its last node (monotonic ns); 0 once it was taken up.
    pub sent_at: AtomicU64,
    /// The outcome of its fresh call, a blob's address; 0: none has come.
    pub reply: AtomicUsize,
    /// Stack bytes.
    pub stack_bytes: AtomicU64,
    /// Bytes granted to the thread's stack and heap.
    pub granted: AtomicU64,
    /// Of a windowed thread: where its memory is kept (`windows`).
    pub stored: AtomicUsize,
    /// What it runs: body, function, argument.
    pub entry: [AtomicUsize; 3],
    /// Name, NUL-padded.
    pub name: [u8; 48],
}

/// A thread's end, and who waits for it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct JoinCell {
    /// [`ending`], 0 while it runs.
    pub how: u32,
    /// Slot of the thread that joins, or [`NONE`].
    pub joiner: u32,
    /// Nobody will join.
    pub detached: u32,
    /// The result, a blob's address, or 0.
    pub result: usize,
}

/// A channel: a queue of blobs, one receiver, many senders.
#[repr(C)]
pub struct Channel {
    /// All of it, under one lock.
    pub state: Lock<ChannelState>,
}

/// The locked part of a channel.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ChannelState {
    /// First and last blob, 0 if empty.
    pub head: usize,
    /// Last blob.
    pub tail: usize,
    /// Number of blobs.
    pub len: u32,
    /// Living senders.
    pub senders: u32,
    /// Living receivers: 1 or 0.
    pub receivers: u32,
    /// Slot of the thread waiting in `recv`, or [`NONE`].
    pub waiter: u32,
    /// Link in the free list.
    pub next_free: u32,
}

/// An end of a channel, with who holds it: so that a thread taken away by force gives back its ends.
#[repr(C)]
pub struct End {
    /// The channel.
    pub channel: AtomicU32,
    /// 0 free, 1 sender, 2 receiver.
    pub kind: AtomicU32,
    /// Slot of the holder, or [`NONE`] while it travels in a message.
    pub holder: AtomicU32,
    /// Link in the free list.
    pub next_free: u32,
}
