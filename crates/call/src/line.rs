//! A line: the piece of shared memory that one call at a time passes through, and what lies where in it.
//!
//! ```text
//! 0x000 caller's half  call   wait  portal/args/flags  deadline  chain  depth/cpu/nice  payload  cancel  alerts
//! 0x040 domain's half  reply  mode  status/code        cpu_ns    result lengths ×8      charge rows  core
//! 0x080 descriptors of the arguments, 24 bytes each ×8
//! 0x140 charge rows: (domain, ns) ×8
//! 0x1c0 payload: bytes of `in` and `inout` arguments, and of lent ones that are in no buffer, each from a multiple of 8
//!       results: from the next multiple of 64 after the payload, in the order of the arguments
//! ```
//!
//! That is the general form. Most calls have the *short* one (`short.rs`): descriptors in the header, in the words of deadline and payload;
//! the payload from 0x080 on; and results, if there are few bytes of them, in the domain's half itself, from 0x050 on.
//!
//! Its first two words on each side are the gate, by which the line is handed to and fro: `gate.rs`.
//!
//! **Nobody relies on it.** Both halves are writable by both processes; the domain keeps its own count of what it served, the
//! caller its own count of what it asked, and each copies the other's half once and checks the copy. A peer that scribbles can
//! at worst make the other sleep through a wake-up. A caller's sleep is bounded by its deadline, and by slices after which it looks
//! whether the domain lives; an activation's ends when the keeper recalls it, by a signal if need be.

use crate::attributes::Affinity;
use crate::chain::{ChainId, Deadline};
use crate::gate::Gate;
use crate::shared::Shared;
use crate::short::Short;
use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering};

/// Arguments that one call may have.
pub(crate) const MAX_ARGS: usize = 8;

const CALL: usize = 0x00;
const WAIT: usize = 0x04;
const TARGET: usize = 0x08;
const DEADLINE: usize = 0x10;
const CHAIN: [usize; 2] = [0x18, 0x20];
const PLACE: usize = 0x28;
const PAYLOAD: usize = 0x30;
const CANCEL: usize = 0x38;
const REPLY: usize = 0x40;
const MODE: usize = 0x44;
const STATUS: usize = 0x48;
const CPU_NS: usize = 0x50;
const LENGTHS: usize = 0x58;
const CHARGE_ROWS: usize = 0x78;
const CORE: usize = 0x7c;
const DESCRIPTORS: usize = 0x80;
const CHARGES: usize = 0x140;
/// Where the payload begins in a line's own memory.
pub(crate) const PAYLOAD_AT: usize = 0x1c0;
/// The same for a call of the short form.
pub(crate) const SHORT_PAYLOAD_AT: usize = 0x80;
/// Results that lie in the domain's half itself.
const HERE: usize = 0x50;
/// The most bytes of them.
pub(crate) const HERE_BYTES: usize = 8 * HERE_WORDS;
const HERE_WORDS: usize = 5;
/// The most arguments of a call with such results: the lengths of theirs have a byte each.
pub(crate) const HERE_ARGS: usize = 4;
const _: () = assert!(HERE + HERE_BYTES <= CHARGE_ROWS, "the words of another use begin there");
const DESCRIPTOR_BYTES: usize = 24;
/// Rows of processor time that a reply can carry.
pub(crate) const MAX_CHARGES: usize = 8;

/// Access to a line's words, by name.
#[derive(Clone, Copy)]
pub(crate) struct Words<'a>(pub &'a Shared);

impl<'a> Words<'a> {
    /// The words by which the line is handed to and fro.
    #[inline(always)]
    pub fn gate(self) -> Gate<'a> {
        let word = |at| self.0.word(at);
        Gate { call: word(CALL), wait: word(WAIT), reply: word(REPLY), mode: word(MODE) }
    }
    /// The number of the newest call that its caller gave up.
    pub fn cancel(self) -> &'a AtomicU32 {
        self.0.word(CANCEL)
    }
    /// The core that the line's activation is bound to, plus one; 0: it is bound to none. A hint, by which a caller knows how to wait.
    pub fn core(self) -> &'a AtomicU32 {
        self.0.word(CORE)
    }
    #[inline(always)]
    fn word64(self, at: usize) -> &'a AtomicU64 {
        self.0.word64(at)
    }
}

