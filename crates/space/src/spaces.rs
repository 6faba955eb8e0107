//! What lies in an arena, and joining it.
//!
//! ```text
//!  │ Head │ Root × spaces │ refcache::Block × members │ Desk × members │ Descriptor × nodes │ Node × nodes
//!                                                     │ Descriptor × regions │ Descriptor × frames │
//! ```
//!
//! All of it is atomics and indices: nothing points into anybody's private memory, so threads, cores and processes may share
//! it, and need not map it at the same address. Zero bytes are the initial state of everything but the head, so memory that
//! is never used is never touched.
//!
//! A member joins by claiming a *desk*: its own lines, which others read but (short of recovery) never write.

use crate::intent::Intent;
use crate::member::{Generation, MAX_MEMBERS, MemberId};
use crate::mmu::{FrameId, Frames};
use crate::pool::{Descriptor, Pool, Stack};
use crate::radix::Node;
use crate::radix::collapse::NO_PARENT;
use crate::record::Value;
use crate::refcache::{
    self, Counted, Epoch, ExpelError, Handle, Object, ObjectId, Reclaim, Refcache, Severed,
};
use crate::step::{Hook, Step};
use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;
use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering};

/// How much an arena is to hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    /// Members at a time.
    pub members: usize,
    /// Address spaces at a time.
    pub spaces: usize,
    /// Nodes of all trees; 4 KiB each, touched when used.
    pub nodes: usize,
    /// Mappings of objects at a time, in all spaces (they are shared by the records of one `map`).
    pub regions: usize,
    /// Frames that the embedder has.
    pub frames: usize,
}

/// Why an arena can't be made or opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ArenaError {
    /// The memory is too small.
    #[error("the arena needs {needed} bytes and has {given}: give more memory or smaller sizes")]
    TooSmall {
        /// Bytes that the sizes need.
        needed: usize,
        /// Bytes given.
        given: usize,
    },
    /// The memory is not aligned to a page.
    #[error("the arena begins at {0:#x}: align it to 4096 bytes")]
    Unaligned(usize),
    /// A size is beyond what words have room for.
    #[error("sizes beyond the limits (256 members, 65535 spaces, 2^24 - 2 regions, 2^32 - 2 objects in all)")]
    TooLarge,
    /// No arena was made here, or by another version.
    #[error("no arena of this version lies here (found {0:#x}): create it first")]
    NotAnArena(u64),
}

/// All members' places are taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("all {members} members' places are taken: make the arena for more")]
pub struct NoPlace {
    /// How many the arena was made for.
    pub members: usize,
}

const MAGIC: u64 = u64::from_le_bytes(*b"space\0\0\x01");

#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Head {
    magic: AtomicU64,
    sizes: [AtomicU64; 5],
    recovery: Recovery,
    pub(crate) fresh_nodes: Lone,
    pub(crate) fresh_regions: Lone,
    pub(crate) epoch: Epoch,
}

/// Whether a recovery holds everybody: read at each operation's begin, written at a death.
#[derive(Debug)]
#[repr(C, align(128))]
struct Recovery(AtomicU32);

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

/// A member's own lines.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Desk {
    /// generation << 1 | claimed
    claim: AtomicU64,
    /// 1 while in an operation.
    busy: AtomicU32,
    free_nodes: Stack,
    free_regions: Stack,
    intent: Intent,
}

