//! Refcache with members that stand still at any step, while others go on, who stand still in turn: random histories, long ones, beside books
//! that know who has a reference.
//!
//! Everything runs on one thread. At each step that a member makes, others may be run then and there, as if it had been stopped; they
//! tick, expel it and each other, take references, pass them on and drop them, and are interrupted likewise. An object that
//! somebody has never dies; one that nobody has dies once, soon after all have gone on. (Reordered memory accesses are the model checker's:
//! `loom_refcache.rs`.)

use peregrine_space::refcache::{
    Block, Counted, Epoch, Handle, Object, ObjectId, Reclaim, Refcache, Severed,
};
use peregrine_space::{Generation, MemberId, Step};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use testkit::Rng;

const MEMBERS: usize = 3;
const OBJECTS: usize = 2;
/// Members that stand still inside of each other.
const DEPTH: usize = 2;

struct Scene {
    epoch: Epoch,
    blocks: Vec<Block>,
    objects: [Object; OBJECTS],
    /// What is true: whether an object is in use, and who has how many references to it.
    alive: [Cell<bool>; OBJECTS],
    held: [[Cell<u32>; OBJECTS]; MEMBERS],
    /// `None`: stands still in the middle of something.
    members: [RefCell<Option<Handle>>; MEMBERS],
    rng: RefCell<Rng>,
    depth: Cell<usize>,
    /// Where somebody stood still while others went on.
    stops: RefCell<BTreeSet<String>>,
    deaths: Cell<usize>,
}

thread_local! {
    static SCENE: RefCell<Option<Rc<Scene>>> = const { RefCell::new(None) };
}

fn stand_still(step: Step) {
    let scene = SCENE.with_borrow(Clone::clone).expect("a scene");
    if scene.depth.get() == DEPTH || scene.below(4) != 0 {
        return;
    }
    scene.stops.borrow_mut().insert(format!("{step:?}"));
    scene.depth.set(scene.depth.get() + 1);
    for _ in 0..scene.below(40) {
        scene.act();
    }
    scene.depth.set(scene.depth.get() - 1);
}

impl Counted for Scene {
    fn object(&self, id: ObjectId) -> &Object {
        &self.objects[id.0 as usize]
    }
}

impl Reclaim for Scene {
    fn sever(&self, _: &Handle, _: ObjectId) -> Severed {
        if self.below(3) == 0 { Severed::AfterGrace } else { Severed::Dead }
    }
    fn dead(&self, _: &Handle, id: ObjectId) {
        assert_eq!(self.references(id), 0, "an object died that somebody has");
        assert!(self.alive[id.0 as usize].replace(false), "an object dies once");
        self.deaths.set(self.deaths.get() + 1);
    }
}

impl Scene {
    fn new(seed: u64) -> Rc<Self> {
        let member = |number| {
            let handle = Handle::new(MemberId::new(number), Generation::default());
            handle.on_step(Some(stand_still));
            RefCell::new(Some(handle))
        };
        Rc::new(Self {
            epoch: Epoch::new(),
            blocks: (0..MEMBERS).map(|_| Block::new()).collect(),
            objects: std::array::from_fn(|_| Object::new(0)),
            alive: Default::default(),
            held: Default::default(),
            members: std::array::from_fn(member),
            rng: RefCell::new(Rng::new(seed)),
            depth: Cell::new(0),
            stops: RefCell::default(),
            deaths: Cell::new(0),
        })
    }

    fn below(&self, n: usize) -> usize {
        self.rng.borrow_mut().below(n)
    }

    fn references(&self, id: ObjectId) -> u32 {
        self.held.iter().map(|own| own[id.0 as usize].get()).sum()
    }

