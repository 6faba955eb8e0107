//! A member is killed (SIGKILL) at every step of every operation that holds a lock or has changed something, and between any two
//! instructions; the survivors mend what it left, and every promise still holds.
//!
//! ```text
//!   parent      a member: prepares ─ forks ─ waits for the death ─ reap ─ checks ─ everything unmapped and mapped again
//!   victim      joins, prepares, then operates and dies at the n-th step (or instruction)
//!   bystander   a member all the while: opens what it can, obeys, ticks
//! ```
//! How many steps an operation has is counted in a dry run.

use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_space::Step;
use peregrine_space::process::{Config, Filling, FrameError, MapRangeError, Member, Space};
use peregrine_sys::process::{
    self, ChildEnd, ForkFlags, Forked, die_with_parent, exit_now, fork_with, wait_for,
};
use peregrine_sys::signal::number;
use peregrine_sys::{io, step, timer};
use peregrine_vm::Mapping;

/// What the victim does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Deed {
    /// Maps where nothing is.
    Map,
    /// Unmaps all of a mapping that others have open.
    Unmap,
    /// Unmaps its middle.
    UnmapPart,
    /// Maps and unmaps many single pages, so that nodes are made and collapse.
    Churn,
    /// Touches a page that another member mapped.
    Touch,
    /// Takes all rights away.
    Protect,
    /// Opens everything.
    Open,
    /// Joins and leaves.
    Join,
}

impl Deed {
    pub const ALL: [Self; 8] = [
        Self::Map,
        Self::Unmap,
        Self::UnmapPart,
        Self::Churn,
        Self::Touch,
        Self::Protect,
        Self::Open,
        Self::Join,
    ];
}

/// When the victim dies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Moment {
    /// Not at all: counts steps.
    DryRun,
    /// At the n-th step.
    Step(u64),
    /// So many instructions after the n-th step (0: from the start), one by one.
    Instructions(u64, u64),
}

static STEPS: AtomicU64 = AtomicU64::new(0);
static LAST: AtomicU64 = AtomicU64::new(u64::MAX);
static INSTRUCTIONS: AtomicU64 = AtomicU64::new(0);

fn on_step(_: Step) {
    let n = STEPS.load(Ordering::Relaxed) + 1;
    STEPS.store(n, Ordering::Relaxed);
    if n == LAST.load(Ordering::Relaxed) {
        match INSTRUCTIONS.load(Ordering::Relaxed) {
            0 => process::kill_self(),
            more => step::begin(more).expect("SIGTRAP"),
        }
    }
}

#[repr(C)]
struct Board {
    stop: AtomicU32,
    ready: AtomicU32,
    /// The bystander opens nothing: whoever locks a range goes through its nodes, and keeps them.
    quiet: AtomicU32,
    counted: AtomicU64,
}

/// A space with a bystander, and the parent as the survivor.
pub struct Scene {
    space: &'static Space,
    member: Option<Member<'static>>,
    board: Mapping,
    bystander: i32,
    seed: u64,
    floor: Option<usize>,
}

const PAGES: usize = 1024;
/// What the parent keeps mapped: it must come through everything unharmed.
const KEPT: (usize, usize) = (900, 32);
/// What deeds are done to.
const TARGET: (usize, usize) = (512 - 5, 12);
/// The part of it that is unmapped alone.
const MIDDLE: (usize, usize) = (512 - 2, 6);

impl Scene {
    pub fn new(filling: Filling) -> Self {
        let config = Config { pages: PageCount::new(PAGES), filling, at: None };
        let space: &'static Space = Box::leak(Box::new(Space::create(config).expect("a space")));
        let board = Mapping::memfd(PageCount::new(1)).expect("memory");
        let mut scene = Self { space, member: None, board, bystander: 0, seed: 0, floor: None };
        scene.bystander = scene.fork(|scene| {
            let mut member = scene.space.join().expect("the bystander's place");
            scene.board().ready.store(1, Ordering::Release);
            let mut turns = 0u64;
            while scene.board().stop.load(Ordering::Acquire) == 0 {
                let quiet = scene.board().quiet.load(Ordering::Acquire) != 0;
                if !quiet {
                    let _ = member.open(scene.part(TARGET));
                }
                member.poll();
                turns += 1;
                if quiet || turns.is_multiple_of(64) {
                    member.tick();
                }
                io::yield_now();
            }
        });
        while scene.board().ready.load(Ordering::Acquire) == 0 {
            io::yield_now();
        }
        let mut member = space.join().expect("the parent's place");
        let kept = scene.part(KEPT);
        member.map_at(kept, Protection::ReadWrite).expect("map");
        fill(&member, kept, 0xcafe);
        scene.member = Some(member);
        scene
    }

    fn board(&self) -> &Board {
        // SAFETY: zeroed shared memory of atomics, which the mapping keeps.
        unsafe { &*self.board.range().start().as_ptr::<Board>() }
    }

    fn part(&self, (first, pages): (usize, usize)) -> PageRange {
        let start = self.space.region().start().as_usize() + first * PAGE_SIZE;
        PageRange::new(VirtAddr::new(start), PageCount::new(pages))
    }

