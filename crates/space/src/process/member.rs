//! What a member of a space of processes does with it.
//!
//! ```text
//!   map, unmap, protect, bytes
//!     │ a touch of a closed page: SIGSEGV or SIGBUS
//!     ▼
//!   AddressSpace::fault ─▶ joins the record's set, opens a block ─▶ the access repeats
//! ```
//!
//! A member belongs to one thread. Operations never touch the region's own bytes (they zero frames through the alias), so none of
//! them traps, and the trap may take locks as an operation does. What can trap inside one is a signal handler of the program that
//! comes in between and touches a closed page: the operation may hold that page's lock, so it is refused, and said why.

use super::frames::FrameError;
use super::ground::Ground;
use super::seat::{FillError, Seat, Tally};
use super::space::JoinError;
use super::table::MemberIndex;
use super::views::Views;
use crate::{
    AddressSpace, Backing, Entry, FaultError, MapAdmitError, MapError, Mapping, Mmu, Place, ProtectError,
    Recovered, SpaceId, Spaces, UnmapError,
};
use peregrine_base::sync::{AtomicBool, Ordering, compiler_fence};
use peregrine_base::{PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::process::write_all;
use peregrine_vm::trap::{Fault, Registration, SignalHandler};
use peregrine_vm::{Access, AltStack, Decision, Volatile};
use std::boxed::Box;
use std::cell::UnsafeCell;
use std::fmt;
use std::time::Duration;

/// A range could not be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapRangeError {
    /// As the address space says.
    #[error(transparent)]
    Space(#[from] MapError),
    /// The pages can't be had now.
    #[error(transparent)]
    Frames(#[from] FrameError),
    /// This member's view could not be opened; the range is mapped all the same.
    #[error("mapped, but not opened here: {0}")]
    Open(FillError),
    /// Not in the region.
    #[error("{asked} does not lie in the region {region:?}")]
    Outside {
        /// The address asked for.
        asked: VirtAddr,
        /// The region.
        region: PageRange,
    },
}

struct Inner<'s> {
    // Before `seat`, which its views point to.
    space: AddressSpace<'s, Views, Views>,
    me: UnsafeCell<crate::Member<'s>>,
    /// An operation runs: a trap now is refused. Atomic, for the trap's handler reads it between any two
    /// instructions of the thread, when another handler of the program touches the region.
    busy: AtomicBool,
    seat: Box<Seat>,
}

impl<'s> Inner<'s> {
    /// Runs an operation.
    #[inline]
    fn operate<R>(&self, f: impl FnOnce(&AddressSpace<'s, Views, Views>, &mut crate::Member<'s>) -> R) -> R {
        assert!(self.seat.is_mine(), "a child of a member is not the member: join in the child");
        assert!(!self.busy.load(Ordering::Relaxed), "an operation inside an operation");
        self.busy.store(true, Ordering::Relaxed);
        // What the operation does is neither begun before the mark nor finished after it, as a handler on this thread sees it.
        compiler_fence(Ordering::SeqCst);
        self.seat.has_not_waited();
        // SAFETY: `busy` was false: no other reference lives. Traps look at it, too.
        let result = f(&self.space, unsafe { &mut *self.me.get() });
        compiler_fence(Ordering::SeqCst);
        self.busy.store(false, Ordering::Relaxed);
        // Whoever asked meanwhile waits.
        self.seat.poll();
        result
    }

    /// Serves a touch of a page that this view does not show. Trap code.
    fn on_trap(&self, address: VirtAddr, access: Access) -> Decision {
        if !self.seat.is_mine() {
            return Decision::Deny;
        }
        if self.busy.load(Ordering::Relaxed) {
            say_refused(address);
            return Decision::Deny;
        }
        let wanted = match access {
            Access::Read => crate::Access::Read,
            Access::Write => crate::Access::Write,
        };
        let filled = self.operate(|space, me| {
            self.seat.serve_trap_at(Some(address));
            let filled = space.fault(me, address, wanted);
            self.seat.serve_trap_at(None);
            filled
        });
        match filled {
            Ok(_) => Decision::Filled,
            Err(_) => Decision::Deny,
        }
    }
}

/// Last words, to standard error, of a process that is about to die of a touch. Trap code: formats on the stack.
#[cold]
fn say_refused(address: VirtAddr) {
    struct Line([u8; 320], usize);
    impl fmt::Write for Line {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            let room = self.0.get_mut(self.1..self.1 + text.len()).ok_or(fmt::Error)?;
            room.copy_from_slice(text.as_bytes());
            self.1 += text.len();
            Ok(())
        }
    }
    let mut line = Line([0; 320], 0);
    // What does not fit is left out.
    let _ = fmt::Write::write_fmt(
        &mut line,
        format_args!(
            "peregrine-space: a signal handler touched {address}, a closed page, while its thread was in an operation of its \
             member, which may hold that page's lock: have handlers touch nothing of the region but what Member::open opened\n"
        ),
    );
    write_all(2, line.0.get(..line.1).unwrap_or_default());
}

