//! The domain's half of a line, but for the words of the gate: how a call ended.

pub(crate) use crate::line::domains::{HERE, HERE_BYTES};

use crate::line::{MAX_ARGS, Words, align_argument, domains};
use peregrine_base::sync::{AtomicU64, Ordering};

/// Rows of processor time that a reply can carry.
pub(crate) const MAX_CHARGES: usize = 8;
/// The most arguments of a call with results in the half itself: the lengths of theirs have a byte each.
pub(crate) const HERE_ARGS: usize = 4;

/// How a call ended, as the domain's half says it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum Status {
    /// Results are in the line.
    Done = 1,
    /// Results are in a memfd that was sent over the socket.
    DoneElsewhere,
    /// The callee's failure: `code`, and the first length is that of the detail.
    Failed,
    /// The first length is that of the message.
    Panicked,
    /// The portal's rule says no.
    Access,
    /// No such portal.
    NoPortal,
    /// The arguments contradict themselves; `code` says how.
    Malformed,
    /// Beyond a limit: `code` says which, the first two lengths what was asked and allowed.
    TooLarge,
    /// The chain is too deep; `code` is the limit.
    Depth,
    /// No such buffer; `code` is its number.
    NoBuffer,
    /// The gift can't be sealed.
    GiftInUse,
    /// The domain gave the call up.
    Terminated,
    /// The deadline passed, or the caller gave up, before the handler began.
    Late,
    /// Results are in the domain's half itself: `code` has their lengths, a byte each. For calls of the short form.
    DoneHere,
    /// The arguments did not come, piece by piece as they were to: nothing was executed, and the caller is to send them whole. See `pieces.rs`.
    Stalled,
    /// The domain lacks memory or a descriptor: `code` is the kernel's error number, the first length what it was for.
    Short,
}

impl Status {
    #[inline]
    pub const fn from_wire(word: u32) -> Option<Self> {
        Some(match word {
            1 => Self::Done,
            2 => Self::DoneElsewhere,
            3 => Self::Failed,
            4 => Self::Panicked,
            5 => Self::Access,
            6 => Self::NoPortal,
            7 => Self::Malformed,
            8 => Self::TooLarge,
            9 => Self::Depth,
            10 => Self::NoBuffer,
            11 => Self::GiftInUse,
            12 => Self::Terminated,
            13 => Self::Late,
            14 => Self::DoneHere,
            15 => Self::Stalled,
            16 => Self::Short,
            _ => return None,
        })
    }
}

/// The domain's half but for its words.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ReplyHead {
    /// `None`: a number that stands for nothing.
    pub status: Option<Status>,
    pub code: u32,
    pub lengths: [u32; MAX_ARGS],
    pub charge_rows: u32,
}

impl ReplyHead {
    #[inline]
    pub const fn new(status: Status, code: u32) -> Self {
        Self { status: Some(status), code, lengths: [0; MAX_ARGS], charge_rows: 0 }
    }

    /// Writes it, with the lengths of `results` arguments.
    #[inline]
    pub fn write(&self, words: Words<'_>, results: usize) {
        let status = self.status.map_or(0, |s| s as u32);
        // Relaxed: published by the store to `reply` that follows.
        words
            .word64(domains::STATUS)
            .store(u64::from(status) | u64::from(self.code) << 32, Ordering::Relaxed);
        for (i, &len) in self.lengths[..results].iter().enumerate() {
            words.0.word(domains::LENGTHS + 4 * i).store(len, Ordering::Relaxed);
        }
        words.0.word(domains::CHARGE_ROWS).store(self.charge_rows, Ordering::Relaxed);
    }

    /// Writes that a call was done that has no results, and is not charged.
    #[inline(always)]
    pub fn write_done(words: Words<'_>) {
        // Relaxed: as in `write`.
        words.word64(domains::STATUS).store(Status::Done as u64, Ordering::Relaxed);
    }

    /// The lengths of the results that lie in the domain's half, if it says that the call of `args` arguments was done and has no others.
    #[inline]
    pub fn done_here(words: Words<'_>, args: usize) -> Option<Here> {
        // Relaxed: as in `read`.
        let head = words.word64(domains::STATUS).load(Ordering::Relaxed);
        match head as u32 {
            DONE if args == 0 => Some(Here(0)),
            DONE_HERE => Some(Here((head >> 32) as u32)),
            _ => None,
        }
    }

    /// A private copy, each word read once.
    #[inline]
    pub fn read(words: Words<'_>, results: usize) -> Self {
        // Relaxed: ordered by the load of `reply` that preceded.
        let head = words.word64(domains::STATUS).load(Ordering::Relaxed);
        let status = Status::from_wire(head as u32);
        // What went wrong may be told by two numbers, whatever the results were to be.
        let results = if status == Some(Status::Done) { results } else { results.max(2) };
        let mut lengths = [0; MAX_ARGS];
        for (i, len) in lengths[..results].iter_mut().enumerate() {
            *len = words.0.word(domains::LENGTHS + 4 * i).load(Ordering::Relaxed);
        }
        Self {
            status,
            code: (head >> 32) as u32,
            lengths,
            charge_rows: words.0.word(domains::CHARGE_ROWS).load(Ordering::Relaxed),
        }
    }
}

const DONE: u32 = Status::Done as u32;
const DONE_HERE: u32 = Status::DoneHere as u32;

/// Lengths of results in the domain's half, a byte each: whatever bits, if a stranger wrote them. Each lies from a multiple of 8 from
/// [`HERE`] on.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Here(pub u32);

impl Here {
    /// The length of the result that is argument `index`.
    #[inline(always)]
    pub const fn len(self, index: usize) -> usize {
        if index < HERE_ARGS { (self.0 >> (8 * index) & 0xff) as usize } else { 0 }
    }

    /// Adds the length of the result that is argument `index`, after those that end at `end`, which is moved on; `None` if there is no room.
    #[inline]
    pub fn push(&mut self, index: usize, len: usize, end: &mut usize) -> Option<()> {
        if len == 0 {
            return Some(());
        }
        *end = align_argument(*end) + len;
        if index >= HERE_ARGS || *end > HERE_BYTES {
            return None;
        }
        self.0 |= (len as u32) << (8 * index);
        Some(())
    }

    /// Says that the call was done, and that its results of these lengths lie here. They were written.
    #[inline(always)]
    pub fn write(self, words: Words<'_>) {
        // Relaxed: published by the store to `reply` that follows.
        words
            .word64(domains::STATUS)
            .store(u64::from(DONE_HERE) | u64::from(self.0) << 32, Ordering::Relaxed);
    }
}

/// One row of processor time: which domain, how many nanoseconds.
pub(crate) fn write_charge(words: Words<'_>, row: usize, domain: u64, ns: u64) {
    let at = domains::CHARGES + 16 * row.min(MAX_CHARGES - 1);
    words.word64(at).store(domain, Ordering::Relaxed);
    words.word64(at + 8).store(ns, Ordering::Relaxed);
}

/// See [`write_charge`].
pub(crate) fn read_charge(words: Words<'_>, row: usize) -> (u64, u64) {
    let at = domains::CHARGES + 16 * row.min(MAX_CHARGES - 1);
    (words.word64(at).load(Ordering::Relaxed), words.word64(at + 8).load(Ordering::Relaxed))
}

/// Processor time of the call itself.
pub(crate) fn cpu_ns(words: Words<'_>) -> &AtomicU64 {
    words.0.word64(domains::CPU_NS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_its_own_number() {
        for word in 0..64 {
            if let Some(status) = Status::from_wire(word) {
                assert_eq!(status as u32, word);
            }
        }
    }
}