    fn refcache(&self) -> Refcache<'_> {
        Refcache::new(&self.epoch, &self.blocks)
    }

    /// Something that a member which does not stand still may do.
    fn act(&self) {
        let who = self.below(MEMBERS);
        let Some(me) = self.members[who].borrow_mut().take() else { return };
        let (x, other) = (self.below(OBJECTS), self.below(MEMBERS));
        let (id, mine) = (ObjectId(x as u32), &self.held[who][x]);
        let refcache = self.refcache();
        match self.below(12) {
            0 => refcache.leave(&me, self),
            1 => {
                // Or it is out, or moved.
                let _ = refcache.expel(&me, MemberId::new(other), self);
            }
            2 if mine.get() > 0 => {
                refcache.add(&me, self, id, 1);
                mine.set(mine.get() + 1);
            }
            3 if mine.get() > 0 => {
                // Nobody counts that: it is the same reference.
                mine.set(mine.get() - 1);
                self.held[other][x].set(self.held[other][x].get() + 1);
            }
            4 | 5 if mine.get() > 0 => {
                mine.set(mine.get() - 1);
                refcache.add(&me, self, id, -1);
            }
            6 if !self.alive[x].get() => {
                self.alive[x].set(true);
                mine.set(1);
                refcache.add(&me, self, id, 1);
            }
            _ => {
                refcache.tick(&me, self);
            }
        }
        *self.members[who].borrow_mut() = Some(me);
    }

    /// All references are dropped, and everybody goes on: nothing stays.
    fn end(&self) {
        self.depth.set(DEPTH);
        for (who, own) in self.held.iter().enumerate() {
            let me = self.members[who].borrow_mut().take().expect("nobody stands still");
            for (x, held) in own.iter().enumerate() {
                for _ in 0..held.replace(0) {
                    self.refcache().add(&me, self, ObjectId(x as u32), -1);
                }
            }
            *self.members[who].borrow_mut() = Some(me);
        }
        for _ in 0..20 {
            for member in &self.members {
                self.refcache().tick(member.borrow().as_ref().expect("nobody stands still"), self);
            }
        }
        assert!(self.alive.iter().all(|alive| !alive.get()), "what nobody has is dead");
    }
}

/// Some thousands, the first ones always; `NESTED_SEEDS=100000` for more.
fn seeds() -> std::ops::Range<u64> {
    let wanted = std::env::var("NESTED_SEEDS").ok().and_then(|n| n.parse().ok());
    0..wanted.unwrap_or(4000)
}

#[test]
fn whoever_stands_still_wherever_no_object_dies_that_somebody_has_and_none_stays_that_nobody_has() {
    let mut stops = BTreeSet::new();
    let mut deaths = 0;
    for seed in seeds() {
        // Shown if it fails.
        println!("seed {seed}");
        let scene = Scene::new(seed);
        SCENE.set(Some(scene.clone()));
        for _ in 0..60 {
            scene.act();
        }
        scene.end();
        SCENE.set(None);
        stops.append(&mut scene.stops.borrow_mut());
        deaths += scene.deaths.get();
    }
    for step in ["DeltaTaken", "DeltaGiven", "Zero", "Marked", "QueueTaken", "Reviewing", "Expelling"] {
        assert!(stops.contains(step), "somebody stood still after {step}: {stops:?}");
    }
    assert!(deaths > 1000, "objects die: {deaths}");
}

/// What happens to an expeller, told by numbers: see the test below.
#[derive(Clone, Copy, Debug)]
struct Script {
    stands_at: Step,
    is_expelled_itself: bool,
}

thread_local! {
    static SCRIPT: Cell<Option<Script>> = const { Cell::new(None) };
}

const EXPELLER: usize = 0;
const EXPELLED: usize = 1;
const REVIEWER: usize = 2;
/// Of another test: who drops, and who takes.
const DROPPER: usize = 0;
const TAKER: usize = 1;
const X: ObjectId = ObjectId(0);

/// The expeller's hook.
fn follow_the_script(step: Step) {
    let Some(script) = SCRIPT.get() else { return };
    let scene = SCENE.with_borrow(Clone::clone).expect("a scene");
    if step == Step::Expelling && script.is_expelled_itself {
        scene.run(REVIEWER, |me| {
            let _ = scene.refcache().expel(me, MemberId::new(EXPELLER), &*scene);
        });
    }
    if step == script.stands_at {
        SCRIPT.set(None);
        // Who is being expelled comes back by itself, and finds nothing to flush, or did not look.
        scene.tick(EXPELLED);
        (0..6).for_each(|_| scene.tick(REVIEWER));
    }
}

impl Scene {
    fn run(&self, who: usize, f: impl FnOnce(&Handle)) {
        let me = self.members[who].borrow_mut().take().expect("does not stand still");
        f(&me);
        *self.members[who].borrow_mut() = Some(me);
    }

