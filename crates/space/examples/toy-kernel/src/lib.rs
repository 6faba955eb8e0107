//! How a kernel embeds `peregrine-space`: no `std`, no allocator, an MMU of a few lines.
//!
//! ```text
//!  arena    memory that the kernel sets aside at boot, zeroed
//!  ToyMmu   a page table for each core, of one level; a shootdown clears the entries of the cores that are named
//!  Bitmap   frames, one bit each
//!  Core     what each processor keeps: its Member
//! ```
//!
//! What a real kernel does in addition is said where it would be done.
#![no_std]

use core::ptr::NonNull;
use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_space::{
    Access, AddressSpace, Arena, ArenaError, Change, Contents, FaultError, Filled, FrameId, Frames, Member,
    MemberId, MemberSet, Mmu, PAGE_SIZE, PageRange, Protection, Sizes, SpaceId, Spaces, VirtAddr,
};

/// Processors of the toy.
pub const CORES: usize = 4;
/// Pages that its page tables can translate.
pub const PAGES: usize = 512;
/// Page frames that it has.
pub const FRAMES: usize = 64;

/// A kernel's own. There can be one in a program, so this compiles only if nothing beneath brings the standard library, which has one:
/// `cargo rustc -p toy-kernel --lib -- --cfg peregrine_bare` is how CI asks.
#[cfg(peregrine_bare)]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        peregrine_base::sync::spin_loop();
    }
}

/// What the arena is made for.
pub const SIZES: Sizes = Sizes { members: CORES, spaces: 2, nodes: 64, regions: 8, frames: FRAMES };

/// A page table for each core: entry = frame << 2 | rights, 0 for none.
#[derive(Debug)]
pub struct ToyMmu {
    tables: [[AtomicU64; PAGES]; CORES],
}

/// The page lies beyond what the toy's tables translate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BeyondTheTable;

impl ToyMmu {
    /// Empty tables.
    #[expect(clippy::new_without_default, reason = "made once, at boot")]
    pub const fn new() -> Self {
        Self { tables: [const { [const { AtomicU64::new(0) }; PAGES] }; CORES] }
    }

    /// What `core`'s table says of a page: frame and rights.
    pub fn translate(&self, core: MemberId, page: VirtAddr) -> Option<(FrameId, Protection)> {
        let entry = self.entry(core, page)?.load(Ordering::Acquire);
        let rights = if entry & 2 != 0 { Protection::ReadWrite } else { Protection::Read };
        (entry & 3 != 0).then(|| (FrameId::new((entry >> 2) as u32), rights))
    }

    fn entry(&self, core: MemberId, page: VirtAddr) -> Option<&AtomicU64> {
        self.tables[core.index()].get(page.as_usize() / PAGE_SIZE)
    }
}

impl Mmu for ToyMmu {
    type Error = BeyondTheTable;

    fn fill(
        &self,
        _space: SpaceId,
        member: MemberId,
        range: PageRange,
        contents: Contents,
        rights: Protection,
    ) -> Result<(), BeyondTheTable> {
        let Contents::Frame(frame) = contents else { return Err(BeyondTheTable) };
        let bits = match rights {
            Protection::None => 0,
            Protection::Read => 1,
            Protection::ReadWrite => 3,
        };
        // A real kernel writes the entry of the running core's own table, and needs no lock: nobody else does.
        let entry = self.entry(member, range.start()).ok_or(BeyondTheTable)?;
        entry.store(u64::from(frame.get()) << 2 | bits, Ordering::Release);
        Ok(())
    }

    fn shootdown(
        &self,
        _space: SpaceId,
        _by: MemberId,
        range: PageRange,
        targets: &MemberSet,
        change: Change,
    ) {
        // A real kernel sends one interrupt to the targets (not to itself), in whose handler each core clears its own entries
        // and invalidates its TLB, and waits for all of them. Interrupts stay on meanwhile: two cores may be doing this to each other.
        for core in targets.iter() {
            for page in range.start().as_usize() / PAGE_SIZE..range.end().as_usize() / PAGE_SIZE {
                let Some(entry) = self.entry(core, VirtAddr::new(page * PAGE_SIZE)) else { break };
                match change {
                    Change::Restrict(Protection::Read) => entry.fetch_and(!2, Ordering::AcqRel),
                    Change::Restrict(Protection::ReadWrite) => continue,
                    Change::Drop | Change::Restrict(Protection::None) => entry.swap(0, Ordering::AcqRel),
                };
            }
        }
    }

    fn wait(&self, _member: MemberId, _owner: MemberId) {
        // Interrupts are on, so shootdowns are served while this core spins. A hypervisor would yield to `owner` here.
        peregrine_base::sync::spin_loop();
    }
}

/// Frames, one bit each.
#[derive(Debug)]
pub struct Bitmap(AtomicU64);

