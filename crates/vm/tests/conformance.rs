//! One suite, run for every mechanism, on every kind of memory it serves, under every set of capabilities.

mod stress;

use peregrine_base::sync::{AtomicU64, AtomicUsize, Ordering};
use peregrine_sys::io;
use peregrine_vm::capabilities::Simulate;
use peregrine_vm::sys_errno::Errno;
use peregrine_vm::{
    Access, BuildError, Capabilities, Capability, Decision, DirtyMechanism, Inline, Mapping, Mechanism,
    PAGE_SIZE, PageCount, PageKind, Protection, Region, TrackError, Tracker, Trap,
};
use std::sync::Arc;
use std::time::Duration;
use testkit::{Outcome, Rng, Test, skip};

/// Whose kernel this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Setting {
    AsFound,
    Masked(Simulate),
    /// Not a mask: the process really becomes uid 65534.
    Nobody,
    /// The same, under a real seccomp filter that refuses `userfaultfd(2)`, as in a container.
    NobodyFiltered,
}

impl Setting {
    const ALL: [Self; 6] = [
        Self::AsFound,
        Self::Masked(Simulate::Linux5_15),
        Self::Masked(Simulate::ContainerWithoutUserfaultfd),
        Self::Masked(Simulate::OrdinaryUser),
        Self::Nobody,
        Self::NobodyFiltered,
    ];

    fn name(self) -> String {
        match self {
            Self::AsFound => "as found".into(),
            Self::Masked(s) => s.to_string(),
            Self::Nobody => "uid 65534".into(),
            Self::NobodyFiltered => "uid 65534 under seccomp".into(),
        }
    }

