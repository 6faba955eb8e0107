//! What every image holds of the control memory: the head, and the used part of each table.
//!
//! ```text
//!   Imaged   free lists, the arena's books, the output's tail, domains, names of regions
//!   table    used entries │ never used: zeroes, and in no image
//!            └ FreeList: those given back are linked through the entries themselves
//! ```

use crate::archive::{Archive, Chunk, most_chunks};
use crate::control::{ARCHIVE_CHUNKS, CHANNELS, ENDS, IMAGED, MAX_DOMAINS, NONE, RECORDS, imaged};
use crate::killpoint::{Point, at};
use crate::lock::Lock;
use crate::records::{Channel, End, ThreadRecord};
use crate::room::room;
use peregrine_base::sync::{AtomicU32, AtomicU64, AtomicUsize};
use peregrine_sys::descriptors::PROGRAMS_BELOW;
use peregrine_thread::stack_kind::StackKind;
use talc::{DefaultBinning, base::Talc, source::Manual};

/// The part of the control memory that every image holds (with the tables below).
#[repr(C)]
pub struct Imaged {
    /// Threads of each kind: free list and high-water mark.
    pub threads: [Lock<FreeList>; 3],
    /// Channels.
    pub channels: Lock<FreeList>,
    /// Ends.
    pub ends: Lock<FreeList>,
    /// The arena's allocator.
    pub arena: Lock<Arena>,
    /// End of the claimed part, for readers without the lock.
    pub arena_end: AtomicUsize,
    /// The archive's books.
    pub archive: Lock<Archive>,
    /// Output: total bytes written, under its lock.
    pub output_tail: Lock<u64>,
    /// World memory given to slots and messages, in bytes.
    pub memory_used: AtomicU64,
    /// Sequence of the image that this state belongs to or follows.
    pub sequence: AtomicU64,
    /// Ordinary nodes of the World that this state was made in.
    pub nodes: AtomicU32,
    /// The domains for carried calls.
    pub domains: Lock<Domains>,
    /// Counts images that threads asked for.
    pub checkpoints_asked: AtomicU64,
    /// Slot of `main`.
    pub main: AtomicU32,
    /// Exit code of `main`, plus one; 0 while it runs.
    pub main_exit: AtomicU32,
    /// Shared regions by name.
    pub regions: Lock<crate::region::Table>,
    /// Numbers of descriptors that programs have opened, a bit each.
    pub open_numbers: [AtomicU64; PROGRAMS_BELOW as usize / 64 + 1],
    /// What the program does about signals.
    pub dispositions: crate::dispositions::Dispositions,
    /// The thread-locals that packed threads are told apart from, in the arena: see `packed`.
    pub pristine: AtomicUsize,
    /// What packed threads of one function have in common: see `models`.
    pub models: Lock<crate::models::Models>,
}

/// The domains that threads have opened, in the order of their nodes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Domains {
    /// Entries in use.
    pub count: u32,
    /// The entries.
    pub entries: [DomainEntry; MAX_DOMAINS],
}

/// A domain for carried calls: a node that runs nothing else. Its number is the World's node count and its place in the table.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DomainEntry {
    /// Name, NUL-padded.
    pub name: [u8; 32],
    /// Address of the `fn()` that its process runs first.
    pub setup: usize,
}

impl DomainEntry {
    /// Tells it from every other domain (FNV-1a; never 0).
    pub fn identity(&self) -> u64 {
        let bytes = self.name.into_iter().chain(self.setup.to_ne_bytes());
        bytes.fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)) | 1
    }
}

impl Domains {
    /// No domain.
    pub const NONE: Self = Self { count: 0, entries: [DomainEntry { name: [0; 32], setup: 0 }; MAX_DOMAINS] };

    /// The entries in use.
    pub fn used(&self) -> &[DomainEntry] {
        &self.entries[..(self.count as usize).min(MAX_DOMAINS)]
    }
}

/// Indices given back, linked through the entries, and how many were ever used.
#[repr(C)]
pub struct FreeList {
    /// First free entry below `used`, or [`NONE`].
    pub head: u32,
    /// Entries from here on were never used.
    pub used: u32,
}

/// Allocator of messages.
#[repr(C)]
pub struct Arena {
    /// The books.
    pub talc: Talc<Manual, DefaultBinning>,
    /// End of the claimed part, 0 before the first claim.
    pub end: usize,
}

