//! Typed channels between threads: many senders, one receiver, unbounded but for the World's memory.
//!
//! A message is serialised into World memory and read into the receiver's own heap: threads share nothing. Ends may be sent
//! in messages, passed to [`spawn`](crate::spawn) and returned; a channel is closed when its last sender or its receiver is
//! gone, whether dropped or lost with a thread that was quarantined.

use crate::arena::OutOfMemory;
use crate::control::end;
use crate::ends::{self, Kind, Pop, PushError};
use crate::killpoint::{Point, at};
use crate::sched::{in_thread, with_room};
use crate::transit;
use peregrine_base::sync::Ordering;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};
use std::cell::Cell;
use std::marker::PhantomData;
use std::time::Duration;

/// Makes a channel for messages of type `T`.
///
/// # Panics
/// Outside a Peregrine thread, and when the World's tables are full (a million channels).
///
/// # Examples
/// ```no_run
/// let (tx, rx) = peregrine_world::channel::<String>();
/// tx.send(&"hello".to_owned()).unwrap();
/// assert_eq!(rx.recv().unwrap(), "hello");
/// ```
pub fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let (tx, rx) = in_thread(ends::make_channel)
        .expect("channel() was called outside a Peregrine thread: start the program with #[peregrine::main]")
        .expect("the World has room for a million channels, and all are taken");
    (Sender { end: tx, of: PhantomData }, Receiver { end: Cell::new(rx), of: PhantomData })
}

/// The sending end of a channel; clone it for more senders.
#[derive(Debug)]
pub struct Sender<T> {
    end: u32,
    of: PhantomData<fn(T)>,
}

/// The receiving end of a channel.
#[derive(Debug)]
pub struct Receiver<T> {
    /// `u32::MAX` once it was sent away.
    end: Cell<u32>,
    of: PhantomData<fn() -> T>,
}

/// Why a message was not sent.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum SendError {
    /// The receiver was dropped, or its thread is gone.
    #[error("the receiver of this channel is gone")]
    Closed,
    /// World memory is used up.
    #[error(transparent)]
    Memory(OutOfMemory),
    /// The message can't be serialised.
    #[error("the message can't be serialised: {0}")]
    Message(String),
}

/// Why no message was received.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum RecvError {
    /// The queue is empty and every sender is gone.
    #[error("every sender of this channel is gone")]
    Closed,
    /// Nothing came in time.
    #[error("no message came in time")]
    Timeout,
    /// The message can't be read as the type expected.
    #[error("the message can't be deserialised: {0}")]
    Message(String),
}

impl<T: Serialize> Sender<T> {
    /// Appends a message. It never waits.
    ///
    /// # Errors
    /// [`SendError`]; the message is dropped then, and any channel ends in it are given up.
    pub fn send(&self, message: &T) -> Result<(), SendError> {
        let (bytes, list) = transit::pack(message).map_err(|e| SendError::Message(e.to_string()))?;
        let sent = with_room(|_| ends::push(self.end, &bytes, &list)).unwrap_or(Err(PushError::Closed));
        sent.map_err(|e| {
            transit::release(&list);
            match e {
                PushError::Closed => SendError::Closed,
                PushError::Memory(m) => SendError::Memory(m),
            }
        })
    }
}

impl<T> Clone for Sender<T> {
    /// # Panics
    /// When the World's table of four million ends is full.
    fn clone(&self) -> Self {
        let e =
            in_thread(|me| ends::make_end(end(self.end).channel.load(Ordering::Relaxed), Kind::Sender, me))
                .flatten()
                .expect("the World has room for four million channel ends, and all are taken");
        Self { end: e, of: PhantomData }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        in_thread(|_| ends::release(self.end));
    }
}

impl<T: DeserializeOwned> Receiver<T> {
    /// Waits for the next message.
    ///
    /// # Errors
    /// [`RecvError::Closed`] once the queue is empty and every sender gone; [`RecvError::Message`].
    pub fn recv(&self) -> Result<T, RecvError> {
        self.take(0)
    }

    /// Takes the next message if there is one: `Err(Timeout)` if not.
    ///
    /// # Errors
    /// As [`Receiver::recv`].
    pub fn try_recv(&self) -> Result<T, RecvError> {
        self.take(1)
    }

    /// Waits for the next message no longer than `limit`.
    ///
    /// # Errors
    /// As [`Receiver::recv`], and [`RecvError::Timeout`].
    pub fn recv_timeout(&self, limit: Duration) -> Result<T, RecvError> {
        let limit = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX / 2);
        self.take(peregrine_sys::timer::monotonic_ns().saturating_add(limit).max(2))
    }

    /// Messages until the channel is closed.
    pub fn iter(&self) -> impl Iterator<Item = T> + '_ {
        std::iter::from_fn(|| self.recv().ok())
    }

    fn take(&self, deadline: u64) -> Result<T, RecvError> {
        match in_thread(|me| ends::pop(self.end.get(), me, deadline)) {
            Some(Pop::Message(bytes, list)) => {
                transit::unpack(&bytes, list).map_err(|e| RecvError::Message(e.to_string()))
            }
            Some(Pop::Empty) => Err(RecvError::Timeout),
            Some(Pop::Closed) | None => Err(RecvError::Closed),
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        if self.end.get() != u32::MAX {
            in_thread(|_| ends::release(self.end.get()));
        }
    }
}

const OUTSIDE: &str = "a channel end can be serialised only into a message, an argument or a result";

impl<T> Serialize for Sender<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        use serde::ser::Error;
        let ch = end(self.end).channel.load(Ordering::Relaxed);
        let place = in_thread(|_| ends::make_end(ch, Kind::Sender, u32::MAX))
            .flatten()
            .and_then(|e| {
                transit::send_end(e).or_else(|| {
                    transit::release(&[e]);
                    None
                })
            })
            .ok_or_else(|| S::Error::custom(OUTSIDE))?;
        s.serialize_u32(place)
    }
}

impl<'de, T> Deserialize<'de> for Sender<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let place = u32::deserialize(d)?;
        let end = transit::take_end(place).ok_or_else(|| D::Error::custom("no channel end at this place"))?;
        Ok(Self { end, of: PhantomData })
    }
}

impl<T> Serialize for Receiver<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        use serde::ser::Error;
        // There is one receiver: this end itself travels, and the value left behind is empty.
        let e = self.end.get();
        let place = (e != u32::MAX)
            .then(|| transit::send_end(e))
            .flatten()
            .ok_or_else(|| S::Error::custom(OUTSIDE))?;
        self.end.set(u32::MAX);
        in_thread(|_| {
            end(e).holder.store(u32::MAX, Ordering::Relaxed);
            at(Point::EndTravels);
        });
        s.serialize_u32(place)
    }
}

impl<'de, T> Deserialize<'de> for Receiver<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let place = u32::deserialize(d)?;
        let end = transit::take_end(place).ok_or_else(|| D::Error::custom("no channel end at this place"))?;
        Ok(Self { end: Cell::new(end), of: PhantomData })
    }
}
