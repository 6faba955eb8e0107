//! A seat: what one process needs to be a member. Its place in the table, its view, its access to the frames.
//!
//! This is the layer below the address space: it opens and closes, takes from other members' views, and knows nothing of
//! what is mapped. Whoever uses it alone (a runtime with records of its own) keeps the protocol:
//!
//! ```text
//!   open:    lock the record ─▶ note this member in its set ─▶ Seat::open ─▶ unlock
//!   unmap:   lock the record ─▶ Seat::take_away(set) ─▶ Seat::vacated ─▶ unlock
//! ```
//!
//! Nothing here breaks Rust's rules, whatever the order: the region's bytes are reached by volatile copies only (S1).

use super::appetite::Appetite;
use super::frames::{FrameError, Frames};
use super::liveness::{self, Vigour};
use super::mine::Mine;
use super::shootdown;
use super::table::{Counts, Lowering, MEMBERS, MemberIndex, MemberRecord, Table};
use super::view::View;
use peregrine_base::sync::{AtomicI32, AtomicU64, Ordering};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::raw::Errno;
use peregrine_sys::{io, timer};
use std::boxed::Box;
use std::cell::Cell;
use std::fmt;
use std::time::Duration;

/// Pages that the first trap in a part of a trap-filled region fills at once: measured, 64 KiB blocks cost 241 ns a page, single
/// pages 2,138. Each further trap there fills up to four times as many, at most [`OPEN_PAGES`] (132 ns a page), until pages of that
/// part are taken away.
pub const BLOCK_PAGES: usize = 16;
/// Pages that a trap in a kernel-filled region opens at once, and the most that a trap in a trap-filled one fills.
pub const OPEN_PAGES: usize = 512;

/// Pages of a trap-filled region that mapping opens at once, at most: who maps much often touches little of it, and frames that are
/// zeroed and mapped for nothing cost up to 5 µs each, the traps for the rest 2 µs for 256 pages or more.
pub const MAP_PAGES: usize = 64;

/// Why a view could not be filled.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FillError {
    /// The pages can't be had now.
    #[error(transparent)]
    Frames(#[from] FrameError),
    /// The kernel refused to map them.
    #[error("mapping {range:?}: {errno}")]
    Kernel {
        /// The pages.
        range: PageRange,
        /// What it answered.
        errno: Errno,
    },
    /// Guards stop reads and writes alike.
    #[error(
        "{range:?} is kernel-filled, which is either open or closed: for pages that can only be read use Filling::Trap"
    )]
    ReadOnly {
        /// The pages.
        range: PageRange,
    },
    /// A frame at another address than its own.
    #[error("{range:?}: a region of one linear mapping holds home records only")]
    NotHome {
        /// The pages.
        range: PageRange,
    },
}

/// What a member's shootdowns came to so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// Requests made that concerned somebody else.
    pub requests: u64,
    /// Members asked.
    pub asked: u64,
    /// Signals sent to members that did not poll.
    pub signals: u64,
    /// Members given up on: they were stopped, and their frames were punched out.
    pub overdue: u64,
    /// Requests of others obeyed.
    pub obeyed: u64,
    /// Traps served.
    pub traps: u64,
}

/// One process's part of a space. It belongs to the thread that made it.
pub struct Seat {
    pub(crate) table: Table,
    pub(crate) index: MemberIndex,
    pub(crate) view: View,
    pub(crate) frames: Frames,
    pub(crate) mine: Mine,
    pub(crate) pidfds: [AtomicI32; MEMBERS],
    pub(crate) pidfd_owners: [AtomicU64; MEMBERS],
    // The three below belong to the operation under way: written inside it only. No handler that comes in between looks at them: traps
    // are refused while an operation runs, and the shootdown signal's handler touches atomics alone.
    /// The address whose trap is being served: fills are cut to a block around it.
    pub(crate) trapped_at: Cell<Option<VirtAddr>>,
    /// How many pages it fills.
    block_pages: Cell<usize>,
    /// Something is being mapped: fills are cut to its first [`MAP_PAGES`].
    mapping: Cell<bool>,
    /// How much traps fill.
    pub(crate) appetite: Appetite,
    /// How long an operation waits for a lock, and when the present wait began.
    patience_ns: Cell<u64>,
    waiting_since: Cell<u64>,
    /// Turns that the operation has waited, all in all.
    turns: Cell<u32>,
}

/// Turns of waiting for a lock before the processor is given up at each: about as long as mapping a page takes.
const SPUN_TURNS: u32 = 64;