    fn enter(self) -> Result<Capabilities, String> {
        match self {
            Self::AsFound => Ok(Capabilities::probe()),
            Self::Masked(s) => Ok(Capabilities::probe().simulate(s)),
            Self::Nobody | Self::NobodyFiltered => {
                if !peregrine_sys::process::is_root() {
                    return Err("missing capability: root, to become uid 65534".into());
                }
                peregrine_sys::process::become_user(65534).expect("root may become anybody");
                if self == Self::NobodyFiltered {
                    peregrine_sys::process::forbid_call(peregrine_sys::process::CALL_USERFAULTFD)
                        .expect("a filter");
                    let caps = Capabilities::probe();
                    let why = caps.lack(Capability::Userfaultfd).expect("it is filtered").to_string();
                    assert!(why.contains("seccomp") && why.contains("/dev/userfaultfd"), "{why}");
                    return Ok(caps);
                }
                let caps = Capabilities::probe();
                // What this setting is for. Should the machine's sysctl allow more, it says so and tests that.
                if caps.has(Capability::UserfaultfdKernelFaults) {
                    println!(
                        "note: vm.unprivileged_userfaultfd=1, so uid 65534 has more than USER_MODE_ONLY"
                    );
                }
                Ok(caps)
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Memory {
    Anonymous,
    Huge,
    Pool,
    PoolMemfd,
    Memfd,
    File,
}

impl Memory {
    const ALL: [Self; 6] =
        [Self::Anonymous, Self::Huge, Self::Pool, Self::PoolMemfd, Self::Memfd, Self::File];

    fn make(self, pages: PageCount, caps: &Capabilities) -> Result<Arc<Mapping>, String> {
        let lack = |c: Capability| caps.lack(c).map_or(Ok(()), |l| Err(l.to_string()));
        let made = match self {
            Self::Anonymous => Mapping::anonymous(pages),
            Self::Huge => {
                lack(Capability::TransparentHuge)?;
                let size = PageCount::new(pages.get().next_multiple_of(512));
                let mapping = Mapping::anonymous_of(size, PageKind::TransparentHuge).expect("room");
                mapping.populate(mapping.range(), true).expect("populate");
                Ok(mapping)
            }
            Self::Pool => {
                lack(Capability::HugePool)?;
                Mapping::anonymous_of(PageCount::new(512), PageKind::Huge2M)
            }
            Self::PoolMemfd => {
                lack(Capability::HugePool)?;
                Mapping::memfd_of(PageCount::new(512), PageKind::Huge2M)
            }
            Self::Memfd => Mapping::memfd(pages),
            Self::File => {
                let file = tempfile::tempfile().expect("a file");
                file.set_len(pages.bytes() as u64).expect("room");
                Mapping::file(&file, PageCount::new(0), pages, Protection::ReadWrite)
            }
        };
        Ok(Arc::new(made.expect("memory")))
    }

    fn is_shared(self) -> bool {
        matches!(self, Self::Memfd | Self::PoolMemfd | Self::File)
    }

    fn is_pool(self) -> bool {
        matches!(self, Self::Pool | Self::PoolMemfd)
    }
}

const PAGES: PageCount = PageCount::new(32);

/// What a handler saw, written without a lock.
#[derive(Default)]
struct Seen {
    traps: AtomicUsize,
    last: AtomicU64,
    writes: AtomicUsize,
}

impl Seen {
    fn note(&self, trap: &Trap<'_>) {
        self.traps.fetch_add(1, Ordering::SeqCst);
        self.last.store(trap.address().as_usize() as u64, Ordering::SeqCst);
        self.writes.fetch_add(usize::from(trap.access() == Access::Write), Ordering::SeqCst);
    }
    fn traps(&self) -> usize {
        self.traps.load(Ordering::SeqCst)
    }
}

/// A region whose handler notes the trap and then does what `answer` says.
fn region(
    memory: &Arc<Mapping>,
    mechanism: Mechanism,
    caps: &Capabilities,
    shape: impl FnOnce(peregrine_vm::region::Builder) -> peregrine_vm::region::Builder,
    answer: fn(&Trap<'_>) -> Decision,
) -> Result<(Region, Arc<Seen>), Outcome> {
    let seen = Arc::new(Seen::default());
    let noted = seen.clone();
    let handler = move |trap: &Trap<'_>| {
        noted.note(trap);
        answer(trap)
    };
    let builder = shape(Region::builder(memory.clone())).force(mechanism);
    let builder = if mechanism.is_inline() {
        // SAFETY: atomics and the trap's own operations only.
        builder.inline(unsafe { Inline::new(handler) })
    } else {
        builder.pager(handler)
    };
    match builder.build(caps) {
        Ok(region) => Ok((region, seen)),
        Err(BuildError::NoMechanism { tried: why, .. }) => {
            let why = why.into_iter().map(|(m, why)| format!("{m}: {why}")).collect::<Vec<_>>().join("; ");
            assert!(why.contains("is missing"), "a skip names the missing capability: {why}");
            Err(Outcome::Skipped(why))
        }
        Err(other) => panic!("{other}"),
    }
}

macro_rules! or_skip {
    ($e:expr) => {
        match $e {
            Ok(x) => x,
            Err(outcome) => return outcome,
        }
    };
}

fn unprotect(trap: &Trap<'_>) -> Decision {
    trap.unprotect()
}

fn fill_memory(memory: &Mapping) {
    for page in 0..PAGES.get() {
        memory.bytes().store_u64(page * PAGE_SIZE + 8, page as u64 + 1).unwrap();
    }
}

fn a_write_to_a_protected_page_traps_once_and_a_read_never(
    m: Mechanism,
    k: Memory,
    c: &Capabilities,
) -> Outcome {
    let memory = k.make(PAGES, c).unwrap_or_else(|e| panic!("{e}"));
    fill_memory(&memory);
    let (region, seen) = or_skip!(region(&memory, m, c, |b| b, unprotect));
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

fn every_access_to_a_page_without_access_traps_and_contents_stay(
    m: Mechanism,
    k: Memory,
    c: &Capabilities,
) -> Outcome {
    let memory = k.make(PAGES, c).unwrap_or_else(|e| panic!("{e}"));
    fill_memory(&memory);
    let keeps = m != Mechanism::Guard || k.is_shared();
    let shape =
        |b: peregrine_vm::region::Builder| b.traps_writes(false).traps_reads(true).may_lose_contents(!keeps);
    let (region, seen) = or_skip!(region(&memory, m, c, shape, unprotect));
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

fn a_batch_protects_exactly_its_ranges(m: Mechanism, k: Memory, c: &Capabilities) -> Outcome {
    let memory = k.make(PAGES, c).unwrap_or_else(|e| panic!("{e}"));
    fill_memory(&memory);
    let guard = m == Mechanism::Guard;
    let shape =
        |b: peregrine_vm::region::Builder| b.traps_writes(!guard).traps_reads(guard).may_lose_contents(guard);
    let (region, seen) = or_skip!(region(&memory, m, c, shape, unprotect));
    let access = if guard { Protection::None } else { Protection::Read };
    let parts = [memory.pages(1, 2).unwrap(), memory.pages(3, 1).unwrap(), memory.pages(9, 4).unwrap()];
    region.protect(&parts, access).unwrap();
    for page in 0..PAGES.get() {
        let before = seen.traps();
        memory.bytes().store_u64(page * PAGE_SIZE, 1).unwrap();
        let trapped = seen.traps() > before;
        assert_eq!(trapped, (1..4).contains(&page) || (9..13).contains(&page), "page {page}");
    }
    let beyond = peregrine_vm::PageRange::new(
        memory.range().start(),
        PageCount::new(memory.range().pages().get() + 1),
    );
    let error = region.protect(&[beyond], access).unwrap_err().to_string();
    assert!(error.contains("does not lie in the region"), "{error}");
    Outcome::Passed
}

fn fill_block(trap: &Trap<'_>) -> Decision {
    let block = trap.block(PageCount::new(8));
    // 8 pages of bytes that say which block they are; on the stack, which is large enough here.
    let tag = (trap.page_index() / 8 + 1) as u8;
    let bytes = [tag; 8 * PAGE_SIZE];
    trap.decide(trap.region().fill_copy(block, &bytes, Protection::ReadWrite))
}

fn absent_pages_trap_and_are_filled_in_blocks(m: Mechanism, k: Memory, c: &Capabilities) -> Outcome {
    let memory = k.make(PAGES, c).unwrap_or_else(|e| panic!("{e}"));
    let _stack = peregrine_vm::AltStack::install(256 << 10).unwrap();
    let (region, seen) = or_skip!(region(&memory, m, c, |b| b.traps_absent(true), fill_block));
    for page in 0..PAGES.get() {
        let value = memory.bytes().load_u8(page * PAGE_SIZE + 77).unwrap();
        assert_eq!(value as usize, page / 8 + 1);
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
    let kept = if k.is_shared() { 44 } else { 2 };
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

fn a_page_can_arrive_protected(m: Mechanism, k: Memory, c: &Capabilities) -> Outcome {
    let memory = k.make(PAGES, c).unwrap_or_else(|e| panic!("{e}"));
    let _stack = peregrine_vm::AltStack::install(64 << 10).unwrap();
    let (_region, seen) = or_skip!(region(&memory, m, c, |b| b.traps_absent(true), fill_protected));
    assert_eq!(memory.bytes().load_u8(3).unwrap(), 5);
    assert_eq!(seen.traps(), 1);
    memory.bytes().store_u8(3, 6).unwrap();
    assert_eq!(seen.traps(), 2, "the write traps too");
    memory.bytes().store_u8(4, 6).unwrap();
    assert_eq!((seen.traps(), memory.bytes().load_u8(3).unwrap()), (2, 6));
    Outcome::Passed
}

fn threads_that_touch_the_same_pages_at_once_all_go_on(m: Mechanism, k: Memory, c: &Capabilities) -> Outcome {
    let memory = k.make(PAGES, c).unwrap_or_else(|e| panic!("{e}"));
    fill_memory(&memory);
    let (region, seen) = or_skip!(region(&memory, m, c, |b| b, unprotect));
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

fn a_system_call_on_a_protected_page_is_served_or_fails_with_efault(
    m: Mechanism,
    k: Memory,
    c: &Capabilities,
) -> Outcome {
    let memory = k.make(PAGES, c).unwrap_or_else(|e| panic!("{e}"));
    fill_memory(&memory);
    let (region, seen) = or_skip!(region(&memory, m, c, |b| b, unprotect));
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

fn dropping_the_region_makes_the_memory_plain(m: Mechanism, k: Memory, c: &Capabilities) -> Outcome {
    let memory = k.make(PAGES, c).unwrap_or_else(|e| panic!("{e}"));
    fill_memory(&memory);
    let (first, seen) = or_skip!(region(&memory, m, c, |b| b, unprotect));
    first.protect(&[first.range()], Protection::Read).unwrap();
    drop(first);
    memory.bytes().store_u64(0, 3).unwrap();
    assert_eq!(seen.traps(), 0);
    // And the range can be had again.
    let (again, seen) = or_skip!(region(&memory, m, c, |b| b, unprotect));
    again.protect(&[again.range()], Protection::Read).unwrap();
    memory.bytes().store_u64(0, 3).unwrap();
    assert_eq!(seen.traps(), 1);
    Outcome::Passed
}

fn a_huge_page_is_protected_and_opened_as_one(m: Mechanism, k: Memory, c: &Capabilities) -> Outcome {
    let memory = k.make(PAGES, c).unwrap_or_else(|e| panic!("{e}"));
    memory.populate(memory.range(), true).unwrap();
    let (region, seen) = or_skip!(region(&memory, m, c, |b| b, unprotect));
    region.protect(&[region.range()], Protection::Read).unwrap();
    for page in [300, 0, 511] {
        memory.bytes().store_u64(page * PAGE_SIZE, 3).unwrap();
        assert_eq!(seen.traps(), 1, "the first write opens all of it");
    }
    Outcome::Passed
}

// ---- trackers ----

fn track(memory: &Arc<Mapping>, m: DirtyMechanism, c: &Capabilities) -> Result<Tracker, Outcome> {
    match Tracker::of(memory.clone()).force(m).start(c) {
        Ok(t) => Ok(t),
        Err(TrackError::NoMechanism { tried: why, .. }) => {
            let why = why.into_iter().map(|(m, why)| format!("{m}: {why}")).collect::<Vec<_>>().join("; ");
            assert!(why.contains("is missing"), "a skip names the missing capability: {why}");
            Err(Outcome::Skipped(why))
        }
        Err(other) => panic!("{other}"),
    }
}

fn indices(memory: &Mapping, set: &peregrine_vm::ViewDirty) -> Vec<usize> {
    set.pages().map(|p| (p.as_usize() - memory.range().start().as_usize()) / PAGE_SIZE).collect()
}

/// How many pages become dirty together: one of the pool is one to the kernel, and not to a comparison.
fn grain(k: Memory, m: DirtyMechanism) -> usize {
    if k.is_pool() && m != DirtyMechanism::Compare { 512 } else { 1 }
}

fn exactly_the_written_pages_are_dirty_and_then_clean(
    m: DirtyMechanism,
    k: Memory,
    c: &Capabilities,
) -> Outcome {
    let memory = k.make(PAGES, c).unwrap_or_else(|e| panic!("{e}"));
    let mut tracker = or_skip!(track(&memory, m, c));
    assert!(tracker.take_dirty().unwrap().is_empty(), "nothing was written yet");
    let mut rng = Rng::new(3);
    for round in 0..10u64 {
        let mut wrote: Vec<usize> = (0..rng.below(12)).map(|_| rng.below(PAGES.get())).collect();
        for &page in &wrote {
            memory
                .bytes()
                .store_u64(page * PAGE_SIZE + 8 * rng.below(512), rng.next_u64() | 1 << 63 | round)
                .unwrap();
        }
        for page in 0..PAGES.get() {
            memory.bytes().load_u64(page * PAGE_SIZE).unwrap();
        }
        wrote.sort_unstable();
        wrote.dedup();
        let set = tracker.take_dirty().unwrap();
        let expected: Vec<usize> =
            if grain(k, m) > 1 && !wrote.is_empty() { (0..512).collect() } else { wrote };
        assert_eq!(indices(&memory, &set), expected, "round {round} over {}", tracker.choice());
        assert_eq!(set.always_dirty().get(), 0);
    }
    assert!(tracker.finish().unwrap().is_empty());
    memory.bytes().store_u64(0, 1).unwrap();
    Outcome::Passed
}

fn a_part_is_taken_alone_and_a_set_can_be_given_back(
    m: DirtyMechanism,
    k: Memory,
    c: &Capabilities,
) -> Outcome {
    let memory = k.make(PAGES, c).unwrap_or_else(|e| panic!("{e}"));
    let mut tracker = or_skip!(track(&memory, m, c));
    for page in [2, 3, 20] {
        memory.bytes().store_u64(page * PAGE_SIZE, 9).unwrap();
    }
    let low = tracker.take_dirty_in(memory.pages(0, 10).unwrap()).unwrap();
    assert_eq!(indices(&memory, &low), [2, 3]);
    tracker.give_back(&low);
    assert_eq!(indices(&memory, &tracker.take_dirty().unwrap()), [2, 3, 20]);
    assert!(tracker.take_dirty().unwrap().is_empty());
    memory.bytes().store_u64(3 * PAGE_SIZE, 10).unwrap();
    assert_eq!(indices(&memory, &tracker.take_dirty().unwrap()), [3], "given back, and tracked again");
    Outcome::Passed
}

fn a_system_call_that_writes_is_tracked_or_fails_with_efault_and_writes_nothing(
    m: DirtyMechanism,
    k: Memory,
    c: &Capabilities,
) -> Outcome {
    let memory = k.make(PAGES, c).unwrap_or_else(|e| panic!("{e}"));
    let mut tracker = or_skip!(track(&memory, m, c));
    let source = Mapping::memfd(PageCount::new(1)).unwrap();
    source.bytes().write(0, b"from a system call").unwrap();
    let to = memory.bytes().address(5 * PAGE_SIZE).unwrap();
    // SAFETY: bytes of the mapping, which is reached by copies only.
    let got = unsafe { io::read_at_ptr(source.object_fd().unwrap(), to.as_ptr(), 18, 0) };
    let served = match m {
        DirtyMechanism::AsyncWriteProtect | DirtyMechanism::Compare => true,
        DirtyMechanism::SyncWriteProtectPager => c.has(Capability::UserfaultfdKernelFaults),
        DirtyMechanism::SyncWriteProtect | DirtyMechanism::Mprotect => false,
    };
    let dirty = tracker.take_dirty().unwrap();
    if served {
        assert_eq!(got, Ok(18));
        assert!(dirty.contains(to));
    } else {
        assert_eq!(got, Err(Errno::EFAULT));
        assert!(dirty.is_empty());
        assert_eq!(memory.bytes().load_u64(5 * PAGE_SIZE).unwrap(), 0, "nothing was written");
    }
    Outcome::Passed
}

fn a_tracked_range_never_misses_a_write(m: DirtyMechanism, k: Memory, c: &Capabilities) -> Outcome {
    let memory = k.make(stress::MEMORY, c).unwrap_or_else(|e| panic!("{e}"));
    drop(or_skip!(track(&memory, m, c)));
    let seed = 0x5eed;
    let plan = stress::Plan { seed, time: Duration::from_millis(100), mechanism: m, views: 1 };
    println!("seed {seed:#x}: {:?}", stress::never_misses(&memory, plan, c));
    Outcome::Passed
}

fn a_union_over_aliases_never_misses_a_write(m: DirtyMechanism, k: Memory, c: &Capabilities) -> Outcome {
    let memory = k.make(stress::MEMORY, c).unwrap_or_else(|e| panic!("{e}"));
    drop(or_skip!(track(&memory, m, c)));
    let seed = 0xa11a5;
    let plan = stress::Plan { seed, time: Duration::from_millis(100), mechanism: m, views: 2 };
    println!("seed {seed:#x}: {:?}", stress::never_misses(&memory, plan, c));
    Outcome::Passed
}

fn the_best_that_there_is_is_chosen_and_the_rest_explained(setting: Setting) -> Outcome {
    let caps = match setting.enter() {
        Ok(caps) => caps,
        Err(why) => skip!("{why}"),
    };
    for kind in [Memory::Anonymous, Memory::Memfd, Memory::File] {
        let memory = kind.make(PAGES, &caps).unwrap();
        // SAFETY: one system call.
        let region =
            Region::builder(memory.clone()).inline(unsafe { Inline::new(unprotect) }).build(&caps).unwrap();
        println!("{kind:?}: {}", region.choice());
        for (_, why) in &region.choice().passed_over {
            assert!(!why.is_empty());
        }
        region.protect(&[region.range()], Protection::Read).unwrap();
        memory.bytes().store_u8(0, 1).unwrap();
        drop(region);
        let mut tracker = Tracker::of(memory.clone()).start(&caps).unwrap();
        println!("{kind:?}: {}", tracker.choice());
        memory.bytes().store_u8(0, 2).unwrap();
        assert_eq!(tracker.take_dirty().unwrap().page_count().get(), 1);
        drop(tracker);
        // One that system calls may write into must never fail them, whatever the kernel offers.
        let mut tracker = Tracker::of(memory.clone()).kernel_writes(true).start(&caps).unwrap();
        let source = Mapping::memfd(PageCount::new(1)).unwrap();
        source.bytes().write(0, b"x").unwrap();
        let to = memory.bytes().address(7).unwrap();
        // SAFETY: a byte of the mapping, which is reached by copies only.
        assert_eq!(unsafe { io::read_at_ptr(source.object_fd().unwrap(), to.as_ptr(), 1, 0) }, Ok(1));
        assert_eq!(tracker.take_dirty().unwrap().page_count().get(), 1);
    }
    Outcome::Passed
}

type RegionCheck = fn(Mechanism, Memory, &Capabilities) -> Outcome;
type TrackerCheck = fn(DirtyMechanism, Memory, &Capabilities) -> Outcome;

/// Whether the check is about something that the mechanism does at all, on any kernel. (What it does not do is in the
/// table of `Mechanism`, and refused with what to use instead: `errors.rs`.)
fn region_applies(name: &str, m: Mechanism, k: Memory) -> bool {
    let userfaultfd = matches!(m, Mechanism::Sigbus | Mechanism::Pager);
    let huge = k == Memory::Huge || k.is_pool();
    if userfaultfd && k == Memory::File {
        return false;
    }
    let as_one = name == "a_huge_page_is_protected_and_opened_as_one";
    if as_one || k.is_pool() {
        return as_one && k.is_pool() && m != Mechanism::Guard;
    }
    match name {
        "every_access_to_a_page_without_access_traps_and_contents_stay" => !userfaultfd,
        "a_batch_protects_exactly_its_ranges" => true,
        "absent_pages_trap_and_are_filled_in_blocks" | "a_page_can_arrive_protected" => {
            m != Mechanism::Guard && !huge && k != Memory::File && (userfaultfd || k.is_shared())
        }
        _ => m != Mechanism::Guard,
    }
}

fn main() -> std::process::ExitCode {
    let mut tests = Vec::new();
    let region_checks: &[(&'static str, RegionCheck)] = &[
        (
            "a_write_to_a_protected_page_traps_once_and_a_read_never",
            a_write_to_a_protected_page_traps_once_and_a_read_never,
        ),
        (
            "every_access_to_a_page_without_access_traps_and_contents_stay",
            every_access_to_a_page_without_access_traps_and_contents_stay,
        ),
        ("a_batch_protects_exactly_its_ranges", a_batch_protects_exactly_its_ranges),
        ("absent_pages_trap_and_are_filled_in_blocks", absent_pages_trap_and_are_filled_in_blocks),
        ("a_page_can_arrive_protected", a_page_can_arrive_protected),
        (
            "threads_that_touch_the_same_pages_at_once_all_go_on",
            threads_that_touch_the_same_pages_at_once_all_go_on,
        ),
        (
            "a_system_call_on_a_protected_page_is_served_or_fails_with_efault",
            a_system_call_on_a_protected_page_is_served_or_fails_with_efault,
        ),
        ("a_huge_page_is_protected_and_opened_as_one", a_huge_page_is_protected_and_opened_as_one),
        ("dropping_the_region_makes_the_memory_plain", dropping_the_region_makes_the_memory_plain),
    ];
    let tracker_checks: &[(&'static str, TrackerCheck)] = &[
        (
            "exactly_the_written_pages_are_dirty_and_then_clean",
            exactly_the_written_pages_are_dirty_and_then_clean,
        ),
        (
            "a_part_is_taken_alone_and_a_set_can_be_given_back",
            a_part_is_taken_alone_and_a_set_can_be_given_back,
        ),
        (
            "a_system_call_that_writes_is_tracked_or_fails_with_efault_and_writes_nothing",
            a_system_call_that_writes_is_tracked_or_fails_with_efault_and_writes_nothing,
        ),
        ("a_tracked_range_never_misses_a_write", a_tracked_range_never_misses_a_write),
        ("a_union_over_aliases_never_misses_a_write", a_union_over_aliases_never_misses_a_write),
    ];
    for setting in Setting::ALL {
        for kind in Memory::ALL {
            for m in Mechanism::ALL {
                for &(name, check) in region_checks.iter().filter(|(n, _)| region_applies(n, m, kind)) {
                    tests.push(case(name, &m.to_string(), kind, setting, move |caps| check(m, kind, caps)));
                }
            }
            for m in DirtyMechanism::ALL {
                let userfaultfd =
                    matches!(m, DirtyMechanism::SyncWriteProtect | DirtyMechanism::SyncWriteProtectPager);
                if userfaultfd && kind == Memory::File {
                    continue;
                }
                for &(name, check) in tracker_checks {
                    let union = name.contains("union");
                    let part = name.contains("part");
                    if union && kind != Memory::Memfd || part && kind.is_pool() {
                        continue;
                    }
                    let by_the_huge_page =
                        matches!(m, DirtyMechanism::AsyncWriteProtect | DirtyMechanism::Compare);
                    if kind.is_pool() && !by_the_huge_page {
                        continue;
                    }
                    tests.push(case(name, &m.to_string(), kind, setting, move |caps| check(m, kind, caps)));
                }
            }
        }
        tests.push(Test {
            name: format!("the_best_that_there_is_is_chosen_and_the_rest_explained[{}]", setting.name()),
            body: Box::new(move || the_best_that_there_is_is_chosen_and_the_rest_explained(setting)),
        });
    }
    testkit::main(tests)
}

fn case(
    name: &str,
    mechanism: &str,
    kind: Memory,
    setting: Setting,
    check: impl Fn(&Capabilities) -> Outcome + Send + Sync + 'static,
) -> Test {
    Test {
        name: format!("{name}[{mechanism}, {kind:?}, {}]", setting.name()),
        body: Box::new(move || {
            let caps = match setting.enter() {
                Ok(caps) => caps,
                Err(why) => skip!("{why}"),
            };
            for (needs, which) in
                [(kind.is_pool(), Capability::HugePool), (kind == Memory::Huge, Capability::TransparentHuge)]
            {
                if let (true, Some(lack)) = (needs, caps.lack(which)) {
                    skip!("{lack}");
                }
            }
            check(&caps)
        }),
    }
}