struct Trapper(*const Inner<'static>);
// SAFETY: signals for the region arrive on the one thread that made the member.
unsafe impl Send for Trapper {}
// SAFETY: as above.
unsafe impl Sync for Trapper {}
// SAFETY: the fault path of the address space allocates only in the shared pool, takes range locks, which interrupted code of
// this member does not hold (`busy`), and does not panic but on broken structures (S3).
unsafe impl SignalHandler for Trapper {
    fn on_fault(&self, fault: &Fault) -> Decision {
        // SAFETY: the member's box outlives the registration, which is dropped first.
        unsafe { &*self.0 }.on_trap(fault.address, fault.access)
    }
}

/// This process as a member of a [`Space`](super::Space). Dropping it leaves; being killed is fine, too, if somebody [`reap`](Self::reap)s.
///
/// # Signal handlers
/// A handler that runs on the member's thread may touch pages of the region that are open here. A page that is not (it was never
/// touched or [`open`](Self::open)ed here, or another member took it away) is opened by a trap, and that needs the locks that an
/// operation of this member may hold at the moment: if the signal came in the middle of one, the touch is refused. The process then says
/// so on standard error, with the address, and dies of SIGSEGV or SIGBUS. Calling a method of the member in a handler panics for the same
/// reason. So keep handlers to memory outside the region, or block their signals around operations.
pub struct Member<'s> {
    registration: Option<Registration>,
    inner: Option<Box<Inner<'s>>>,
    _stack: AltStack,
    ground: &'s Ground,
}

impl<'s> Member<'s> {
    /// With a place in the structures and a seat; gives both back if traps can't be caught.
    pub(super) fn new(
        ground: &'s Ground,
        spaces: Spaces<'s>,
        space: SpaceId,
        me: crate::Member<'s>,
        seat: Box<Seat>,
    ) -> Result<Self, JoinError> {
        let views = Views(&raw const *seat);
        let space = AddressSpace::open(spaces, space, views, views);
        let inner = Box::new(Inner { space, me: UnsafeCell::new(me), busy: AtomicBool::new(false), seat });
        let trapper = Trapper((&raw const *inner).cast());
        let registration = Registration::new(ground.region(), trapper).map_err(JoinError::Trap);
        let stack = AltStack::install(64 << 10).map_err(JoinError::Trap);
        match (registration, stack) {
            (Ok(registration), Ok(stack)) => {
                Ok(Self { registration: Some(registration), inner: Some(inner), _stack: stack, ground })
            }
            (Err(e), _) | (_, Err(e)) => {
                let Inner { me, seat, .. } = *inner;
                me.into_inner().leave();
                ground.leave(seat);
                Err(e)
            }
        }
    }