/// What an argument is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum Kind {
    In = 1,
    Out = 2,
    InOut = 3,
    Lend = 4,
    Give = 5,
}

/// One argument as it travels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Descriptor {
    pub kind: Kind,
    /// The buffer that is lent or given; 0 for bytes that are lent in the payload.
    pub id: u32,
    /// Bytes of payload, or of the part that is lent or given.
    pub len: u64,
    /// The most bytes of result that the caller takes; for a lent part, where it begins.
    pub bound: u64,
}

impl Descriptor {
    #[inline]
    pub fn write(self, words: Words<'_>, index: usize) {
        let at = DESCRIPTORS + index * DESCRIPTOR_BYTES;
        let head = self.kind as u64 | u64::from(self.id) << 32;
        // Relaxed, as all of a half: published by the store to `call` that follows.
        words.word64(at).store(head, Ordering::Relaxed);
        words.word64(at + 8).store(self.len, Ordering::Relaxed);
        words.word64(at + 16).store(self.bound, Ordering::Relaxed);
    }

    /// A private copy; `None` if the kind is none.
    #[inline]
    pub fn read(words: Words<'_>, index: usize) -> Option<Self> {
        let at = DESCRIPTORS + index * DESCRIPTOR_BYTES;
        // Relaxed, as all of a half: ordered by the load of `call` that preceded. Each word is read once.
        let head = words.word64(at).load(Ordering::Relaxed);
        let kind = match head as u32 {
            1 => Kind::In,
            2 => Kind::Out,
            3 => Kind::InOut,
            4 => Kind::Lend,
            5 => Kind::Give,
            _ => return None,
        };
        Some(Self {
            kind,
            id: (head >> 32) as u32,
            len: words.word64(at + 8).load(Ordering::Relaxed),
            bound: words.word64(at + 16).load(Ordering::Relaxed),
        })
    }
}

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
}

const CHARGE: u64 = 1 << 8;
const PRIORITY: u64 = 1 << 9;
const SHORT: u64 = 1 << 10;

impl Header {
    #[inline(always)]
    pub fn write(&self, words: Words<'_>) {
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
        let payload = u64::from(self.payload_bytes) | u64::from(self.spill) << 32;
        let [deadline, payload] = match self.short {
            Some(short) => short.to_wire(),
            None => [Deadline::to_wire(self.deadline), payload],
        };
        let place = u64::from(self.depth) | u64::from(self.cpu) << 32 | u64::from(self.nice as u8) << 48;
        // Relaxed: published by the store to `call` that follows.
        words.word64(TARGET).store(u64::from(self.portal) | flags << 32, Ordering::Relaxed);
        words.word64(DEADLINE).store(deadline, Ordering::Relaxed);
        words.word64(CHAIN[0]).store(self.chain.0[0], Ordering::Relaxed);
        words.word64(CHAIN[1]).store(self.chain.0[1], Ordering::Relaxed);
        words.word64(PLACE).store(place, Ordering::Relaxed);
        words.word64(PAYLOAD).store(payload, Ordering::Relaxed);
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
        }
    }
}

/// The words of a header: a private copy, for whoever has the line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RawHeader([u64; 6]);

impl RawHeader {
    /// Each word is read once.
    #[inline(always)]
    pub fn read(words: Words<'_>) -> Self {
        // Relaxed: ordered by the load of `call` that preceded.
        let word = |at| words.word64(at).load(Ordering::Relaxed);
        Self([word(TARGET), word(DEADLINE), word(CHAIN[0]), word(CHAIN[1]), word(PLACE), word(PAYLOAD)])
    }

