//! What a domain knows of one client: who it is, its lines, its buffers, and what it has used.

use super::ended::Ended;
use super::pool::FREE_LINE;
use crate::credentials::Credentials;
use crate::line::Words;
use crate::memory::Lendable;
use crate::shared::Shared;
use peregrine_base::sync::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

/// A connected client.
pub(crate) struct Peer {
    /// Its key in the keeper's table; never used again in this domain's life.
    pub token: u64,
    pub credentials: Credentials,
    pub socket: OwnedFd,
    /// For each portal, whether this client may call it: the rules are asked once, for credentials don't change.
    pub may_call: Vec<bool>,
    /// It hung up, died, or broke the protocol.
    pub gone: Ended,
    /// Lines with a call that wait because the client works with as many activations as it may.
    pub aside: AtomicUsize,
    pub lines: Mutex<Vec<Arc<Line>>>,
    pub buffers: Mutex<Buffers>,
    pub cpu_ns: AtomicU64,
}

/// What a client has registered.
#[derive(Default)]
pub(crate) struct Buffers {
    pub lent: HashMap<u32, Arc<Lendable>>,
    pub gifts: HashMap<u32, (OwnedFd, usize)>,
    pub total_bytes: u64,
    next: u32,
}

impl Buffers {
    /// A number for a new one; 0 means none and is never given out.
    pub fn number(&mut self) -> u32 {
        loop {
            self.next = self.next.wrapping_add(1);
            if self.next != 0 && !self.lent.contains_key(&self.next) && !self.gifts.contains_key(&self.next) {
                return self.next;
            }
        }
    }

    pub fn count(&self) -> usize {
        self.lent.len() + self.gifts.len()
    }
}

impl Peer {
    #[inline]
    pub fn is_gone(&self) -> bool {
        self.gone.has()
    }

    pub fn lock_buffers(&self) -> std::sync::MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn lock_lines(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Line>>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls executed.
    pub fn calls(&self) -> u64 {
        self.lock_lines().iter().map(|line| line.calls.load(Ordering::Relaxed)).sum()
    }

    /// Marks it gone and lets go of all it had here, but for lines that an activation still serves: those go with it.
    pub fn leave(&self) -> Vec<Arc<Line>> {
        self.gone.end();
        *self.lock_buffers() = Buffers::default();
        std::mem::take(&mut *self.lock_lines())
    }
}

/// A line, from the domain's side.
pub(crate) struct Line {
    pub peer: Arc<Peer>,
    pub index: u32,
    pub shared: Shared,
    /// The number of the last call that was served; the shared words are not asked what we did ourselves.
    pub served: AtomicU32,
    /// Calls executed on it: written by the activation that has it, as `served`, so that counting needs no locked instruction.
    pub calls: AtomicU64,
    /// Whether an activation has it, or it waits for one; changed under the pool's lock only.
    pub binding: AtomicU32,
    /// Whether its client says that its memory never came.
    pub lost: AtomicBool,
    /// The write end of the line's pipe, ours alone and non-blocking, for callers that wait by `poll`.
    pub pipe: Mutex<Option<OwnedFd>>,
}

impl Line {
    #[inline(always)]
    pub const fn words(&self) -> Words<'_> {
        Words(&self.shared)
    }

    /// Whether it can be given out anew: its client says that it has not got it, and no activation has.
    pub fn is_lost(&self) -> bool {
        let is_free = self.binding.load(Ordering::Relaxed) == FREE_LINE;
        self.lost.load(Ordering::Relaxed) && is_free && self.calls.load(Ordering::Relaxed) == 0
    }

    /// The number of a call that was not served yet.
    #[inline]
    pub fn pending(&self) -> Option<u32> {
        let call = self.words().gate().called();
        // Relaxed: ours alone, or handed over with the binding.
        (call != self.served.load(Ordering::Relaxed)).then_some(call)
    }
}

/// Writes one byte to a line's pipe, and never waits: a pipe that is full has rung already.
pub(crate) fn notify(line: &Line) {
    let pipe = line.pipe.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pipe) = &*pipe {
        let _ = peregrine_sys::rustix::io::write(pipe, &[1]);
    }
}
