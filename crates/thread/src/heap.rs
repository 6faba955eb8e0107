//! Two heaps: the slot's, for what a thread allocates, and the process's, for everything else.
//!
//! The slot heap is [`talc`] over `[heap_base, high_water)`, which grows upwards in steps; its books lie in the slot
//! header and in the heap itself, so it travels with the thread and needs no lock: only the slot's thread uses it,
//! and if that thread is preempted inside an allocation nobody else looks. The process heap is the same allocator at
//! [`PROCESS_HEAP`] behind a spin lock; it serves the supervisor, tests, and everything
//! before `main`.
//!
//! Frees go by address.

use crate::carrier::{Refusal, carrier, current_slot};
use crate::layout::{PROCESS_HEAP, PROCESS_HEAP_BYTES};
use crate::slot::SlotHeader;
use crate::window::header_at;
use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;
use peregrine_base::sync::{AtomicU32, Ordering, compiler_fence, spin_loop};
use peregrine_base::{PageCount, Protection, VirtAddr};
use peregrine_sys::mem::{self, MapOptions, Placement, Source};
use talc::{DefaultBinning, base::Talc, source::Manual};

/// Least number of bytes that a heap grows by.
const STEP: usize = 64 << 10;
/// The same for a heap that shall stay small.
const SMALL_STEP: usize = 2 << 10;

/// A growing heap over one range of addresses.
#[repr(C)]
pub struct SlotHeap {
    talc: Talc<Manual, DefaultBinning>,
    base: usize,
    /// End of what talc has.
    end: Option<NonNull<u8>>,
    /// End of what talc has or is about to get: see [`SlotHeap::grow`].
    water: usize,
    limit: usize,
    /// Least number of bytes that it grows by.
    step: usize,
}

impl SlotHeap {
    /// An empty heap that may grow from `base` up to `limit`.
    pub const fn new(base: usize, limit: usize) -> Self {
        Self { talc: Talc::new(Manual), base, end: None, water: base, limit, step: STEP }
    }

    /// As [`SlotHeap::new`], for a heap that shall stay small: it grows by little at a time.
    pub const fn new_small(base: usize, limit: usize) -> Self {
        Self { talc: Talc::new(Manual), base, end: None, water: base, limit, step: SMALL_STEP }
    }

    /// The heap may grow up to `limit` from now on; `false` if it is larger than that already.
    pub fn set_limit(&mut self, limit: usize) -> bool {
        let fits = self.water <= limit;
        self.limit = if fits { limit } else { self.limit };
        fits
    }

    /// First address that the heap never used.
    pub fn high_water(&self) -> usize {
        self.water
    }

    /// [`SlotHeap::high_water`] of a heap that another process may be changing.
    ///
    /// # Safety
    /// `this` is mapped.
    pub unsafe fn high_water_of_foreign(this: *const Self) -> usize {
        // SAFETY: a mapped word.
        unsafe { (&raw const (*this).water).read_volatile() }
    }

    #[inline]
    unsafe fn allocate(
        &mut self,
        layout: Layout,
        grant: impl FnOnce(usize) -> bool,
        refused: impl FnOnce(Refusal),
    ) -> *mut u8 {
        // SAFETY: talc's contract: the layout's size is not zero (callers see to it), and the heap is ours.
        unsafe {
            if let Some(p) = self.talc.try_allocate(layout) {
                return p.as_ptr();
            }
            if let Err(why) = self.grow(layout, grant) {
                refused(why);
                return core::ptr::null_mut();
            }
            self.talc.try_allocate(layout).map_or(core::ptr::null_mut(), NonNull::as_ptr)
        }
    }

