//! How much of each range of addresses a World maps: all that the layout has, or less where `RLIMIT_AS` is finite.
//!
//! ```text
//!   limit     none, or FULL and more        less
//!   slots     all, each of SLOT_BYTES       all, but of the last one (the only one, mostly) its first part
//!   tables    as long as they can be        their first part, in proportion
//!   dirty     32 MiB a node                 1/1024 of the limit a node: a list that is full has slots compared as a whole
//!   arena, archive                          1/16 and 1/32 of the limit, whatever that is
//! ```
//!
//! What is left out is never used: lists of free entries end where the tables do, and a heap where its slot does. No address changes
//! by it, so an image of a World under another limit is resumed if what it holds lies in what is mapped here
//! ([`Shadow::adopt`](crate::shadow::Shadow::adopt)).

use crate::control::{DIRTY_STRIDE, MAX_CHANNELS, MAX_ENDS, world};
use peregrine_base::sync::{AtomicU32, AtomicUsize, Ordering};
use peregrine_sys::rustix::process::{Resource, getrlimit};
use peregrine_thread::layout::{ARCHIVE_BYTES, ARENA_BYTES, SLOT_BYTES, SLOT_COUNT};
use peregrine_thread::stack_kind::{MOST_WINDOWED, StackKind};

/// From this limit on, in bytes, slots and tables are what they are without one.
const FULL: usize = 5 << 30;
/// The least part of a slot: its thread's colour, a stack of [`NEAR_STACK_BYTES`](peregrine_thread::layout::NEAR_STACK_BYTES), and a heap.
const LEAST_SLOT: usize = 256 << 20;

/// What is mapped, in bytes or entries.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Room {
    /// Bytes of the slots, from the first on.
    pub slots_bytes: AtomicUsize,
    /// Threads of each windowed kind that there are records for.
    pub windowed: AtomicU32,
    /// Channels.
    pub channels: AtomicU32,
    /// Ends.
    pub ends: AtomicU32,
    /// Bytes of a node's dirty list.
    pub dirty_bytes: AtomicUsize,
    /// Bytes of the arena.
    pub arena_bytes: AtomicUsize,
    /// Bytes of the archive.
    pub archive_bytes: AtomicUsize,
}

impl Room {
    /// For a World of `slots` slots in this process.
    pub fn for_this_process(slots: usize) -> Self {
        Self::under(getrlimit(Resource::As).current, slots)
    }

    fn under(limit: Option<u64>, slots: usize) -> Self {
        let limit = limit.map(|l| l.min(1 << 46) as usize);
        let share =
            |of: usize| limit.map_or(of, |l| (of as u128 * l.min(FULL) as u128 / FULL as u128) as usize);
        let pages = |bytes: usize, by: usize| bytes & !(by - 1);
        let part = |of: usize, nth: usize| limit.map_or(of, |l| pages(l / nth, 2 << 20).clamp(16 << 20, of));
        let last = pages(share(SLOT_BYTES), 2 << 20).max(LEAST_SLOT);
        let dirty = limit.map_or(DIRTY_STRIDE, |l| pages(l / 1024, 4096).clamp(64 << 10, DIRTY_STRIDE));
        Self {
            slots_bytes: AtomicUsize::new((slots - 1) * SLOT_BYTES + last),
            windowed: AtomicU32::new(share(MOST_WINDOWED) as u32),
            channels: AtomicU32::new(share(MAX_CHANNELS) as u32),
            ends: AtomicU32::new(share(MAX_ENDS) as u32),
            dirty_bytes: AtomicUsize::new(dirty),
            arena_bytes: AtomicUsize::new(part(ARENA_BYTES, 16)),
            archive_bytes: AtomicUsize::new(part(ARCHIVE_BYTES, 32)),
        }
    }

    /// Becomes what `other` is.
    pub fn set(&self, other: &Self) {
        for (to, from) in [
            (&self.slots_bytes, &other.slots_bytes),
            (&self.dirty_bytes, &other.dirty_bytes),
            (&self.arena_bytes, &other.arena_bytes),
            (&self.archive_bytes, &other.archive_bytes),
        ] {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        for (to, from) in
            [(&self.windowed, &other.windowed), (&self.channels, &other.channels), (&self.ends, &other.ends)]
        {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Threads of this kind that there are records for.
    pub fn records(&self, kind: StackKind) -> usize {
        match kind {
            StackKind::Isomalloc => SLOT_COUNT,
            _ => self.windowed.load(Ordering::Relaxed) as usize,
        }
    }

    /// Channels that there can be.
    pub fn channels(&self) -> usize {
        self.channels.load(Ordering::Relaxed) as usize
    }

    /// Ends that there can be.
    pub fn ends(&self) -> usize {
        self.ends.load(Ordering::Relaxed) as usize
    }
}

/// The World's.
pub fn room() -> &'static Room {
    &world().room
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(r: &Room) -> [usize; 7] {
        [
            r.slots_bytes.load(Ordering::Relaxed),
            r.records(StackKind::Copy),
            r.channels(),
            r.ends(),
            r.dirty_bytes.load(Ordering::Relaxed),
            r.arena_bytes.load(Ordering::Relaxed),
            r.archive_bytes.load(Ordering::Relaxed),
        ]
    }

    #[test]
    fn without_a_limit_all_is_mapped_and_with_one_never_more() {
        let all = words(&Room::under(None, 3));
        let design =
            [3 * SLOT_BYTES, MOST_WINDOWED, MAX_CHANNELS, MAX_ENDS, DIRTY_STRIDE, ARENA_BYTES, ARCHIVE_BYTES];
        assert_eq!(all, design);
        let mut before = [0; 7];
        for mib in (1..40).map(|i| i * 300).chain([1 << 20, 1 << 40]) {
            let now = words(&Room::under(Some(mib << 20), 3));
            assert!(now.iter().zip(&before).all(|(n, b)| n >= b), "{mib} MiB: {before:?}, {now:?}");
            assert!(now.iter().zip(&all).all(|(n, a)| n <= a && *n > 0), "{mib} MiB: {now:?}");
            assert!([0, 4, 5, 6].iter().all(|i| now[*i].is_multiple_of(4096)), "{mib} MiB: {now:?}");
            before = now;
        }
        assert_eq!(words(&Room::under(Some(u64::MAX - 1), 3)), all);
        assert_eq!(words(&Room::under(Some(FULL as u64), 3))[..4], all[..4]);
    }
}
