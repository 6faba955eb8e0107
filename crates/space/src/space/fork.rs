//! Making, copying and taking down whole spaces.
//!
//! `fork` locks the parent's whole range. Private pages that have a frame become copy-on-write on both sides: their writers
//! lose the right first, then the parent's record is marked, then the child gets a copy of it. The child is nobody's yet, so it is
//! written without locks; if its maker dies, it is dropped as a whole, and marks that are left in the parent only cost a copy each.

use super::{AddressSpace, range_of};
use crate::desk::Member;
use crate::holder::Holder;
use crate::intent::Doing;
use crate::member::MemberSet;
use crate::mmu::{Change, Frames, Mmu, SpaceId};
use crate::radix::change::NoNodes;
use crate::radix::collapse::RETIRED;
use crate::radix::slot::{Shape, SlotWord};
use crate::radix::{PAGES, Spot, Tree};
use crate::record::{Kind, Value};
use crate::refcache::ObjectId;
use crate::spaces::{RootState, Spaces};
use crate::step::Step;
use core::ops::Range;
use peregrine_base::Protection;
use peregrine_base::sync::Ordering;

/// Why no space was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CreateError {
    /// The MMU [gave up](crate::Mmu::gives_up) waiting for a member that holds a lock.
    #[error(
        "waited in vain: {0}; let it go on if it is stopped, or kill it: what a dead member holds is taken over"
    )]
    Held(Holder),
    /// All are in use.
    #[error("the arena's {0} spaces are in use: make it for more")]
    NoSpaces(usize),
    /// A space needs a node for its root.
    #[error("the arena's {0} nodes are in use: make it for more")]
    NoNodes(usize),
}

/// Why a space was not copied.
pub type ForkError = CreateError;

impl<'m, M: Mmu, F: Frames> AddressSpace<'m, M, F> {
    /// Makes an empty space.
    ///
    /// # Errors
    /// See [`CreateError`].
    pub fn create(member: &mut Member<'m>, mmu: M, frames: F) -> Result<Self, CreateError> {
        let spaces = member.spaces;
        while !member.try_enter() {
            mmu.wait(member.id(), member.id());
        }
        let made = make(member);
        if let Ok(id) = made {
            spaces.roots[id.index()].state.store(RootState::LIVE, Ordering::Release);
        }
        member.exit();
        Ok(Self { spaces, id: made?, mmu, frames })
    }

    /// Opens a space that was made, here or by another member. Its maker tells the id.
    pub const fn open(spaces: Spaces<'m>, id: SpaceId, mmu: M, frames: F) -> Self {
        Self { spaces, id, mmu, frames }
    }

    /// Copies the space: a new one with the same mappings, private pages copy-on-write, shared ones and
    /// [home](crate::Backing::Home) ones shared. Nothing is filled in it.
    ///
    /// # Errors
    /// See [`ForkError`]; the parent is as before.
    pub fn fork(&self, member: &mut Member<'m>) -> Result<SpaceId, ForkError> {
        self.enter(member);
        let made = make(member);
        member.exit();
        let id = made?;
        let operation = match self.begin(member, Doing::Fork(id), 0..PAGES) {
            Ok(operation) => operation,
            Err(holder) => {
                self.of_child(id).destroy(member);
                return Err(CreateError::Held(holder));
            }
        };
        self.unshare(member, &operation);
        let child =
            Tree { spaces: &self.spaces, root: self.spaces.roots[id.index()].node.load(Ordering::Relaxed) };
        let mut result = Ok(());
        let me = &*member;
        self.tree().each_locked(operation.by, operation.at, &operation.pages, &mut |spot| {
            if result.is_err() || !spot.slot.value().is_mapped() {
                return;
            }
            result = child.plant(me, &spot);
            me.handle.step(Step::Copied);
        });
        self.finish(member, &operation);
        if result.is_err() {
            self.of_child(id).destroy(member);
            return Err(CreateError::NoNodes(self.spaces.nodes.len()));
        }
        self.spaces.roots[id.index()].state.store(RootState::LIVE, Ordering::Release);
        Ok(id)
    }

