//! Who an image belongs to: the world, the build, the thread, the life that wrote it, and its place in line.
//!
//! ```text
//! WorldId ──── one run of a program, through all its deaths
//!   Generation 1, 2, 3 …   one life each; a resume after a crash is the next one
//!     Sequence 1, 2, 3 …   one image of the whole world each; the count goes on across generations
//! BuildId ──── the executable, without which the images mean nothing
//! ```

use core::fmt;
use core::num::NonZeroU64;
use core::str::FromStr;
use std::io::{self, Read};

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|b| write!(f, "{b:02x}"))
}

fn read_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let nibble = |d: u8| match d {
        b'0'..=b'9' => Some(d - b'0'),
        b'a'..=b'f' => Some(d - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(bytes)
}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; $len]);

        impl $name {
            /// The id with these bytes.
            pub const fn from_bytes(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }

            /// The id's bytes.
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(f, &self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(f, &self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            /// Reads what `Display` writes: lower-case hexadecimal digits, all of them and nothing else.
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                read_hex(text).map(Self).ok_or(ParseIdError { digits: 2 * $len, found: text.len() })
            }
        }
    };
}

hex_id!(
    /// One run of a program, through all its deaths and resumes.
    WorldId,
    16
);
hex_id!(
    /// The executable that wrote an image: the BLAKE3 hash of its file.
    BuildId,
    32
);

impl WorldId {
    /// An id that nobody else has.
    ///
    /// # Errors
    /// If the kernel's random source can't be read.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Self(bytes))
    }
}

/// A text that is not an id.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("an id is {digits} lower-case hexadecimal digits, not these {found} characters")]
pub struct ParseIdError {
    digits: usize,
    found: usize,
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// Number `n`.
            pub const fn new(n: u64) -> Self {
                Self(n)
            }

            /// The number.
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

number_id!(
    /// A thread of the world, for as long as the world lives.
    ThreadId
);
number_id!(
    /// One life of a world. A higher generation supersedes every lower one; the first is 1.
    Generation
);

/// The place of an image in its world's line of images: 1, 2, 3 …
///
/// Never 0, so that "no earlier image" has a value of its own on disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sequence(NonZeroU64);

impl Sequence {
    /// The first image of a world.
    pub const FIRST: Self = Self(NonZeroU64::MIN);

    /// Sequence `n`, or `None` for 0.
    pub const fn new(n: u64) -> Option<Self> {
        match NonZeroU64::new(n) {
            Some(n) => Some(Self(n)),
            None => None,
        }
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0.get()
    }

    /// The sequence after this one, or `None` after the last possible.
    pub const fn next(self) -> Option<Self> {
        match self.0.checked_add(1) {
            Some(n) => Some(Self(n)),
            None => None,
        }
    }

    /// The number on disk of a sequence that may be missing.
    pub(crate) fn encode(sequence: Option<Self>) -> u64 {
        sequence.map_or(0, Self::get)
    }
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sequence({})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_back_from_its_text_and_from_nothing_else() {
        let id = WorldId::random().unwrap();
        assert_eq!(id.to_string().parse::<WorldId>(), Ok(id));
        for wrong in ["", "0", &id.to_string()[1..], "+0000000000000000000000000000000", "ÿ"] {
            assert!(wrong.parse::<WorldId>().is_err(), "{wrong:?}");
        }
        assert!("A".repeat(32).parse::<WorldId>().is_err());
    }

    #[test]
    fn sequences_start_at_one_and_end_without_wrapping() {
        assert_eq!(Sequence::new(0), None);
        assert_eq!(Sequence::FIRST.next().map(Sequence::get), Some(2));
        assert_eq!(Sequence::new(u64::MAX).and_then(Sequence::next), None);
    }
}
