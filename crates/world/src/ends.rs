//! Channel ends and channels.
//!
//! Each sender and receiver is an *end*: an entry that names its channel and its holder. An end that travels in a blob has
//! no holder; who takes the blob adopts it; a blob that is dropped unread releases its ends. So a channel always knows how
//! many senders live, and when a thread is taken away by force its ends can be found and released.

use crate::arena::{self, Blob, OutOfMemory};
use crate::control::{ChannelState, End, NONE, channel, end, end_link, imaged, wait};
use crate::killpoint::{Point, at};
use crate::room::room;
use crate::sched::{self, LacksMemory};
use peregrine_base::sync::Ordering;

/// Which end of a channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Kind {
    /// Sends.
    Sender = 1,
    /// Receives.
    Receiver = 2,
}

/// Why nothing was sent.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub enum PushError {
    /// The receiver is gone.
    #[error("the receiver is gone")]
    Closed,
    /// No room for the message.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
}

impl LacksMemory for PushError {
    fn lacks_memory(&self) -> bool {
        matches!(self, Self::Memory(_))
    }
}

fn channel_link(i: u32) -> *mut u32 {
    // SAFETY: only the address is computed; a free channel is used by nobody but the list.
    channel(i).state_ptr(|s| &raw mut s.next_free)
}

impl crate::control::Channel {
    fn state_ptr(&self, f: impl FnOnce(&mut ChannelState) -> *mut u32) -> *mut u32 {
        self.state.with(f)
    }
}

/// Makes a channel and its two ends, held by the thread in `holder`.
pub fn make_channel(holder: u32) -> Option<(u32, u32)> {
    let ch = imaged().channels.with(|l| l.take(room().channels(), channel_link))?;
    at(Point::ChannelTaken);
    channel(ch).state.with(|s| {
        *s = ChannelState {
            head: 0,
            tail: 0,
            len: 0,
            senders: 0,
            receivers: 0,
            waiter: NONE,
            next_free: NONE,
        };
    });
    at(Point::ChannelReset);
    let tx = make_end(ch, Kind::Sender, holder);
    let rx = make_end(ch, Kind::Receiver, holder);
    at(Point::ChannelMade);
    match (tx, rx) {
        (Some(tx), Some(rx)) => Some((tx, rx)),
        (Some(e), None) | (None, Some(e)) => {
            release(e);
            None
        }
        (None, None) => None,
    }
}

/// One more end of channel `ch`.
pub fn make_end(ch: u32, kind: Kind, holder: u32) -> Option<u32> {
    let e = imaged().ends.with(|l| l.take(room().ends(), end_link))?;
    at(Point::EndTaken);
    let entry = end(e);
    entry.channel.store(ch, Ordering::Relaxed);
    entry.holder.store(holder, Ordering::Relaxed);
    entry.kind.store(kind as u32, Ordering::Release);
    at(Point::EndSet);
    channel(ch).state.with(|s| match kind {
        Kind::Sender => s.senders += 1,
        Kind::Receiver => s.receivers += 1,
    });
    at(Point::EndCounted);
    Some(e)
}

/// Gives up end `e`. The last sender wakes the receiver; the receiver drops what is queued; the last end frees the channel.
pub fn release(e: u32) {
    let entry: &End = end(e);
    let (ch, kind) = (entry.channel.load(Ordering::Relaxed), entry.kind.swap(0, Ordering::AcqRel));
    if kind == 0 {
        return;
    }
    at(Point::EndUnset);
    imaged().ends.with(|l| l.give(e, end_link));
    at(Point::EndGiven);
    let (mut queue, waiter, last) = channel(ch).state.with(|s| {
        if kind == Kind::Sender as u32 {
            s.senders -= 1
        } else {
            s.receivers -= 1
        }
        at(Point::CloseCounted);
        let queue = if s.receivers == 0 { core::mem::replace(&mut s.head, 0) } else { 0 };
        if queue != 0 {
            at(Point::CloseUnqueued);
            (s.tail, s.len) = (0, 0);
        }
        let waiter = if s.senders == 0 { core::mem::replace(&mut s.waiter, NONE) } else { NONE };
        (queue, waiter, s.senders == 0 && s.receivers == 0)
    });
    if waiter != NONE {
        at(Point::CloseWakes);
        // SAFETY: in a section, or in the supervisor.
        unsafe { sched::wake(waiter) };
    }
    if last {
        imaged().channels.with(|l| l.give(ch, channel_link));
        at(Point::CloseFreed);
    }
    while queue != 0 {
        // SAFETY: taken off its queue above.
        let next = unsafe { (*(queue as *const Blob)).next };
        release_blob(queue);
        at(Point::CloseQueue);
        queue = next;
    }
}

