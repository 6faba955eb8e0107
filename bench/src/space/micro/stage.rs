//! The stage: members (processes or threads), each on a processor of its own if there are enough, a common start and end, and
//! the three programs of RadixVM's evaluation.

use crate::space::index::{VOCABULARY, WORDS, next_word};
use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering, spin_loop};
use peregrine_base::{PageCount, Protection};
use peregrine_sys::mem::{self, MapOptions, Placement, Source};
use peregrine_sys::process::{ForkFlags, Forked, die_with_parent, exit_now, fork_with, pin_to_cpu, wait_for};
use peregrine_sys::{io, timer};
use std::time::Duration;

/// Most members.
pub const MEMBERS: usize = 8;
/// Pages of the region that all work in.
pub const PAGES: usize = 16384;
/// Pages of the `global` program.
const GLOBAL_PAGES: usize = 1024;
const WINDOWS: usize = 8;

/// A member's means to have memory and to give it back.
pub trait Worker {
    /// Makes pages usable and zero, here at once.
    fn map(&mut self, first: usize, pages: usize);
    /// Makes pages that any member mapped unreachable for all; returns when they are.
    fn unmap(&mut self, first: usize, pages: usize);
    /// Told to a member that touched pages which another one unmapped: bare processes must do their own part.
    fn gone(&mut self, _first: usize, _pages: usize) {}
    /// A safepoint.
    fn poll(&self) {}
    /// Where a page is.
    fn at(&self, page: usize) -> *mut u64;
    /// Requests to other members so far.
    fn shootdowns(&self) -> u64 {
        0
    }
}

/// Which program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Program {
    Local,
    Pipeline,
    Global,
    /// A word-position index, as in the paper's MapReduce: each member indexes its words in memory that it maps in units, all
    /// reduce what all have mapped, each gives its units back.
    Index,
}

impl Program {
    pub const ALL: [Self; 4] = [Self::Local, Self::Pipeline, Self::Global, Self::Index];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Pipeline => "pipeline",
            Self::Global => "global",
            Self::Index => "index",
        }
    }
}

#[repr(C, align(128))]
#[derive(Default)]
struct Lane {
    operations: AtomicU64,
    shootdowns: AtomicU64,
    /// Pages that the member's index takes, and what its reducer counted.
    index_pages: AtomicU64,
    counted: AtomicU64,
    /// The member's windows in the pipeline: 0 its own, 1 the neighbour's.
    windows: [AtomicU32; WINDOWS],
}

#[repr(C)]
struct Board {
    ready: AtomicU32,
    go: AtomicU32,
    stop: AtomicU32,
    arrived: AtomicU32,
    round: AtomicU32,
    lanes: [Lane; MEMBERS],
}

/// What a run came to.
#[derive(Clone, Copy, Debug)]
pub struct Ran {
    /// Operations (local, pipeline) or rounds (global) a second.
    pub per_second: f64,
    /// Requests to other members for each operation or round.
    pub shootdowns: f64,
}

/// Whether members are processes or threads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Processes,
    Threads,
}

/// What to run.
#[derive(Clone, Copy)]
pub struct Play {
    pub kind: Kind,
    pub program: Program,
    pub members: usize,
    /// Pages mapped at once.
    pub unit: usize,
    pub time: Duration,
}

#[derive(Clone, Copy)]
struct SharedBoard(*const Board);
// SAFETY: the board is atomics in shared memory that outlives the run.
unsafe impl Send for SharedBoard {}
// SAFETY: as above.
unsafe impl Sync for SharedBoard {}

impl SharedBoard {
    fn get(&self) -> &Board {
        // SAFETY: mapped in `play` until the run is over.
        unsafe { &*self.0 }
    }
}