    #[cold]
    unsafe fn grow(&mut self, layout: Layout, grant: impl FnOnce(usize) -> bool) -> Result<(), Refusal> {
        let now = self.high_water();
        // An eighth more than there is keeps the number of steps logarithmic; a step, of at most 4 KiB, covers talc's own words.
        let step = self.step;
        let need = layout.size().saturating_add(layout.align()).saturating_add(step.min(4096));
        let Some(by) = need.max(step).max((now - self.base) / 8).checked_next_multiple_of(step) else {
            return Err(Refusal::Range);
        };
        let new_end = now.checked_add(by).filter(|e| *e <= self.limit).ok_or(Refusal::Range)?;
        if !grant(by) {
            return Err(Refusal::Grant);
        }
        // Before anything is written there: a thread may be suspended in the middle, and its image holds what lies below
        // the high water and nothing else.
        self.water = new_end;
        compiler_fence(Ordering::SeqCst);
        // SAFETY: [now, new_end) is reserved for this heap and unused so far.
        unsafe {
            self.end = match self.end {
                None => self.talc.claim(now as *mut u8, by),
                Some(end) => Some(self.talc.extend(end, new_end as *mut u8)),
            };
        }
        if self.end.is_none() {
            self.water = self.base;
        }
        self.end.map(|_| ()).ok_or(Refusal::Range)
    }
}

/// The process heap, at a fixed address.
#[repr(C)]
struct ProcessHeap {
    /// [`MAGIC`].
    magic: u64,
    /// 0: not mapped yet (never seen: the page does not exist then), 1: free, 2: taken.
    lock: AtomicU32,
    heap: SlotHeap,
}

/// What this process believes. A static, so on a node it is whatever the thread in the window knows; see
/// [`map_process_heap`].
static MAPPED: AtomicU32 = AtomicU32::new(0);
const MAGIC: u64 = 0x7065_7265_6772_6865;

fn with_process_heap<R>(f: impl FnOnce(&mut SlotHeap) -> R) -> Option<R> {
    while MAPPED.load(Ordering::Acquire) != 2 {
        map_process_heap()?;
    }
    let p = PROCESS_HEAP as *mut ProcessHeap;
    // SAFETY: mapped and initialised when MAPPED is 2. The lock makes the heap reference exclusive.
    unsafe {
        let lock = &(*p).lock;
        // Acquire pairs with the release below.
        while lock.compare_exchange_weak(1, 2, Ordering::Acquire, Ordering::Relaxed).is_err() {
            spin_loop();
        }
        let r = f(&mut (*p).heap);
        lock.store(1, Ordering::Release);
        Some(r)
    }
}

/// Addresses for the process heap: what there is by design, or a small part of what the limit on address space allows.
fn most_process_heap() -> usize {
    use peregrine_sys::rustix::process::{Resource, getrlimit};
    let limit = getrlimit(Resource::As).current;
    limit.map_or(PROCESS_HEAP_BYTES, |l| {
        ((l as usize / 32) & !((1 << 20) - 1)).clamp(1 << 20, PROCESS_HEAP_BYTES)
    })
}

#[cold]
fn map_process_heap() -> Option<()> {
    if MAPPED.compare_exchange(0, 1, Ordering::Acquire, Ordering::Acquire).is_err() {
        // Another thread maps it, or failed to.
        return (MAPPED.load(Ordering::Acquire) != 3).then_some(());
    }
    // Under a tight RLIMIT_AS a smaller heap is better than none, and most of the limit is for others.
    let mut bytes = most_process_heap();
    let options = MapOptions { no_reserve: true, ..MapOptions::default() };
    let at = Placement::At(VirtAddr::new(PROCESS_HEAP));
    // SAFETY: replaces nothing.
    while let Err(e) = unsafe {
        mem::map(PageCount::for_bytes(bytes), Protection::ReadWrite, Source::Anonymous, at, options)
    } {
        let taken = e == peregrine_sys::raw::Errno::EEXIST;
        // SAFETY: something is mapped there, and nothing but this heap may be.
        if taken && unsafe { (*(PROCESS_HEAP as *const ProcessHeap)).magic } == MAGIC {
            // On a node: inherited from the zygote, which the statics in the window know nothing of.
            MAPPED.store(2, Ordering::Release);
            return Some(());
        }
        bytes /= 4;
        if bytes < 1 << 20 {
            MAPPED.store(3, Ordering::Release);
            return None;
        }
    }
    let first = (PROCESS_HEAP + size_of::<ProcessHeap>()).next_multiple_of(64);
    // SAFETY: just mapped, seen by nobody else before MAPPED becomes 2.
    unsafe {
        (PROCESS_HEAP as *mut ProcessHeap).write(ProcessHeap {
            magic: MAGIC,
            lock: AtomicU32::new(1),
            heap: SlotHeap::new(first, PROCESS_HEAP + bytes),
        });
    }
    MAPPED.store(2, Ordering::Release);
    Some(())
}