    fn fork(&self, f: impl FnOnce(&Self)) -> i32 {
        // SAFETY: the tests' processes have one thread.
        match unsafe { fork_with(ForkFlags::default()) }.expect("fork") {
            Forked::Child => {
                die_with_parent();
                f(self);
                exit_now(0)
            }
            Forked::Parent(pid) => pid,
        }
    }

    fn me(&mut self) -> &mut Member<'static> {
        self.member.as_mut().expect("joined in `new`")
    }

    /// Runs one deed; the victim dies at `moment`. Returns what a dry run counted.
    pub fn kill(&mut self, deed: Deed, moment: Moment) -> u64 {
        self.seed += 1;
        let what = format!("{deed:?} {moment:?} (round {})", self.seed);
        let target = self.part(TARGET);
        let value = 0x1000 + self.seed;
        if deed != Deed::Map && deed != Deed::Churn {
            let member = self.me();
            map(member, target, &what);
            fill(member, target, value);
        }
        let victim = self.fork(|scene| {
            if deed == Deed::Join {
                return perish(scene, moment, || drop(scene.space.join().expect("a place")));
            }
            let mut member = scene.space.join().expect("the victim's place");
            member.on_step(Some(on_step));
            perish(scene, moment, || do_deed(scene, &mut member, deed));
        });
        let end = wait_for(victim).expect("our child");
        match moment {
            Moment::DryRun => assert_eq!(end, ChildEnd::Exited(0), "{what}"),
            _ => assert!(
                matches!(end, ChildEnd::Killed(number::KILL) | ChildEnd::Exited(0)),
                "{what}: {end:?}"
            ),
        }
        let counted = self.board().counted.load(Ordering::Relaxed);
        self.check(deed, &what, value);
        counted
    }

    /// Mends and checks everything.
    fn check(&mut self, deed: Deed, what: &str, value: u64) {
        let (target, kept, all) = (self.part(TARGET), self.part(KEPT), self.space.region());
        self.me().reap();
        let alive = self.me().spaces().members();
        assert!(alive.len() <= 3, "{what}: the dead keep their places: {alive:?}");
        assert_filled(self.me(), kept, 0xcafe, what);
        // Whatever was to be done to the target is done to all of it or to none of it.
        let middle = self.part(MIDDLE);
        let mut mapped = Vec::new();
        for page in 0..target.pages().get() {
            let at = VirtAddr::new(target.start().as_usize() + page * PAGE_SIZE);
            mapped.push(self.me().query(at).map(|e| e.rights));
        }
        let rights_of = |range: PageRange| {
            let first = (range.start().as_usize() - target.start().as_usize()) / PAGE_SIZE;
            let part = &mapped[first..first + range.pages().get()];
            assert!(part.iter().all(|m| *m == part[0]), "{what}: half done: {mapped:?}");
            part[0]
        };
        match deed {
            Deed::Churn => {}
            Deed::UnmapPart => {
                rights_of(middle);
                assert!(
                    mapped[0].is_some() && mapped[mapped.len() - 1].is_some(),
                    "{what}: too much is gone"
                );
            }
            _ => {
                rights_of(target);
            }
        }
        // What is mapped holds what it held, and can be reached by others.
        let member = self.member.as_mut().expect("joined");
        for (page, rights) in mapped.iter().enumerate() {
            let at = VirtAddr::new(target.start().as_usize() + page * PAGE_SIZE);
            let one = PageRange::new(at, PageCount::new(1));
            match rights {
                Some(Protection::ReadWrite) if deed != Deed::Map && deed != Deed::Churn => {
                    assert_filled(member, one, value, what);
                }
                Some(Protection::None) => {
                    let held = u64::from_ne_bytes(member.seat().peek(at)[..8].try_into().expect("a word"));
                    assert_eq!(held, value, "{what}: contents of a page without rights");
                }
                _ => {}
            }
        }
        // No lock is left: everything can be unmapped. No frame is lost or shared: everything can be mapped, and is zero.
        member.unmap(all).unwrap_or_else(|e| panic!("{what}: unmap: {e}"));
        for page in [0, TARGET.0, MIDDLE.0, TARGET.0 + TARGET.1 - 1, KEPT.0, PAGES - 1] {
            let one =
                PageRange::new(VirtAddr::new(all.start().as_usize() + page * PAGE_SIZE), PageCount::new(1));
            map(member, one, what);
            assert_filled(member, one, 0, what);
            member.unmap(one).unwrap_or_else(|e| panic!("{what}: unmap: {e}"));
        }
        map(member, all, what);
        member.unmap(all).unwrap_or_else(|e| panic!("{what}: unmap: {e}"));
        // The nodes of what is gone come back: looked at now and then, for it takes a few epochs.
        if self.seed % 32 == 1 {
            let floor = self.floor.unwrap_or(0);
            self.board().quiet.store(1, Ordering::Release);
            let member = self.member.as_mut().expect("joined");
            let deadline = timer::monotonic_ns() + if floor == 0 { 300_000_000 } else { 10_000_000_000 };
            while timer::monotonic_ns() < deadline && (floor == 0 || member.spaces().nodes_in_use() > floor) {
                member.tick();
                io::yield_now();
            }
            let nodes = member.spaces().nodes_in_use();
            assert!(floor == 0 || nodes <= floor, "{what}: {nodes} nodes in use, {floor} at first");
            self.floor = Some(nodes);
            self.board().quiet.store(0, Ordering::Release);
        }
        let member = self.member.as_mut().expect("joined");
        map(member, kept, what);
        fill(member, kept, 0xcafe);
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.board().stop.store(1, Ordering::Release);
        let _ = wait_for(self.bystander);
        self.member = None;
    }
}

