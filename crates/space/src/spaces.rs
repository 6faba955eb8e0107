//! What lies in an arena.
//!
//! ```text
//!  │ Head │ Root × spaces │ refcache::Block × members │ Desk × members │ Descriptor × nodes │ Node × nodes
//!                                          │ Line × (64 nodes, and some) │ Descriptor × regions │ Descriptor × frames │
//! ```
//!
//! All of it is atomics and indices: nothing points into anybody's private memory, so threads, cores and processes may share
//! it, and need not map it at the same address. Zero bytes are the initial state of everything but the head, so memory that
//! is never used is never touched.

use crate::desk::Desk;
use crate::intent::Intent;
use crate::keeper::Class;
use crate::member::MemberId;
use crate::mmu::FrameId;
use crate::pool::{Descriptor, Pool};
use crate::radix::Node;
use crate::radix::collapse::NO_PARENT;
use crate::radix::slot::{Line, Slot, SlotWord};
use crate::record::Value;
use crate::refcache::{self, Epoch, Handle, ObjectId, Refcache};
use crate::sizes::{ArenaError, Sizes};
use crate::step::Step;
use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;
use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering, spin_loop};

pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"space\0\0\x02");

#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Head {
    pub(crate) magic: AtomicU64,
    pub(crate) sizes: [AtomicU64; 5],
    pub(crate) recovery: Recovery,
    pub(crate) fresh_nodes: Lone,
    pub(crate) fresh_lines: Lone,
    pub(crate) fresh_regions: Lone,
    pub(crate) epoch: Epoch,
}

/// Whether a recovery holds everybody: read at each operation's begin, written at a death.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Recovery(pub(crate) AtomicU32);

/// A word in a line of its own.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Lone(pub(crate) AtomicU32);

/// An address space's root.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Root {
    /// See [`RootState`].
    pub(crate) state: AtomicU32,
    pub(crate) node: AtomicU32,
}

/// States of a root.
pub(crate) struct RootState;
impl RootState {
    pub(crate) const FREE: u32 = 0;
    /// In use.
    pub(crate) const LIVE: u32 = 1;
    /// Being made or taken down by `member`.
    pub(crate) const fn making(member: MemberId) -> u32 {
        member.index() as u32 + 2
    }
}

/// What lies in an arena.
#[derive(Clone, Copy)]
pub struct Spaces<'m> {
    pub(crate) head: &'m Head,
    pub(crate) roots: &'m [Root],
    pub(crate) blocks: &'m [refcache::Block],
    pub(crate) desks: &'m [Desk],
    pub(crate) node_descriptors: &'m [Descriptor],
    pub(crate) nodes: &'m [Node],
    pub(crate) lines: &'m [Line],
    pub(crate) region_descriptors: &'m [Descriptor],
    pub(crate) frames: &'m [Descriptor],
}

impl fmt::Debug for Spaces<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spaces").field("sizes", &self.sizes()).finish()
    }
}

/// Memory from the embedder.
#[derive(Debug)]
pub struct Arena<'m> {
    base: NonNull<u8>,
    len_bytes: usize,
    memory: PhantomData<&'m ()>,
}

impl<'m> Arena<'m> {
    /// The `len_bytes` bytes from `base`.
    ///
    /// # Safety
    /// They are valid for reads and writes by all who use the arena, for `'m` and as long as anybody does, and nobody reads or writes
    /// them but through arenas of this crate. They are zeroes, or hold an arena that [`Spaces::create`] made.
    pub const unsafe fn new(base: NonNull<u8>, len_bytes: usize) -> Self {
        Self { base, len_bytes, memory: PhantomData }
    }
}

impl<'m> Spaces<'m> {
    /// Makes an arena.
    ///
    /// # Errors
    /// See [`ArenaError`].
    ///
    /// # Safety
    /// The memory is zeroes, and nobody else uses it yet.
    pub unsafe fn create(arena: &Arena<'m>, sizes: &Sizes) -> Result<Self, ArenaError> {
        let needed = if sizes.is_within_limits() { sizes.bytes() } else { return Err(ArenaError::TooLarge) };
        if !(arena.base.as_ptr() as usize).is_multiple_of(4096) {
            return Err(ArenaError::Unaligned(arena.base.as_ptr() as usize));
        }
        if arena.len_bytes < needed {
            return Err(ArenaError::TooSmall { needed, given: arena.len_bytes });
        }
        // SAFETY: `needed` bytes are there by the check, aligned, and zeroes by this function's contract.
        let spaces = unsafe { Self::carve(arena, sizes) };
        let all = [sizes.members, sizes.spaces, sizes.nodes, sizes.regions, sizes.frames];
        for (word, size) in spaces.head.sizes.iter().zip(all) {
            word.store(size as u64, Ordering::Relaxed);
        }
        // Release: who finds the number finds the sizes.
        spaces.head.magic.store(MAGIC, Ordering::Release);
        Ok(spaces)
    }

