//! The review: which of the objects whose count was zero are dead.
//!
//! ```text
//!  due, count ≠ 0                      unmark, leave the queue
//!  due, 0, dirty                       mark, start over       (some member's flush has touched it: a reference may live)
//!  due, 0, in somebody's hands         start over             (a delta is in nobody's memory)
//!  due, 0, clean, link not severed     mark, start over       (somebody came through the weak link)
//!  due, 0, clean, severed              readers may be inside: limbo, two epochs more
//!  due, limbo                          dead
//! ```
//!
//! A queue is a stack that is taken whole by a swap, so that anybody can take over the queue of a member that is Out. Objects
//! that stay are pushed back. A reviewer that is stopped with a queue in its hands delays the reuse of that memory,
//! and nothing else.

use super::cache::change;
use super::epoch::Status;
use super::object::{Object, ObjectId};
use super::{Counted, Handle, Reclaim, Refcache, Severed};
use crate::member::MemberId;
use crate::step::Step;
use peregrine_base::sync::Ordering;

impl Refcache<'_> {
    /// A member's regular duty, between operations: flushes, moves the epoch on, reviews. Tells how many objects died.
    pub fn tick(&self, me: &Handle, objects: &impl Reclaim) -> usize {
        self.flush(me, objects);
        let mut dead = self.review(me, me.id(), objects);
        for i in 0..self.blocks.len() {
            let other = MemberId::new(i);
            if matches!(self.status(other), Status::Out | Status::Stray)
                && self.block(other).queue.load(Ordering::Relaxed) != 0
            {
                dead += self.review(me, other, objects);
            }
        }
        dead
    }

    /// Puts an object in a member's queue.
    pub(super) fn push(&self, member: MemberId, objects: &impl Counted, id: ObjectId) {
        let (queue, object) = (&self.block(member).queue, objects.object(id));
        loop {
            let head = queue.load(Ordering::Relaxed);
            object.next.store(head, Ordering::Relaxed);
            // Release publishes `next`. A stack that is only pushed to and taken whole has no ABA.
            if queue.compare_exchange(head, id.0 + 1, Ordering::Release, Ordering::Relaxed).is_ok() {
                return;
            }
        }
    }

    fn review(&self, me: &Handle, whose: MemberId, objects: &impl Reclaim) -> usize {
        let queue = &self.block(whose).queue;
        if queue.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        let mut at = queue.swap(0, Ordering::Acquire);
        me.step(Step::QueueTaken);
        let mut dead = 0;
        while at != 0 {
            let id = ObjectId(at - 1);
            let object = objects.object(id);
            at = object.next.load(Ordering::Relaxed);
            me.step(Step::Reviewing);
            dead += usize::from(self.review_one(me, objects, object, id));
        }
        dead
    }

    /// Tells whether it died.
    fn review_one(&self, me: &Handle, objects: &impl Reclaim, object: &Object, id: ObjectId) -> bool {
        loop {
            let turn = self.enter(me);
            let own = self.own_epoch(me.id());
            // Before the word is read: whoever has let go of the object has changed the word first.
            let held = self.is_in_hands(id);
            let old = object.load();
            if !old.is_due(own) {
                self.push(me.id(), objects, id);
                return false;
            }
            if old.limbo() {
                if object.exchange(old, old.released()) {
                    me.step(Step::Dead);
                    objects.dead(me, id);
                    return true;
                }
                continue;
            }
            if old.count() != 0 {
                // Unmarked while still queued: a flush that makes it zero now only soils it, and the exchange fails.
                objects.unmark_dying(id);
                if object.exchange(old, old.released()) {
                    return false;
                }
                continue;
            }
            let severed = if old.dirty() || held { Severed::Revived } else { objects.sever(me, id) };
            match severed {
                Severed::Revived => {
                    if object.exchange(old, old.queue_at(own + 3)) {
                        self.submit(me, objects, object, id, turn);
                        return false;
                    }
                }
                Severed::Dead => {
                    if object.exchange(old, old.released()) {
                        me.step(Step::Dead);
                        objects.dead(me, id);
                        return true;
                    }
                }
                Severed::AfterGrace => {
                    change(object, |old| old.into_limbo().queue_at(own + 3));
                    self.submit(me, objects, object, id, turn);
                    return false;
                }
            }
        }
    }
}