    fn tick(&self, who: usize) {
        self.run(who, |me| {
            self.refcache().tick(me, self);
        });
    }

    fn change(&self, who: usize, delta: i32) {
        let held = &self.held[who][X.0 as usize];
        held.set(held.get().wrapping_add_signed(delta));
        self.run(who, |me| self.refcache().add(me, self, X, delta));
    }
}

/// All sequences of at most `most` members.
fn sequences(most: u32) -> impl Iterator<Item = Vec<usize>> {
    (0..=most).flat_map(|n| {
        (0..MEMBERS.pow(n)).map(move |code| (0..n).map(|i| code / MEMBERS.pow(i) % MEMBERS).collect())
    })
}

/// One has taken a reference and is then expelled; the expeller stands still, with that delta in its hands or before it has it; who was
/// expelled comes back, and others go through epochs and reviews. However all of them ticked before.
#[test]
fn a_delta_that_an_expeller_has_taken_keeps_its_object_alive_whoever_comes_back_meanwhile() {
    let mut zeros = 0;
    for (stands_at, is_expelled_itself) in
        [(Step::Expelling, false), (Step::DeltaTaken, false), (Step::DeltaTaken, true)]
    {
        for before in sequences(2) {
            for after in sequences(4) {
                let script = Script { stands_at, is_expelled_itself };
                println!("{script:?}, ticks {before:?}, {after:?}");
                let scene = Scene::new(0);
                SCENE.set(Some(scene.clone()));
                for member in &scene.members {
                    member.borrow().as_ref().expect("nobody stands still").on_step(None);
                }
                scene.alive[X.0 as usize].set(true);
                scene.change(REVIEWER, 1);
                for _ in 0..2 {
                    (0..MEMBERS).for_each(|who| scene.tick(who));
                }
                before.iter().for_each(|who| scene.tick(*who));
                scene.change(EXPELLED, 1);
                scene.change(REVIEWER, -1);
                after.iter().for_each(|who| scene.tick(*who));
                zeros += usize::from(scene.objects[X.0 as usize].global() == 0);
                SCRIPT.set(Some(script));
                scene.run(EXPELLER, |me| {
                    me.on_step(Some(follow_the_script));
                    let _ = scene.refcache().expel(me, MemberId::new(EXPELLED), &*scene);
                });
                (0..4).for_each(|_| (0..MEMBERS).for_each(|who| scene.tick(who)));
                assert!(scene.alive[X.0 as usize].get(), "somebody has it");
                SCRIPT.set(None);
                scene.end();
                SCENE.set(None);
            }
        }
    }
    assert!(zeros > 300, "the object looked dead in many of the cases: {zeros}");
}

/// More than a way holds: given to the object at once, in the middle of an epoch, of which the giver may be behind.
const MANY: i32 = 1 << 14;

/// One drops so many that they go to the object at once and it looks dead; another has just taken a reference, and does not tick. That the
/// giver has seen the next epoch begin says nothing about the other's flush: it takes one epoch more than for what is flushed.
#[test]
fn an_object_that_looks_dead_in_the_middle_of_an_epoch_is_not_reviewed_before_all_have_flushed() {
    let mut zeros = 0;
    for before in sequences(5) {
        println!("ticks {before:?}");
        let scene = Scene::new(0);
        SCENE.set(Some(scene.clone()));
        for member in &scene.members {
            member.borrow().as_ref().expect("nobody stands still").on_step(None);
        }
        scene.alive[X.0 as usize].set(true);
        scene.change(DROPPER, MANY);
        for _ in 0..2 {
            (0..MEMBERS).for_each(|who| scene.tick(who));
        }
        before.iter().for_each(|who| scene.tick(*who));
        scene.change(TAKER, 1);
        scene.change(DROPPER, -MANY);
        zeros += usize::from(scene.objects[X.0 as usize].global() == 0);
        for _ in 0..6 {
            scene.tick(DROPPER);
            scene.tick(REVIEWER);
        }
        assert!(scene.alive[X.0 as usize].get(), "somebody has it");
        scene.end();
        SCENE.set(None);
    }
    assert!(zeros > 300, "the object looked dead: {zeros}");
}
