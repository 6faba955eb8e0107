//! Refcache under a model checker: every interleaving of two members' atomic steps, within a bound on preemptions.
//!
//! The same scene is played on a faithful small model of the algorithm as it was first published, and must fail there: a test that
//! could not fail would prove nothing.

use base_loom::sync::{AtomicBool, AtomicU32, Ordering};
use loom::sync::Arc;
use space_loom::refcache::{Block, Counted, Epoch, Handle, Object, ObjectId, Reclaim, Refcache, Severed};
use space_loom::{Generation, MemberId};

const X: ObjectId = ObjectId(0);

/// One object, and whether it has died.
struct Scene {
    epoch: Epoch,
    blocks: [Block; 2],
    object: Object,
    dead: AtomicBool,
}

impl Scene {
    fn new(count: i32) -> Arc<Self> {
        Arc::new(Self {
            epoch: Epoch::new(),
            blocks: [Block::new(), Block::new()],
            object: Object::new(count),
            dead: AtomicBool::new(false),
        })
    }
    fn refcache(&self) -> Refcache<'_> {
        Refcache::new(&self.epoch, &self.blocks)
    }
}

impl Counted for Scene {
    fn object(&self, _id: ObjectId) -> &Object {
        &self.object
    }
}

impl Reclaim for Scene {
    fn sever(&self, _me: &Handle, _id: ObjectId) -> Severed {
        Severed::Dead
    }
    fn dead(&self, _me: &Handle, _id: ObjectId) {
        assert!(!self.dead.swap(true, Ordering::SeqCst), "an object dies once");
    }
}

fn member(number: usize) -> Handle {
    Handle::new(MemberId::new(number), Generation::default())
}

fn check(preemptions: usize, f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder.check(f);
}

/// Two places that hold references; at any time at least one of them does. Filling one takes a reference from the other.
struct Places([AtomicBool; 2]);

impl Places {
    /// Member `who` moves the reference to its own place, or drops its own if the other one is filled: `Some(delta)`.
    fn step(&self, who: usize) -> Option<i32> {
        let (mine, other) = (&self.0[who], &self.0[1 - who]);
        match (mine.load(Ordering::SeqCst), other.load(Ordering::SeqCst)) {
            (false, true) => {
                mine.store(true, Ordering::SeqCst);
                Some(1)
            }
            (true, true) => {
                mine.store(false, Ordering::SeqCst);
                Some(-1)
            }
            _ => None,
        }
    }
}

#[test]
fn an_object_with_a_reference_never_dies() {
    check(2, || {
        // One reference, in place 0, counted in the global count. Steps of the places take turns; flushes do not.
        let scene = Scene::new(1);
        let places = Arc::new((Places([AtomicBool::new(true), AtomicBool::new(false)]), AtomicU32::new(0)));
        let run = |who: usize| {
            let (scene, places) = (scene.clone(), places.clone());
            move || {
                let me = member(who);
                for _ in 0..2 {
                    if places.1.compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                        if let Some(delta) = places.0.step(who) {
                            scene.refcache().add(&me, &*scene, X, delta);
                        }
                        places.1.store(0, Ordering::SeqCst);
                    }
                    scene.refcache().tick(&me, &*scene);
                }
            }
        };
        let other = loom::thread::spawn(run(1));
        run(0)();
        other.join().unwrap();
        assert!(!scene.dead.load(Ordering::SeqCst), "a reference lives");
    });
}

#[test]
fn an_object_without_references_dies_once_in_spite_of_a_member_that_never_ticks() {
    check(2, || {
        let scene = Scene::new(1);
        let stopped = member(1);
        // In the epoch, with a delta of its own, and then never again.
        scene.refcache().add(&stopped, &*scene, X, -1);
        let me = member(0);
        scene.refcache().tick(&me, &*scene);
        let other = {
            let scene = scene.clone();
            loom::thread::spawn(move || {
                // It may be on its way to another step when it is expelled.
                let late = stopped;
                scene.refcache().add(&late, &*scene, X, 1);
                scene.refcache().add(&late, &*scene, X, -1);
            })
        };
        let _ = scene.refcache().expel(&me, MemberId::new(1), &*scene);
        other.join().unwrap();
        for _ in 0..8 {
            let _ = scene.refcache().expel(&me, MemberId::new(1), &*scene);
            scene.refcache().tick(&me, &*scene);
        }
        assert!(scene.dead.load(Ordering::SeqCst), "nobody waits for a member that does not move");
    });
}

