//! What is known of a page: the record.
//!
//! A record is one word, so that a lookup that takes no lock never sees half of one:
//!
//! ```text
//!   63            32 31          8 7      6    5      4      3    2     1        0
//!  │     frame      │   region    │framed│ backing │shared│cow│ rights │ mapped │
//! ```
//!
//! Zero is "not mapped". `frame` counts only with `framed`; `region` (0: none) is the index of an immutable, counted
//! description of the object behind the pages. It holds the object's page at address zero, not each page's own, so that one
//! record can stand for a whole range (the paper: "virtual address of file offset 0").

use crate::mmu::FrameId;
use peregrine_base::{PageRange, Protection, VirtAddr};

/// What is behind the pages of a mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// Frames of zeroes, one at each page's first fault. Private: `fork` makes them copy-on-write.
    Anonymous,
    /// As [`Backing::Anonymous`], but a fork shares them.
    AnonymousShared,
    /// Pages of an object of the embedder (a file), the first one at page `first`. Written in place.
    Object {
        /// The embedder's name for it.
        object: u64,
        /// The object's page that lies at the start of the mapping.
        first: u64,
    },
    /// Pages of an object, copied at the first write.
    ObjectPrivate {
        /// The embedder's name for it.
        object: u64,
        /// The object's page that lies at the start of the mapping.
        first: u64,
    },
    /// The frames that the addresses name by themselves, as when every member maps one memfd linearly: they are neither
    /// allocated nor counted, `fork` shares them, and a fault fills without making the record finer than it is.
    Home {
        /// The embedder's name for what lies here; 0 if it has none.
        object: u64,
    },
}

/// A mapping to be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// What is behind its pages.
    pub backing: Backing,
    /// What may be done with them.
    pub rights: Protection,
}

/// Where a mapping goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// There, in place of whatever is there.
    Fixed(VirtAddr),
    /// There, or nowhere if anything is there.
    FixedNoReplace(VirtAddr),
    /// In a hole of this range, at or above `hint` if possible. Members look from different places, so that they find
    /// different holes.
    Hole {
        /// Where to look.
        within: PageRange,
        /// Where to look first; `None`: after this member's last one.
        hint: Option<VirtAddr>,
    },
}

/// What an access wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// To read.
    Read,
    /// To write.
    Write,
}

/// What a lookup or an iteration found in a run of pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The pages that the record stands for, cut to what was asked for.
    pub range: PageRange,
    /// What is behind them, as of the entry's first page.
    pub backing: Backing,
    /// What may be done with them.
    pub rights: Protection,
    /// Whether a write copies first.
    pub copy_on_write: bool,
    /// The frame, if the entry is one page that has one.
    pub frame: Option<FrameId>,
}