/// Runs the program with members made by `make`, each in its own process or thread.
pub fn play(play: Play, make: &(dyn Fn(usize) -> Box<dyn Worker> + Sync)) -> Ran {
    let pages = PageCount::for_bytes(size_of::<Board>());
    // SAFETY: a new mapping at a place of the kernel's choice.
    let memory = unsafe {
        mem::map(
            pages,
            Protection::ReadWrite,
            Source::SharedAnonymous,
            Placement::Anywhere,
            MapOptions::default(),
        )
    }
    .expect("memory");
    let shared = SharedBoard(memory.start().as_ptr());
    let board = shared.get();
    let conduct = || {
        while board.ready.load(Ordering::Acquire) < play.members as u32 {
            std::thread::sleep(Duration::from_micros(100));
        }
        let begun = timer::monotonic_ns();
        board.go.store(1, Ordering::Release);
        std::thread::sleep(play.time);
        board.stop.store(1, Ordering::Release);
        (timer::monotonic_ns() - begun) as f64 / 1e9
    };
    let seconds = match play.kind {
        Kind::Threads => std::thread::scope(|scope| {
            for index in 0..play.members {
                scope.spawn(move || perform(shared.get(), play, index, &mut *make(index)));
            }
            conduct()
        }),
        Kind::Processes => {
            let mut children = Vec::new();
            for index in 0..play.members {
                // SAFETY: this suite starts no thread that outlives its measurement.
                match unsafe { fork_with(ForkFlags::default()) }.expect("fork") {
                    Forked::Child => {
                        die_with_parent();
                        perform(board, play, index, &mut *make(index));
                        exit_now(0);
                    }
                    Forked::Parent(pid) => children.push(pid),
                }
            }
            let seconds = conduct();
            for pid in children {
                let end = wait_for(pid);
                assert_eq!(end, Ok(peregrine_sys::process::ChildEnd::Exited(0)), "a member died");
            }
            seconds
        }
    };
    let lanes = &board.lanes[..play.members];
    let sum = |f: fn(&Lane) -> &AtomicU64| lanes.iter().map(|l| f(l).load(Ordering::Relaxed)).sum::<u64>();
    let operations = sum(|l| &l.operations).max(1) as f64;
    let ran =
        Ran { per_second: operations / seconds, shootdowns: sum(|l| &l.shootdowns) as f64 / operations };
    // SAFETY: everybody has ended.
    let _ = unsafe { mem::unmap(memory) };
    ran
}

fn perform(board: &Board, play: Play, index: usize, worker: &mut dyn Worker) {
    let _ = pin_to_cpu(index % std::thread::available_parallelism().map_or(1, usize::from));
    board.ready.fetch_add(1, Ordering::AcqRel);
    while board.go.load(Ordering::Acquire) == 0 {
        worker.poll();
        io::yield_now();
    }
    let before = worker.shootdowns();
    let done = match play.program {
        Program::Local => local(board, play, index, worker),
        Program::Pipeline => pipeline(board, play, index, worker),
        Program::Global => global(board, play, index, worker),
        Program::Index => word_index(board, play, index, worker),
    };
    let lane = &board.lanes[index];
    lane.operations.store(done, Ordering::Relaxed);
    lane.shootdowns.store(worker.shootdowns() - before, Ordering::Relaxed);
}

fn touch(worker: &dyn Worker, first: usize, pages: usize) {
    for page in first..first + pages {
        // SAFETY: mapped by this program, or it traps and is opened; nobody refers to the bytes (S1).
        unsafe { worker.at(page).write_volatile(page as u64) };
    }
}

fn local(board: &Board, play: Play, index: usize, worker: &mut dyn Worker) -> u64 {
    let first = index * (PAGES / MEMBERS);
    let mut done = 0;
    while board.stop.load(Ordering::Relaxed) == 0 {
        worker.map(first, play.unit);
        touch(worker, first, play.unit);
        worker.unmap(first, play.unit);
        worker.poll();
        done += 1;
    }
    done
}

fn pipeline(board: &Board, play: Play, index: usize, worker: &mut dyn Worker) -> u64 {
    let first_of = |member: usize, window: usize| member * (PAGES / MEMBERS) + window * play.unit;
    let before = (index + play.members - 1) % play.members;
    let (mut done, mut out, mut came_in) = (0, 0, 0);
    let mut handed = [false; WINDOWS];
    while board.stop.load(Ordering::Relaxed) == 0 {
        let mine = &board.lanes[index].windows[out];
        if mine.load(Ordering::Acquire) == 0 {
            let first = first_of(index, out);
            // One member has handed it to itself, and has closed its view when it unmapped.
            if handed[out] && play.members > 1 {
                worker.gone(first, play.unit);
            }
            worker.map(first, play.unit);
            touch(worker, first, play.unit);
            handed[out] = true;
            mine.store(1, Ordering::Release);
            out = (out + 1) % WINDOWS;
        }
        let theirs = &board.lanes[before].windows[came_in];
        if theirs.load(Ordering::Acquire) == 1 {
            let first = first_of(before, came_in);
            touch(worker, first, play.unit);
            worker.unmap(first, play.unit);
            theirs.store(0, Ordering::Release);
            came_in = (came_in + 1) % WINDOWS;
            done += 1;
        } else {
            spin_loop();
        }
        worker.poll();
    }
    done
}

fn barrier(board: &Board, play: Play, worker: &dyn Worker) {
    let round = board.round.load(Ordering::Acquire);
    if board.arrived.fetch_add(1, Ordering::AcqRel) + 1 == play.members as u32 {
        board.arrived.store(0, Ordering::Relaxed);
        board.round.store(round + 1, Ordering::Release);
        return;
    }
    let mut spins = 0u32;
    while board.round.load(Ordering::Acquire) == round {
        worker.poll();
        spin_loop();
        spins += 1;
        if spins.is_multiple_of(10_000) {
            io::yield_now();
        }
    }
}

