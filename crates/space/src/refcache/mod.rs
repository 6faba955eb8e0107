//! Refcache: counts that nobody shares, and deaths that everybody agrees on.
//!
//! A shared counter is a shared cache line. Refcache splits each count into a *global* part in the object and a *delta* in
//! each member's own delta cache; taking or dropping a reference changes the member's delta only. The price is that
//! nobody knows the true count, which is the sum, until all deltas have been flushed. So time is cut in epochs:
//!
//! ```text
//!            member 0      member 1      member 2
//!  epoch e    flush ──────▶ flush ──────▶ flush ─┐    an epoch ends when every member that is In has flushed in it
//!  epoch e+1  …                                  │◀── global count of X reaches 0: X is queued for review at e+2
//!  epoch e+2  review X: a whole round of flushes (that of e+1) lies behind. Still 0, and never touched? then it is dead
//! ```
//!
//! **Why a delta of zero is flushed too.** A member that took a reference and dropped another's in one epoch has delta 0, and
//! yet the reference it took lives on. Its flush must mark X *dirty* (the count "went to zero again"), so that the review starts
//! over. The text first published leaves it out, and frees live objects (`tests/loom_refcache.rs` shows the run).
//!
//! **Weak references** are links that do not count, with a mark *dying* beside them. An object whose count reaches zero
//! has its link marked; whoever goes through the link takes the mark away, and the review, which must swing
//! `(link, dying)` to null in one step, fails and starts over. So a radix node that is emptied and filled in turn is not
//! freed and made anew each time.
//!
//! # Members that do not move
//!
//! An epoch must end without members that are idle, stopped or dead, and yet none of their deltas may be missed:
//!
//! ```text
//!  state of a member     In ──idle()──▶ Out            it flushed, and has no deltas
//!                        In ──expel()─▶ Expelling ─▶ Out     another one flushed for it
//!                        Out, Expelling ──▶ In              by itself, at its next step; its `turn` has changed
//! ```
//!
//! `expel` can flush for another member because a delta is one word (`cache.rs`) that only changes by compare-and-swap.
//! What a member holds in its registers when it is stopped in the middle of a flush is written down first (`moving`): the
//! object it names can't die, and the epoch goes on. A member that finds its turn changed knows that its lock-free reading may
//! have gone through memory used anew, and begins again; all memory here is type-stable, so such reading does no harm.
//!
//! Every word is changed by one atomic step and there are no locks: the published code locks objects, and a member stopped inside
//! would stop everybody. What a *killed* member leaves half done is found by making all counts anew ([`crate::Spaces`], `recover`).

mod cache;
mod epoch;
mod object;
mod review;

pub use cache::WAYS;
pub use epoch::{Epoch, ExpelError};
pub use object::{Object, ObjectId};

use crate::member::{Generation, MemberId};
use crate::step::{Hook, Step};
use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering};

/// What Refcache must know of the objects it counts.
pub trait Counted {
    /// The object's counting words.
    fn object(&self, id: ObjectId) -> &Object;

    /// Sets the dying mark of the weak link that leads to `id`, if it has one.
    fn mark_dying(&self, id: ObjectId) {
        let _ = id;
    }
}

/// What Refcache must be able to do with objects that die.
pub trait Reclaim: Counted {
    /// Takes the dying mark away again: the object lives.
    fn unmark_dying(&self, id: ObjectId) {
        let _ = id;
    }

    /// Cuts the weak link, if its dying mark is still set; objects without a link have been cut by being dead.
    fn sever(&self, me: &Handle, id: ObjectId) -> Severed {
        let _ = (me, id);
        Severed::Dead
    }

    /// The object is dead, and nobody can be reading it: its memory may be used again.
    fn dead(&self, me: &Handle, id: ObjectId);
}

/// What became of a weak link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Severed {
    /// Somebody went through it: the object lives, for now.
    Revived,
    /// No link leads to the object, and no reader can be inside.
    Dead,
    /// No link leads to the object any more, but readers may have come through it: wait two epochs.
    AfterGrace,
}