#[test]
fn a_member_that_comes_back_late_drops_a_reference_without_killing_the_object() {
    check(2, || {
        // Member 1 holds the second reference and is out of the epoch; it comes back just while member 0 moves the epoch on.
        let scene = Scene::new(2);
        let other = {
            let scene = scene.clone();
            loom::thread::spawn(move || {
                let me = member(1);
                // The first reference goes, and a third one is taken from the second before anybody flushes.
                scene.refcache().add(&me, &*scene, X, -2);
                scene.refcache().add(&me, &*scene, X, 1);
                scene.refcache().tick(&me, &*scene);
            })
        };
        let me = member(0);
        for _ in 0..3 {
            scene.refcache().tick(&me, &*scene);
        }
        other.join().unwrap();
        for _ in 0..2 {
            scene.refcache().tick(&me, &*scene);
        }
        assert!(!scene.dead.load(Ordering::SeqCst), "a reference lives");
    });
}

/// The algorithm as first published: only deltas that are not zero are flushed. Locks in place of its per-object locks, and no
/// hardware in between, so what fails is the algorithm.
mod published {
    use loom::sync::Mutex;

    #[derive(Default)]
    pub struct State {
        epoch: u64,
        behind: usize,
        global: i64,
        review: Option<(usize, u64)>,
        dirty: bool,
        delta: [i64; 2],
        local: [u64; 2],
        pub freed: bool,
    }

    pub struct Published(pub Mutex<State>);

    impl Published {
        pub fn new() -> Self {
            Self(Mutex::new(State { global: 1, behind: 2, epoch: 1, ..State::default() }))
        }

        pub fn add(&self, core: usize, delta: i64) {
            self.0.lock().unwrap().delta[core] += delta;
        }

        /// `flush(); review()`. With `zeroes`, a delta of zero that is in the cache is flushed as well.
        pub fn tick(&self, core: usize, zeroes: bool) {
            let s = &mut *self.0.lock().unwrap();
            if s.local[core] < s.epoch {
                let delta = std::mem::take(&mut s.delta[core]);
                if delta != 0 || zeroes {
                    s.global += delta;
                    if s.global == 0 {
                        match s.review {
                            None => {
                                s.dirty = false;
                                s.review = Some((core, s.epoch + 2));
                            }
                            Some(_) => s.dirty = true,
                        }
                    }
                }
                s.local[core] = s.epoch;
                s.behind -= 1;
                if s.behind == 0 {
                    s.epoch += 1;
                    s.behind = 2;
                }
            }
            if let Some((who, due)) = s.review
                && who == core
                && s.epoch >= due
            {
                s.review = None;
                if s.global == 0 {
                    if s.dirty {
                        s.dirty = false;
                        s.review = Some((core, s.epoch + 2));
                    } else {
                        s.freed = true;
                    }
                }
            }
        }
    }
}

/// The run that the correction of the paper names: two members pass a reference back and forth around each other's flushes, so the
/// global count stays zero while a reference lives.
fn pass_back_and_forth(add: &dyn Fn(usize, i64), tick: &dyn Fn(usize)) {
    // Member 1 takes a reference from member 0's, which then goes: the sum stays 1 from here on.
    add(1, 1);
    add(0, -1);
    tick(0);
    for _ in 0..6 {
        // Before member 1 flushes, its reference moves to member 0; before member 0 flushes, back again.
        add(0, 1);
        add(1, -1);
        tick(1);
        add(1, 1);
        add(0, -1);
        tick(0);
    }
}

#[test]
fn passing_a_reference_around_flushes_frees_a_live_object_as_published_and_not_here() {
    for (zeroes, freed) in [(false, true), (true, false)] {
        check(0, move || {
            let p = published::Published::new();
            pass_back_and_forth(&|core, delta| p.add(core, delta), &|core| p.tick(core, zeroes));
            assert_eq!(p.0.lock().unwrap().freed, freed, "flushing zeroes: {zeroes}");
        });
    }
    check(0, || {
        let scene = Scene::new(1);
        let members = [member(0), member(1)];
        pass_back_and_forth(
            &|core, delta| scene.refcache().add(&members[core], &*scene, X, delta as i32),
            &|core| {
                scene.refcache().tick(&members[core], &*scene);
            },
        );
        assert!(!scene.dead.load(Ordering::SeqCst), "a reference lives");
        // And when the last one goes, it dies.
        scene.refcache().add(&members[1], &*scene, X, -1);
        for _ in 0..8 {
            for me in &members {
                scene.refcache().tick(me, &*scene);
            }
        }
        assert!(scene.dead.load(Ordering::SeqCst));
    });
}
