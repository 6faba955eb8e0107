//! What the members of a space know of each other, in memory that all of them map at one address.
//!
//! ```text
//!   Table ──┬─ members[i]   who it is (pid, birth, generation) │ asked │ overdue, flushed │ its request │ acked[j]
//!           ├─ states[p]    one byte a page: may its frame hold somebody's bytes?
//!           ├─ unacked[p]   one word a page: members that may still reach its frame
//!           └─ pool         the address space's own nodes
//! ```
//!
//! Every word has one kind of writer, named at its field, so that a member that is killed leaves nothing half written: a
//! word is either the old one or the new one. All of it starts as zeros, which mean "nobody, nothing".

use peregrine_base::sync::{AtomicU8, AtomicU64, Ordering, fence};
use peregrine_base::{PageCount, PageRange, Protection, VirtAddr};

/// Most members of a space: one bit each in a word.
pub const MEMBERS: usize = 64;

/// A member's place in the table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MemberIndex(pub(crate) u8);

impl MemberIndex {
    /// The place as a number below [`MEMBERS`].
    #[inline]
    pub const fn get(self) -> usize {
        self.0 as usize
    }

    /// The one bit that stands for this member.
    #[inline]
    pub const fn bit(self) -> u64 {
        1 << self.0
    }
}

/// The members in a word, lowest first.
pub(crate) fn members_in(mut set: u64) -> impl Iterator<Item = MemberIndex> {
    core::iter::from_fn(move || {
        let lowest = set.trailing_zeros();
        (set != 0).then(|| {
            set &= set - 1;
            MemberIndex(lowest as u8)
        })
    })
}

/// Where a member is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Life {
    /// Nobody.
    Free = 0,
    /// Taken by a process that is making its view.
    Joining = 1,
    /// A member.
    Live = 2,
    /// Found dead; what it left is being mended.
    Corpse = 3,
}

/// Who has a place: written by compare-and-swap only.
///
/// ```text
///   63        32 31          8 7     0
///   │   pid     │ generation  │ life  │
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Who(pub(crate) u64);

impl Who {
    pub(crate) const fn new(pid: u32, generation: u32, life: Life) -> Self {
        Self((pid as u64) << 32 | (generation as u64 & 0xff_ffff) << 8 | life as u64)
    }

    pub(crate) const fn pid(self) -> u32 {
        (self.0 >> 32) as u32
    }

    pub(crate) const fn generation(self) -> u32 {
        (self.0 >> 8) as u32 & 0xff_ffff
    }

    pub(crate) const fn life(self) -> Life {
        match self.0 as u8 {
            1 => Life::Joining,
            2 => Life::Live,
            3 => Life::Corpse,
            _ => Life::Free,
        }
    }
}

/// What a member asks of others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lowering {
    /// No access any more.
    Close,
    /// Reads only.
    ReadOnly,
}

/// One member's request to others: a sequence lock with one writer.
///
/// A reader that meets it half written skips it: the writer is then making a *new* request, which it does only when
/// everybody has obeyed the old one or was marked overdue, and an overdue member drops its whole view.
#[repr(C)]
pub(crate) struct Request {
    /// 0 while being written. Written by the asking member.
    sequence: AtomicU64,
    start: AtomicU64,
    pages: AtomicU64,
    lowering: AtomicU64,
    /// Highest sequence this place has used, whoever had it. Written by the member, beside what it writes anyway: in the line that says
    /// who it is, which whoever asks it something reads, it would take that line from them each time.
    pub(crate) last: AtomicU64,
}

impl Request {
    pub(crate) fn write(&self, sequence: u64, range: PageRange, lowering: Lowering) {
        self.sequence.store(0, Ordering::Relaxed);
        // Release: a reader that sees one of the fields below sees the 0 above (its fence in `read`).
        fence(Ordering::Release);
        self.start.store(range.start().as_usize() as u64, Ordering::Relaxed);
        self.pages.store(range.pages().get() as u64, Ordering::Relaxed);
        self.lowering.store(matches!(lowering, Lowering::ReadOnly) as u64, Ordering::Relaxed);
        // Release pairs with the Acquire in `read`.
        self.sequence.store(sequence, Ordering::Release);
    }

    pub(crate) fn read(&self) -> Option<(u64, PageRange, Lowering)> {
        let sequence = self.sequence.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed) as usize;
        let pages = self.pages.load(Ordering::Relaxed) as usize;
        let lowering =
            if self.lowering.load(Ordering::Relaxed) == 0 { Lowering::Close } else { Lowering::ReadOnly };
        // Acquire: the fields were read before the sequence is looked at again.
        fence(Ordering::Acquire);
        (sequence != 0 && self.sequence.load(Ordering::Relaxed) == sequence)
            .then(|| (sequence, PageRange::new(VirtAddr::new(start), PageCount::new(pages)), lowering))
    }
}

