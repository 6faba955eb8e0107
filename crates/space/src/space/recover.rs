//! After a death: what a member left half done is finished or undone, and all counts are made anew.
//!
//! ```text
//!  claim     one survivor recovers; if it dies too, the next one takes over from the start
//!  hold      the others finish their operations, or give up waiting for locks, and stand back. Lookups go on
//!  decide    the dead member's intent: committed → change the remaining records; pending → nothing has changed
//!  unlock    every slot that shows one of its locks
//!  count     all trees are walked: uses of nodes, references of regions and frames. Deltas and queues are forgotten
//!  free      nodes and regions that nothing leads to; the embedder learns which frames are in use
//!  release   the dead member's place is free for another
//! ```
//!
//! Nothing that was in the dead member's hands need be known: a node taken from a pool, a delta between cache and object, an
//! object off its queue, a half-copied child are all what the walk does not find. It costs time in proportion to what the arena
//! holds, and is paid for deaths only.
//!
//! No view need be mended: shootdowns come before commits, and sets are left only after views were emptied. A view of a dead
//! member is gone with it ([`Mmu::forget`]); its number may stay in sets, and a shootdown to it is at worst for nothing.
//!
//! A runtime that goes back to an earlier state drops what its *living* members are doing, too: their operations are as unfinished
//! as a dead one's, but their views are what they were ([`AddressSpace::recover_all`]).
//!
//! What can go wrong: a member that is *stopped* in the middle of an operation holds up the recovery until it goes on or is
//! killed too, for what it is about to change can't be known. It holds up nothing else.

use super::AddressSpace;
use crate::desk::Member;
use crate::intent::Phase;
use crate::member::{MemberId, MemberSet};
use crate::mmu::{Frames, Mmu};
use crate::radix::slot::{Shape, Slot, SlotWord};
use crate::radix::{FANOUT, LEVELS, Tree};
use crate::record::Value;
use crate::refcache::{Counted, ObjectId};
use crate::spaces::{RootState, Spaces};
use peregrine_base::sync::{Ordering, spin_loop};

/// Whom a recovery is for: see [`AddressSpace::recover_all`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stopped {
    /// Members that were killed.
    pub killed: MemberSet,
    /// Members that live, but have dropped what they were doing for good, and will join anew before their next operation. What they
    /// have in view they keep.
    pub reset: MemberSet,
    /// Whether the killed have nothing in view any more, as is so for processes: then they leave all sets. Not so where entries
    /// that a member filled lie in a table that others use.
    pub views_are_gone: bool,
}

/// What a recovery found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Recovered {
    /// Who was mended: the members named, and others that were found dead. Their places may be taken already: don't recover
    /// them again.
    pub dead: MemberSet,
    /// Whether an operation had taken effect and was finished.
    pub finished: bool,
    /// Locks that the dead member held.
    pub locks: usize,
    /// Nodes that nothing led to.
    pub nodes: usize,
    /// Regions that no record named.
    pub regions: usize,
    /// Spaces that were being made, or taken down.
    pub spaces: usize,
}

impl<'m, M: Mmu, F: Frames> AddressSpace<'m, M, F> {
    /// Mends what `dead` left behind, in all spaces of the arena (this space lends its MMU and frames). The caller is
    /// certain that `dead` does not run any more, and never will: it was killed, and waited for. Others that turn out to be
    /// dead meanwhile ([`Mmu::is_dead`]) are mended with it.
    pub fn recover(&self, member: &mut Member<'m>, dead: MemberId) -> Recovered {
        self.recover_all(member, Stopped { killed: MemberSet::only(dead), ..Stopped::default() })
    }

    /// As [`recover`](Self::recover), for several members, some of which may live: a runtime that went back to an earlier state had them
    /// drop what they were doing. All their places are free afterwards.
    pub fn recover_all(&self, member: &mut Member<'m>, stopped: Stopped) -> Recovered {
        self.recover_if(member, stopped, || true)
    }

    /// As [`recover`](Self::recover), if `dead` [is dead](Mmu::is_dead) still when nobody else can recover it: somebody may have, and its
    /// place may be another's. Then, unless others are dead, nothing is done, and nobody named.
    pub fn recover_dead(&self, member: &mut Member<'m>, dead: MemberId) -> Recovered {
        let views_are_gone = self.mmu.views_die_with_members();
        let stopped = Stopped { killed: MemberSet::only(dead), views_are_gone, ..Stopped::default() };
        self.recover_if(member, stopped, || self.mmu.is_dead(dead))
    }

