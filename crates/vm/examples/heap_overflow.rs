//! Heap overflow found by a guard page (Appel and Li's eighth application): an allocation is one addition; there is no compare
//! with the arena's end. The first touch beyond it traps, and the trap grows the arena; when it may grow no more, it opens a
//! reserve and asks for a collection at the next safe point.
//!
//! ```text
//!   reserved address space, no access
//!   ├── open ──────────────┤░░ next step ░░┤ …                                  limit ┤ last reserve ┤
//!                     top ─▶ a touch here traps: open the next step
//! ```
//!
//! The trap repeats the access, so nothing of the allocating code's state has to be changed.

use peregrine_vm::{
    Capabilities, Decision, Inline, Mapping, Mechanism, PageCount, PageRange, Protection, Region, Trap,
    VirtAddr, Volatile,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const RESERVED: PageCount = PageCount::new(32 * 1024);
const STEP: PageCount = PageCount::new(64);
const RESERVE_STEPS: usize = 1;

/// What the trap and the program share.
struct State {
    /// Steps that are open.
    open: AtomicUsize,
    /// Steps that may be open without a collection.
    limit: usize,
    /// Set by the trap, honoured by the program at its next safe point.
    collect: AtomicBool,
    traps: AtomicUsize,
}

impl State {
    /// Trap code: atomics and one system call.
    fn grow(&self, trap: &Trap<'_>) -> Decision {
        let step = trap.page_index() / STEP.get();
        if step >= self.limit + RESERVE_STEPS {
            // Beyond the reserve, before the collection was made: a bug of the program, and it dies as of any bad access.
            return Decision::Deny;
        }
        if step >= self.limit {
            self.collect.store(true, Ordering::Release);
        }
        self.traps.fetch_add(1, Ordering::Relaxed);
        self.open.fetch_max(step + 1, Ordering::AcqRel);
        trap.decide(trap.region().protect(&[trap.block(STEP)], Protection::ReadWrite))
    }
}

/// An arena whose `allocate` compares nothing.
struct Arena {
    memory: Arc<Mapping>,
    region: Region,
    state: Arc<State>,
    top: usize,
    collections: usize,
}

impl Arena {
    fn new(limit: PageCount, caps: &Capabilities) -> Result<Self, Box<dyn std::error::Error>> {
        let memory = Arc::new(Mapping::reserve(RESERVED)?);
        let state = Arc::new(State {
            open: AtomicUsize::new(0),
            limit: limit.get() / STEP.get(),
            collect: AtomicBool::new(false),
            traps: AtomicUsize::new(0),
        });
        let seen = state.clone();
        // SAFETY: `grow` keeps to atomics and one system call.
        let handler = unsafe { Inline::new(move |trap: &Trap<'_>| seen.grow(trap)) };
        let builder = Region::builder(memory.clone()).traps_reads(true).force(Mechanism::Mprotect);
        let region = builder.inline(handler).build(caps)?;
        Ok(Self { memory, region, state, top: 0, collections: 0 })
    }

    /// One addition. The caller initialises the block, and that is where an overflow shows.
    fn allocate(&mut self, bytes: usize) -> usize {
        let at = self.top;
        self.top += bytes;
        at
    }

    fn bytes(&self) -> Volatile<'_> {
        self.memory.bytes()
    }

    /// Called where the program holds no block it would miss.
    fn safe_point(&mut self) -> Result<(), Box<dyn std::error::Error>> {
        if self.state.collect.swap(false, Ordering::AcqRel) {
            // This program's collector keeps nothing; a real one copies what lives. What was open is closed and given back.
            self.collections += 1;
            self.top = 0;
            let open = PageCount::new(self.state.open.swap(0, Ordering::AcqRel) * STEP.get());
            let part = PageRange::new(self.region.range().start(), open);
            self.memory.discard(part)?;
            self.region.protect(&[part], Protection::None)?;
        }
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let caps = Capabilities::probe();
    let mut arena = Arena::new(PageCount::new(1024), &caps)?;
    const BLOCKS: usize = 200_000;
    const BLOCK: usize = 48;
    for n in 0..BLOCKS {
        let block = arena.allocate(BLOCK);
        arena.bytes().store_u64(block, n as u64)?;
        arena.bytes().store_u64(block + BLOCK - 8, n as u64)?;
        if n % 16 == 0 {
            arena.safe_point()?;
        }
    }
    let traps = arena.state.traps.load(Ordering::Relaxed);
    println!("{BLOCKS} blocks, {traps} traps, {} collections", arena.collections);
    assert!(arena.collections >= 2 && traps >= arena.collections * 16);
    assert_eq!(arena.region.range().start(), VirtAddr::new(arena.memory.range().start().as_usize()));

    println!("one trap for {} blocks, and no compare in any allocation", BLOCKS / traps);
    Ok(())
}
