//! The checks of regions: traps, protection, fills.

use crate::common::{Seen, noting, unprotect};
use crate::or_skip;
use crate::settings::{Case, PAGES, skip_for};
use peregrine_base::sync::{AtomicUsize, Ordering};
use peregrine_sys::io;
use peregrine_vm::Errno;
use peregrine_vm::region::Builder;
use peregrine_vm::{
    Access, BuildError, Decision, Mapping, Mechanism, PAGE_SIZE, PageCount, PageRange, Protection, Region,
    Trap,
};
use std::sync::Arc;
use testkit::{Outcome, Rng};

impl Case<Mechanism> {
    /// Memory that says of each page which it is.
    fn memory(&self) -> Arc<Mapping> {
        let memory = self.kind.make(PAGES);
        for page in 0..PAGES.get() {
            memory.bytes().store_u64(page * PAGE_SIZE + 8, page as u64 + 1).unwrap();
        }
        memory
    }

    /// [`noting`], or a skip that names the missing capability.
    fn shaped(
        &self,
        memory: &Arc<Mapping>,
        shape: impl FnOnce(Builder) -> Builder,
        answer: fn(&Trap<'_>) -> Decision,
    ) -> Result<(Region, Arc<Seen>), Outcome> {
        match noting(memory, self.mechanism, &self.caps, shape, answer) {
            Ok(made) => Ok(made),
            Err(BuildError::NoMechanism { tried: why, .. }) => Err(skip_for(why)),
            Err(other) => panic!("{other}"),
        }
    }

    /// A region that opens each page that traps.
    fn region(&self, memory: &Arc<Mapping>) -> Result<(Region, Arc<Seen>), Outcome> {
        self.shaped(memory, |builder| builder, unprotect)
    }
}

pub fn a_write_to_a_protected_page_traps_once_and_a_read_never(case: &Case<Mechanism>) -> Outcome {
    let memory = case.memory();
    let (region, seen) = or_skip!(case.region(&memory));
    region.protect(&[region.range()], Protection::Read).unwrap();
    for page in 0..PAGES.get() {
        assert_eq!(memory.bytes().load_u64(page * PAGE_SIZE + 8).unwrap(), page as u64 + 1);
    }
    assert_eq!(seen.traps(), 0, "reads");
    for (n, &page) in Rng::new(1).permutation(PAGES.get()).iter().enumerate() {
        let at = page * PAGE_SIZE + 2408;
        memory.bytes().store_u64(at, 7).unwrap();
        memory.bytes().store_u64(at + 8, 8).unwrap();
        assert_eq!((seen.traps(), seen.writes.load(Ordering::SeqCst)), (n + 1, n + 1));
        let last = seen.last.load(Ordering::SeqCst) as usize;
        assert_eq!(last, memory.range().start().as_usize() + at, "the exact address");
        assert_eq!(memory.bytes().load_u64(at).unwrap(), 7);
        assert_eq!(memory.bytes().load_u64(page * PAGE_SIZE + 8).unwrap(), page as u64 + 1, "contents kept");
    }
    Outcome::Passed
}

/// Opens the page when it is asked for the third time.
fn at_the_third_time(trap: &Trap<'_>) -> Decision {
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    if ASKED.fetch_add(1, Ordering::SeqCst) % 3 < 2 { Decision::Retry } else { trap.unprotect() }
}

pub fn an_access_that_is_to_be_tried_again_traps_again(case: &Case<Mechanism>) -> Outcome {
    let memory = case.memory();
    let (region, seen) = or_skip!(case.shaped(&memory, |b| b, at_the_third_time));
    region.protect(&[region.range()], Protection::Read).unwrap();
    for (n, page) in [7, 0, 30].into_iter().enumerate() {
        memory.bytes().store_u64(page * PAGE_SIZE, 9).unwrap();
        assert_eq!(seen.traps(), 3 * (n + 1));
        assert_eq!(memory.bytes().load_u64(page * PAGE_SIZE), Ok(9));
    }
    Outcome::Passed
}

pub fn every_access_to_a_page_without_access_traps_and_contents_stay(case: &Case<Mechanism>) -> Outcome {
    let memory = case.memory();
    let keeps = case.mechanism != Mechanism::Guard || case.kind.is_shared();
    let shape = |b: Builder| b.traps_writes(false).traps_reads(true).may_lose_contents(!keeps);
    let (region, seen) = or_skip!(case.shaped(&memory, shape, unprotect));
    region.protect(&[region.range()], Protection::None).unwrap();
    for page in 0..PAGES.get() {
        let value = memory.bytes().load_u64(page * PAGE_SIZE + 8).unwrap();
        assert_eq!(value, if keeps { page as u64 + 1 } else { 0 });
        assert_eq!(seen.traps(), page + 1);
        memory.bytes().store_u64(page * PAGE_SIZE + 8, 1).unwrap();
        assert_eq!(seen.traps(), page + 1, "the page is open now");
    }
    assert_eq!(seen.writes.load(Ordering::SeqCst), 0);
    Outcome::Passed
}

pub fn a_batch_protects_exactly_its_ranges(case: &Case<Mechanism>) -> Outcome {
    let memory = case.memory();
    let guard = case.mechanism == Mechanism::Guard;
    let shape = |b: Builder| b.traps_writes(!guard).traps_reads(guard).may_lose_contents(guard);
    let (region, seen) = or_skip!(case.shaped(&memory, shape, unprotect));
    let access = if guard { Protection::None } else { Protection::Read };
    let parts = [memory.pages(1, 2).unwrap(), memory.pages(3, 1).unwrap(), memory.pages(9, 4).unwrap()];
    region.protect(&parts, access).unwrap();
    for page in 0..PAGES.get() {
        let before = seen.traps();
        memory.bytes().store_u64(page * PAGE_SIZE, 1).unwrap();
        let trapped = seen.traps() > before;
        assert_eq!(trapped, (1..4).contains(&page) || (9..13).contains(&page), "page {page}");
    }
    let beyond = PageRange::new(memory.range().start(), PageCount::new(memory.range().pages().get() + 1));
    let error = region.protect(&[beyond], access).unwrap_err().to_string();
    assert!(error.contains("does not lie in the region"), "{error}");
    Outcome::Passed
}

fn fill_block(trap: &Trap<'_>) -> Decision {
    let block = trap.block(PageCount::new(8));
    // 8 pages of bytes that say which page they are; on the stack, which is large enough here.
    let first = trap.page_index() / 8 * 8;
    let mut bytes = [0; 8 * PAGE_SIZE];
    for (i, page) in bytes.chunks_exact_mut(PAGE_SIZE).enumerate() {
        page.fill((first + i + 1) as u8);
    }
    trap.decide(trap.region().fill_copy(block, &bytes, Protection::ReadWrite))
}

pub fn absent_pages_trap_and_are_filled_in_blocks(case: &Case<Mechanism>) -> Outcome {
    let memory = case.kind.make(PAGES);
    let _stack = peregrine_vm::AltStack::install(256 << 10).unwrap();
    let (region, seen) = or_skip!(case.shaped(&memory, |b| b.traps_absent(true), fill_block));
    // One that is there already, amid a block: the fill goes on behind it with the bytes of the pages there.
    region.fill_copy(memory.pages(19, 1).unwrap(), &[200; PAGE_SIZE], Protection::ReadWrite).unwrap();
    for page in 0..PAGES.get() {
        let value = memory.bytes().load_u8(page * PAGE_SIZE + 77).unwrap();
        assert_eq!(value as usize, if page == 19 { 200 } else { page + 1 });
        assert_eq!(seen.traps(), page / 8 + 1);
    }
    // A fill never undoes a write: what is there stays.
    memory.bytes().store_u8(5, 99).unwrap();
    let filled =
        region.fill_copy(memory.pages(0, 8).unwrap(), &[1; 8 * PAGE_SIZE], Protection::ReadWrite).unwrap();
    assert_eq!((filled.get(), memory.bytes().load_u8(5).unwrap()), (0, 99));
    // Evicted, the pages trap once more; shared ones come back with what was in them.
    memory.bytes().store_u8(9 * PAGE_SIZE, 44).unwrap();
    region.evict(memory.pages(8, 8).unwrap()).unwrap();
    let traps = seen.traps();
    let kept = if case.kind.is_shared() { 44 } else { 10 };
    assert_eq!(memory.bytes().load_u8(9 * PAGE_SIZE).unwrap(), kept);
    assert_eq!(seen.traps(), traps + 1);
    Outcome::Passed
}

fn fill_protected(trap: &Trap<'_>) -> Decision {
    match trap.access() {
        Access::Read => trap.decide(trap.region().fill_copy(trap.page(), &[5; PAGE_SIZE], Protection::Read)),
        // A write to an absent page may be asked for first; to one that is there it lifts the protection.
        Access::Write => match trap.region().fill_copy(trap.page(), &[5; PAGE_SIZE], Protection::ReadWrite) {
            Ok(n) if n.get() == 1 => Decision::Filled,
            _ => trap.unprotect(),
        },
    }
}

pub fn a_page_can_arrive_protected(case: &Case<Mechanism>) -> Outcome {
    let memory = case.kind.make(PAGES);
    let _stack = peregrine_vm::AltStack::install(64 << 10).unwrap();
    let (_region, seen) = or_skip!(case.shaped(&memory, |b| b.traps_absent(true), fill_protected));
    assert_eq!(memory.bytes().load_u8(3).unwrap(), 5);
    assert_eq!(seen.traps(), 1);
    memory.bytes().store_u8(3, 6).unwrap();
    assert_eq!(seen.traps(), 2, "the write traps too");
    memory.bytes().store_u8(4, 6).unwrap();
    assert_eq!((seen.traps(), memory.bytes().load_u8(3).unwrap()), (2, 6));
    Outcome::Passed
}

pub fn threads_that_touch_the_same_pages_at_once_all_go_on(case: &Case<Mechanism>) -> Outcome {
    let memory = case.memory();
    let (region, seen) = or_skip!(case.region(&memory));
    for round in 0..20 {
        region.protect(&[region.range()], Protection::Read).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let memory = &memory;
                scope.spawn(move || {
                    for page in Rng::new(round * 4 + thread).permutation(PAGES.get()) {
                        memory.bytes().fetch_add_u64(page * PAGE_SIZE + 16, 1).unwrap();
                    }
                });
            }
        });
    }
    for page in 0..PAGES.get() {
        assert_eq!(memory.bytes().load_u64(page * PAGE_SIZE + 16).unwrap(), 80, "page {page}");
    }
    assert!(seen.traps() >= 20 * PAGES.get());
    Outcome::Passed
}

