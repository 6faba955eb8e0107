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
//! record can stand for a whole range (the paper: "virtual address of file offset 0"). A home record has no frame, so a
//! name that fits lies in its place: it needs no description, and nothing is counted.

use crate::mmu::FrameId;
use peregrine_base::{PAGE_SHIFT, PageRange, Protection, VirtAddr};

/// What is behind the pages of a mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// Frames of zeroes, one at each page's first fault. Private: `fork` makes them copy-on-write.
    Anonymous,
    /// As [`Backing::Anonymous`], but a fork shares the frames that there are. A page that nobody touched before the fork has none, and
    /// each space gets one of its own later: what is to be shared whatever happens is an [`Object`](Self::Object).
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
    /// allocated nor counted, `fork` shares them, and a fault fills without making the record finer than it is. It fills what is
    /// around the page, up to a block of [`Mmu::block_pages`](crate::Mmu::block_pages): pages of the same mapping without a hole between, which
    /// nobody has locked. It locks those, or the coarser record: faults of different members there come one after the other, also on
    /// different pages.
    Home {
        /// The embedder's name for what lies here; 0 if it has none. One of up to 32 bits costs nothing.
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

/// A record: see the top of this file.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Value(pub(crate) u64);

const MAPPED: u64 = 1;
const RIGHTS_SHIFT: u32 = 1;
const COW: u64 = 1 << 3;
const SHARED: u64 = 1 << 4;
const KIND_SHIFT: u32 = 5;
const FRAMED: u64 = 1 << 7;
const REGION_SHIFT: u32 = 8;
const REGION_MASK: u64 = (1 << 24) - 1;

/// The kinds of backing that a fault tells apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Anonymous,
    Object,
    Home,
}

impl Value {
    pub(crate) const UNMAPPED: Self = Self(0);

    /// A record without a frame. `region` is the index of a region, if the backing has an object.
    #[inline]
    pub(crate) fn new(kind: Kind, shared: bool, rights: Protection, region: Option<u32>) -> Self {
        let shared = if shared { SHARED } else { 0 };
        let region = region.map_or(0, |r| u64::from(r) + 1);
        debug_assert!(region <= REGION_MASK, "an arena has fewer regions than a record can name");
        Self(
            MAPPED
                | (rights as u64) << RIGHTS_SHIFT
                | shared
                | (kind as u64) << KIND_SHIFT
                | region << REGION_SHIFT,
        )
    }

    /// A home record that carries its object's name itself.
    #[inline]
    pub(crate) fn home(rights: Protection, name: u32) -> Self {
        Self(Self::new(Kind::Home, true, rights, None).0 | u64::from(name) << 32)
    }

    #[inline]
    pub(crate) const fn is_mapped(self) -> bool {
        self.0 != 0
    }

    #[inline]
    pub(crate) const fn rights(self) -> Protection {
        match self.0 >> RIGHTS_SHIFT & 3 {
            0 => Protection::None,
            1 => Protection::Read,
            _ => Protection::ReadWrite,
        }
    }

    /// What a view may be given: a page that is copied when written is shown read-only.
    #[inline]
    pub(crate) fn view_rights(self) -> Protection {
        if self.is_cow() { self.rights().min(Protection::Read) } else { self.rights() }
    }

    #[must_use]
    #[inline]
    pub(crate) const fn with_rights(self, rights: Protection) -> Self {
        if !self.is_mapped() {
            return self;
        }
        Self(self.0 & !(3 << RIGHTS_SHIFT) | (rights as u64) << RIGHTS_SHIFT)
    }

    #[inline]
    pub(crate) const fn kind(self) -> Kind {
        match self.0 >> KIND_SHIFT & 3 {
            0 => Kind::Anonymous,
            1 => Kind::Object,
            _ => Kind::Home,
        }
    }

    #[inline]
    pub(crate) const fn is_shared(self) -> bool {
        self.0 & SHARED != 0
    }

    #[inline]
    pub(crate) const fn is_cow(self) -> bool {
        self.0 & COW != 0
    }

    #[must_use]
    pub(crate) const fn cow(self, yes: bool) -> Self {
        Self(if yes { self.0 | COW } else { self.0 & !COW })
    }

    /// Whether it names anything that is counted.
    #[inline]
    pub(crate) const fn has_references(self) -> bool {
        self.0 & (FRAMED | REGION_MASK << REGION_SHIFT) != 0
    }

    #[inline]
    pub(crate) const fn region(self) -> Option<u32> {
        match (self.0 >> REGION_SHIFT & REGION_MASK) as u32 {
            0 => None,
            n => Some(n - 1),
        }
    }

    #[must_use]
    pub(crate) const fn with_region(self, region: u32) -> Self {
        Self(self.0 & !(REGION_MASK << REGION_SHIFT) | (region as u64 + 1) << REGION_SHIFT)
    }

    #[inline]
    pub(crate) const fn frame(self) -> Option<FrameId> {
        if self.0 & FRAMED != 0 { Some(FrameId::new((self.0 >> 32) as u32)) } else { None }
    }

    #[must_use]
    pub(crate) const fn with_frame(self, frame: FrameId) -> Self {
        Self(self.0 & 0xffff_ffff | FRAMED | (frame.get() as u64) << 32)
    }

    /// As the embedder sees it. `object` and `base` are the region's, if there is one.
    pub(crate) fn entry(self, range: PageRange, object: u64, base: u64) -> Entry {
        let first = base.wrapping_add((range.start().as_usize() >> PAGE_SHIFT) as u64);
        let backing = match (self.kind(), self.is_shared()) {
            (Kind::Anonymous, false) => Backing::Anonymous,
            (Kind::Anonymous, true) => Backing::AnonymousShared,
            (Kind::Object, true) => Backing::Object { object, first },
            (Kind::Object, false) => Backing::ObjectPrivate { object, first },
            (Kind::Home, _) if self.region().is_none() => Backing::Home { object: self.0 >> 32 },
            (Kind::Home, _) => Backing::Home { object },
        };
        Entry { range, backing, rights: self.rights(), copy_on_write: self.is_cow(), frame: self.frame() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_record_keeps_its_name() {
        let range = PageRange::new(VirtAddr::new(0), peregrine_base::PageCount::new(1));
        for name in [0, 1, u32::MAX] {
            let v = Value::home(Protection::ReadWrite, name).with_rights(Protection::Read);
            assert_eq!(
                (v.kind(), v.frame(), v.region(), v.rights()),
                (Kind::Home, None, None, Protection::Read)
            );
            assert_eq!(v.entry(range, 7, 9).backing, Backing::Home { object: name.into() });
        }
    }

    #[test]
    fn a_record_keeps_each_of_its_parts() {
        for kind in [Kind::Anonymous, Kind::Object, Kind::Home] {
            for rights in [Protection::None, Protection::Read, Protection::ReadWrite] {
                let v = Value::new(kind, true, rights, Some(77)).with_frame(FrameId::new(u32::MAX)).cow(true);
                assert_eq!((v.kind(), v.rights(), v.region()), (kind, rights, Some(77)));
                assert_eq!(v.frame(), Some(FrameId::new(u32::MAX)));
                assert!(v.is_cow() && v.is_shared() && v.is_mapped());
                assert_eq!(v.with_rights(Protection::None).rights(), Protection::None);
                assert_eq!(v.with_rights(Protection::None).with_rights(rights), v);
            }
        }
    }
}
