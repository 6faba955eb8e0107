//! Waiting for the pieces of a large argument (`pieces.rs`).
//!
//! ```text
//! look ──▶ awake, 100 us a piece ──▶ wanted elsewhere, or asleep for 100 ms in all? ──yes──▶ stalled: the call is refused
//!  ▲                                              │ no
//!  └──────────────────────────────────────── sleep a little
//! ```
//!
//! Both times are counted whatever comes meanwhile, so that who writes a byte now and then gets no more of them than who writes none.

use super::Inner;
use super::peer::Line;
use crate::header::Header;
use crate::pieces::{PIECE_BYTES, written};
use crate::shared::Shared;
use peregrine_base::sync::{Ordering, spin_loop};
use std::time::{Duration, Instant};

/// Looks between two readings of the clock.
const LOOKS: u32 = 64;
/// How long a piece is looked for awake: several times what the writing of one takes.
const AWAKE: Duration = Duration::from_micros(100);
/// The first sleep between two looks after that, and the longest: the activation may be wanted elsewhere meanwhile.
const LEAST_ASLEEP: Duration = Duration::from_micros(100);
const MOST_ASLEEP: Duration = Duration::from_millis(5);
/// How long a call is slept for: longer than a caller is away that others take the core from.
const PATIENCE: Duration = Duration::from_millis(100);

/// What of a call's payload is there.
pub(super) struct Arrival<'a> {
    domain: &'a Inner,
    line: &'a Line,
    /// All of it, if it does not come in pieces.
    there: u64,
    slept: Duration,
    stalled: bool,
}

impl<'a> Arrival<'a> {
    #[inline]
    pub fn of(domain: &'a Inner, line: &'a Line, header: &Header) -> Self {
        let there = if header.in_pieces { 0 } else { u64::MAX };
        Self { domain, line, there, slept: Duration::ZERO, stalled: false }
    }

    /// Whether the wait was given up.
    pub const fn has_stalled(&self) -> bool {
        self.stalled
    }

    /// Waits until `bytes` of the payload are there; false if that is given up.
    #[inline]
    pub fn until(&mut self, bytes: usize) -> bool {
        self.there >= bytes as u64 || self.wait(bytes as u64)
    }

    #[cold]
    fn wait(&mut self, bytes: u64) -> bool {
        let (mut begun, mut asleep) = (None, LEAST_ASLEEP);
        loop {
            for _ in 0..LOOKS {
                // Acquire pairs with the Release in `Line::write_pieces`: the bytes are read after this.
                self.there = written(self.line.words()).load(Ordering::Acquire);
                if self.there >= bytes {
                    return true;
                }
                spin_loop();
            }
            if begun.get_or_insert_with(Instant::now).elapsed() < AWAKE {
                continue;
            }
            // The caller does not run, or wants no piece to come.
            let (line, pool) = (self.line, &self.domain.pool);
            if line.peer.is_gone() || pool.is_closing() || pool.is_wanted_from(line) || self.slept >= PATIENCE
            {
                self.stalled = true;
                return false;
            }
            std::thread::sleep(asleep);
            self.slept += asleep;
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