/// A member's part of Refcache in shared memory. Lines that only the member writes are apart from those that others do.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct Block {
    /// See [`epoch`].
    state: AtomicU64,
    /// The object whose delta is between the cache and the object, plus one; 0: none.
    moving: AtomicU32,
    /// Objects under review: a stack through [`Object`]'s `next`, plus one. Others take it over when this member is Out.
    queue: AtomicU32,
    ways: cache::Ways,
}

impl Block {
    /// A member's block before anybody joined.
    #[expect(clippy::new_without_default, reason = "made in place, in shared memory")]
    pub fn new() -> Self {
        Self {
            state: AtomicU64::new(0),
            moving: AtomicU32::new(0),
            queue: AtomicU32::new(0),
            ways: cache::Ways::new(),
        }
    }
}

/// A member as Refcache knows it: who, and how often its place in the epoch was taken from it.
#[derive(Debug)]
pub struct Handle {
    id: MemberId,
    generation: Generation,
    turn: core::cell::Cell<u16>,
    /// Where the member's last walks ended, the latest first: see `radix::lock`.
    pub(crate) last: [core::cell::Cell<Last>; LASTS],
    hook: core::cell::Cell<Option<Hook>>,
}

/// Walks that a member remembers: enough for two nodes of its own and two of a neighbour's, in turn.
const LASTS: usize = 4;

/// A node that a walk came to, and what the member's part in the epoch was when the walk began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Last {
    pub(crate) root: u32,
    pub(crate) node: u32,
    pub(crate) base: u64,
    pub(crate) moment: Moment,
}

/// The member's part in the epoch at one moment: as long as it is the same, the member has neither flushed nor been expelled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Moment(u64);

impl Last {
    /// No member's state is this one: it says "out of the epoch" in an epoch that is never reached.
    const NOWHERE: Self = Self { root: 0, node: 0, base: 0, moment: Moment(u64::MAX << 2) };
}

impl Handle {
    /// The member `id`. There must be one handle for a member at a time.
    pub const fn new(id: MemberId, generation: Generation) -> Self {
        Self {
            id,
            generation,
            turn: core::cell::Cell::new(0),
            last: [const { core::cell::Cell::new(Last::NOWHERE) }; LASTS],
            hook: core::cell::Cell::new(None),
        }
    }

    /// The member's number.
    #[inline]
    pub const fn id(&self) -> MemberId {
        self.id
    }

    /// Which life of that number.
    #[inline]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// Remembers a walk, in place of what was noted of the same place, or of the oldest.
    pub(crate) fn note_walk(&self, new: Last) {
        let same = self.last.iter().position(|l| l.get().root == new.root && l.get().base == new.base);
        for at in (1..=same.unwrap_or(LASTS - 1)).rev() {
            self.last[at].set(self.last[at - 1].get());
        }
        self.last[0].set(new);
    }

    /// Has `hook` called at every step from now on.
    pub fn on_step(&self, hook: Option<Hook>) {
        self.hook.set(hook);
    }

    /// A step was done that others can see.
    #[inline]
    pub(crate) fn step(&self, step: Step) {
        if let Some(hook) = self.hook.get() {
            hook(step);
        }
    }
}

/// Refcache over the blocks of all members.
#[derive(Clone, Copy, Debug)]
pub struct Refcache<'m> {
    epoch: &'m Epoch,
    blocks: &'m [Block],
}

impl<'m> Refcache<'m> {
    /// Over these.
    pub const fn new(epoch: &'m Epoch, blocks: &'m [Block]) -> Self {
        Self { epoch, blocks }
    }

    #[inline]
    fn block(&self, member: MemberId) -> &'m Block {
        &self.blocks[member.index()]
    }

    /// The member's part in the epoch now.
    #[inline]
    pub(crate) fn moment(&self, me: &Handle) -> Moment {
        Moment(self.block(me.id()).state.load(Ordering::Acquire))
    }

    /// The epoch's number.
    pub fn now(&self) -> u64 {
        self.epoch.now()
    }
}