    /// Whether they are the same, by a comparison without a branch for each.
    #[inline(always)]
    pub fn is(&self, other: &Self) -> bool {
        let ([a, b, c, d, e, f], o) = (self.0, &other.0);
        (a ^ o[0]) | (b ^ o[1]) | (c ^ o[2]) | (d ^ o[3]) | (e ^ o[4]) | (f ^ o[5]) == 0
    }
}

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
        words.word64(STATUS).store(u64::from(status) | u64::from(self.code) << 32, Ordering::Relaxed);
        for (i, &len) in self.lengths[..results].iter().enumerate() {
            words.0.word(LENGTHS + 4 * i).store(len, Ordering::Relaxed);
        }
        words.0.word(CHARGE_ROWS).store(self.charge_rows, Ordering::Relaxed);
    }

    /// Writes that a call was done that has no results, and is not charged.
    #[inline(always)]
    pub fn write_done(words: Words<'_>) {
        // Relaxed: as in `write`.
        words.word64(STATUS).store(Status::Done as u64, Ordering::Relaxed);
    }

    /// The lengths of the results that lie in the domain's half, if it says that the call of `args` arguments was done and has no others.
    #[inline]
    pub fn done_here(words: Words<'_>, args: usize) -> Option<Here> {
        // Relaxed: as in `read`.
        let head = words.word64(STATUS).load(Ordering::Relaxed);
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
        let head = words.word64(STATUS).load(Ordering::Relaxed);
        let status = Status::from_wire(head as u32);
        // What went wrong may be told by two numbers, whatever the results were to be.
        let results = if status == Some(Status::Done) { results } else { results.max(2) };
        let mut lengths = [0; MAX_ARGS];
        for (i, len) in lengths[..results].iter_mut().enumerate() {
            *len = words.0.word(LENGTHS + 4 * i).load(Ordering::Relaxed);
        }
        Self {
            status,
            code: (head >> 32) as u32,
            lengths,
            charge_rows: words.0.word(CHARGE_ROWS).load(Ordering::Relaxed),
        }
    }
}

const DONE: u32 = Status::Done as u32;
const DONE_HERE: u32 = Status::DoneHere as u32;

/// Lengths of results in the domain's half, a byte each: whatever bits, if a stranger wrote them.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Here(pub u32);

impl Here {
    /// The length of the result that is argument `index`.
    #[inline(always)]
    pub const fn len(self, index: usize) -> usize {
        if index < HERE_ARGS { (self.0 >> (8 * index) & 0xff) as usize } else { 0 }
    }

    /// A private copy of all of the results, each word read once; and as many zeros, so that there are as many bytes from each on.
    #[inline(always)]
    pub fn read(words: Words<'_>) -> [u8; 2 * HERE_BYTES] {
        let mut copy = [0; 2 * HERE_BYTES];
        for (i, word) in copy.as_chunks_mut::<8>().0[..HERE_WORDS].iter_mut().enumerate() {
            // Relaxed: ordered by the load of `reply` that preceded.
            *word = words.word64(HERE + 8 * i).load(Ordering::Relaxed).to_ne_bytes();
        }
        copy
    }
}

/// Results on their way into the domain's half.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Few {
    here: Here,
    words: [u64; HERE_WORDS],
    /// Bytes so far.
    end: usize,
}

impl Few {
    /// Adds the result that is argument `index`; `None` if there is no room for it.
    #[inline]
    pub fn push(&mut self, index: usize, result: &[u8]) -> Option<()> {
        let begin = align_argument(self.end);
        let end = begin + result.len();
        if result.is_empty() {
            return Some(());
        }
        if index >= HERE_ARGS || end > HERE_BYTES {
            return None;
        }
        let (whole, rest) = result.as_chunks();
        let mut into = self.words[begin / 8..].iter_mut();
        for (bytes, word) in whole.iter().zip(&mut into) {
            *word = u64::from_ne_bytes(*bytes);
        }
        if !rest.is_empty()
            && let Some(word) = into.next()
        {
            let mut padded = [0; 8];
            padded[..rest.len()].copy_from_slice(rest);
            *word = u64::from_ne_bytes(padded);
        }
        self.here.0 |= (result.len() as u32) << (8 * index);
        self.end = end;
        Some(())
    }