impl Bitmap {
    /// All free.
    #[expect(clippy::new_without_default, reason = "made once, at boot")]
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Frames in use.
    pub fn in_use(&self) -> u32 {
        self.0.load(Ordering::Relaxed).count_ones()
    }

    fn take(&self) -> Option<FrameId> {
        loop {
            let used = self.0.load(Ordering::Relaxed);
            let free = used.trailing_ones();
            if free as usize == FRAMES {
                return None;
            }
            if self.0.compare_exchange(used, used | 1 << free, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                // A real kernel zeroes the frame here, or keeps zeroed ones in stock.
                return Some(FrameId::new(free));
            }
        }
    }
}

impl Frames for Bitmap {
    fn zeroed(&self, _space: SpaceId, _by: MemberId, _page: VirtAddr) -> Option<FrameId> {
        self.take()
    }
    fn copied(&self, _space: SpaceId, _by: MemberId, _page: VirtAddr, _from: FrameId) -> Option<FrameId> {
        self.take()
    }
    fn of_object(&self, _by: MemberId, _object: u64, _index: u64) -> Option<FrameId> {
        // The page cache's business; the toy has no files.
        None
    }
    fn release(&self, _by: MemberId, frame: FrameId) {
        self.0.fetch_and(!(1 << frame.get()), Ordering::AcqRel);
    }
    fn rebuild(&self, _by: MemberId, live: &dyn Fn(FrameId) -> bool) {
        let used = (0..FRAMES as u32).filter(|f| live(FrameId::new(*f))).fold(0, |bits, f| bits | 1 << f);
        self.0.store(used, Ordering::Release);
    }
}

/// Sets up the structures in memory that the kernel set aside: once, on the first core.
///
/// # Errors
/// As [`Spaces::create`].
///
/// # Safety
/// `SIZES.bytes()` zeroed bytes from `memory` on, aligned to a page, are this call's for ever.
pub unsafe fn boot(memory: NonNull<u8>) -> Result<Spaces<'static>, ArenaError> {
    // SAFETY: as this function's own contract says.
    let arena = unsafe { Arena::new(memory, SIZES.bytes()) };
    // SAFETY: the memory is zeroes and nobody's yet.
    unsafe { Spaces::create(&arena, &SIZES) }
}

/// What a core's page-fault handler does: `Err` is a signal to the process.
///
/// # Errors
/// As [`AddressSpace::fault`].
pub fn page_fault(
    space: &AddressSpace<'static, &'static ToyMmu, &'static Bitmap>,
    core: &mut Member<'static>,
    addr: VirtAddr,
    access: Access,
) -> Result<Filled, FaultError<BeyondTheTable>> {
    space.fault(core, addr, access)
}

/// What a core's timer interrupt does every few milliseconds, between operations. A core that goes to sleep calls
/// [`Member::idle`] first.
pub fn timer(core: &mut Member<'static>, frames: &'static Bitmap) {
    core.tick(frames);
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use peregrine_space::{Backing, Mapping, PageCount, Place};

    #[test]
    fn the_toy_kernel_maps_faults_shares_and_unmaps() {
        static MMU: ToyMmu = ToyMmu::new();
        static FRAMES: Bitmap = Bitmap::new();
        let layout = std::alloc::Layout::from_size_align(SIZES.bytes(), PAGE_SIZE).unwrap();
        // SAFETY: not of size 0.
        let memory = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).unwrap();
        // SAFETY: zeroed, aligned, and never freed: a kernel's arena.
        let spaces = unsafe { boot(memory) }.unwrap();
        let (mut first, mut second) = (spaces.join().unwrap(), spaces.join().unwrap());
        let space = AddressSpace::create(&mut first, &MMU, &FRAMES).unwrap();

        let addr = VirtAddr::new(0x4000);
        let mapping = Mapping { backing: Backing::Anonymous, rights: Protection::ReadWrite };
        let range = space.map(&mut first, Place::Fixed(addr), PageCount::new(2), &mapping).unwrap();
        page_fault(&space, &mut first, addr, Access::Write).unwrap();
        page_fault(&space, &mut second, addr, Access::Read).unwrap();
        assert_eq!(MMU.translate(first.id(), addr), MMU.translate(second.id(), addr));
        assert_eq!(FRAMES.in_use(), 1);

        space.protect(&mut second, range, Protection::Read).unwrap();
        assert_eq!(MMU.translate(first.id(), addr).unwrap().1, Protection::Read);
        space.unmap(&mut second, range).unwrap();
        assert!(MMU.translate(first.id(), addr).is_none() && MMU.translate(second.id(), addr).is_none());
        for _ in 0..5 {
            timer(&mut first, &FRAMES);
            timer(&mut second, &FRAMES);
        }
        assert_eq!(FRAMES.in_use(), 0, "the frame comes back after its review");
    }
}