/// Links entries of a table that were given back. `link` gives the place of the next free index in an entry.
impl FreeList {
    /// Takes an entry, below `capacity`.
    pub fn take(&mut self, capacity: usize, link: impl Fn(u32) -> *mut u32) -> Option<u32> {
        if self.head != NONE {
            let i = self.head;
            // SAFETY: a free entry's link is guarded by the list's lock, which the caller holds.
            self.head = unsafe { *link(i) };
            at(Point::ListPopped);
            return Some(i);
        }
        if (self.used as usize) < capacity {
            self.used += 1;
            at(Point::ListRaised);
            return Some(self.used - 1);
        }
        None
    }

    /// Gives entry `i` back.
    pub fn give(&mut self, i: u32, link: impl Fn(u32) -> *mut u32) {
        // SAFETY: as above.
        unsafe { *link(i) = self.head };
        at(Point::ListLinked);
        self.head = i;
        at(Point::ListGiven);
    }
}

/// The tables that an image holds besides slots and arena: address and used bytes of each.
pub fn imaged_tables() -> [(usize, usize); TABLES] {
    let i = imaged();
    let used = |list: &Lock<FreeList>| list.with(|l| l.used) as usize;
    let [isomalloc, alias, copy] = &i.threads;
    let chunks = i.archive.with(|a| a.used) as usize;
    tables_of([used(isomalloc), used(alias), used(copy), used(&i.channels), used(&i.ends), chunks])
}

/// Number of tables of an image.
pub const TABLES: usize = 7;

/// How many entries of each table were ever used: threads by kind, channels, ends, and chunks of the archive.
pub type Used = [usize; TABLES - 1];

/// The tables, if so many entries are in use.
pub fn tables_of(used: Used) -> [(usize, usize); TABLES] {
    let records = |i: usize| (records_of(StackKind::ALL[i]), used[i] * size_of::<ThreadRecord>());
    [
        (IMAGED, size_of::<Imaged>()),
        records(0),
        records(1),
        records(2),
        (CHANNELS, used[3] * size_of::<Channel>()),
        (ENDS, used[4] * size_of::<End>()),
        (ARCHIVE_CHUNKS, used[5] * size_of::<Chunk>()),
    ]
}

pub(crate) const fn records_of(kind: StackKind) -> usize {
    RECORDS + kind.first() as usize * size_of::<ThreadRecord>()
}

/// How many entries of each table were ever used, read without the locks, which the dead may hold; never more than there are.
pub fn used_now() -> Used {
    let i = imaged();
    // SAFETY: plain words of mapped memory that nodes may write meanwhile, read at once and bounded before use (S1, S4).
    let used = |list: &Lock<FreeList>| unsafe { (&raw const (*list.as_ptr()).used).read_volatile() } as usize;
    // SAFETY: likewise.
    let chunks = unsafe { (&raw const (*i.archive.as_ptr()).used).read_volatile() } as usize;
    let threads = |k: StackKind| used(&i.threads[k as usize]).min(room().records(k));
    [
        threads(StackKind::Isomalloc),
        threads(StackKind::Alias),
        threads(StackKind::Copy),
        used(&i.channels).min(room().channels()),
        used(&i.ends).min(room().ends()),
        chunks.min(most_chunks()),
    ]
}

/// Every number that a thread has or ever had. (Takes no lock: it is asked for while a dead node may hold it.)
pub fn numbers() -> impl Iterator<Item = u32> + Clone {
    numbers_of(used_now())
}

/// The numbers of so many threads of each kind.
pub fn numbers_of(used: Used) -> impl Iterator<Item = u32> + Clone {
    StackKind::ALL.into_iter().flat_map(move |k| k.first()..k.first() + used[k as usize] as u32)
}

/// Most bytes of the imaged table at `addr`, if there is one.
pub fn table_bounds(addr: usize) -> Option<usize> {
    match addr {
        IMAGED => Some(size_of::<Imaged>()),
        a if StackKind::ALL.into_iter().any(|k| a == records_of(k)) => {
            let kind = StackKind::ALL.into_iter().find(|k| a == records_of(*k))?;
            Some(room().records(kind) * size_of::<ThreadRecord>())
        }
        CHANNELS => Some(room().channels() * size_of::<Channel>()),
        ENDS => Some(room().ends() * size_of::<End>()),
        ARCHIVE_CHUNKS => Some(most_chunks() * size_of::<Chunk>()),
        _ => None,
    }
}
