//! The slot: the address range that holds all that one thread owns.
//!
//! ```text
//!  slot_base                                                                         slot_base + SLOT_BYTES
//!  │ colour │ guard │ stack ↓ │ header │ TLS + TCB + dtv │ statics copy │ heap ↑ …                   │
//!                   ▲         ▲                                         ▲
//!              stack_low  stack_high                                heap_base
//!
//!  the same with a stack of more than NEAR_STACK_BYTES
//!  │ colour │ header │ TLS + TCB + dtv │ statics copy │ guard │ stack ↓ │ guard │ heap ↑ …           │
//! ```
//!
//! The colour is unused: it keeps the same parts of different slots out of each other's cache and TLB sets. What a switch
//! touches, the top of the stack, the header and the thread control block, is on one page: where pages are nested, as in a virtual
//! machine, looking up a page costs more than a switch.
//!
//! Guards are markers in the node's page table (`MADV_GUARD_INSTALL`; one big mapping is never split), or pages
//! without access where the kernel has no markers. Markers belong to a page table, so each node installs them
//! before a slot's thread first runs there.

use crate::heap::SlotHeap;
use crate::layout::{NEAR_STACK_BYTES, SLOT_BYTES, SLOTS, header_offset, slot_base};
use crate::stack_kind::is_windowed;
use crate::template::{TemplateHeader, template};
use peregrine_base::{PageRange, VirtAddr};
use peregrine_sys::raw::Errno;
use peregrine_vm::guard;

/// Bytes of each guard.
pub const GUARD_BYTES: usize = 64 << 10;
/// Stack of a thread that asks for nothing else.
pub const DEFAULT_STACK_BYTES: usize = 1 << 20;
/// Smallest stack: the frame of a preempting signal must fit.
pub const MIN_STACK_BYTES: usize = 64 << 10;

/// What the runtime keeps in a slot, at its start.
#[repr(C)]
pub struct SlotHeader {
    /// This slot's number.
    pub index: u32,
    /// Granules of `statics` that hold the thread's own bytes; the others equal the template's (`statics`).
    pub statics_written: u64,
    /// Stack pointer of the suspended thread.
    pub saved_sp: usize,
    /// The thread pointer.
    pub fs_base: usize,
    /// Signals that the thread blocks (`mask`).
    pub blocked: u64,
    /// Where the statics copy lies.
    pub statics: usize,
    /// Lowest usable stack address.
    pub stack_low: usize,
    /// End of the stack.
    pub stack_high: usize,
    /// First byte of the heap.
    pub heap_base: usize,
    /// The heap's books.
    pub heap: SlotHeap,
    /// Thread-local destructors still to run, newest first (`interpose::atexit`).
    pub destructors: usize,
    /// Mappings that the thread made (`interpose::mmap`): the newest of a list.
    pub mappings: usize,
    /// For the crate that schedules: entry point and argument.
    pub entry: [usize; 4],
}

/// A stack that does not fit into a slot.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[error(
    "a stack of {asked} bytes does not fit: between {MIN_STACK_BYTES} and {max} bytes are possible in a slot of {slot}"
)]
pub struct StackSizeError {
    /// What was asked for.
    pub asked: usize,
    /// The most that a slot holds besides a minimal heap.
    pub max: usize,
    /// Bytes of the smallest slot: less than a gigabyte under a limit on address space.
    pub slot: usize,
}

/// Checks a stack size and rounds it up to pages.
pub fn check_stack_size(bytes: usize, t: &TemplateHeader) -> Result<usize, StackSizeError> {
    let slot = (t.slots_end - SLOTS - 1) % SLOT_BYTES + 1;
    let max = slot / 2;
    if (MIN_STACK_BYTES..=max).contains(&bytes) {
        Ok(bytes.next_multiple_of(4096))
    } else {
        Err(StackSizeError { asked: bytes, max, slot })
    }
}

impl SlotHeader {
    /// The header of thread `index`. Of a windowed thread: where it lies while the thread is in its window on this node.
    #[inline(always)]
    pub fn of(index: u32) -> *mut SlotHeader {
        if is_windowed(index) {
            // SAFETY: windowed threads exist only in a World, which has a template.
            return unsafe { template() }.windows.header_of(index) as *mut SlotHeader;
        }
        (slot_base(index) + header_offset(index)) as *mut SlotHeader
    }

