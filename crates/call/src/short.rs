//! The short form of a call: its descriptors lie in the header, in two words that a call of this form has no other use for.
//!
//! On its way a call's cost is the cache lines that change cores. The general form has four of them for the smallest argument: the
//! header, the descriptors, the payload, and the lengths of the results beside the results themselves. The short form has the header, the payload, and
//! one for the whole reply:
//!
//! ```text
//!        general form                            short form
//! 0x000  gate, reply head, lengths               gate, reply head, results of 40 bytes at most
//! 0x040  header (deadline … payload, spill)      header (… four words of descriptors)
//! 0x080  descriptors                             payload
//! 0x200  payload
//!  then  results                                 results that are longer
//! ```
//!
//! It is for calls that have no deadline, no attribute that costs something, nothing in the spill buffer, and arguments that say what they are in
//! four words of 32 bits, the kind in the low 3 bits of the first:
//!
//! | argument | words |
//! |---|---|
//! | `in` | `In`, bytes |
//! | `out` | `Out`, bound |
//! | `inout` | `InOut`, bytes · bound |
//! | `lend`, of a buffer | `Lend`, buffer · offset · bytes |
//!
//! All others take the general form. The domain has a private copy of these words with its copy of the header, so what it checked of one call holds for
//! the next with the same header (`domain/known.rs`).

use crate::args::{Arg, Lend};
use crate::line::{Descriptor, Kind, MAX_ARGS, align_argument};
use crate::memory::Buffer;

/// Words that describe arguments.
pub(crate) const WORDS: usize = 4;
const KIND_BITS: u32 = 3;
const KIND_MASK: u32 = (1 << KIND_BITS) - 1;
/// What the rest of a word can say.
const MOST: usize = (1 << (32 - KIND_BITS)) - 1;

/// The words, as they travel, the first lowest. One number, so that they are put together in registers: a load of two words that were stored
/// one by one would wait until all that was stored before has left the core, the payload's cache line among it, which the other core has.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Short(u128);

/// A call's arguments in the short form, and what they come to.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Shortened {
    pub short: Short,
    /// Bytes of payload, aligned as they will lie.
    pub payload_bytes: usize,
    /// Whether there may be results.
    pub returns: bool,
}

impl Shortened {
    /// `None`: they need the general form, or `put` says so, which is told of each piece of the payload and where in it that will lie, or `is_ours`
    /// says that a buffer is not this connection's.
    #[inline(always)]
    pub fn of(
        args: &[Arg<'_>],
        put: impl Fn(usize, &[u8]) -> Option<()>,
        is_ours: impl Fn(&Buffer) -> bool,
    ) -> Option<Self> {
        let mut this = Self::default();
        let mut filling = Filling::default();
        for arg in args {
            match arg {
                Arg::In(bytes) => filling.first(Kind::In, this.add_payload(bytes, &put)?)?,
                Arg::Out(_, bound) => {
                    this.returns = true;
                    filling.first(Kind::Out, *bound)?;
                }
                Arg::InOut(bytes, bound) => {
                    this.returns = true;
                    filling.first(Kind::InOut, this.add_payload(bytes, &put)?)?;
                    filling.next(*bound)?;
                }
                Arg::Lend(Lend::Part(part)) if is_ours(part.buffer) => {
                    filling.first(Kind::Lend, part.buffer.id as usize)?;
                    filling.next(part.offset_bytes)?;
                    filling.next(part.len_bytes)?;
                }
                Arg::None | Arg::Lend(_) | Arg::Give(_) | Arg::Given(..) => return None,
            }
        }
        this.short = filling.done()?;
        Some(this)
    }

    #[inline(always)]
    fn add_payload(&mut self, bytes: &[u8], put: impl Fn(usize, &[u8]) -> Option<()>) -> Option<usize> {
        let begin = align_argument(self.payload_bytes);
        self.payload_bytes = begin + bytes.len();
        put(begin, bytes)?;
        Some(bytes.len())
    }
}

/// Words as they are put together: each comes in at the top, and those before it move down, by so much each time that the compiler knows it.
#[derive(Default)]
struct Filling {
    words: u128,
    used: usize,
}

impl Filling {
    #[inline(always)]
    fn add(&mut self, word: u32) {
        self.words = self.words >> 32 | u128::from(word) << 96;
        self.used += 1;
    }

    /// The first word of an argument; `None` if it can't say `value`.
    #[inline(always)]
    fn first(&mut self, kind: Kind, value: usize) -> Option<()> {
        (value <= MOST).then(|| self.add(kind as u32 | (value as u32) << KIND_BITS))
    }

    /// Another.
    #[inline(always)]
    fn next(&mut self, value: usize) -> Option<()> {
        u32::try_from(value).ok().map(|word| self.add(word))
    }

