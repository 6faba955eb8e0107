//! What one process needs to be a member: its view, its access to the frames, its place in the table. The traits that the
//! address space asks for are carried out here.

use super::frames::{FrameError, Frames};
use super::liveness::{self, Vigour};
use super::shootdown;
use super::table::{Lowering, MEMBERS, MemberIndex, MemberRecord, Table};
use super::view::View;
use crate::{Change, Contents, FrameId, MemberId, MemberSet, Mmu, SpaceId};
use peregrine_base::sync::{AtomicI32, AtomicU64, Ordering};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::io;
use peregrine_sys::raw::Errno;
use std::cell::Cell;

/// Pages that a trap in a trap-filled region fills at once: measured, 64 KiB blocks cost 241 ns a page, single pages 2,138.
pub const BLOCK_PAGES: usize = 16;
/// Pages that a trap in a kernel-filled region opens at once.
const OPEN_PAGES: usize = 512;

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
    #[error("{range:?} is kernel-filled, which is either open or closed: for pages that can only be read use Filling::Trap")]
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

/// One process's part of a space.
pub(crate) struct Local {
    pub(crate) table: Table,
    pub(crate) index: MemberIndex,
    // Before `frames`: a view is closed before its frames' alias goes.
    pub(crate) view: View,
    pub(crate) frames: Frames,
    pub(crate) pidfds: [AtomicI32; MEMBERS],
    pub(crate) pidfd_owners: [AtomicU64; MEMBERS],
    /// The address whose trap is being served: fills are cut to a block around it.
    pub(crate) trapped_at: Cell<Option<VirtAddr>>,
}

impl Local {
    pub(crate) fn new(table: Table, index: MemberIndex, view: View, frames: Frames) -> Self {
        Self {
            table,
            index,
            view,
            frames,
            pidfds: shootdown::no_pidfds(),
            pidfd_owners: std::array::from_fn(|_| AtomicU64::new(0)),
            trapped_at: Cell::new(None),
        }
    }

    #[inline]
    pub(crate) fn record(&self) -> &MemberRecord {
        self.table.member(self.index)
    }

    /// The aligned block of `range` around the trap that is being served; all of `range` if there is none.
    fn block(&self, range: PageRange) -> PageRange {
        let Some(at) = self.trapped_at.get() else { return range };
        let pages = if self.view.is_trap_filled() { BLOCK_PAGES } else { OPEN_PAGES };
        let start = VirtAddr::new(at.as_usize() / (pages * PAGE_SIZE) * (pages * PAGE_SIZE));
        PageRange::new(start, PageCount::new(pages)).intersect(range).unwrap_or(range)
    }

    #[inline]
    pub(crate) fn open(&self, range: PageRange, rights: Protection) -> Result<(), FillError> {
        if rights == Protection::None {
            return Ok(());
        }
        let trap_filled = self.view.is_trap_filled();
        if rights == Protection::Read && !trap_filled {
            return Err(FillError::ReadOnly { range });
        }
        let range = self.block(range);
        self.frames.prepare(range, trap_filled)?;
        self.view.open(range, rights).map_err(|errno| FillError::Kernel { range, errno })
    }

    pub(crate) fn lower(&self, range: PageRange, targets: u64, lowering: Lowering) {
        let outcome = self.shoot_down(targets, range, lowering);
        if outcome.overdue != 0 {
            // Punching can fail only for lack of memory for its own books; then the pages stay with the stopped member, and
            // its name at the pages keeps everybody else off them.
            let _ = self.frames.cut_off(range, outcome.overdue, true);
        }
    }
}

/// Members below [`MEMBERS`] as one word.
fn word(set: &MemberSet) -> u64 {
    set.words()[0]
}

/// A process's `Local` as the address space's MMU and frames. It stays where it is as long as the member.
#[derive(Clone, Copy)]
pub(crate) struct Views(*const Local);

impl Views {
    /// # Safety
    /// `local` stays where it is as long as the value, or a copy of it, is used.
    pub(crate) const unsafe fn new(local: *const Local) -> Self {
        Self(local)
    }

    fn local(&self) -> &Local {
        // SAFETY: promised in `new`.
        unsafe { &*self.0 }
    }
}

impl Mmu for Views {
    type Error = FillError;

    fn fill(
        &self,
        _: SpaceId,
        _: MemberId,
        range: PageRange,
        contents: Contents,
        rights: Protection,
    ) -> Result<(), FillError> {
        match contents {
            Contents::Home => self.local().open(range, rights),
            Contents::Frame(_) => Err(FillError::NotHome { range }),
        }
    }

    fn shootdown(&self, _: SpaceId, _: MemberId, range: PageRange, targets: &MemberSet, change: Change) {
        let lowering = match change {
            Change::Restrict(Protection::ReadWrite) => return,
            Change::Restrict(Protection::Read) => Lowering::ReadOnly,
            Change::Drop | Change::Restrict(Protection::None) => Lowering::Close,
        };
        self.local().lower(range, word(targets), lowering);
    }

    fn wait(&self, _: MemberId, owner: MemberId) {
        let local = self.local();
        local.poll();
        let _ = owner;
        io::yield_now();
    }
}

impl crate::Frames for Views {
    fn zeroed(&self, _: SpaceId, _: MemberId, _: VirtAddr) -> Option<FrameId> {
        None
    }

    fn copied(&self, _: SpaceId, _: MemberId, _: VirtAddr, _: FrameId) -> Option<FrameId> {
        None
    }

    fn of_object(&self, _: MemberId, _: u64, _: u64) -> Option<FrameId> {
        None
    }

    fn release(&self, _: MemberId, _: FrameId) {}

    fn rebuild(&self, _: MemberId, _: &dyn Fn(FrameId) -> bool) {}
}

impl Local {
    /// Whether the member at `index` is dead.
    pub(crate) fn is_dead(&self, index: MemberIndex) -> bool {
        liveness::of(self.table.member(index)) == Vigour::Gone
    }

    /// Traps served so far.
    pub(crate) fn note_trap(&self) {
        super::table::Counts::bump(&self.record().counts.traps);
    }

    /// Requests waiting: for tests.
    pub(crate) fn is_asked(&self) -> bool {
        self.record().asked.load(Ordering::Relaxed) != 0
    }
}