impl Desk {
    #[cfg_attr(not(peregrine_loom), allow(dead_code, reason = "elsewhere it lies in zeroed memory"))]
    fn new() -> Self {
        Self {
            claim: AtomicU64::new(0),
            busy: AtomicU32::new(0),
            free_nodes: Stack::new(),
            free_regions: Stack::new(),
            intent: Intent::new(),
        }
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

impl Sizes {
    /// Bytes that an arena of these sizes needs, most of them never touched.
    ///
    /// ```
    /// use peregrine_space::Sizes;
    /// let sizes = Sizes { members: 4, spaces: 2, nodes: 1000, regions: 100, frames: 1000 };
    /// assert!(sizes.bytes() > 1000 * 4096);
    /// ```
    pub const fn bytes(&self) -> usize {
        self.offsets()[7]
    }

    const fn is_within_limits(&self) -> bool {
        let objects = self.nodes + self.regions + self.frames;
        self.members > 0
            && self.members <= MAX_MEMBERS
            && self.spaces < 1 << 16
            && self.regions < (1 << 24) - 1
            && objects < u32::MAX as usize - 1
    }

    /// Where each part begins after the head, and where the last one ends.
    const fn offsets(&self) -> [usize; 8] {
        const fn after(offset: usize, count: usize, size: usize, next_align: usize) -> usize {
            (offset + count * size).next_multiple_of(next_align)
        }
        let roots = size_of::<Head>().next_multiple_of(128);
        let blocks = after(roots, self.spaces, size_of::<Root>(), 128);
        let desks = after(blocks, self.members, size_of::<refcache::Block>(), 128);
        let node_descriptors = after(desks, self.members, size_of::<Desk>(), 4096);
        let nodes = after(node_descriptors, self.nodes, size_of::<Descriptor>(), 4096);
        let regions = after(nodes, self.nodes, size_of::<Node>(), 4096);
        let frames = after(regions, self.regions, size_of::<Descriptor>(), 4096);
        let end = after(frames, self.frames, size_of::<Descriptor>(), 4096);
        [roots, blocks, desks, node_descriptors, nodes, regions, frames, end]
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
        let [roots, blocks, desks, node_descriptors, nodes, regions, frames, _] = sizes.offsets();
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
                region_descriptors: part(arena.base, regions, sizes.regions),
                frames: part(arena.base, frames, sizes.frames),
            }
        }
    }

    /// What the arena was made for.
    pub fn sizes(&self) -> Sizes {
        self.head.read_sizes()
    }

