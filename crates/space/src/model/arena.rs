//! An arena on the heap.

use crate::sizes::Sizes;
#[cfg(not(peregrine_loom))]
use crate::spaces::Arena;
use crate::spaces::Spaces;

/// Zeroed memory that holds an arena, for one process.
#[derive(Debug)]
pub struct HeapArena {
    #[cfg(not(peregrine_loom))]
    memory: core::ptr::NonNull<u8>,
    #[cfg(not(peregrine_loom))]
    layout: std::alloc::Layout,
    #[cfg(peregrine_loom)]
    parts: crate::parts::Parts,
}

#[cfg(not(peregrine_loom))]
impl HeapArena {
    /// Makes an arena.
    ///
    /// # Panics
    /// If the sizes are beyond the limits.
    pub fn new(sizes: &Sizes) -> Self {
        let layout = std::alloc::Layout::from_size_align(sizes.bytes(), 4096).expect("a sensible size");
        // SAFETY: the size is not 0: an arena has a head.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        let memory =
            core::ptr::NonNull::new(memory).unwrap_or_else(|| std::alloc::handle_alloc_error(layout));
        let this = Self { memory, layout };
        // SAFETY: zeroes, and nobody else knows of them yet.
        let made = unsafe { Spaces::create(&this.arena(), sizes) };
        assert!(made.is_ok(), "the sizes are within the limits: {made:?}");
        this
    }

    fn arena(&self) -> Arena<'_> {
        // SAFETY: the memory lives as long as `self`, which the arena borrows, and only arenas use it.
        unsafe { Arena::new(self.memory, self.layout.size()) }
    }

    /// What lies in it.
    pub fn spaces(&self) -> Spaces<'_> {
        Spaces::open(&self.arena()).expect("made in `new`")
    }

    /// Where it lies: for whoever compares recordings with traces.
    pub fn addr(&self) -> usize {
        self.memory.as_ptr() as usize
    }
}

#[cfg(not(peregrine_loom))]
impl Drop for HeapArena {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; nobody borrows `self` any more.
        unsafe { std::alloc::dealloc(self.memory.as_ptr(), self.layout) };
    }
}

// SAFETY: the memory is atomics, shared by design.
#[cfg(not(peregrine_loom))]
unsafe impl Send for HeapArena {}
// SAFETY: as above.
#[cfg(not(peregrine_loom))]
unsafe impl Sync for HeapArena {}

/// Under a model checker atomics are made one by one, not found in zeroed memory.
#[cfg(peregrine_loom)]
impl HeapArena {
    /// Makes an arena.
    pub fn new(sizes: &Sizes) -> Self {
        Self { parts: crate::parts::Parts::new(sizes) }
    }

    /// What lies in it.
    pub fn spaces(&self) -> Spaces<'_> {
        self.parts.spaces()
    }
}
