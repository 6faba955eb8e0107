//! Waiting for the pieces of a large argument (`pieces.rs`).

use super::Inner;
use super::peer::Line;
use crate::header::Header;
use crate::pieces::{PIECE_BYTES, written};
use crate::shared::Shared;
use peregrine_base::sync::{Ordering, spin_loop};
use std::time::{Duration, Instant};

/// Looks between two readings of the clock.
const LOOKS: u32 = 64;
/// How long the next piece is looked for awake: several times what the writing of one takes.
const AWAKE: Duration = Duration::from_micros(100);
/// The longest sleep between two looks after that.
const MOST_ASLEEP: Duration = Duration::from_millis(10);

/// What of a call's payload is there.
pub(super) struct Arrival<'a> {
    domain: &'a Inner,
    line: &'a Line,
    /// All of it, if it does not come in pieces.
    there: u64,
    gave_up: bool,
}

impl<'a> Arrival<'a> {
    #[inline]
    pub fn of(domain: &'a Inner, line: &'a Line, header: &Header) -> Self {
        Self { domain, line, there: if header.in_pieces { 0 } else { u64::MAX }, gave_up: false }
    }

    /// Whether the wait was given up: the call is as it was, for whoever takes it up.
    pub const fn gave_up(&self) -> bool {
        self.gave_up
    }

    /// Waits until `bytes` of the payload are there; false if that is given up.
    #[inline]
    pub fn until(&mut self, bytes: usize) -> bool {
        self.there >= bytes as u64 || self.wait(bytes as u64)
    }

    fn look(&mut self) -> bool {
        // Acquire pairs with the caller's Release: the bytes are read after this.
        let now = written(self.line.words()).load(Ordering::Acquire);
        let more = now > self.there;
        self.there = self.there.max(now);
        more
    }

    #[cold]
    fn wait(&mut self, bytes: u64) -> bool {
        let (mut since, mut asleep) = (None, Duration::from_micros(100));
        loop {
            for _ in 0..LOOKS {
                if self.look() {
                    since = None;
                }
                if self.there >= bytes {
                    return true;
                }
                spin_loop();
            }
            if since.get_or_insert_with(Instant::now).elapsed() < AWAKE {
                continue;
            }
            // The caller does not run, or wants no piece to come.
            let (domain, line) = (self.domain, self.line);
            if line.peer.is_gone() || domain.pool.is_closing() || domain.pool.is_wanted_from(line) {
                self.gave_up = true;
                return false;
            }
            std::thread::sleep(asleep);
            asleep = (asleep * 2).min(MOST_ASLEEP);
        }
    }

    /// Appends `len` bytes at `begin` of `memory`, whose payload begins at `payload_at`, as they come. `None`: there are none such, or it was
    /// given up.
    #[inline]
    pub fn append(
        &mut self,
        memory: &Shared,
        payload_at: usize,
        (begin, len): (usize, usize),
        into: &mut Vec<u8>,
    ) -> Option<()> {
        if self.there == u64::MAX {
            return memory.append_to(begin, len, into);
        }
        if begin.checked_add(len)? > memory.len_bytes() {
            return None;
        }
        into.reserve(len);
        for at in (begin..begin + len).step_by(PIECE_BYTES) {
            let len = PIECE_BYTES.min(begin + len - at);
            if !self.until(at + len - payload_at) {
                return None;
            }
            memory.append_to(at, len, into)?;
        }
        Some(())
    }
}