/// What happened to a member's shootdowns, for tests, benchmarks and people. Written by the member itself.
#[repr(C, align(128))]
#[derive(Default)]
pub(crate) struct Counts {
    /// Requests made that concerned somebody else.
    pub(crate) requests: AtomicU64,
    /// Members asked.
    pub(crate) asked: AtomicU64,
    /// Signals sent to members that did not poll.
    pub(crate) signals: AtomicU64,
    /// Members given up on: their frames were punched out.
    pub(crate) overdue: AtomicU64,
    /// Requests of others obeyed.
    pub(crate) obeyed: AtomicU64,
    /// Traps served.
    pub(crate) traps: AtomicU64,
}

impl Counts {
    /// Adds one; there is one writer.
    pub(crate) fn bump(count: &AtomicU64) {
        count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }
}

/// Highest value of [`MemberRecord::polls`].
pub(crate) const POLLS_MOST: u64 = 4;

/// One member.
#[repr(C, align(128))]
pub(crate) struct MemberRecord {
    /// Who it is.
    pub(crate) who: AtomicU64,
    /// When its process was born; 0 while it joins. Written by the member.
    pub(crate) born: AtomicU64,
    /// One bit for each member whose request waits: set by the asking one, taken by this one.
    pub(crate) asked: Line<AtomicU64>,
    /// Counts the times that others gave up waiting. Written by others, under no lock (an increment).
    pub(crate) overdue: AtomicU64,
    /// The `overdue` that this member has answered by dropping its whole view. Written by the member.
    pub(crate) flushed: AtomicU64,
    /// What it asks of others.
    pub(crate) request: Line<Request>,
    /// Highest request of each member that this one has obeyed. Written by this member.
    pub(crate) acked: Line<[AtomicU64; MEMBERS]>,
    /// Where it obeyed lately: one more for each time that it did at a safepoint, up to [`POLLS_MOST`], one less for each that took a
    /// signal. Written by this member.
    pub(crate) polls: AtomicU64,
    /// What happened so far.
    pub(crate) counts: Counts,
}

/// A value that begins a pair of cache lines (the processor fetches them in pairs).
#[repr(C, align(128))]
pub(crate) struct Line<T>(pub(crate) T);

impl<T> core::ops::Deref for Line<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl MemberRecord {
    pub(crate) fn who(&self) -> Who {
        // Acquire pairs with the Release half of the swap that made the place somebody's.
        Who(self.who.load(Ordering::Acquire))
    }

    /// Notes where the member obeyed, of which there is one writer: a handler that interrupts it here makes no more than a wrong guess.
    pub(crate) fn note_manner(&self, at_safepoint: bool) {
        let was = self.polls.load(Ordering::Relaxed);
        let now = if at_safepoint { (was + 1).min(POLLS_MOST) } else { was.saturating_sub(1) };
        if now != was {
            self.polls.store(now, Ordering::Relaxed);
        }
    }

    /// Whether it obeys at safepoints most of the time, so that it is worth waiting for the next one.
    pub(crate) fn is_polling(&self) -> bool {
        self.polls.load(Ordering::Relaxed) >= POLLS_MOST / 2
    }

    /// Whether the member has dropped its view since it was last given up on.
    pub(crate) fn has_flushed(&self) -> bool {
        // The order matters: `flushed` never runs ahead of an `overdue` read later.
        let flushed = self.flushed.load(Ordering::Acquire);
        self.overdue.load(Ordering::Acquire) == flushed
    }
}

/// What a space is, fixed when it is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// The addresses of the region, the same in every member.
    pub(crate) region: PageRange,
    /// The shared table: header, page states, unacknowledged words, pool.
    pub(crate) table: PageRange,
}

/// The table of one space. `Copy`, for it is an address that stays mapped as long as any member of this process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table {
    shape: Shape,
}

impl Table {
    /// Bytes before the pool for a region of `pages` pages.
    pub(crate) const fn overhead_bytes(pages: usize) -> usize {
        let members = size_of::<MemberRecord>() * MEMBERS;
        (members + pages * 8 + pages).next_multiple_of(1 << 16)
    }

    /// # Safety
    /// `shape.table` is shared memory, zeros when the space was made, of at least [`Table::overhead_bytes`], mapped as long as
    /// the value is used.
    pub(crate) const unsafe fn new(shape: Shape) -> Self {
        Self { shape }
    }

