//! The caller's half of a line, but for the words of the gate: what is called, on whose behalf, and how.

use crate::attributes::Affinity;
use crate::chain::{ChainId, Deadline};
use crate::line::{Words, callers};
use crate::short::Short;
use peregrine_base::sync::Ordering;

/// The caller's half but for its words: what is called, on whose behalf, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub portal: u32,
    pub args: u8,
    pub charge: bool,
    pub priority: bool,
    pub affinity: Affinity,
    pub deadline: Option<Deadline>,
    pub chain: ChainId,
    pub depth: u32,
    pub cpu: u16,
    pub nice: i8,
    pub payload_bytes: u32,
    /// The caller's buffer that holds payload and results, if they are too large for the line; 0 if not.
    pub spill: u32,
    /// The arguments, of a call of the short form: which has neither deadline nor spill, and whose payload's size follows from them.
    pub short: Option<Short>,
    /// Whether the payload is still being written when the call is published: see `pieces.rs`.
    pub in_pieces: bool,
}

const CHARGE: u64 = 1 << 8;
const PRIORITY: u64 = 1 << 9;
const SHORT: u64 = 1 << 10;
const IN_PIECES: u64 = 1 << 11;

impl Header {
    #[inline(always)]
    pub fn raw(&self) -> RawHeader {
        let affinity = match self.affinity {
            Affinity::Together => 0,
            Affinity::Apart => 1,
            Affinity::Anywhere => 2u64,
        };
        let mut flags = u64::from(self.args) | affinity << 16;
        if self.charge {
            flags |= CHARGE;
        }
        if self.priority {
            flags |= PRIORITY;
        }
        if self.short.is_some() {
            flags |= SHORT;
        }
        if self.in_pieces {
            flags |= IN_PIECES;
        }
        let payload = u64::from(self.payload_bytes) | u64::from(self.spill) << 32;
        let [deadline, payload] = match self.short {
            Some(short) => short.to_wire(),
            None => [Deadline::to_wire(self.deadline), payload],
        };
        let place = u64::from(self.depth) | u64::from(self.cpu) << 32 | u64::from(self.nice as u8) << 48;
        let target = u64::from(self.portal) | flags << 32;
        RawHeader([target, deadline, self.chain.0[0], self.chain.0[1], place, payload])
    }

    /// What the words of a private copy say. Any bits make a header; what they mean is checked by the domain.
    pub fn of(raw: RawHeader) -> Self {
        let [target, deadline, chain_a, chain_b, place, payload] = raw.0;
        let flags = target >> 32;
        let args = flags as u8;
        let short = (flags & SHORT != 0).then(|| Short::from_wire([deadline, payload]));
        Self {
            portal: target as u32,
            args,
            charge: flags & CHARGE != 0,
            priority: flags & PRIORITY != 0,
            affinity: match flags >> 16 & 0xff {
                0 => Affinity::Together,
                1 => Affinity::Apart,
                _ => Affinity::Anywhere,
            },
            deadline: if short.is_some() { None } else { Deadline::from_wire(deadline) },
            chain: ChainId([chain_a, chain_b]),
            depth: place as u32,
            cpu: (place >> 32) as u16,
            nice: (place >> 48) as u8 as i8,
            payload_bytes: short.map_or(payload as u32, |short| short.payload_bytes(args)),
            spill: if short.is_some() { 0 } else { (payload >> 32) as u32 },
            short,
            in_pieces: flags & IN_PIECES != 0 && short.is_none(),
        }
    }
}

/// The words of a header: a private copy, for whoever has the line. By default those of new memory.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct RawHeader([u64; 6]);

/// Where they lie.
const PLACES: [usize; 6] = [
    callers::TARGET,
    callers::DEADLINE,
    callers::CHAIN[0],
    callers::CHAIN[1],
    callers::PLACE,
    callers::PAYLOAD,
];

impl RawHeader {
    /// Each word is read once.
    #[inline(always)]
    pub fn read(words: Words<'_>) -> Self {
        // Relaxed: ordered by the load of `call` that preceded.
        Self(PLACES.map(|at| words.word64(at).load(Ordering::Relaxed)))
    }

    #[inline(always)]
    pub fn write(&self, words: Words<'_>) {
        for (at, word) in PLACES.into_iter().zip(self.0) {
            // Relaxed: published by the store to `call` that follows.
            words.word64(at).store(word, Ordering::Relaxed);
        }
    }

    /// Whether they are the same, by a comparison without a branch for each.
    #[inline(always)]
    pub fn is(&self, other: &Self) -> bool {
        let ([a, b, c, d, e, f], o) = (self.0, &other.0);
        (a ^ o[0]) | (b ^ o[1]) | (c ^ o[2]) | (d ^ o[3]) | (e ^ o[4]) | (f ^ o[5]) == 0
    }
}