    fn of_child(&self, id: SpaceId) -> AddressSpace<'m, &M, &F> {
        AddressSpace { spaces: self.spaces, id, mmu: &self.mmu, frames: &self.frames }
    }

    /// Takes the right to write from private pages that have a frame, in views first and then in the records.
    fn unshare(&self, member: &Member<'m>, operation: &super::Operation) {
        let becomes_cow =
            |v: Value| v.kind() != Kind::Home && !v.is_shared() && v.frame().is_some() && !v.is_cow();
        // Neighbouring pages lose it in one shootdown.
        let mut run: Option<(Range<u64>, MemberSet)> = None;
        let shoot = |run: Option<(Range<u64>, MemberSet)>| {
            if let Some((pages, losers)) = run.filter(|(_, losers)| !losers.is_empty()) {
                let change = Change::Restrict(Protection::Read);
                self.mmu.shootdown(self.id, member.id(), range_of(&pages), &losers, change);
                member.handle.step(Step::ShotDown);
            }
        };
        self.tree().each_locked(operation.by, operation.at, &operation.pages, &mut |spot| {
            if !becomes_cow(spot.slot.value()) {
                return;
            }
            let own = spot.pages();
            match &mut run {
                Some((pages, losers)) if pages.end == own.start => {
                    pages.end = own.end;
                    losers.union_with(&spot.slot.members());
                }
                _ => shoot(run.replace((own, spot.slot.members()))),
            }
        });
        shoot(run);
        self.tree().each_locked(operation.by, operation.at, &operation.pages, &mut |spot| {
            let value = spot.slot.value();
            if becomes_cow(value) {
                spot.slot.set_value(value.cow(true));
                member.handle.step(Step::Changed);
            }
        });
    }

    /// Unmaps everything and takes the space down. Nobody else uses it any more.
    pub fn destroy(self, member: &mut Member<'m>) {
        // Unmapping everything splits nothing, so it can't fail but for somebody who still uses the space and should not.
        let mut unmapped = self.unmap(member, range_of(&(0..PAGES)));
        while let Err(super::UnmapError::Held(_)) = unmapped {
            unmapped = self.unmap(member, range_of(&(0..PAGES)));
        }
        debug_assert!(unmapped.is_ok());
        self.enter(member);
        let root = &self.spaces.roots[self.id.index()];
        root.state.store(RootState::making(member.id()), Ordering::Release);
        let node = root.node.load(Ordering::Relaxed);
        self.spaces.node_descriptors[node as usize].first.store(RETIRED, Ordering::Release);
        self.spaces.refcache().add(&member.handle, &self.spaces, ObjectId(node), -1);
        root.state.store(RootState::FREE, Ordering::Release);
        member.exit();
    }
}

/// Claims a root and gives it a node; the caller makes it live.
fn make(member: &Member<'_>) -> Result<SpaceId, CreateError> {
    let spaces = member.spaces;
    let me = &member.handle;
    let making = RootState::making(member.id());
    let claim = |root: &crate::spaces::Root| {
        let free = RootState::FREE;
        root.state.compare_exchange(free, making, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    };
    let index = spaces.roots.iter().position(claim).ok_or(CreateError::NoSpaces(spaces.roots.len()))?;
    let Some(node) = spaces.node_pool(|pool| pool.take(me)) else {
        spaces.roots[index].state.store(RootState::FREE, Ordering::Release);
        return Err(CreateError::NoNodes(spaces.nodes.len()));
    };
    spaces.make_root(me, node);
    spaces.roots[index].node.store(node, Ordering::Release);
    Ok(SpaceId(index as u16))
}

impl<'m> Tree<'_, 'm> {
    /// Copies a record to the same place in this tree, which is nobody's yet.
    fn plant(&self, member: &Member<'m>, from: &Spot<'m>) -> Result<(), NoNodes> {
        let me = &member.handle;
        let mut at = self.top();
        let pages = from.pages();
        while at.level > from.at.level {
            let index = at.slots(&(pages.start..pages.start + 1)).start;
            let (slot, word) = self.slot(at, index);
            let node = match word.shape() {
                Shape::Child { node, .. } => node,
                Shape::Terminal(_) => {
                    let node = self.spaces.node_pool(|pool| pool.take(me)).ok_or(NoNodes)?;
                    self.spaces.clear_node(node, u64::from(at.node) << 32 | index as u64);
                    // A use that is taken back at once: a node in which nothing is planted after all is reviewed.
                    self.count(me, node, 0);
                    self.count(me, at.node, 1);
                    slot.set_word(SlotWord::child(node, false));
                    me.step(Step::Expanded);
                    node
                }
            };
            at = at.child(index, node);
        }
        let spot = Spot { at, index: from.index, slot: self.slot(at, from.index).0 };
        self.set(me, &spot, from.slot.value());
        Ok(())
    }
}