/// Drops a blob that nobody will read.
pub fn release_blob(blob: usize) {
    // SAFETY: the caller took it off its queue. The list is copied before the blob goes.
    unsafe {
        let mut i = 0;
        while let Some(e) = arena::ends_of(blob).get(i).copied() {
            release(e);
            i += 1;
        }
        arena::free(blob);
    }
}

/// Makes `holder` the holder of `list`.
pub fn adopt(list: &[u32], holder: u32) {
    for e in list {
        end(*e).holder.store(holder, Ordering::Relaxed);
        at(Point::EndAdopted);
    }
}

/// Appends a message to the channel of end `e`.
pub fn push(e: u32, bytes: &[u8], list: &[u32]) -> Result<(), PushError> {
    let ch = end(e).channel.load(Ordering::Relaxed);
    let blob = arena::write(bytes, list)?;
    at(Point::PushWritten);
    let waiter = channel(ch).state.with(|s| {
        if s.receivers == 0 {
            return Err(PushError::Closed);
        }
        if s.tail == 0 {
            s.head = blob;
        } else {
            // SAFETY: the tail is queued in this channel, whose lock is held.
            unsafe { (*(s.tail as *mut Blob)).next = blob };
        }
        at(Point::PushLinked);
        s.tail = blob;
        s.len += 1;
        at(Point::PushCounted);
        Ok(core::mem::replace(&mut s.waiter, NONE))
    });
    match waiter {
        Ok(NONE) => Ok(()),
        Ok(w) => {
            at(Point::PushUnlocked);
            // SAFETY: in a section.
            unsafe { sched::wake(w) };
            Ok(())
        }
        Err(why) => {
            // The ends stay with the caller, who releases them with the message.
            // SAFETY: never queued.
            unsafe { arena::free(blob) };
            Err(why)
        }
    }
}

/// What a receive came to.
#[derive(Debug)]
pub enum Pop {
    /// A message: bytes and channel ends.
    Message(Vec<u8>, Vec<u32>),
    /// Nothing there, and senders live.
    Empty,
    /// Nothing there, and nobody will send.
    Closed,
}

/// Takes the oldest message of end `e`'s channel; waits for one until `deadline` (ns; 0: for ever; 1: not at all).
pub fn pop(e: u32, me: u32, deadline: u64) -> Pop {
    let ch = end(e).channel.load(Ordering::Relaxed);
    let wait_at_all = deadline != 1;
    loop {
        let taken = channel(ch).state.with(|s| {
            if s.head == 0 {
                if s.senders == 0 {
                    return Err(Pop::Closed);
                }
                if wait_at_all {
                    s.waiter = me;
                    at(Point::PopWaits);
                }
                return Err(Pop::Empty);
            }
            let blob = s.head;
            // SAFETY: queued in this channel, whose lock is held.
            s.head = unsafe { (*(blob as *const Blob)).next };
            at(Point::PopUnlinked);
            if s.head == 0 {
                s.tail = 0;
            }
            s.len -= 1;
            at(Point::PopCounted);
            Ok(blob)
        });
        match taken {
            Ok(blob) => {
                // SAFETY: just taken off its queue.
                let (bytes, list) = unsafe { arena::take(blob) };
                at(Point::PopTaken);
                adopt(&list, me);
                return Pop::Message(bytes, list);
            }
            Err(Pop::Empty) if wait_at_all => {
                // SAFETY: in a section.
                if unsafe { !sched::park(deadline, wait::RECEIVE, ch) } && deadline != 0 {
                    // One last look, without waiting.
                    channel(ch).state.with(|s| {
                        if s.waiter == me {
                            s.waiter = NONE;
                        }
                    });
                    return pop(e, me, 1);
                }
            }
            Err(other) => return other,
        }
    }
}

/// Releases every end that the thread in `slot` holds.
pub fn release_all_of(slot: u32) {
    let used = imaged().ends.with(|l| l.used);
    for e in 0..used {
        let entry = end(e);
        if entry.kind.load(Ordering::Relaxed) != 0 && entry.holder.load(Ordering::Relaxed) == slot {
            release(e);
        }
    }
}