    #[inline]
    pub(crate) const fn region(&self) -> PageRange {
        self.shape.region
    }

    /// The table's own mapping.
    pub(crate) const fn whole(&self) -> PageRange {
        self.shape.table
    }

    #[inline]
    pub(crate) fn member(&self, index: MemberIndex) -> &MemberRecord {
        let members: *const MemberRecord = self.shape.table.start().as_ptr();
        // SAFETY: promised in `new`; an index is below MEMBERS; all fields are atomics (S1).
        unsafe { &*members.add(index.get()) }
    }

    /// Page states, in page order.
    #[inline]
    pub(crate) fn states(&self) -> &[AtomicU8] {
        let at = self.shape.table.start().as_usize() + size_of::<MemberRecord>() * MEMBERS + self.pages() * 8;
        // SAFETY: as in `member`: `overhead_bytes` counts them.
        unsafe { core::slice::from_raw_parts(VirtAddr::new(at).as_ptr(), self.pages()) }
    }

    /// Members that may still reach each page's frame, in page order.
    #[inline]
    pub(crate) fn unacked(&self) -> &[AtomicU64] {
        let at = self.shape.table.start().as_usize() + size_of::<MemberRecord>() * MEMBERS;
        // SAFETY: as in `member`; records are aligned to more than a word.
        unsafe { core::slice::from_raw_parts(VirtAddr::new(at).as_ptr(), self.pages()) }
    }

    /// The pool for the address space's nodes.
    pub(crate) fn pool(&self) -> PageRange {
        let overhead = PageCount::for_bytes(Self::overhead_bytes(self.pages()));
        let start = VirtAddr::new(self.shape.table.start().as_usize() + overhead.bytes());
        PageRange::new(start, PageCount::new(self.shape.table.pages().get() - overhead.get()))
    }

    /// Pages of the region.
    pub(crate) const fn pages(&self) -> usize {
        self.shape.region.pages().get()
    }

    /// Indices of the pages of `range` in the region; it lies inside.
    #[inline]
    pub(crate) fn indices(&self, range: PageRange) -> core::ops::Range<usize> {
        let first = (range.start().as_usize() - self.shape.region.start().as_usize()) >> 12;
        first..first + range.pages().get()
    }
}

/// What an access right means to a view.
pub(crate) const fn writable(rights: Protection) -> bool {
    matches!(rights, Protection::ReadWrite)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_whole_or_not_at_all() {
        let request = Request {
            sequence: AtomicU64::new(0),
            start: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            lowering: AtomicU64::new(0),
            last: AtomicU64::new(0),
        };
        assert_eq!(request.read(), None);
        std::thread::scope(|s| {
            s.spawn(|| {
                for i in 1..200_000usize {
                    let range = PageRange::new(VirtAddr::new(i * 4096), PageCount::new(i));
                    request.write(i as u64, range, Lowering::Close);
                }
            });
            let mut seen = 0;
            while seen < 199_999 {
                if let Some((sequence, range, _)) = request.read() {
                    assert_eq!(range.pages().get() as u64, sequence);
                    assert_eq!(range.start().as_usize() as u64, sequence * 4096);
                    assert!(sequence >= seen);
                    seen = sequence;
                }
            }
        });
    }

    #[test]
    fn a_member_counts_as_polling_after_two_answers_at_safepoints_and_until_signals_outweigh_them() {
        // SAFETY: atomics and padding, of which zeros are valid.
        let record: std::boxed::Box<MemberRecord> =
            std::boxed::Box::new(unsafe { core::mem::MaybeUninit::zeroed().assume_init() });
        let after = |answers: &[bool]| {
            answers.iter().for_each(|at_safepoint| record.note_manner(*at_safepoint));
            record.is_polling()
        };
        assert!(!after(&[]));
        assert!(!after(&[true]));
        assert!(after(&[true]));
        assert!(after(&[true; 100]));
        assert!(after(&[false; 2]), "a signal now and then");
        assert!(!after(&[false]));
        assert!(!after(&[false; 100]));
        assert!(after(&[true; 2]), "and back");
    }

    #[test]
    fn who_keeps_its_parts_apart() {
        let who = Who::new(u32::MAX, 0xab_cdef, Life::Live);
        assert_eq!((who.pid(), who.generation(), who.life()), (u32::MAX, 0xab_cdef, Life::Live));
        assert!(members_in(0b1010_0001).map(|m| m.0).eq([0, 5, 7]));
    }
}