    /// Where slot `index` begins and ends; the last one may be smaller than the others.
    pub fn bounds(index: u32) -> (usize, usize) {
        let base = slot_base(index);
        // SAFETY: slots are asked about in a World only, which has a template.
        (base, unsafe { template() }.slots_end.min(base + SLOT_BYTES))
    }

    /// Lays out an empty slot: header, TLS, heap bounds, and a first frame that enters `start`.
    ///
    /// # Safety
    /// The slot belongs to the caller alone, its pages are zero, and `stack_bytes` passed [`check_stack_size`].
    pub unsafe fn prepare(index: u32, t: &TemplateHeader, stack_bytes: usize, start: extern "C" fn() -> !) {
        if is_windowed(index) {
            // SAFETY: as promised.
            return unsafe { Self::prepare_in_window(index, t, start) };
        }
        let base = slot_base(index);
        // The thread pointer keeps its alignment to what the program's thread-locals ask for.
        let header = Self::of(index) as usize;
        let earliest = (header + size_of::<SlotHeader>()).next_multiple_of(64) + t.tls_len;
        let tls = earliest + (t.maker_tp.wrapping_sub(earliest) & (t.tls_align - 1)) - t.tls_len;
        let statics = (tls + t.tls_area_len()).next_multiple_of(64);
        let end = (statics + t.statics_len).next_multiple_of(4096);
        let (stack_low, stack_high, heap_base) = if stack_bytes <= NEAR_STACK_BYTES {
            // A whole number of pages, and the part of the header's page that is below it.
            ((header - stack_bytes) & !4095, header, end)
        } else {
            let low = end + GUARD_BYTES;
            (low, low + stack_bytes, low + stack_bytes + GUARD_BYTES)
        };
        // SAFETY: all addresses lie in the slot, which the caller owns.
        unsafe {
            let fs_base = crate::tls::build(t, tls, index);
            let saved_sp = crate::arch::first_frame(stack_high - 64, start);
            Self::of(index).write(SlotHeader {
                index,
                statics_written: 0,
                saved_sp,
                fs_base,
                blocked: 0,
                statics,
                stack_low,
                stack_high,
                heap_base,
                heap: SlotHeap::new(heap_base, t.slots_end.min(base + SLOT_BYTES)),
                destructors: 0,
                mappings: 0,
                entry: [0; 4],
            });
        }
    }

    /// As [`SlotHeader::prepare`], in the window of thread `index`, with the stack that the windows have. The window's bytes
    /// need not be zero.
    unsafe fn prepare_in_window(index: u32, t: &TemplateHeader, start: extern "C" fn() -> !) {
        let (stack_low, stack_high, end) = crate::window::limits(&t.windows, index);
        let header = Self::of(index) as usize;
        let earliest = (header + size_of::<SlotHeader>()).next_multiple_of(64) + t.tls_len;
        let tls = earliest + (t.maker_tp.wrapping_sub(earliest) & (t.tls_align - 1)) - t.tls_len;
        let statics = (tls + t.tls_area_len()).next_multiple_of(64);
        let heap_base = (statics + t.statics_len).next_multiple_of(64);
        // SAFETY: all addresses lie in the window, which is mapped and the caller's; `Windows::new` made room for them.
        unsafe {
            let fs_base = crate::tls::build(t, tls, index);
            let saved_sp = crate::arch::first_frame(stack_high - 64, start);
            Self::of(index).write(SlotHeader {
                index,
                statics_written: 0,
                saved_sp,
                fs_base,
                blocked: 0,
                statics,
                stack_low,
                stack_high,
                heap_base,
                heap: SlotHeap::new_small(heap_base, end),
                destructors: 0,
                mappings: 0,
                entry: [0; 4],
            });
        }
    }

    /// Where the guards of this slot begin: one below the stack, and one above it if the heap follows there.
    fn guards(&self) -> [Option<usize>; 2] {
        let near = self.stack_low < Self::of(self.index) as usize;
        [Some(self.stack_low - GUARD_BYTES), (!near).then_some(self.stack_high)]
    }