    /// Opens an arena that was made, here or in another process.
    ///
    /// # Errors
    /// See [`ArenaError`].
    pub fn open(arena: &Arena<'m>) -> Result<Self, ArenaError> {
        if !(arena.base.as_ptr() as usize).is_multiple_of(4096) {
            return Err(ArenaError::Unaligned(arena.base.as_ptr() as usize));
        }
        if arena.len_bytes < size_of::<Head>() {
            return Err(ArenaError::TooSmall { needed: size_of::<Head>(), given: arena.len_bytes });
        }
        // SAFETY: the memory is large enough and aligned, lives for 'm and is atomics or zeroes, by `Arena::new`'s contract.
        let head: &'m Head = unsafe { arena.base.cast::<Head>().as_ref() };
        let found = head.magic.load(Ordering::Acquire);
        if found != MAGIC {
            return Err(ArenaError::NotAnArena(found));
        }
        let sizes = head.read_sizes();
        if !sizes.is_within_limits() || arena.len_bytes < sizes.bytes() {
            return Err(ArenaError::TooSmall { needed: sizes.bytes(), given: arena.len_bytes });
        }
        // SAFETY: as above, and the sizes fit.
        Ok(unsafe { Self::carve(arena, &sizes) })
    }

    /// # Safety
    /// The arena's memory is page-aligned, has `sizes.bytes()` bytes, and is zeroes or an arena of these sizes.
    unsafe fn carve(arena: &Arena<'m>, sizes: &Sizes) -> Self {
        let [roots, blocks, desks, node_descriptors, nodes, lines, regions, frames, _] = sizes.offsets();
        /// # Safety
        /// `count` values of `T` lie at `offset`, aligned, for `'a`; `T` is made of atomics, for which zeroes are a value.
        unsafe fn part<'a, T>(base: NonNull<u8>, offset: usize, count: usize) -> &'a [T] {
            // SAFETY: by this function's contract; atomics may be shared with whoever else uses the arena.
            unsafe { core::slice::from_raw_parts(base.add(offset).cast::<T>().as_ptr(), count) }
        }
        // SAFETY: offsets follow each other without overlap, rounded up to each type's alignment (at most 4096, the
        // base's), and end within the memory by this function's contract. All types consist of atomics only.
        unsafe {
            Self {
                head: arena.base.cast::<Head>().as_ref(),
                roots: part(arena.base, roots, sizes.spaces),
                blocks: part(arena.base, blocks, sizes.members),
                desks: part(arena.base, desks, sizes.members),
                node_descriptors: part(arena.base, node_descriptors, sizes.nodes),
                nodes: part(arena.base, nodes, sizes.nodes),
                lines: part(arena.base, lines, sizes.lines()),
                region_descriptors: part(arena.base, regions, sizes.regions),
                frames: part(arena.base, frames, sizes.frames),
            }
        }
    }

    /// What the arena was made for.
    pub fn sizes(&self) -> Sizes {
        self.head.read_sizes()
    }

    /// How many nodes are in use (those under review and those that wait for readers to leave count).
    pub fn nodes_in_use(&self) -> usize {
        self.node_pool(|pool| pool.live())
    }

    /// How many regions are in use.
    pub fn regions_in_use(&self) -> usize {
        self.region_pool(|pool| pool.live())
    }

    /// Slots that have a cache line of their own, for several members work near them.
    pub fn lines_in_use(&self) -> usize {
        self.line_pool(|pool| pool.live())
    }

    /// Bytes of nodes, lines and descriptors that have been touched: what the structure costs.
    pub fn touched_bytes(&self) -> usize {
        let node = size_of::<Node>() + size_of::<Descriptor>();
        self.node_pool(|pool| pool.touched()) * node
            + self.line_pool(|pool| pool.touched()) * size_of::<Line>()
            + self.region_pool(|pool| pool.touched()) * size_of::<Descriptor>()
    }