/// How long an operation waits for a lock, unless it is told otherwise ([`Seat::set_patience`]).
pub const PATIENCE: Duration = Duration::from_secs(10);

impl Seat {
    pub(crate) fn new(table: Table, index: MemberIndex, view: View, frames: Frames, mine: Mine) -> Box<Self> {
        Box::new(Self {
            table,
            index,
            view,
            frames,
            mine,
            pidfds: shootdown::no_pidfds(),
            pidfd_owners: std::array::from_fn(|_| AtomicU64::new(0)),
            trapped_at: Cell::new(None),
            block_pages: Cell::new(OPEN_PAGES),
            mapping: Cell::new(false),
            appetite: Appetite::new(),
            patience_ns: Cell::new(PATIENCE.as_nanos() as u64),
            waiting_since: Cell::new(0),
            turns: Cell::new(0),
        })
    }

    #[inline]
    pub(crate) fn record(&self) -> &MemberRecord {
        self.table.member(self.index)
    }

    /// Whether this is the process that joined, and not a child of it.
    #[inline]
    pub fn is_mine(&self) -> bool {
        self.mine.is_mine()
    }

    /// Which member this is.
    pub const fn index(&self) -> MemberIndex {
        self.index
    }

    /// The region.
    pub const fn region(&self) -> PageRange {
        self.table.region()
    }

    /// From now on fills are cut to the aligned block around `at`, whose trap is being served; `None`: to nothing.
    #[inline]
    pub fn serve_trap_at(&self, at: Option<VirtAddr>) {
        if let Some(at) = at {
            Counts::bump(&self.record().counts.traps);
            let pages = if self.view.is_trap_filled() { self.appetite.grow(at) } else { OPEN_PAGES };
            self.block_pages.set(pages);
        }
        self.trapped_at.set(at);
    }

    /// Pages that the trap being served fills at most.
    pub(crate) fn block_pages(&self) -> usize {
        if self.trapped_at.get().is_some() { self.block_pages.get() } else { OPEN_PAGES }
    }

    /// Runs `f`, in which fills are those of a mapping that is being made.
    #[inline]
    pub(crate) fn while_mapping<R>(&self, f: impl FnOnce() -> R) -> R {
        self.mapping.set(true);
        let result = f();
        self.mapping.set(false);
        result
    }

    /// Whether mapping `pages` pages opens all of them.
    #[inline]
    pub(crate) const fn map_opens_all(&self, pages: PageCount) -> bool {
        pages.get() <= MAP_PAGES || !self.view.is_trap_filled()
    }

    /// What of `range` is filled now.
    #[inline]
    fn block(&self, range: PageRange) -> PageRange {
        let is_cut = self.mapping.get() && !self.map_opens_all(range.pages());
        if is_cut || self.trapped_at.get().is_some() { self.cut(range) } else { range }
    }

    #[cold]
    fn cut(&self, range: PageRange) -> PageRange {
        if self.mapping.get() && !self.map_opens_all(range.pages()) {
            self.appetite.note_mapped(range.start());
            return PageRange::new(range.start(), PageCount::new(MAP_PAGES));
        }
        let Some(at) = self.trapped_at.get() else { return range };
        let pages = self.block_pages.get();
        let block = if self.view.is_trap_filled() {
            self.appetite.block(at, pages)
        } else {
            let bytes = pages * PAGE_SIZE;
            PageRange::new(VirtAddr::new(at.as_usize() / bytes * bytes), PageCount::new(pages))
        };
        block.intersect(range).unwrap_or(range)
    }

    /// Opens `range`, whose record allows `rights` and names this member; stale frames are zeroed first. While a trap is
    /// served, only the block around it. It may be a safepoint ([`poll`](Self::poll)). Trap code.
    ///
    /// # Errors
    /// [`FillError`].
    #[inline]
    pub fn open(&self, range: PageRange, rights: Protection) -> Result<(), FillError> {
        if rights == Protection::None {
            return Ok(());
        }
        let trap_filled = self.view.is_trap_filled();
        if rights == Protection::Read && !trap_filled {
            return Err(FillError::ReadOnly { range });
        }
        let range = self.block(range);
        self.frames.prepare(range, trap_filled)?;
        if range.pages().get() > 1 {
            // Zeroing took time, and so will what comes: whoever asks need not wait for both.
            self.poll();
        }
        self.view.open(range, rights).map_err(|errno| FillError::Kernel { range, errno })
    }

