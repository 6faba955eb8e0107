//! What an image has and this World no room for, and what would make room.

use crate::control::world;
use peregrine_base::sync::Ordering;
use peregrine_sys::rustix::process::{Resource, getrlimit};
use peregrine_thread::layout::{ARCHIVE, ARCHIVE_BYTES, ARENA, ARENA_BYTES, slot_index_of};
use peregrine_thread::stack_kind::is_windowed;

/// What of an image does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// A wider limit on address space would have room for it (`room.rs`).
    #[error(
        "the image holds more {what} than there is room for under the limit on address space ({} KiB): resume it under the limit that it was made under, or a wider one (ulimit -v)",
        limit >> 10
    )]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// Bytes.
        limit: u64,
    },
    /// A thread is in a slot that this World has not.
    #[error("the image has a thread in slot {slot}, and this World {slots} slots: set PEREGRINE_SLOTS to at least {}", slot + 1)]
    Slots {
        /// The thread's.
        slot: u32,
        /// The World's.
        slots: u32,
    },
    /// No World of this version has room for it.
    #[error("more {0} than a World has room for")]
    Unknown(&'static str),
}

impl Misfit {
    /// Too much of `what`, in this process.
    pub fn of(what: &'static str) -> Self {
        match getrlimit(Resource::As).current {
            Some(limit) => Self::Limit { what, limit },
            None => Self::Unknown(what),
        }
    }

    /// Thread `number` of an image, which this World has no place for.
    pub fn of_thread(number: u32) -> Self {
        let slots = world().slot_count.load(Ordering::Relaxed);
        if is_windowed(number) || number < slots {
            return Self::of("threads");
        }
        Self::Slots { slot: number, slots }
    }

    /// A page of an image, at an address where this World maps none.
    pub fn of_page(page: usize) -> Self {
        if slot_index_of(page).is_some() {
            Self::of(HEAP)
        } else if (ARENA..ARENA + ARENA_BYTES).contains(&page) {
            Self::of(MESSAGES)
        } else if (ARCHIVE..ARCHIVE + ARCHIVE_BYTES).contains(&page) {
            Self::of(PACKED)
        } else {
            Self::Unknown("pages")
        }
    }
}

/// What lies in a slot.
pub const HEAP: &str = "of a thread's stack and heap";
/// What lies in the arena.
pub const MESSAGES: &str = "messages, regions and suspended threads";
/// What lies in the archive.
pub const PACKED: &str = "packed threads";