    /// Writes them, with the status.
    #[inline(always)]
    pub fn write(&self, words: Words<'_>) {
        // Relaxed: published by the store to `reply` that follows.
        for (i, &word) in self.words.iter().enumerate().take(self.end.div_ceil(8)) {
            words.word64(HERE + 8 * i).store(word, Ordering::Relaxed);
        }
        let head = u64::from(DONE_HERE) | u64::from(self.here.0) << 32;
        words.word64(STATUS).store(head, Ordering::Relaxed);
    }
}

/// One row of processor time: which domain, how many nanoseconds.
pub(crate) fn write_charge(words: Words<'_>, row: usize, domain: u64, ns: u64) {
    let at = CHARGES + 16 * row.min(MAX_CHARGES - 1);
    words.word64(at).store(domain, Ordering::Relaxed);
    words.word64(at + 8).store(ns, Ordering::Relaxed);
}

/// See [`write_charge`].
pub(crate) fn read_charge(words: Words<'_>, row: usize) -> (u64, u64) {
    let at = CHARGES + 16 * row.min(MAX_CHARGES - 1);
    (words.word64(at).load(Ordering::Relaxed), words.word64(at + 8).load(Ordering::Relaxed))
}

/// Processor time of the call itself.
pub(crate) fn cpu_ns(words: Words<'_>) -> &AtomicU64 {
    words.0.word64(CPU_NS)
}

/// Where an argument's bytes begin after those before it.
pub(crate) const fn align_argument(at: usize) -> usize {
    at.next_multiple_of(8)
}

/// Where results begin after `payload_bytes` of payload from `payload_at`.
pub(crate) const fn results_at(payload_at: usize, payload_bytes: usize) -> usize {
    (payload_at + payload_bytes).next_multiple_of(64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::sealed_memfd;
    use peregrine_base::Protection;

    #[test]
    fn halves_come_back_as_written() {
        let fd = sealed_memfd(c"test", 4096).unwrap();
        let memory = Shared::map(&fd, 4096, Protection::ReadWrite).unwrap();
        let words = Words(&memory);
        let header = Header {
            portal: 9,
            args: 3,
            charge: true,
            priority: false,
            affinity: Affinity::Apart,
            deadline: Deadline::from_wire(77),
            chain: ChainId([5, u64::MAX]),
            depth: 12,
            cpu: 1023,
            nice: -20,
            payload_bytes: u32::MAX,
            spill: 4,
            short: None,
        };
        header.write(words);
        assert_eq!(Header::of(RawHeader::read(words)), header);
        let descriptor = Descriptor { kind: Kind::Lend, id: 8, len: u64::MAX, bound: 3 };
        descriptor.write(words, MAX_ARGS - 1);
        assert_eq!(Descriptor::read(words, MAX_ARGS - 1), Some(descriptor));
        assert_eq!(Descriptor::read(words, 0), None);
        let mut reply = ReplyHead::new(Status::TooLarge, 6);
        reply.lengths = [1, 2, 3, 4, 5, 6, 7, u32::MAX];
        reply.write(words, MAX_ARGS);
        assert_eq!(ReplyHead::read(words, MAX_ARGS), reply);
        write_charge(words, 7, 1, 2);
        assert_eq!(read_charge(words, 7), (1, 2));
        assert_eq!(Header::of(RawHeader::read(words)), header, "nothing overlaps");
    }

    #[test]
    fn every_status_has_its_own_number() {
        for word in 0..64 {
            if let Some(status) = Status::from_wire(word) {
                assert_eq!(status as u32, word);
            }
        }
    }
}