fn perish(scene: &Scene, moment: Moment, operate: impl FnOnce()) {
    let (last, instructions) = match moment {
        Moment::DryRun => (u64::MAX, 0),
        Moment::Step(n) => (n, 0),
        Moment::Instructions(n, more) => (n, more),
    };
    STEPS.store(0, Ordering::Relaxed);
    LAST.store(last, Ordering::Relaxed);
    INSTRUCTIONS.store(instructions, Ordering::Relaxed);
    if last == 0 && instructions != 0 {
        step::begin(instructions).expect("SIGTRAP");
    }
    operate();
    step::end();
    scene.board().counted.store(STEPS.load(Ordering::Relaxed), Ordering::Relaxed);
}

fn do_deed(scene: &Scene, member: &mut Member<'static>, deed: Deed) {
    let target = scene.part(TARGET);
    match deed {
        Deed::Map => {
            member.map_at(target, Protection::ReadWrite).expect("map");
        }
        Deed::Unmap => member.unmap(target).expect("unmap"),
        Deed::UnmapPart => member.unmap(scene.part(MIDDLE)).expect("unmap"),
        Deed::Churn => {
            for page in (0..TARGET.1).step_by(5) {
                let one = scene.part((TARGET.0 + page, 1));
                member.map_at(one, Protection::ReadWrite).expect("map");
                member.bytes(one).store_u64(0, 1).expect("in bounds");
                member.unmap(one).expect("unmap");
                member.tick();
            }
        }
        Deed::Touch => {
            let value = member.bytes(target).load_u64(5 * PAGE_SIZE).expect("in bounds");
            member.bytes(target).store_u64(5 * PAGE_SIZE, value).expect("in bounds");
        }
        Deed::Protect => member.protect(target, Protection::None).expect("protect"),
        Deed::Open => member.open(scene.space.region()).expect("open"),
        Deed::Join => {}
    }
}

/// Maps the range. On a loaded machine the bystander may have been silent for so long that it was cut off: the range is free again
/// when it has run.
fn map(member: &mut Member<'_>, range: PageRange, what: &str) {
    let deadline = timer::monotonic_ns() + 10_000_000_000;
    loop {
        match member.map_at(range, Protection::ReadWrite) {
            Ok(_) => return,
            Err(MapRangeError::Frames(FrameError::Unacknowledged { .. }))
                if timer::monotonic_ns() < deadline =>
            {
                io::yield_now();
            }
            Err(e) => panic!("{what}: map: {e}"),
        }
    }
}

/// Each page's first and last word.
fn fill(member: &Member<'_>, range: PageRange, value: u64) {
    for page in 0..range.pages().get() {
        for offset in [0, PAGE_SIZE - 8] {
            member.bytes(range).store_u64(page * PAGE_SIZE + offset, value).expect("in bounds");
        }
    }
}

fn assert_filled(member: &Member<'_>, range: PageRange, value: u64, what: &str) {
    for page in 0..range.pages().get() {
        for offset in [0, PAGE_SIZE - 8] {
            let found = member.bytes(range).load_u64(page * PAGE_SIZE + offset).expect("in bounds");
            assert_eq!(found, value, "{what}: page {page} of {range:?} at {offset}");
        }
    }
}

/// Kills at every step of every deed; returns how many kills.
pub fn at_every_step(scene: &mut Scene) -> u64 {
    let mut kills = 0;
    for deed in Deed::ALL {
        let steps = scene.kill(deed, Moment::DryRun);
        println!("{deed:?}: {steps} steps");
        for n in 1..=steps {
            scene.kill(deed, Moment::Step(n));
            kills += 1;
        }
    }
    kills
}

/// Kills `count` times, random numbers of instructions after random steps of random deeds.
pub fn at_random_instructions(scene: &mut Scene, rng: &mut testkit::Rng, count: u64) -> u64 {
    let steps: Vec<u64> = Deed::ALL.iter().map(|d| scene.kill(*d, Moment::DryRun)).collect();
    for _ in 0..count {
        let i = rng.below(Deed::ALL.len());
        let step = rng.below(steps[i] as usize + 1) as u64;
        let most = [100, 1000, 10_000][rng.below(3)];
        let more = 1 + rng.below(most) as u64;
        scene.kill(Deed::ALL[i], Moment::Instructions(step, more));
    }
    count
}