    /// Claims a member's place.
    ///
    /// # Errors
    /// [`NoPlace`] if there is none left.
    pub fn join(&self) -> Result<Member<'m>, NoPlace> {
        let claimed = (0..self.desks.len()).find_map(|index| self.claim(index));
        claimed.ok_or(NoPlace { members: self.desks.len() })
    }

    /// Claims one certain place: for embedders that have a list of members of their own, by the same numbers.
    ///
    /// # Errors
    /// [`NoPlace`] if somebody has it, or there is none.
    pub fn join_at(&self, member: MemberId) -> Result<Member<'m>, NoPlace> {
        self.claim(member.index()).ok_or(NoPlace { members: self.desks.len() })
    }

    fn claim(&self, index: usize) -> Option<Member<'m>> {
        let desk = self.desks.get(index)?;
        let claim = desk.claim.load(Ordering::Relaxed);
        if claim & 1 != 0 {
            return None;
        }
        let generation = Generation::new((claim >> 1) as u16).next();
        let claimed = u64::from(generation.get()) << 1 | 1;
        // Acquire pairs with the release of whoever left this place or recovered it.
        desk.claim.compare_exchange(claim, claimed, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        let handle = Handle::new(MemberId::new(index), generation);
        Some(Member { spaces: *self, operation: desk.intent.last(), handle, hint: None, stuck: (0, 0) })
    }

    /// The members whose places are claimed.
    pub fn members(&self) -> crate::MemberSet {
        let claimed = |d: &&(usize, &Desk)| d.1.claim.load(Ordering::Relaxed) & 1 != 0;
        self.desks.iter().enumerate().collect_members(claimed)
    }

    /// How many nodes are in use (those under review and those that wait for readers to leave count).
    pub fn nodes_in_use(&self) -> usize {
        self.node_pool(|pool| pool.live())
    }

    /// How many regions are in use.
    pub fn regions_in_use(&self) -> usize {
        self.region_pool(|pool| pool.live())
    }

    /// Bytes of nodes and descriptors that have been touched: what the structure costs.
    pub fn touched_bytes(&self) -> usize {
        let node = size_of::<Node>() + size_of::<Descriptor>();
        self.node_pool(|pool| pool.touched()) * node
            + self.region_pool(|pool| pool.touched()) * size_of::<Descriptor>()
    }

    pub(crate) const fn refcache(&self) -> Refcache<'m> {
        Refcache::new(&self.head.epoch, self.blocks)
    }

    pub(crate) fn intent(&self, member: MemberId) -> &'m Intent {
        &self.desks[member.index()].intent
    }

    pub(crate) fn node_pool<R>(&self, f: impl FnOnce(Pool<'m, '_>) -> R) -> R {
        let desks = self.desks;
        f(Pool {
            all: self.node_descriptors,
            fresh: &self.head.fresh_nodes.0,
            stacks: &move |m| &desks[m.index()].free_nodes,
            members: desks.len(),
        })
    }

    pub(crate) fn region_pool<R>(&self, f: impl FnOnce(Pool<'m, '_>) -> R) -> R {
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

trait CollectMembers<'a> {
    fn collect_members(self, keep: impl Fn(&&(usize, &'a Desk)) -> bool) -> crate::MemberSet;
}
impl<'a, I: Iterator<Item = (usize, &'a Desk)>> CollectMembers<'a> for I {
    fn collect_members(self, keep: impl Fn(&&(usize, &'a Desk)) -> bool) -> crate::MemberSet {
        self.filter(|d| keep(&d)).map(|(i, _)| MemberId::new(i)).collect()
    }
}

impl Head {
    fn read_sizes(&self) -> Sizes {
        let size = |i: usize| self.sizes[i].load(Ordering::Relaxed) as usize;
        Sizes { members: size(0), spaces: size(1), nodes: size(2), regions: size(3), frames: size(4) }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Class {
    Node(u32),
    Region(u32),
    Frame(FrameId),
}

impl Counted for Spaces<'_> {
    fn object(&self, id: ObjectId) -> &Object {
        match self.class(id) {
            Class::Node(n) => &self.node_descriptors[n as usize].object,
            Class::Region(n) => &self.region_descriptors[n as usize].object,
            Class::Frame(f) => &self.frames[f.get() as usize].object,
        }
    }

    fn mark_dying(&self, id: ObjectId) {
        if let Class::Node(node) = self.class(id) {
            self.mark_link(node, true);
        }
    }
}

/// What the review needs: the arena and the embedder's frames.
pub(crate) struct Keeper<'a, 'm, F> {
    pub(crate) spaces: &'a Spaces<'m>,
    pub(crate) frames: &'a F,
}

impl<F> Counted for Keeper<'_, '_, F> {
    fn object(&self, id: ObjectId) -> &Object {
        self.spaces.object(id)
    }
    fn mark_dying(&self, id: ObjectId) {
        self.spaces.mark_dying(id);
    }
}

impl<F: Frames> Reclaim for Keeper<'_, '_, F> {
    fn unmark_dying(&self, id: ObjectId) {
        if let Class::Node(node) = self.spaces.class(id) {
            self.spaces.mark_link(node, false);
        }
    }

    fn sever(&self, me: &Handle, id: ObjectId) -> Severed {
        match self.spaces.class(id) {
            Class::Node(node) => self.spaces.sever_link(me, node),
            // Readers that found the record before it went have left two epochs ago.
            Class::Region(_) | Class::Frame(_) => Severed::Dead,
        }
    }

    fn dead(&self, me: &Handle, id: ObjectId) {
        match self.spaces.class(id) {
            Class::Node(node) => self.spaces.node_pool(|pool| pool.give(me, node)),
            Class::Region(region) => self.spaces.region_pool(|pool| pool.give(me, region)),
            Class::Frame(frame) => self.frames.release(me.id(), frame),
        }
    }
}

/// A member: one at a time uses it, and all operations go through one.
///
/// Dropping it does not give the place back, for a member may also end by being killed: [`leave`](Self::leave) does, and
/// [`AddressSpace::recover`](crate::AddressSpace::recover) does it for the dead.
pub struct Member<'m> {
    pub(crate) spaces: Spaces<'m>,
    pub(crate) handle: Handle,
    pub(crate) operation: u32,
    /// Where the next hole is looked for.
    pub(crate) hint: Option<u64>,
    /// The epoch at the last tick, and for how many ticks it has been that.
    stuck: (u64, u32),
}

/// Ticks for which the epoch may wait for a member before it goes on without it.
const PATIENCE: u32 = 16;

impl fmt::Debug for Member<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Member({}, {:?})", self.id(), self.generation())
    }
}

impl<'m> Member<'m> {
    /// The member's number.
    pub const fn id(&self) -> MemberId {
        self.handle.id()
    }

    /// Which life of that number.
    pub const fn generation(&self) -> Generation {
        self.handle.generation()
    }

    /// The arena.
    pub const fn spaces(&self) -> Spaces<'m> {
        self.spaces
    }

    /// Has `hook` called at every step that holds a lock or has changed something.
    pub fn on_step(&mut self, hook: Option<Hook>) {
        self.handle.on_step(hook);
    }

    /// To be called between operations every few milliseconds: flushes deltas, moves the epoch on, gives memory that nobody uses
    /// back to its pools, and frames to `frames`. Tells how many objects died. Skipped while a recovery is on.
    ///
    /// A member for which the epoch has waited a number of these ticks is [expelled](Self::expel): it may be stopped.
    pub fn tick(&mut self, frames: &impl Frames) -> usize {
        if !self.try_enter() {
            return 0;
        }
        let keeper = Keeper { spaces: &self.spaces, frames };
        let dead = self.spaces.refcache().tick(&self.handle, &keeper);
        let epoch = self.epoch();
        self.stuck = if self.stuck.0 == epoch { (epoch, self.stuck.1 + 1) } else { (epoch, 0) };
        if self.stuck.1 >= PATIENCE {
            self.stuck.1 = 0;
            for laggard in self.laggards().iter().filter(|m| *m != self.id()) {
                // It may have moved just now, which is as good.
                let _ = self.spaces.refcache().expel(&self.handle, laggard, &self.spaces);
            }
        }
        self.exit();
        dead
    }

    /// Leaves the epoch until the next operation: before blocking. Nobody waits for this member then, and what it has under
    /// review is taken over by others.
    pub fn idle(&mut self) {
        if self.try_enter() {
            self.spaces.refcache().leave(&self.handle, &self.spaces);
            self.exit();
        }
    }

    /// Takes a member that no longer ticks out of the epoch: it may be stopped. It comes back by itself.
    ///
    /// # Errors
    /// See [`ExpelError`]. A member that moves in between is not expelled; try again later.
    pub fn expel(&mut self, who: MemberId) -> Result<(), ExpelError> {
        if !self.try_enter() {
            return Err(ExpelError::Moved(who));
        }
        let result = self.spaces.refcache().expel(&self.handle, who, &self.spaces);
        self.exit();
        result
    }

    /// The members that the epoch waits for. One that is named again and again is stopped: see [`expel`](Self::expel).
    pub fn laggards(&self) -> crate::MemberSet {
        self.spaces.refcache().laggards().collect()
    }

    /// The epoch.
    pub fn epoch(&self) -> u64 {
        self.spaces.refcache().now()
    }

    /// Takes a reference to a frame for the embedder itself (a page cache), which reports it in [`Frames::pins`].
    pub fn hold(&mut self, frame: FrameId) {
        self.add_to_frame(frame, 1);
    }

    /// Drops a reference that [`hold`](Self::hold) took.
    pub fn let_go(&mut self, frame: FrameId) {
        self.add_to_frame(frame, -1);
    }

    fn add_to_frame(&self, frame: FrameId, delta: i32) {
        while !self.try_enter() {
            peregrine_base::sync::spin_loop();
        }
        self.spaces.refcache().add(&self.handle, &self.spaces, self.spaces.frame_id(frame), delta);
        self.exit();
    }

    /// Gives the place back.
    pub fn leave(self) {
        while !self.try_enter() {
            peregrine_base::sync::spin_loop();
        }
        self.spaces.refcache().leave(&self.handle, &self.spaces);
        self.exit();
        let desk = self.desk();
        let claim = desk.claim.load(Ordering::Relaxed);
        desk.claim.store(claim & !1, Ordering::Release);
    }

    pub(crate) fn desk(&self) -> &'m Desk {
        &self.spaces.desks[self.id().index()]
    }

    /// Says that the member is at work on the structures, unless a recovery holds everybody.
    pub(crate) fn try_enter(&self) -> bool {
        // SeqCst here and in `hold_everybody`: either this member sees the recovery, or the recovery sees it busy.
        self.desk().busy.swap(1, Ordering::SeqCst);
        if self.spaces.head.recovery.0.load(Ordering::SeqCst) == 0 {
            return true;
        }
        self.exit();
        false
    }

    pub(crate) fn exit(&self) {
        self.desk().busy.store(0, Ordering::Release);
    }

    /// Tries to become the one who recovers; who recovers at present is asked for `is_dead`, and taken over from if so.
    pub(crate) fn claim_recovery(&self, is_dead: impl Fn(MemberId) -> bool) -> bool {
        let (word, mine) = (&self.spaces.head.recovery.0, self.id().index() as u32 + 1);
        let now = word.load(Ordering::SeqCst);
        let free = now == 0 || is_dead(MemberId::new(now as usize - 1));
        free && word.compare_exchange(now, mine, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }

    /// A member that has not stepped back yet.
    pub(crate) fn somebody_at_work(&self) -> Option<MemberId> {
        let at_work = |(i, d): (usize, &Desk)| {
            (i != self.id().index() && d.busy.load(Ordering::SeqCst) != 0).then(|| MemberId::new(i))
        };
        self.spaces.desks.iter().enumerate().find_map(at_work)
    }

    pub(crate) fn release_everybody(&self) {
        self.spaces.head.recovery.0.store(0, Ordering::Release);
    }
}

