//! A space of processes: made once, joined by every process that is forked from its maker.
//!
//! ```text
//!   Space::create ── fork ─▶ Space::join ─▶ Member: map, unmap, protect, bytes
//! ```

use super::ground::{Config, Ground, GroundError, GroundJoinError};
use super::member::Member;
use super::table::MEMBERS;
use crate::{AddressSpace, Arena, MemberId, NoViews, Sizes, SpaceId, Spaces};
use core::ptr::NonNull;
use peregrine_base::{PageCount, PageRange};
use std::fmt;

/// A space could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SpaceError {
    /// Its memory.
    #[error(transparent)]
    Ground(#[from] GroundError),
    /// Its structures.
    #[error(transparent)]
    Arena(#[from] crate::ArenaError),
    /// The first address space.
    #[error(transparent)]
    Create(#[from] crate::CreateError),
    /// The maker's place.
    #[error(transparent)]
    NoPlace(#[from] crate::NoPlace),
}

/// A process could not become a member.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// All places are taken; dead members keep theirs until [`Member::reap`].
    #[error(transparent)]
    NoPlace(#[from] crate::NoPlace),
    /// Its view or its handlers.
    #[error(transparent)]
    Ground(#[from] GroundJoinError),
    /// Its traps.
    #[error("traps can't be caught: {0}")]
    Trap(peregrine_sys::raw::Errno),
}

/// An address space over processes: one region, at the same addresses in every member.
///
/// ```
/// use peregrine_space::process::{Config, Filling, Space};
/// use peregrine_space::{PageCount, Protection};
/// let space = Space::create(Config { pages: PageCount::new(1024), filling: Filling::Kernel, at: None })?;
/// // Processes forked from here on may join.
/// let mut member = space.join()?;
/// let range = member.map_anywhere(PageCount::new(16), Protection::ReadWrite)?;
/// member.bytes(range).store_u64(8, 42)?;
/// member.unmap(range)?;
/// // From here on no member reaches the frames; the next owner finds zeros.
/// let again = member.map_at(range, Protection::ReadWrite)?;
/// assert_eq!(member.bytes(again).load_u64(8)?, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Space {
    ground: Ground,
    sizes: Sizes,
    id: SpaceId,
}

/// The nodes that a region of `pages` pages can need: all of it page by page, its path, and some for each member's churn.
const fn nodes_for(pages: usize) -> usize {
    // 64 slots each, and of the levels above a 64th, a 64th of that, …
    pages / 63 + 4 * MEMBERS + 16
}

impl Space {
    /// Makes the memory and the structures. Whoever is to join inherits them by fork.
    ///
    /// # Errors
    /// [`SpaceError`].
    pub fn create(config: Config) -> Result<Self, SpaceError> {
        let sizes = Sizes {
            members: MEMBERS,
            spaces: 1,
            nodes: nodes_for(config.pages.get()),
            regions: 1,
            frames: 0,
        };
        let ground = Ground::new(config, PageCount::for_bytes(sizes.bytes()))?;
        let arena = Self::arena(&ground);
        // SAFETY: the pool is zeros, and nobody has seen it.
        let spaces = unsafe { Spaces::create(&arena, &sizes)? };
        let mut maker = spaces.join()?;
        let id = AddressSpace::create(&mut maker, NoViews, NoViews)?.id();
        maker.leave();
        Ok(Self { ground, sizes, id })
    }

    fn arena(ground: &Ground) -> Arena<'_> {
        let pool = ground.pool();
        let base = NonNull::new(pool.start().as_ptr::<u8>()).expect("a mapping is not at address 0");
        // SAFETY: the pool is mapped as long as the ground; nobody but arenas of this crate touches it; zeros, or what `create`
        // made of it.
        unsafe { Arena::new(base, pool.len_bytes()) }
    }

    /// The region.
    pub fn region(&self) -> PageRange {
        self.ground.region()
    }

    /// How much the structures can hold.
    pub const fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// Makes this process a member; all of the region is closed to it at first. The calling thread gets an alternate stack for
    /// signals.
    ///
    /// # Errors
    /// [`JoinError`].
    pub fn join(&self) -> Result<Member<'_>, JoinError> {
        let spaces = Spaces::open(&Self::arena(&self.ground)).expect("made in `create`");
        let none = crate::NoPlace { members: MEMBERS };
        let is_free = |index: usize| !spaces.members().contains(MemberId::new(index));
        let index = self.ground.reserve(is_free).ok_or(none)?;
        let me = spaces.join_at(MemberId::new(index)).inspect_err(|_| self.ground.release(index))?;
        let seat = match self.ground.join(index) {
            Ok(seat) => seat,
            Err(e) => {
                me.leave();
                self.ground.release(index);
                return Err(e.into());
            }
        };
        Member::new(&self.ground, spaces, self.id, me, seat)
    }
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Space({:?}, {:?})", self.region(), self.ground.filling())
    }
}
