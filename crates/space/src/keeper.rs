//! What Refcache counts in an arena, and what becomes of it when it dies.

use crate::mmu::{FrameId, Frames};
use crate::refcache::{Counted, Handle, Object, ObjectId, Reclaim, Severed};
use crate::spaces::Spaces;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Class {
    Node(u32),
    Region(u32),
    Frame(FrameId),
}

impl Counted for Spaces<'_> {
    fn object(&self, id: ObjectId) -> &Object {
        match self.class(id) {
            Class::Node(n) => &self.node_descriptors[n as usize].object,
            Class::Region(n) => &self.region_descriptors[n as usize].object,
            Class::Frame(f) => &self.frames[f.get() as usize].object,
        }
    }

    fn mark_dying(&self, id: ObjectId) {
        if let Class::Node(node) = self.class(id) {
            self.mark_link(node, true);
        }
    }
}

/// What the review needs: the arena and the embedder's frames.
pub(crate) struct Keeper<'a, 'm, F> {
    pub(crate) spaces: &'a Spaces<'m>,
    pub(crate) frames: &'a F,
}

impl<F> Counted for Keeper<'_, '_, F> {
    fn object(&self, id: ObjectId) -> &Object {
        self.spaces.object(id)
    }
    fn mark_dying(&self, id: ObjectId) {
        self.spaces.mark_dying(id);
    }
}

impl<F: Frames> Reclaim for Keeper<'_, '_, F> {
    fn unmark_dying(&self, id: ObjectId) {
        if let Class::Node(node) = self.spaces.class(id) {
            self.spaces.mark_link(node, false);
        }
    }

    fn sever(&self, me: &Handle, id: ObjectId) -> Severed {
        match self.spaces.class(id) {
            Class::Node(node) => self.spaces.sever_link(me, node),
            // Readers that found the record before it went have left two epochs ago.
            Class::Region(_) => Severed::Dead,
            // The same, but the embedder's cache may have led somebody to the frame: it is a weak link.
            Class::Frame(frame) if self.frames.forget(me.id(), frame) => Severed::Dead,
            Class::Frame(_) => Severed::Revived,
        }
    }

    fn dead(&self, me: &Handle, id: ObjectId) {
        match self.spaces.class(id) {
            Class::Node(node) => self.spaces.give_node(me, node),
            Class::Region(region) => self.spaces.region_pool(|pool| pool.give(me, region)),
            Class::Frame(frame) => self.frames.release(me.id(), frame),
        }
    }
}