/// Allocates for whoever runs: in the running thread's slot, or in the process heap.
///
/// # Safety
/// `layout` has a size of at least 1.
#[inline]
pub unsafe fn allocate(layout: Layout) -> *mut u8 {
    match current_slot() {
        // SAFETY: the thread in slot `i` is the one that runs, and nobody else uses its heap (S5).
        Some(i) => unsafe {
            let (grant, refused) = (|by| (carrier().hooks.grant)(by), |why| (carrier().hooks.refused)(why));
            (*SlotHeader::of(i)).heap.allocate(layout, grant, refused)
        },
        None => {
            // SAFETY: the lock is held.
            let block = with_process_heap(|h| unsafe { h.allocate(layout, |_| true, |_| ()) });
            block.unwrap_or(core::ptr::null_mut())
        }
    }
}

/// Frees by address.
///
/// # Safety
/// `ptr` came from [`allocate`] with this layout and is not used again.
#[inline]
pub unsafe fn deallocate(ptr: *mut u8, layout: Layout) {
    let addr = ptr as usize;
    // SAFETY: a thread frees only what it owns, so slot or window is the running thread's.
    if let Some(header) = unsafe { header_at(addr) } {
        // SAFETY: as above.
        unsafe { (*header).heap.talc.deallocate(ptr, layout) }
    } else if (PROCESS_HEAP..PROCESS_HEAP + PROCESS_HEAP_BYTES).contains(&addr) && current_slot().is_none() {
        // What a thread inherited from the time before `main` stays: that memory is the process's.
        // SAFETY: the lock is held.
        with_process_heap(|h| unsafe { h.talc.deallocate(ptr, layout) });
    }
}

/// Resizes in place if that is possible.
///
/// # Safety
/// As [`deallocate`]; on `true` the block has `new_size` bytes.
#[inline]
pub unsafe fn resize_in_place(ptr: *mut u8, layout: Layout, new_size: usize) -> bool {
    // SAFETY: as `deallocate`.
    if let Some(header) = unsafe { header_at(ptr as usize) } {
        // SAFETY: as `deallocate`.
        return unsafe { (*header).heap.talc.try_realloc_in_place(ptr, layout, new_size) };
    }
    if current_slot().is_some() {
        return false;
    }
    // SAFETY: the lock is held.
    with_process_heap(|h| unsafe { h.talc.try_realloc_in_place(ptr, layout, new_size) }).unwrap_or(false)
}

/// The global allocator of every program that links this crate.
#[derive(Clone, Copy, Debug)]
pub struct ThreadAllocator;

// SAFETY: blocks come from talc heaps over memory that stays mapped; exclusive use as argued above.
unsafe impl GlobalAlloc for ThreadAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: GlobalAlloc forbids size 0.
        unsafe { allocate(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: GlobalAlloc's contract.
        unsafe { deallocate(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: GlobalAlloc's contract; old and new block do not overlap.
        unsafe {
            if resize_in_place(ptr, layout, new_size) {
                return ptr;
            }
            let new = allocate(Layout::from_size_align_unchecked(new_size, layout.align()));
            if !new.is_null() {
                core::ptr::copy_nonoverlapping(ptr, new, layout.size().min(new_size));
                deallocate(ptr, layout);
            }
            new
        }
    }
}

#[global_allocator]
static ALLOCATOR: ThreadAllocator = ThreadAllocator;