    /// `still`, asked once nobody else can recover: whether it is to be done.
    fn recover_if(
        &self,
        member: &mut Member<'m>,
        stopped: Stopped,
        still: impl FnOnce() -> bool,
    ) -> Recovered {
        let mut dead = stopped.killed;
        dead.union_with(&stopped.reset);
        while !member.claim_recovery(|m| dead.contains(m) || self.mmu.is_dead(m)) {
            self.mmu.wait(member.id(), member.id());
            spin_loop();
        }
        let mut killed = stopped.killed;
        if !still() {
            (dead, killed) = (MemberSet::EMPTY, MemberSet::EMPTY);
        }
        // Also those whose recovery was begun by one that has died over it.
        for other in self.spaces.members().iter().filter(|m| *m != member.id()) {
            if !dead.contains(other) && self.mmu.is_dead(other) {
                dead.insert(other);
                killed.insert(other);
            }
        }
        if dead.is_empty() {
            member.release_everybody();
            return Recovered::default();
        }
        killed.iter().for_each(|dead| self.mmu.forget(dead));
        dead.iter().for_each(|dead| self.spaces.stop_working(dead));
        while let Some(other) = member.somebody_at_work() {
            if self.mmu.is_dead(other) {
                dead.insert(other);
                killed.insert(other);
                self.mmu.forget(other);
                self.spaces.stop_working(other);
            }
            self.mmu.wait(member.id(), other);
            spin_loop();
        }
        let mut result = Recovered { dead, ..Recovered::default() };
        for dead in dead.iter() {
            self.drop_spaces(dead, &mut result);
            self.finish_intent(member, dead, &mut result);
        }
        let viewless = if stopped.views_are_gone { killed } else { MemberSet::EMPTY };
        self.count_anew(member, &dead, &viewless, &mut result);
        for dead in dead.iter() {
            self.spaces.bury(dead);
        }
        member.release_everybody();
        result
    }

    fn trees(&self) -> impl Iterator<Item = (u16, Tree<'_, 'm>)> {
        let spaces = &self.spaces;
        spaces.roots.iter().enumerate().filter_map(move |(i, root)| {
            let used = root.state.load(Ordering::Acquire) != RootState::FREE;
            used.then(|| (i as u16, Tree { spaces, root: root.node.load(Ordering::Relaxed) }))
        })
    }

    fn drop_spaces(&self, dead: MemberId, result: &mut Recovered) {
        for root in self.spaces.roots {
            if root.state.load(Ordering::Acquire) == RootState::making(dead) {
                root.state.store(RootState::FREE, Ordering::Release);
                result.spaces += 1;
            }
        }
    }

    fn finish_intent(&self, member: &Member<'m>, dead: MemberId, result: &mut Recovered) {
        let Some(intent) = self.spaces.intent(dead).read() else { return };
        let Some((_, tree)) = self.trees().find(|(id, _)| *id == intent.space.0) else { return };
        if !matches!(intent.phase, Phase::Committed | Phase::Planting) {
            return;
        }
        result.finished = true;
        // The dead member's locks name its operation.
        let mut by = None;
        each_slot(tree, &mut |_, slot, _| {
            if let Shape::Terminal(Some(owner)) = slot.word().shape()
                && owner.member == dead
            {
                by = Some(owner);
            }
        });
        if let Some(by) = by {
            let space =
                AddressSpace { spaces: self.spaces, id: intent.space, mmu: &self.mmu, frames: &self.frames };
            if intent.phase == Phase::Committed {
                space.change_records(member, by, tree.top(), &intent.pages, intent.doing);
            } else {
                // What is mapped is new, and may be in the view of its member, if that lives: nothing was vacated there.
                tree.each_locked(by, tree.top(), &intent.pages, &mut |spot| {
                    if !spot.slot.value().is_mapped() {
                        tree.set(&member.handle, &spot, intent.doing.apply(Value::UNMAPPED));
                    }
                });
            }
        }
    }