    /// All of them, the first lowest; `None` if there were too many.
    #[inline(always)]
    fn done(self) -> Option<Short> {
        Some(Short(match self.used {
            0 => 0,
            1 => self.words >> 96,
            2 => self.words >> 64,
            3 => self.words >> 32,
            WORDS => self.words,
            _ => return None,
        }))
    }
}

impl Short {
    /// The two words of the header that hold it.
    #[inline(always)]
    pub const fn to_wire(self) -> [u64; 2] {
        [self.0 as u64, (self.0 >> 64) as u64]
    }

    /// Any bits are some words; what they mean is checked when they are decoded.
    pub const fn from_wire([a, b]: [u64; 2]) -> Self {
        Self(a as u128 | (b as u128) << 64)
    }

    /// What the words of a private copy say, one argument after the other.
    pub const fn descriptors(self) -> Descriptors {
        Descriptors { words: self.0, at: 0 }
    }

    /// Bytes of payload of the first `args` arguments, as far as they make sense.
    pub fn payload_bytes(self, args: u8) -> u32 {
        let taken = self.descriptors().take(usize::from(args).min(MAX_ARGS));
        let payload = taken.filter(|d| matches!(d.kind, Kind::In | Kind::InOut));
        // At most four of less than 2^29 each.
        payload.fold(0, |at, d| align_argument(at) + d.len as usize) as u32
    }
}

/// The arguments that [`Short`] describes. Ends at the first that is none, or when there are no words left.
pub(crate) struct Descriptors {
    words: u128,
    at: usize,
}

impl Descriptors {
    fn word(&mut self) -> Option<u32> {
        let word = (self.at < WORDS).then(|| (self.words >> (32 * self.at)) as u32);
        self.at += 1;
        word
    }
}

impl Iterator for Descriptors {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        let first = self.word()?;
        let value = first >> KIND_BITS;
        let d =
            |kind, id, len: u32, bound: u32| Descriptor { kind, id, len: len.into(), bound: bound.into() };
        Some(match first & KIND_MASK {
            1 => d(Kind::In, 0, value, 0),
            2 => d(Kind::Out, 0, 0, value),
            3 => d(Kind::InOut, 0, value, self.word()?),
            // A number that no buffer has stands for bytes of the payload in the general form, and for nothing here.
            4 if value != 0 => {
                let offset = self.word()?;
                d(Kind::Lend, value, self.word()?, offset)
            }
            _ => {
                self.at = WORDS;
                return None;
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shortened(args: &[Arg<'_>]) -> Option<Shortened> {
        Shortened::of(args, |_, _| Some(()), |_| true)
    }

    fn back(args: &[Arg<'_>]) -> Option<Vec<Descriptor>> {
        let shortened = shortened(args)?;
        let short = Short::from_wire(shortened.short.to_wire());
        assert_eq!(short.payload_bytes(args.len() as u8) as usize, shortened.payload_bytes);
        Some(short.descriptors().collect())
    }

    #[test]
    fn arguments_come_back_as_they_were_declared() {
        let (mut a, mut b) = (Vec::new(), vec![1; 9]);
        let d = |kind, len, bound| Descriptor { kind, id: 0, len, bound };
        assert_eq!(back(&[]), Some(vec![]));
        assert_eq!(
            back(&[Arg::In(&[0; 5]), Arg::Out(&mut a, 65_536), Arg::InOut(&mut b, 1 << 31)]),
            Some(vec![d(Kind::In, 5, 0), d(Kind::Out, 0, 65_536), d(Kind::InOut, 9, 1 << 31)])
        );
        let sizes = shortened(&[Arg::In(&[0; 5]), Arg::In(&[0; 3]), Arg::InOut(&mut b, 7)]).unwrap();
        assert_eq!((sizes.payload_bytes, sizes.returns), (25, true));
    }

    #[test]
    fn what_does_not_fit_has_no_short_form() {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        assert_eq!(shortened(&[const { Arg::In(&[]) }; 5]), None, "five arguments");
        assert_eq!(shortened(&[Arg::Out(&mut a, MOST + 1)]), None);
        assert_eq!(shortened(&[Arg::InOut(&mut a, usize::MAX)]), None);
        assert_eq!(shortened(&[Arg::Lend(Lend::Bytes(b"x"))]), None);
        let three = [Arg::InOut(&mut a, 1), Arg::In(b""), Arg::InOut(&mut b, 1)];
        assert_eq!(shortened(&three), None, "five words");
    }

    #[test]
    fn any_words_are_decoded_and_nothing_beyond_them() {
        for seed in 0..10_000u64 {
            let mut rng = testkit::Rng::new(seed);
            let short = Short::from_wire([rng.next_u64(), rng.next_u64()]);
            let all: Vec<Descriptor> = short.descriptors().collect();
            assert!(all.len() <= WORDS);
            let sum: u64 = all.iter().map(|d| if d.kind == Kind::Lend { 0 } else { d.len + 8 }).sum();
            assert!(u64::from(short.payload_bytes(u8::MAX)) <= sum);
            assert!(all.iter().all(|d| d.kind != Kind::Give && (d.kind == Kind::Lend) == (d.id != 0)));
        }
    }
}