    #[inline]
    pub(crate) const fn refcache(&self) -> Refcache<'m> {
        Refcache::new(&self.head.epoch, self.blocks)
    }

    #[inline]
    pub(crate) fn intent(&self, member: MemberId) -> &'m Intent {
        &self.desks[member.index()].intent
    }

    pub(crate) fn node_pool<R>(&self, f: impl FnOnce(Pool<'m, '_, Descriptor>) -> R) -> R {
        let desks = self.desks;
        f(Pool {
            all: self.node_descriptors,
            fresh: &self.head.fresh_nodes.0,
            stacks: &move |m| &desks[m.index()].free_nodes,
            members: desks.len(),
        })
    }

    pub(crate) fn line_pool<R>(&self, f: impl FnOnce(Pool<'m, '_, Line>) -> R) -> R {
        let desks = self.desks;
        f(Pool {
            all: self.lines,
            fresh: &self.head.fresh_lines.0,
            stacks: &move |m| &desks[m.index()].free_lines,
            members: desks.len(),
        })
    }

    pub(crate) fn region_pool<R>(&self, f: impl FnOnce(Pool<'m, '_, Descriptor>) -> R) -> R {
        let desks = self.desks;
        f(Pool {
            all: self.region_descriptors,
            fresh: &self.head.fresh_regions.0,
            stacks: &move |m| &desks[m.index()].free_regions,
            members: desks.len(),
        })
    }

    pub(crate) fn region_id(&self, region: u32) -> ObjectId {
        ObjectId(self.nodes.len() as u32 + region)
    }

    pub(crate) fn frame_id(&self, frame: FrameId) -> ObjectId {
        ObjectId((self.nodes.len() + self.region_descriptors.len()) as u32 + frame.get())
    }

    /// The object and base that a record's region says.
    pub(crate) fn region(&self, value: Value) -> (u64, u64) {
        value.region().map_or((0, 0), |region| {
            let d = &self.region_descriptors[region as usize];
            (d.first.load(Ordering::Relaxed), d.second.load(Ordering::Relaxed))
        })
    }

    /// Which kind of object `id` is.
    pub(crate) fn class(&self, id: ObjectId) -> Class {
        let (nodes, regions) = (self.nodes.len() as u32, self.region_descriptors.len() as u32);
        match id.0 {
            n if n < nodes => Class::Node(n),
            n if n < nodes + regions => Class::Region(n - nodes),
            n => Class::Frame(FrameId::new(n - nodes - regions)),
        }
    }

    /// Whether a recovery wants everybody outside.
    pub(crate) fn is_recovering(&self) -> bool {
        self.head.recovery.0.load(Ordering::Acquire) != 0
    }
}

impl Head {
    fn read_sizes(&self) -> Sizes {
        let size = |i: usize| self.sizes[i].load(Ordering::Relaxed) as usize;
        Sizes { members: size(0), spaces: size(1), nodes: size(2), regions: size(3), frames: size(4) }
    }
}

impl<'m> Spaces<'m> {
    /// A slot and its word.
    #[inline]
    pub(crate) fn slot(&self, node: u32, index: usize) -> (Slot<'m>, SlotWord) {
        let node = &self.nodes[node as usize];
        Slot::find(&node.cells[index], &node.head.inherited, self.lines)
    }

    /// A line that nobody uses. There is one: [`Sizes::lines`].
    pub(crate) fn take_line(&self, me: &Handle) -> u32 {
        loop {
            if let Some(line) = self.line_pool(|pool| pool.take(me)) {
                return line;
            }
            // Others gave theirs back to stacks that this one had looked through already.
            spin_loop();
        }
    }

    /// Gives a node back to its pool, with the lines of its slots. Nobody can be reading it.
    pub(crate) fn give_node(&self, me: &Handle, node: u32) {
        for cell in &self.nodes[node as usize].cells {
            if let Some(line) = cell.line() {
                self.line_pool(|pool| pool.give(me, line));
            }
        }
        self.node_pool(|pool| pool.give(me, node));
    }

    /// Empties a node just taken from its pool.
    pub(crate) fn clear_node(&self, node: u32, parent: u64) {
        self.node_descriptors[node as usize].first.store(parent, Ordering::Relaxed);
        let node = &self.nodes[node as usize];
        node.head.make(None, &crate::MemberSet::EMPTY);
        for cell in &node.cells {
            cell.make(SlotWord::FREE, Value::UNMAPPED);
        }
    }

    /// Prepares a node just taken from its pool as a root.
    pub(crate) fn make_root(&self, me: &Handle, node: u32) {
        self.clear_node(node, NO_PARENT);
        // The root's own use: it does not collapse.
        self.refcache().add(me, self, ObjectId(node), 1);
        me.step(Step::Expanded);
    }
}