pub fn a_system_call_on_a_protected_page_is_served_or_fails_with_efault(case: &Case<Mechanism>) -> Outcome {
    let memory = case.memory();
    let (region, seen) = or_skip!(case.region(&memory));
    region.protect(&[region.range()], Protection::Read).unwrap();
    let source = Mapping::memfd(PageCount::new(1)).unwrap();
    source.bytes().write(0, b"eight by").unwrap();
    let to = memory.bytes().address(8).unwrap();
    // SAFETY: eight bytes of the mapping, which is reached by copies only.
    let got = unsafe { io::read_at_ptr(source.object_fd().unwrap(), to.as_ptr(), 8, 0) };
    if region.serves_system_calls() {
        assert_eq!((got, seen.traps()), (Ok(8), 1));
        assert_eq!(memory.bytes().load_u64(8).unwrap(), u64::from_le_bytes(*b"eight by"));
    } else {
        assert_eq!((got, seen.traps()), (Err(Errno::EFAULT), 0));
        assert_eq!(memory.bytes().load_u64(8).unwrap(), 1, "nothing was written");
    }
    // Reading *from* the page succeeds always: it is only protected against writes.
    let sink = Mapping::memfd(PageCount::new(1)).unwrap();
    let from = memory.bytes().address(PAGE_SIZE + 8).unwrap();
    // SAFETY: the sink is nobody else's.
    let wrote = unsafe { io::write_at_ptr(sink.object_fd().unwrap(), from.as_ptr(), 8, 0) };
    assert_eq!((wrote, sink.bytes().load_u64(0).unwrap()), (Ok(8), 2));
    Outcome::Passed
}

pub fn dropping_the_region_makes_the_memory_plain(case: &Case<Mechanism>) -> Outcome {
    let memory = case.memory();
    let (first, seen) = or_skip!(case.region(&memory));
    first.protect(&[first.range()], Protection::Read).unwrap();
    drop(first);
    memory.bytes().store_u64(0, 3).unwrap();
    assert_eq!(seen.traps(), 0);
    // And the range can be had again.
    let (again, seen) = or_skip!(case.region(&memory));
    again.protect(&[again.range()], Protection::Read).unwrap();
    memory.bytes().store_u64(0, 3).unwrap();
    assert_eq!(seen.traps(), 1);
    Outcome::Passed
}

pub fn a_huge_page_is_protected_and_opened_as_one(case: &Case<Mechanism>) -> Outcome {
    let memory = case.kind.make(PAGES);
    memory.populate(memory.range(), true).unwrap();
    let (region, seen) = or_skip!(case.region(&memory));
    region.protect(&[region.range()], Protection::Read).unwrap();
    for page in [300, 0, 511] {
        memory.bytes().store_u64(page * PAGE_SIZE, 3).unwrap();
        assert_eq!(seen.traps(), 1, "the first write opens all of it");
    }
    Outcome::Passed
}