fn global(board: &Board, play: Play, index: usize, worker: &mut dyn Worker) -> u64 {
    let share = GLOBAL_PAGES / play.members / play.unit * play.unit;
    let all = share * play.members;
    let order = crate::measure::Rng(index as u64).permutation(all);
    let mut done = 0;
    loop {
        // Everybody sees the same answer: it is asked between two barriers, in which nobody sets it.
        let stop = board.stop.load(Ordering::Acquire);
        if index == 0 {
            board.go.store(1 + stop, Ordering::Release);
        }
        barrier(board, play, worker);
        if board.go.load(Ordering::Acquire) == 2 {
            // Rounds, not shares of rounds.
            return if index == 0 { done } else { 0 };
        }
        for first in (index * share..(index + 1) * share).step_by(play.unit) {
            worker.map(first, play.unit);
        }
        barrier(board, play, worker);
        for page in &order {
            touch(worker, *page, 1);
        }
        barrier(board, play, worker);
        for member in 0..play.members {
            if member != index {
                worker.gone(member * share, share);
            }
        }
        for first in (index * share..(index + 1) * share).step_by(play.unit) {
            worker.unmap(first, play.unit);
        }
        done += 1;
    }
}

/// Memory of one member's index: a head for each word, then lists of positions. Mapped a unit at a time.
struct Bump {
    base: *mut u32,
    first_page: usize,
    unit: usize,
    mapped: usize,
    /// In words of 4 bytes, from the member's first page.
    used: usize,
}

impl Bump {
    fn new(worker: &dyn Worker, member: usize, unit: usize) -> Self {
        let first_page = member * (PAGES / MEMBERS);
        Self { base: worker.at(first_page).cast(), first_page, unit, mapped: 0, used: 0 }
    }

    fn take(&mut self, worker: &mut dyn Worker, words: usize) -> usize {
        while (self.used + words) * 4 > self.mapped * 4096 {
            worker.map(self.first_page + self.mapped, self.unit);
            self.mapped += self.unit;
            worker.poll();
        }
        self.used += words;
        self.used - words
    }

    fn get(&self, at: usize) -> u32 {
        // SAFETY: taken above by this member or another of this program, or it traps and is opened (S1).
        unsafe { self.base.add(at).read_volatile() }
    }

    fn set(&self, at: usize, value: u32) {
        // SAFETY: as in `get`.
        unsafe { self.base.add(at).write_volatile(value) };
    }
}

fn word_index(board: &Board, play: Play, index: usize, worker: &mut dyn Worker) -> u64 {
    let mut rng = crate::measure::Rng(index as u64);
    let mut done = 0;
    loop {
        let stop = board.stop.load(Ordering::Acquire);
        if index == 0 {
            board.go.store(1 + stop, Ordering::Release);
        }
        barrier(board, play, worker);
        if board.go.load(Ordering::Acquire) == 2 {
            return if index == 0 { done } else { 0 };
        }
        let mut mine = Bump::new(worker, index, play.unit);
        let heads = mine.take(worker, VOCABULARY);
        for position in 1..=WORDS as u32 {
            let word = next_word(&mut rng);
            let node = mine.take(worker, 2);
            mine.set(node, position);
            mine.set(node + 1, mine.get(heads + word));
            mine.set(heads + word, node as u32);
        }
        board.lanes[index].index_pages.store(mine.mapped as u64, Ordering::Relaxed);
        barrier(board, play, worker);
        let mut counted = 0;
        for member in 0..play.members {
            let theirs = Bump::new(worker, member, play.unit);
            for word in (index..VOCABULARY).step_by(play.members) {
                let mut node = theirs.get(word) as usize;
                while node != 0 {
                    counted += 1;
                    node = theirs.get(node + 1) as usize;
                }
            }
            worker.poll();
        }
        board.lanes[index].counted.store(counted, Ordering::Relaxed);
        barrier(board, play, worker);
        let all: u64 = board.lanes[..play.members].iter().map(|l| l.counted.load(Ordering::Relaxed)).sum();
        assert_eq!(all, (WORDS * play.members) as u64, "the index lost positions");
        for member in (0..play.members).filter(|m| *m != index) {
            let pages = board.lanes[member].index_pages.load(Ordering::Relaxed) as usize;
            worker.gone(member * (PAGES / MEMBERS), pages);
        }
        for unit in (0..mine.mapped).step_by(play.unit) {
            worker.unmap(mine.first_page + unit, play.unit);
        }
        done += 1;
    }
}
