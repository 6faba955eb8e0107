//! A line: the piece of shared memory that one call at a time passes through, and what lies where in it.
//!
//! ```text
//! 0x000 the gate       call  wait │ reply  mode   then the domain's   status/code  result lengths ×8  charge rows
//! 0x040 the header     portal/args/flags  deadline  chain  depth/cpu/nice  payload  cancel  alerts │ core
//! 0x080 descriptors of the arguments, 24 bytes each ×8
//! 0x140 charge rows: (domain, ns) ×8; of a call in pieces, for which nobody is charged, the bytes that are written: `pieces.rs`
//! 0x1c0 the domain's   cpu_ns
//! 0x200 payload: bytes of `in` and `inout` arguments, and of lent ones that are in no buffer, each from a multiple of 8
//!       results: from the next multiple of 64 after the payload, in the order of the arguments
//! ```
//!
//! What the caller says is in `header.rs`, what the domain says in `reply.rs`: the *halves*.
//!
//! **The first cache line is what changes cores at a call**, there and back: who calls again as before has its header there already and does not write
//! it (`client/line.rs`), so the domain finds it in its own cache. With a line for each half, a call took 100 ns longer on some processors: each of the two
//! had to be taken back from who had read it before it was written again (`docs/costs.md`).
//!
//! That is the general form. Most calls have the *short* one (`short.rs`): descriptors in the header, in the words of deadline and payload;
//! the payload from 0x080 on; and results, if there are few bytes of them, in the first cache line itself, from 0x018 on.
//!
//! The first four words are the gate, by which the line is handed to and fro: `gate.rs`.
//!
//! **Nobody relies on it.** Both halves are writable by both processes; the domain keeps its own count of what it served, the
//! caller its own count of what it asked, and each copies the other's half once and checks the copy. A peer that scribbles can
//! at worst make the other sleep through a wake-up. A caller's sleep is bounded by its deadline, and by slices after which it looks
//! whether the domain lives; an activation's ends when the keeper recalls it, by a signal if need be.

use crate::gate::Gate;
use crate::shared::Shared;
use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering};

/// Arguments that one call may have.
pub(crate) const MAX_ARGS: usize = 8;

/// What the caller writes, by the byte: what `gate.rs` and `header.rs` call their words.
pub(crate) mod callers {
    pub const CALL: usize = 0x00;
    pub const WAIT: usize = 0x04;
    pub const TARGET: usize = 0x40;
    pub const DEADLINE: usize = 0x48;
    pub const CHAIN: [usize; 2] = [0x50, 0x58];
    pub const PLACE: usize = 0x60;
    pub const PAYLOAD: usize = 0x68;
    pub const CANCEL: usize = 0x70;
}

/// What the domain writes: the words of `gate.rs` and `reply.rs`.
pub(crate) mod domains {
    pub const REPLY: usize = 0x08;
    pub const MODE: usize = 0x0c;
    pub const STATUS: usize = 0x10;
    pub const LENGTHS: usize = 0x18;
    pub const CHARGE_ROWS: usize = 0x38;
    pub const CORE: usize = 0x78;
    pub const CHARGES: usize = 0x140;
    pub const CPU_NS: usize = 0x1c0;
    /// Results that lie there themselves: no call that has them is charged, and their lengths are in the code.
    pub const HERE: usize = 0x18;
    /// The most bytes of them.
    pub const HERE_BYTES: usize = 0x40 - HERE;
}

const DESCRIPTORS: usize = 0x80;
const DESCRIPTOR_BYTES: usize = 24;
/// Where the payload begins in a line's own memory.
pub(crate) const PAYLOAD_AT: usize = 0x200;
/// The same for a call of the short form.
pub(crate) const SHORT_PAYLOAD_AT: usize = 0x80;

/// Access to a line's words, by name.
#[derive(Clone, Copy)]
pub(crate) struct Words<'a>(pub &'a Shared);

impl<'a> Words<'a> {
    /// The words by which the line is handed to and fro.
    #[inline(always)]
    pub fn gate(self) -> Gate<'a> {
        let word = |at| self.0.word(at);
        Gate {
            call: word(callers::CALL),
            wait: word(callers::WAIT),
            reply: word(domains::REPLY),
            mode: word(domains::MODE),
        }
    }
    /// The number of the newest call that its caller gave up.
    pub fn cancel(self) -> &'a AtomicU32 {
        self.0.word(callers::CANCEL)
    }
    /// The core that the line's activation is bound to, plus one; 0: it is bound to none. A hint, by which a caller knows how to wait.
    pub fn core(self) -> &'a AtomicU32 {
        self.0.word(domains::CORE)
    }
    /// One of them.
    #[inline(always)]
    pub fn word64(self, at: usize) -> &'a AtomicU64 {
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
    use crate::attributes::Affinity;
    use crate::chain::{ChainId, Deadline};
    use crate::header::{Header, RawHeader};
    use crate::reply::{ReplyHead, Status, read_charge, write_charge};
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
            in_pieces: true,
        };
        header.raw().write(words);
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
}