    #[inline]
    fn inner(&self) -> &Inner<'s> {
        self.inner.as_ref().expect("taken in drop only")
    }

    /// This member's place.
    pub fn index(&self) -> MemberIndex {
        self.inner().seat.index()
    }

    /// Maps exactly `range`, where nothing is mapped, and opens it here. Other members open it by touching it. Of a large range in a
    /// trap-filled region the first [`MAP_PAGES`](super::MAP_PAGES) are opened, and the rest by touching it: [`open`](Self::open) it
    /// before a system call reads or writes there.
    ///
    /// # Errors
    /// [`MapRangeError`]; [`FrameError::Unacknowledged`]: a member that is stopped may still reach a frame there.
    #[inline]
    pub fn map_at(&mut self, range: PageRange, rights: Protection) -> Result<PageRange, MapRangeError> {
        self.check_inside(range)?;
        self.map(Place::FixedNoReplace(range.start()), range.pages(), rights)
    }

    /// Maps `pages` pages where there is room, and opens them here, as [`map_at`](Self::map_at) does.
    ///
    /// # Errors
    /// [`MapRangeError`].
    pub fn map_anywhere(&mut self, pages: PageCount, rights: Protection) -> Result<PageRange, MapRangeError> {
        let within = self.ground.region();
        let mut hint = None;
        loop {
            match self.map(Place::Hole { within, hint }, pages, rights) {
                // Look on beyond the page that a stopped member holds.
                Err(MapRangeError::Frames(FrameError::Unacknowledged { page, .. })) => {
                    let next = page.checked_add(peregrine_base::PAGE_SIZE);
                    hint = next.filter(|n| *n < within.end() && hint.is_none_or(|h| *n > h));
                    if hint.is_none() {
                        return Err(FrameError::Unacknowledged { page, members: 0 }.into());
                    }
                }
                other => return other,
            }
        }
    }

    #[inline]
    fn map(
        &mut self,
        place: Place,
        pages: PageCount,
        rights: Protection,
    ) -> Result<PageRange, MapRangeError> {
        let inner = self.inner();
        let mapping = Mapping { backing: Backing::Home { object: 0 }, rights };
        let mapped = inner.operate(|space, me| {
            inner.seat.while_mapping(|| space.map_and_admit(me, place, pages, &mapping))
        });
        let (range, open) = match mapped {
            Ok(range) => (range, Ok(())),
            Err(MapAdmitError::Map(e)) => return Err(e.into()),
            Err(MapAdmitError::Mmu { range, error }) => (range, Err(error)),
        };
        // What is opened for writing was looked at as it was opened.
        let held = match open {
            Err(FillError::Frames(e)) => Err(e),
            Ok(()) if rights == Protection::ReadWrite && inner.seat.map_opens_all(pages) => Ok(()),
            _ => inner.seat.check_acknowledged(range),
        };
        if let Err(e) = held {
            let _ = inner.operate(|space, me| space.unmap(me, range));
            return Err(e.into());
        }
        open.map_err(MapRangeError::Open).map(|()| range)
    }

    /// Opens what is mapped of `range` here, as touching its pages one by one would.
    ///
    /// # Errors
    /// [`FillError`].
    #[inline]
    pub fn open(&mut self, range: PageRange) -> Result<(), FillError> {
        match self.inner().operate(|space, me| space.admit(me, range)) {
            Err(FaultError::Mmu(e)) => Err(e),
            _ => Ok(()),
        }
    }

    /// Unmaps `range`: when this returns, no member reaches its frames, and whoever touches a page traps.
    ///
    /// # Errors
    /// As [`AddressSpace::unmap`].
    #[inline]
    pub fn unmap(&mut self, range: PageRange) -> Result<(), UnmapError> {
        self.inner().operate(|space, me| space.unmap(me, range))
    }

    /// Gives `range`, all mapped, these rights. Kernel-filled regions know `ReadWrite` and `None` only: pages that can be read
    /// only trap on every access there.
    ///
    /// # Errors
    /// As [`AddressSpace::protect`].
    pub fn protect(&mut self, range: PageRange, rights: Protection) -> Result<(), ProtectError> {
        self.inner().operate(|space, me| space.protect(me, range, rights))
    }

    /// What is mapped at `address`. Takes no lock.
    pub fn query(&mut self, address: VirtAddr) -> Option<Entry> {
        self.inner().operate(|space, me| space.query(me, address))
    }

    /// The bytes of `range`, as this member may reach them: a touch of what is not mapped kills the process.
    pub fn bytes(&self, range: PageRange) -> Volatile<'_> {
        assert!(
            range.start() >= self.ground.region().start() && range.end() <= self.ground.region().end(),
            "{range:?} does not lie in the region {:?}",
            self.ground.region()
        );
        // SAFETY: the region is mapped as long as the member, and no reference to its bytes exists (S1).
        unsafe { Volatile::new(range) }
    }

    /// A safepoint: obeys what other members ask. Members that never call it are signalled.
    #[inline]
    pub fn poll(&self) {
        self.inner().seat.poll();
    }

    /// To be called every few milliseconds, between operations: moves Refcache's epoch on and gives empty nodes back. Members that
    /// are stopped are taken out of the epoch.
    pub fn tick(&mut self) {
        let inner = self.inner();
        let views = Views(&raw const *inner.seat);
        inner.operate(|_, me| {
            me.tick(&views);
            for laggard in me.laggards().iter() {
                if laggard != me.id() && inner.seat.is_stopped(laggard.index()) {
                    let _ = me.expel(laggard);
                }
            }
        });
    }

    /// Leaves the epoch until the next operation: before blocking.
    pub fn idle(&mut self) {
        self.inner().operate(|_, me| me.idle());
    }

    /// How long an operation waits for a member that holds a lock before it fails with `Held`, which names it;
    /// [`PATIENCE`](super::PATIENCE) at first, `None`: for ever. Members that are dead are not waited for: what they hold is taken over.
    pub fn set_patience(&mut self, patience: Option<Duration>) {
        self.inner().seat.set_patience(patience);
    }

    /// Members that are stopped in the middle of an operation: others may be waiting for them.
    pub fn stopped_holders(&mut self) -> std::vec::Vec<crate::Holder> {
        let inner = self.inner();
        inner.operate(|space, _| {
            space.at_work().filter(|holder| inner.seat.is_stopped(holder.member.index())).collect()
        })
    }

    /// Looks for members that died, and mends what each left half done; returns what that was. One recovery may mend several.
    pub fn reap(&mut self) -> std::vec::Vec<(MemberIndex, Recovered)> {
        let inner = self.inner();
        let mut found = std::vec::Vec::new();
        loop {
            let views = Views(&raw const *inner.seat);
            let claimed = inner.operate(|_, me| me.spaces().members());
            let Some(dead) = claimed.iter().find(|m| views.is_dead(*m)) else { return found };
            let mended = inner.operate(|space, me| space.recover_dead(me, dead));
            // Or somebody else was faster.
            if !mended.dead.is_empty() {
                found.push((MemberIndex(dead.index() as u8), mended));
            }
        }
    }

    /// What this member's shootdowns came to.
    pub fn tally(&self) -> Tally {
        self.inner().seat.tally()
    }

    /// The layer below: for frames, tracking, and checks.
    pub fn seat(&self) -> &Seat {
        &self.inner().seat
    }

    /// The structures, for checks and measurements.
    pub fn spaces(&self) -> Spaces<'s> {
        self.inner().operate(|_, me| me.spaces())
    }

    /// Has `hook` called at every step of an operation that holds a lock or has changed something: for tests that die there.
    pub fn on_step(&mut self, hook: Option<crate::Hook>) {
        self.inner().operate(|_, me| me.on_step(hook));
    }

    fn check_inside(&self, range: PageRange) -> Result<(), MapRangeError> {
        let region = self.ground.region();
        if range.start() >= region.start() && range.end() <= region.end() {
            return Ok(());
        }
        Err(MapRangeError::Outside { asked: range.start(), region })
    }
}

impl fmt::Debug for Member<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Member({:?})", self.inner().seat)
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        // No trap is served from here on.
        self.registration = None;
        if let Some(inner) = self.inner.take() {
            if !inner.seat.is_mine() {
                core::mem::forget(inner);
                return;
            }
            let Inner { me, seat, .. } = *inner;
            // First the place in the structures, then the one in the table, by which this process is named as long as it has
            // either, and asked as long as it has a view.
            me.into_inner().leave();
            self.ground.leave(seat);
        }
    }
}
