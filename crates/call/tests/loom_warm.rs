//! Every order of takings, reservations and returns of one place: nobody has what another has, what was written before it was put back is
//! read after it was taken, and nothing is lost.
//!
//! (That who waits is seen or sees rests on the one order of all SeqCst accesses, which loom does not model.)

#![expect(clippy::vec_box, reason = "boxes are what passes through the place")]

use call_loom::warm::Warm;
use loom::cell::UnsafeCell;
use loom::sync::{Arc, Mutex};
use loom::thread;

/// What passes through the place: loom reports whoever touches it beside another, or before it sees what the last one wrote.
struct Thing(UnsafeCell<u32>);

impl Thing {
    fn use_it(&mut self) {
        // SAFETY: whether nobody else does is what loom checks.
        self.0.with_mut(|n| unsafe { *n += 1 });
    }
}

/// The place, and the stack beside it.
struct Shelf {
    warm: Warm<Thing>,
    rest: Mutex<Vec<Box<Thing>>>,
}

impl Shelf {
    fn with(things: u32) -> Arc<Self> {
        let shelf = Self { warm: Warm::new(), rest: Mutex::new(Vec::new()) };
        for _ in 0..things {
            shelf.put_back(Box::new(Thing(UnsafeCell::new(0))));
        }
        Arc::new(shelf)
    }

    fn put_back(&self, thing: Box<Thing>) {
        if let Err(thing) = self.warm.put_back(thing) {
            self.rest.lock().unwrap().push(thing);
        }
    }

    /// A hot call; `answered`: as fast as that, or it goes another way.
    fn hot(&self, answered: bool) -> u32 {
        let Some(mut thing) = self.warm.reserve() else { return self.cold() };
        thing.use_it();
        if answered {
            self.warm.put_back_reserved(thing);
        } else {
            self.warm.unreserve();
            self.put_back(thing);
        }
        1
    }

    /// Any other call; how many were made, 0 if all is in use.
    fn cold(&self) -> u32 {
        let Some(mut thing) = self.warm.take().or_else(|| self.rest.lock().unwrap().pop()) else { return 0 };
        thing.use_it();
        self.put_back(thing);
        1
    }

    /// Uses of all that is there, and how much that is.
    fn count(&self) -> (u32, usize) {
        let mut all: Vec<_> = self.warm.take().into_iter().collect();
        all.append(&mut self.rest.lock().unwrap());
        // SAFETY: all threads have been joined.
        (all.iter().map(|thing| thing.0.with(|n| unsafe { *n })).sum(), all.len())
    }
}

fn check(things: u32, threads: &'static [fn(&Shelf) -> u32]) {
    loom::model(move || {
        let shelf = Shelf::with(things);
        let (first, others) = threads.split_first().unwrap();
        let others: Vec<_> = others
            .iter()
            .map(|other| {
                let shelf = shelf.clone();
                thread::spawn(move || other(&shelf))
            })
            .collect();
        let mut uses = first(&shelf);
        for other in others {
            uses += other.join().unwrap();
        }
        assert_eq!(shelf.count(), (uses, things as usize), "something is lost, or was used by two");
    });
}

#[test]
fn two_hot_callers_of_one_line_and_of_two() {
    for things in [1, 2] {
        check(things, &[|s| s.hot(true) + s.hot(true), |s| s.hot(true) + s.hot(false)]);
    }
}

#[test]
fn hot_callers_and_others() {
    check(1, &[|s| s.hot(true) + s.hot(true), |s| s.cold() + s.cold()]);
    check(1, &[|s| s.hot(true), |s| s.hot(false), |s| s.cold()]);
}