    /// Counts, and takes the `viewless` out of all sets.
    fn count_anew(
        &self,
        member: &Member<'m>,
        dead: &MemberSet,
        viewless: &MemberSet,
        result: &mut Recovered,
    ) {
        let spaces = self.spaces;
        spaces.refcache().reset(dead);
        let nodes = spaces.node_pool(|pool| pool.touched());
        let regions = spaces.region_pool(|pool| pool.touched());
        let descriptors = &spaces.node_descriptors[..nodes];
        let region_descriptors = &spaces.region_descriptors[..regions];
        let were_live = spaces.nodes_in_use();
        let regions_were_live = spaces.regions_in_use();
        for descriptor in descriptors.iter().chain(region_descriptors) {
            descriptor.object.reset(0);
            descriptor.live.store(0, Ordering::Relaxed);
        }
        let lines = &spaces.lines[..spaces.line_pool(|pool| pool.touched())];
        lines.iter().for_each(|line| line.live.store(0, Ordering::Relaxed));
        for (index, frame) in spaces.frames.iter().enumerate() {
            let pins = self.frames.pins(crate::FrameId::new(index as u32));
            if pins != 0 || frame.object.global() != 0 || frame.object.load().queued() {
                frame.object.reset(pins as i32);
            }
        }
        for (_, tree) in self.trees() {
            // A root's own use.
            bump(&spaces, ObjectId(tree.root), 1);
            descriptors[tree.root as usize].live.store(1, Ordering::Relaxed);
            each_slot(tree, &mut |node, slot, line| {
                if let Some(line) = line {
                    lines[line as usize].live.store(1, Ordering::Relaxed);
                }
                match slot.word().shape() {
                    Shape::Child { node: child, .. } => {
                        // A mark is set by whoever queues the node, and the queues are gone.
                        slot.set_word(SlotWord::child(child, false));
                        descriptors[child as usize].live.store(1, Ordering::Relaxed);
                        remove_inherited(&spaces, child, viewless);
                        bump(&spaces, ObjectId(node), 1);
                    }
                    Shape::Terminal(owner) => {
                        if owner.is_some() {
                            result.locks += 1;
                            slot.unlock();
                        }
                        let value = slot.value();
                        if !value.is_mapped() {
                            return;
                        }
                        // Nobody else writes a set now: everybody is held.
                        slot.remove_all(viewless);
                        bump(&spaces, ObjectId(node), 1);
                        if let Some(region) = value.region() {
                            bump(&spaces, spaces.region_id(region), 1);
                            region_descriptors[region as usize].live.store(1, Ordering::Relaxed);
                        }
                        if let Some(frame) = value.frame() {
                            bump(&spaces, spaces.frame_id(frame), 1);
                        }
                    }
                }
            });
        }
        spaces.forget_free();
        for (index, descriptor) in descriptors.iter().enumerate() {
            if descriptor.live.load(Ordering::Relaxed) == 0 {
                spaces.node_pool(|pool| pool.give(&member.handle, index as u32));
            } else if descriptor.object.global() == 0 {
                // Empty, and in no queue any more: a delta of zero brings it under review.
                spaces.refcache().add(&member.handle, &spaces, ObjectId(index as u32), 0);
            }
        }
        for (index, line) in lines.iter().enumerate() {
            if line.live.load(Ordering::Relaxed) == 0 {
                spaces.line_pool(|pool| pool.give(&member.handle, index as u32));
            }
        }
        for (index, descriptor) in region_descriptors.iter().enumerate() {
            if descriptor.live.load(Ordering::Relaxed) == 0 {
                spaces.region_pool(|pool| pool.give(&member.handle, index as u32));
            }
        }
        result.nodes = were_live - spaces.nodes_in_use();
        result.regions = regions_were_live - spaces.regions_in_use();
        self.frames.rebuild(member.id(), &|frame| {
            spaces.frames.get(frame.get() as usize).is_some_and(|d| d.object.global() != 0)
        });
    }
}

fn bump(objects: &impl Counted, id: ObjectId, by: i32) {
    let object = objects.object(id);
    object.reset(object.global() + by);
}

/// Takes the `viewless` out of the set that a node's cells may have inherited.
fn remove_inherited(spaces: &Spaces<'_>, node: u32, viewless: &MemberSet) {
    let inherited = &spaces.nodes[node as usize].head.inherited;
    let mut members = inherited.load();
    members.remove_all(viewless);
    inherited.store(&members);
}

/// Calls `f` with each slot of a tree, the number of its node, and that of its line if it has one; parents before children.
fn each_slot<'m>(tree: Tree<'_, 'm>, f: &mut dyn FnMut(u32, Slot<'m>, Option<u32>)) {
    fn visit<'m>(tree: Tree<'_, 'm>, node: u32, level: u32, f: &mut dyn FnMut(u32, Slot<'m>, Option<u32>)) {
        for index in 0..FANOUT {
            let (slot, _) = tree.spaces.slot(node, index);
            f(node, slot, tree.spaces.nodes[node as usize].cells[index].line());
            if let (Shape::Child { node, .. }, 1..) = (slot.word().shape(), level) {
                visit(tree, node, level - 1, f);
            }
        }
    }
    visit(tree, tree.root, LEVELS - 1, f);
}