impl Spaces<'_> {
    /// A dead member's place: no longer at work, and free for another.
    pub(crate) fn bury(&self, dead: MemberId) {
        let desk = &self.desks[dead.index()];
        desk.busy.store(0, Ordering::Release);
        desk.intent.finish(desk.intent.last());
        let claim = desk.claim.load(Ordering::Relaxed);
        desk.claim.store(claim & !1, Ordering::Release);
    }

    pub(crate) fn stop_working(&self, dead: MemberId) {
        self.desks[dead.index()].busy.store(0, Ordering::SeqCst);
    }

    /// Empties all stacks of free ones: recovery fills them anew.
    pub(crate) fn forget_free(&self) {
        for desk in self.desks {
            desk.free_nodes.clear();
            desk.free_regions.clear();
        }
    }

    /// Empties a node just taken from its pool.
    pub(crate) fn clear_node(&self, node: u32, parent: u64) {
        self.node_descriptors[node as usize].first.store(parent, Ordering::Relaxed);
        for slot in &self.nodes[node as usize].slots {
            slot.set_value(Value::UNMAPPED);
            slot.members.store(&crate::MemberSet::EMPTY);
            slot.set_word(crate::radix::slot::SlotWord::FREE);
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

/// Under a model checker atomics can't be found in zeroed memory: each part is made one by one.
#[cfg(peregrine_loom)]
#[derive(Debug)]
pub(crate) struct Parts {
    head: std::boxed::Box<Head>,
    roots: std::vec::Vec<Root>,
    blocks: std::vec::Vec<refcache::Block>,
    desks: std::vec::Vec<Desk>,
    node_descriptors: std::vec::Vec<Descriptor>,
    nodes: std::vec::Vec<Node>,
    region_descriptors: std::vec::Vec<Descriptor>,
    frames: std::vec::Vec<Descriptor>,
}

#[cfg(peregrine_loom)]
impl Parts {
    pub(crate) fn new(sizes: &Sizes) -> Self {
        fn many<T>(count: usize, make: impl Fn() -> T) -> std::vec::Vec<T> {
            (0..count).map(|_| make()).collect()
        }
        let all = [sizes.members, sizes.spaces, sizes.nodes, sizes.regions, sizes.frames];
        Self {
            head: std::boxed::Box::new(Head {
                magic: AtomicU64::new(MAGIC),
                sizes: all.map(|n| AtomicU64::new(n as u64)),
                recovery: Recovery(AtomicU32::new(0)),
                fresh_nodes: Lone(AtomicU32::new(0)),
                fresh_regions: Lone(AtomicU32::new(0)),
                epoch: Epoch::new(),
            }),
            roots: many(sizes.spaces, || Root { state: AtomicU32::new(0), node: AtomicU32::new(0) }),
            blocks: many(sizes.members, refcache::Block::new),
            desks: many(sizes.members, Desk::new),
            node_descriptors: many(sizes.nodes, Descriptor::new),
            nodes: many(sizes.nodes, Node::new),
            region_descriptors: many(sizes.regions, Descriptor::new),
            frames: many(sizes.frames, Descriptor::new),
        }
    }

    pub(crate) fn spaces(&self) -> Spaces<'_> {
        Spaces {
            head: &self.head,
            roots: &self.roots,
            blocks: &self.blocks,
            desks: &self.desks,
            node_descriptors: &self.node_descriptors,
            nodes: &self.nodes,
            region_descriptors: &self.region_descriptors,
            frames: &self.frames,
        }
    }
}