    /// Takes `what` of `range` from the views of the members in `targets`, one bit each, and returns when none of them can
    /// reach beyond that. Members that don't answer because they are stopped are cut off from the frames. Trap code.
    #[inline]
    pub fn take_away(&self, range: PageRange, targets: u64, what: Lowering) {
        let outcome = self.shoot_down(targets, range, what);
        if outcome.overdue != 0 {
            // Punching can fail only for lack of memory for its own books; then the pages stay with the stopped member, and
            // its name at the pages keeps everybody else off them.
            let _ = self.frames.cut_off(range, outcome.overdue, true);
        }
    }

    /// The owner of `range` is gone, and its pages were taken from all views: their frames are zeroed before they are opened
    /// again, or go back to the kernel now if they are many. Trap code.
    #[inline]
    pub fn vacated(&self, range: PageRange) {
        self.frames.vacated(range);
    }

    /// Gives the memory of vacated pages in `range`, which nobody may open meanwhile, back to the kernel.
    ///
    /// # Errors
    /// The kernel's.
    pub fn trim(&self, range: PageRange) -> Result<PageCount, Errno> {
        self.frames.trim(range)
    }

    /// Whether all pages of `range` may be opened: nobody who does not answer can reach their frames.
    ///
    /// # Errors
    /// [`FrameError::Unacknowledged`], with the first page that may not.
    pub fn check_acknowledged(&self, range: PageRange) -> Result<(), FrameError> {
        self.frames.check_range(range)
    }

    /// Notes what this member has written in `range` since it was last asked, for [`Seat::take_written`] by anybody: tracked
    /// regions only. Pages that were taken from a view were noted then.
    ///
    /// # Errors
    /// The kernel's.
    pub fn note_written(&self, range: PageRange) -> Result<(), Errno> {
        self.view.note_written(range, &self.frames)
    }

    /// The pages of `range` that any member noted as written, each once.
    pub fn take_written(&self, range: PageRange, found: impl FnMut(VirtAddr)) {
        self.frames.take_written(range, found);
    }

    /// How long an operation waits for a lock before it fails and names the holder, [`PATIENCE`] at first; `None`: for ever. A
    /// trap always waits, for the access that it serves can't fail otherwise than by killing the process.
    pub fn set_patience(&self, patience: Option<Duration>) {
        let ns = patience.map_or(u64::MAX, |p| u64::try_from(p.as_nanos()).unwrap_or(u64::MAX));
        self.patience_ns.set(ns);
    }

    /// An operation begins, which has not waited yet.
    #[inline]
    pub(crate) fn has_not_waited(&self) {
        self.turns.set(0);
    }

    /// One turn of an operation's waiting: whoever is waited for is about to let go, or else needs this processor. Trap code.
    pub(crate) fn let_time_pass(&self) {
        let turns = self.turns.get().saturating_add(1);
        self.turns.set(turns);
        self.poll();
        if turns > SPUN_TURNS {
            io::yield_now();
        }
    }

    /// After the `turns`th turn of waiting. Trap code.
    pub(crate) fn has_waited_enough(&self, turns: u32) -> bool {
        if turns == 1 {
            self.waiting_since.set(timer::monotonic_ns());
            return false;
        }
        turns.is_multiple_of(64)
            && self.trapped_at.get().is_none()
            && timer::monotonic_ns() - self.waiting_since.get() > self.patience_ns.get()
    }

    /// Frames that the region holds now, in use or kept for later.
    pub fn resident(&self) -> PageCount {
        self.frames.resident()
    }

    /// A copy of the frame whose home is `page`, whatever the views show: for checks.
    pub fn peek(&self, page: VirtAddr) -> [u8; PAGE_SIZE] {
        self.frames.peek(page)
    }

    /// Whether the member at `index` is dead or its place free.
    pub fn is_gone(&self, index: usize) -> bool {
        index >= MEMBERS || liveness::of(self.table.member(MemberIndex(index as u8))) == Vigour::Gone
    }

    /// Whether the member at `index` is stopped (SIGSTOP, a debugger).
    pub fn is_stopped(&self, index: usize) -> bool {
        index < MEMBERS && liveness::of(self.table.member(MemberIndex(index as u8))) == Vigour::Stopped
    }

    /// What happened so far.
    pub fn tally(&self) -> Tally {
        let c = &self.record().counts;
        let get = |a: &AtomicU64| a.load(Ordering::Relaxed);
        Tally {
            requests: get(&c.requests),
            asked: get(&c.asked),
            signals: get(&c.signals),
            overdue: get(&c.overdue),
            obeyed: get(&c.obeyed),
            traps: get(&c.traps),
        }
    }
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Seat({}, {:?})", self.index.get(), self.region())
    }
}
