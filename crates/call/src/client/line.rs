//! A line, from the caller's side: who may use it, and what it remembers.

use super::connection::Connection;
use crate::chain::Deadline;
use crate::header::{Header, RawHeader};
use crate::line::Words;
use crate::look::Patience;
use crate::shared::Shared;
use peregrine_base::sync::{Ordering, spin_loop};
use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Looks between two readings of the clock while spinning, and before the first.
const LOOKS: u32 = 64;

/// A buffer of the library's own, for what is too large for the line. Not a [`Buffer`](crate::Buffer), which keeps its connection alive: the
/// connection keeps this.
pub(crate) struct Spill {
    pub shared: Shared,
    pub id: u32,
}

/// One open line.
pub(crate) struct Line {
    pub index: u32,
    /// Its memory: known to who wakes its callers when the domain dies, too.
    pub shared: Arc<Shared>,
    /// The number of the last call made on it; the shared words are not asked what we did ourselves.
    pub call: u32,
    /// The header that it has; what the domain makes of its memory hurts nobody but the domain.
    header: RawHeader,
    /// The core that the caller of the last call was on.
    pub cpu: u16,
    /// Whether the last call was answered while its caller spun: see `hot.rs`.
    pub is_hot: Cell<bool>,
    /// What this side knows of looking for a reply on a shared core.
    pub patience: Cell<Patience>,
    /// Where arguments and results go that are too large for the line.
    pub spill: Option<Spill>,
    /// Bytes of the largest results that came in memory of their own.
    pub grown: usize,
    /// Read end of the pipe by which the domain tells of a reply, once one was asked for.
    pub pipe: Option<OwnedFd>,
    /// When the call under way gives up: ringing for it need not go on beyond.
    pub due: Option<Deadline>,
    /// Whether the call under way is still to be rung for: the domain had no room for the message.
    pub owes_ring: bool,
}

impl Line {
    pub fn new(index: u32, shared: Arc<Shared>) -> Box<Self> {
        Box::new(Self {
            index,
            shared,
            call: 0,
            header: RawHeader::default(),
            cpu: 0,
            is_hot: Cell::new(false),
            spill: None,
            grown: 0,
            pipe: None,
            patience: Cell::default(),
            due: None,
            owes_ring: false,
        })
    }

    #[inline]
    pub fn words(&self) -> Words<'_> {
        Words(&self.shared)
    }

    /// Says what is called, where that is not what was called last.
    #[inline(always)]
    pub fn head(&mut self, header: &Header) {
        let raw = header.raw();
        if !raw.is(&self.header) {
            raw.write(self.words());
            self.header = raw;
        }
    }

    /// Whether the reply to the last call is there (or none was made).
    #[inline]
    pub fn is_over(&self) -> bool {
        self.words().gate().is_answered(self.call)
    }

    /// Looks for the reply some times; whether it came.
    #[inline]
    pub fn look(&self) -> bool {
        (0..LOOKS).any(|_| {
            let over = self.is_over();
            if !over {
                spin_loop();
            }
            over
        })
    }

    /// Tells the domain that nobody waits any more.
    pub fn cancel(&self) {
        // Relaxed: a hint. A domain that has begun goes on.
        self.words().cancel().store(self.call, Ordering::Relaxed);
    }
}

/// A line in use by one call: goes back to its connection when dropped, as abandoned if the call is not over.
pub(crate) struct Guard<'a> {
    connection: &'a Arc<Connection>,
    line: Option<Box<Line>>,
}

impl<'a> Guard<'a> {
    pub const fn new(connection: &'a Arc<Connection>, line: Box<Line>) -> Self {
        Self { connection, line: Some(line) }
    }

    /// Puts the line back.
    #[inline]
    pub fn release(self) {}
}

impl Deref for Guard<'_> {
    type Target = Line;
    #[inline]
    fn deref(&self) -> &Line {
        self.line.as_deref().expect("a guard has its line until it is dropped")
    }
}

impl DerefMut for Guard<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut Line {
        self.line.as_deref_mut().expect("a guard has its line until it is dropped")
    }
}

impl Drop for Guard<'_> {
    #[inline]
    fn drop(&mut self) {
        if let Some(line) = self.line.take() {
            if !line.is_over() {
                line.cancel();
            }
            self.connection.put_back(line);
        }
    }
}