    /// Installs the guards of this slot in the calling process's page table.
    ///
    /// # Errors
    /// The kernel's, when neither markers nor page protection can be had (`ENOMEM`: out of mappings).
    ///
    /// # Safety
    /// The slot is prepared, its thread does not run, and none of its pages is write-protected by a userfaultfd.
    pub unsafe fn install_guards(&self) -> Result<(), Errno> {
        for low in self.guards().into_iter().flatten() {
            // SAFETY: guard ranges hold nothing, and are not write-protected (the caller).
            unsafe { guard::install(PageRange::covering(VirtAddr::new(low), GUARD_BYTES))? };
        }
        Ok(())
    }

    /// Takes all guard markers out of this slot in the calling process's page table.
    ///
    /// # Errors
    /// The kernel's.
    ///
    /// # Safety
    /// As [`SlotHeader::install_guards`].
    pub unsafe fn remove_guards(&self) -> Result<(), Errno> {
        let (base, end) = Self::bounds(self.index);
        let slot = PageRange::covering(VirtAddr::new(base), end - base);
        // SAFETY: makes pages accessible that are this slot's.
        unsafe { guard::remove(slot) }
    }

    /// Pages of the stack, by which a node knows whether the guards it put up are those of this thread.
    #[inline(always)]
    pub fn stack_pages(&self) -> u32 {
        ((self.stack_high - self.stack_low) / 4096) as u32
    }

    /// Whether `addr` lies in a guard of this slot.
    pub fn is_guard(&self, addr: usize) -> bool {
        self.guards().into_iter().flatten().any(|low| (low..low + GUARD_BYTES).contains(&addr))
    }

    /// The extents of slot `index`, whose thread may be starting, running or ending on another node at this moment: `None` if
    /// the header makes no sense, for then there is no thread. (No reference is made: S1.)
    pub fn extents_of_foreign(index: u32, live_only: bool) -> Option<[(usize, usize); 3]> {
        let (base, end) = Self::bounds(index);
        let h = Self::of(index);
        let header = h as usize;
        // SAFETY: plain words of mapped memory, each checked before it is used.
        let (own, low, high, heap, water, sp) = unsafe {
            (
                (&raw const (*h).index).read_volatile(),
                (&raw const (*h).stack_low).read_volatile(),
                (&raw const (*h).stack_high).read_volatile(),
                (&raw const (*h).heap_base).read_volatile(),
                SlotHeap::high_water_of_foreign(&raw const (*h).heap),
                (&raw const (*h).saved_sp).read_volatile(),
            )
        };
        let placed = if low < header {
            base + GUARD_BYTES <= low && high == header && header < heap
        } else {
            header + GUARD_BYTES < low && high.saturating_add(GUARD_BYTES) == heap
        };
        let sound = own == index && placed && low < high && heap <= water && water <= end;
        sound.then(|| Self::parts(header, low, high, heap, water, sp, live_only))
    }

    /// The parts of the slot that hold anything, in the order of their addresses: stack to statics copy, or one after the other
    /// if the stack lies apart, and used heap last. Whole pages, `(start, end)`.
    /// With `live_only` the stack begins at its saved pointer; below it nothing survives a resume.
    pub fn extents(&self, live_only: bool) -> [(usize, usize); 3] {
        let (low, high, heap, water) =
            (self.stack_low, self.stack_high, self.heap_base, self.heap.high_water());
        Self::parts(Self::of(self.index) as usize, low, high, heap, water, self.saved_sp, live_only)
    }

    fn parts(
        header: usize,
        low: usize,
        high: usize,
        heap: usize,
        water: usize,
        sp: usize,
        live_only: bool,
    ) -> [(usize, usize); 3] {
        let live = if live_only && (low..high).contains(&sp) {
            // A red zone of 128 bytes lies below the stack pointer of a preempted leaf.
            (sp - 128).max(low) & !4095
        } else {
            low
        };
        let heap_end = water.next_multiple_of(4096);
        if low < header {
            // Stack and header share a page.
            return [(live, heap), (heap, heap), (heap, heap_end)];
        }
        [(header & !4095, low - GUARD_BYTES), (live, high), (heap, heap_end)]
    }
}
