//! The World's tables, in shared memory at one address in every process.
//!
//! ```text
//!  CONTROL            World        who supervises, how many nodes, the pause word, NodeShared × MAX_NODES
//!                                  ── lives as long as the World; not part of an image ──
//!  CONTROL +  1 GiB   Imaged       free lists, the arena's books, the output's tail     ┐
//!          +  2 GiB   ThreadRecord × MOST_THREADS, by number: a table for each kind       │ part of every image
//!          +  4 GiB   Channel × MAX_CHANNELS                                            │
//!          +  6 GiB   End × MAX_ENDS                                                    │
//!          +  7 GiB   Chunk × MOST_CHUNKS, the archive's books                          ┘
//!          +  8 GiB   the output ring: bytes between `released` and `tail`
//!          + 10 GiB   one dirty list per node, 32 MiB apart
//!          + 12 GiB   the address space's structures (`address_space`): not part of an image
//! ```
//!
//! Who may write what, and how it is repaired when a node dies, is the table in ARCHITECTURE.md; in short: what is
//! imaged goes back to the last image, what is not is either a node's own (its replacement starts anew) or
//! derived from the records.

use crate::archive::{Archive, CHUNK, Chunk};
use crate::lock::Lock;
pub use crate::records::{Channel, ChannelState, End, JoinCell, ThreadRecord, ending, mail, state, wait};
use crate::room::Room;
use crate::tables::records_of;
pub use crate::tables::{
    Arena, DomainEntry, Domains, FreeList, Imaged, TABLES, Used, imaged_tables, numbers, numbers_of,
    table_bounds, tables_of, used_now,
};
use peregrine_base::sync::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use peregrine_thread::layout::CONTROL;
use peregrine_thread::stack_kind::{MOST_THREADS, StackKind};
use peregrine_vm::dirty::DirtyRun;
use talc::{base::Talc, source::Manual};

const GIB: usize = 1 << 30;
/// Most nodes of a World.
pub const MAX_NODES: usize = 64;
/// Most channels.
pub const MAX_CHANNELS: usize = 1 << 20;
/// Most channel ends.
pub const MAX_ENDS: usize = 1 << 22;
/// Where the imaged part begins.
pub const IMAGED: usize = CONTROL + GIB;
/// Where the threads' records begin.
pub const RECORDS: usize = CONTROL + 2 * GIB;
/// Where the channels begin.
pub const CHANNELS: usize = CONTROL + 4 * GIB;
/// Where the ends begin.
pub const ENDS: usize = CONTROL + 6 * GIB;
/// Where the records of the archive's chunks begin.
pub const ARCHIVE_CHUNKS: usize = CONTROL + 7 * GIB;
/// The output ring.
pub const OUTPUT: usize = CONTROL + 8 * GIB;
/// Its size in bytes, a power of two.
pub const OUTPUT_BYTES: usize = 4 << 20;
const DIRTY: usize = CONTROL + 10 * GIB;
pub(crate) const DIRTY_STRIDE: usize = 32 << 20;
/// Bytes of the control memory.
pub const CONTROL_BYTES: usize = 14 * GIB + MAX_NODES * DIRTY_STRIDE;

/// The parts of the control memory that are used, with so many nodes: address and bytes, whole pages.
pub fn control_parts(nodes: u32, room: &Room) -> Vec<(usize, usize)> {
    let records = StackKind::ALL.map(|k| (records_of(k), room.records(k) * size_of::<ThreadRecord>()));
    let lists = (0..(nodes as usize + MAX_DOMAINS).min(MAX_NODES)).map(|node| DIRTY + node * DIRTY_STRIDE);
    let dirty_bytes = room.dirty_bytes.load(Ordering::Relaxed);
    let parts = [
        (CONTROL, size_of::<World>()),
        (IMAGED, size_of::<Imaged>()),
        (CHANNELS, room.channels() * size_of::<Channel>()),
        (ENDS, room.ends() * size_of::<End>()),
        (ARCHIVE_CHUNKS, room.archive_bytes.load(Ordering::Relaxed) / CHUNK * size_of::<Chunk>()),
        (OUTPUT, OUTPUT_BYTES),
        (crate::address_space::STRUCTURES, crate::address_space::STRUCTURES_BYTES),
    ];
    let all = parts.into_iter().chain(records).chain(lists.map(|at| (at, dirty_bytes)));
    all.map(|(at, bytes)| (at, bytes.next_multiple_of(4096))).collect()
}

/// Most domains for carried calls; they count as nodes too.
pub const MAX_DOMAINS: usize = 8;

/// No thread, channel or end.
pub const NONE: u32 = u32::MAX;

/// What a pause is for.
#[allow(missing_docs)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum PauseKind {
    Image = 1,
    Rollback = 2,
    Rebuild = 3,
}

/// Words of text that say why a thread must not run again.
pub const WHY_WORDS: usize = 24;
/// Most threads that must not run again, between two images. (Of such a number that `World::pause` lies where it should.)
pub const MOST_DOOMED: usize = 80;

/// The part of the control memory that is not imaged.
#[repr(C)]
pub struct World {
    /// Threads that must not run again: their `thread::identity`. The first `doomed_count` count.
    // First, because a switch looks at `pause`: see the assertions below.
    pub doomed: [AtomicU64; MOST_DOOMED],
    /// Even: run. Odd: every node pauses, reports and waits until the word changes.
    pub pause: AtomicU32,
    /// What for: a [`PauseKind`].
    pub pause_kind: AtomicU32,
    /// Counts rollbacks, from a random number, so that no life of a World has another's, resumed ones included: a node whose queue
    /// is of an earlier life fills it anew.
    pub life: AtomicU32,
    /// Bumped by a node that has paused or is ready; the supervisor sleeps on it.
    pub acks: AtomicU32,
    /// Number of nodes.
    pub node_count: AtomicU32,
    /// Why the supervisor should look: bits of [`request`].
    pub requests: AtomicU32,
    /// The supervisor's process id.
    pub supervisor: AtomicU32,
    /// Bytes of output given to their destination.
    pub released: AtomicU64,
    /// Sequence of the newest image.
    pub committed: AtomicU64,
    /// Sequence of the first image that satisfies everybody who has asked for one.
    pub image_wanted: AtomicU64,
    /// World memory that threads may use, in bytes.
    pub memory_limit: AtomicU64,
    /// Slots that are mapped.
    pub slot_count: AtomicU32,
    /// How much of each range is mapped.
    pub room: Room,
    /// The archive's file.
    pub archive_fd: AtomicU32,
    /// The file of the alias threads' frames.
    pub frames_fd: AtomicU32,
    /// Kind of a thread that asks for none: a `StackKind`.
    pub default_kind: AtomicU32,
    /// How long a thread is idle before it is packed, in ns; `u64::MAX`: never.
    pub pack_after_ns: AtomicU64,
    /// Until when every node packs idle threads at once, for somebody found no room; 0: nobody did.
    pub room_wanted_until: AtomicU64,
    /// Nodes, one bit each, that stand still until there is room for a thread which has to leave its window.
    pub lacking: AtomicU64,
    /// Threads packed and unpacked so far.
    pub packed: [AtomicU64; 2],
    /// Bytes of those packed.
    pub packed_bytes: AtomicU64,
    /// Length of a time slice in ns.
    pub slice_ns: AtomicU64,
    /// The longest that an idle node looks for work before it sleeps, in ns; see `sched::spin`.
    pub spin_ns: AtomicU64,
    /// Whether output is held for commits.
    pub hold_output: AtomicBool,
    /// Whether writes are tracked by the kernel (else whole slots are compared).
    pub track: AtomicBool,
    /// Which nodes look for work: one bit each.
    pub hungry: AtomicU64,
    /// Compares of the statics window between two reviews of its seals; 0: nothing is sealed.
    pub seal_every: AtomicU32,
    /// What the processor allows, found by the supervisor: bits as in `node::cpu_flags`.
    pub cpu: AtomicU64,
    /// Range of the vDSO.
    pub vdso: [AtomicUsize; 2],
    /// Nodes killed on purpose so far, and how many of those ran a thread.
    pub kills: [AtomicU64; 2],
    /// Rollbacks so far.
    pub rollbacks: AtomicU64,
    /// Whether this life began with an image from disk.
    pub resumed: AtomicBool,
    /// Threads that must not run again; the supervisor's, written while every node is paused.
    pub doomed_count: AtomicU32,
    /// Their slots (upper half) and generations, for [`World::doomed`]'s places.
    pub doomed_at: [AtomicU64; MOST_DOOMED],
    /// Why they must not, as text that ends with zeros, for [`World::doomed`]'s places.
    pub doomed_why: [[AtomicU64; WHY_WORDS]; MOST_DOOMED],
    /// What tests count and kill at.
    #[cfg(feature = "killpoints")]
    pub kill_points: crate::killpoint::Table,
    /// The nodes.
    pub nodes: [NodeShared; MAX_NODES],
}

/// Bits of [`World::requests`].
pub mod request {
    /// A thread waits for an image.
    pub const CHECKPOINT: u32 = 1;
    /// `main` has ended.
    pub const MAIN_ENDED: u32 = 2;
    /// The output ring is filling up.
    pub const OUTPUT: u32 = 4;
    /// A domain is in the table that has no process.
    pub const DOMAINS: u32 = 8;
}

/// What a node may lack to run a thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Lack {
    /// The kernel installs no guards.
    Guards = 1,
    /// It maps no window.
    Window = 2,
    /// The arena has no room for a suspended thread.
    Arena = 3,
    /// It is a domain whose set-up failed, and the thread is on a call into it.
    SetUp = 4,
}

impl Lack {
    /// What could not be done, and what to do about it.
    pub fn in_words(code: u32) -> &'static str {
        const WORDS: [&str; 4] = [
            "cannot install the guard pages of its stack: too many mappings (vm.max_map_count)",
            "cannot map its window: too many mappings (vm.max_map_count), or the limit on address space is too low (ulimit -v)",
            "has no addresses left for what it holds while another thread is in its window: they are a sixteenth of the limit on address space (ulimit -v)",
            "could not be set up again as the domain that the thread was in: what the set-up printed says why",
        ];
        WORDS.get((code as usize).wrapping_sub(1)).copied().unwrap_or("gave up")
    }
}

/// Descriptors that the calls of a node may have open: as many as the supervisor can close after it.
pub const MOST_CALL_FDS: usize = 1024;

/// What others see of a node. What a switch does not touch comes first: see below, where that is checked.
#[repr(C, align(256))]
pub struct NodeShared {
    /// Process id, 0 if there is none.
    pub pid: AtomicU32,
    /// Set once the node's process is initialised.
    pub ready: AtomicU32,
    /// [`DomainEntry::identity`] of the domain that the process was set up as; 0: an ordinary node, or not ready.
    pub serves: AtomicU64,
    /// Set-ups of that domain begun since one succeeded; at `carried::MOST_SETUPS` it is given up.
    pub setups: AtomicU32,
    /// A crash that the node's handler saw: signal, address, slot + 1.
    pub crash_signal: AtomicU32,
    /// Faulting address.
    pub crash_addr: AtomicUsize,
    /// For which thread the node gave up (slot + 1; 0: it did not), and for lack of what: a [`Lack`].
    pub gave_up: [AtomicU32; 2],
    /// The last time that a thread's heap had no room here: the thread's identity (0: never), and the
    /// [`Refusal`](peregrine_thread::carrier::Refusal).
    pub refused: [AtomicU64; 2],
    /// Whether the supervisor answers writes to units that `window_open` does not name.
    pub seals_answered: AtomicU64,
    /// Whether it is answering one now.
    pub seals_answering: AtomicU64,
    /// Writes to sealed units so far.
    pub seal_faults: AtomicU64,
    /// Bumped to wake the node.
    pub wake: AtomicU32,
    /// Whether it sleeps or is about to.
    pub idle: AtomicU32,
    /// Slot + 1 of a thread that is about to come, for which it was woken; 0: none.
    pub expected: AtomicU32,
    /// Monotonic time at which it began to be idle, if `idle` says that it sleeps.
    pub idle_since_ns: AtomicU64,
    /// Whether a mover has it wake on its own processor: a state of `sched::lend`.
    pub lent: AtomicU32,
    /// Head of the inbox: a stack of slots linked by `inbox_next`.
    pub inbox: AtomicU32,
    /// Value of `pause` that this node has obeyed.
    pub paused: AtomicU32,
    /// Slot that runs, or [`NONE`].
    pub current: AtomicU32,
    /// Runnable threads waiting here.
    pub queued: AtomicU32,
    /// Units of the statics window that may differ from the template (`peregrine_thread::seal`).
    pub window_open: AtomicU64,
    /// Descriptors of this node in the shared table: userfaultfd, pagemap, the statics window's userfaultfd (plus one; 0
    /// for none).
    pub fds: [AtomicU32; 3],
    /// Descriptors of its connections to domains (plus one; 0 for none).
    pub call_fds: [AtomicU32; MOST_CALL_FDS],
    /// Entries of the dirty list; `usize::MAX` if tracking failed and whole slots must be compared.
    pub dirty: AtomicUsize,
    /// Switches so far.
    pub switches: AtomicU64,
    /// Slots unmapped so far that this node had in view; by whoever unmaps.
    pub unmapped: AtomicU64,
    /// Times that a window was mapped over or filled, for its thread was new or had had to leave; alias, then copy.
    pub window_entries: [AtomicU64; 2],
    /// Moves that ended here.
    pub arrivals: AtomicU64,
    /// Time that those took together, from leaving a node to being taken up here, in ns.
    pub arrival_ns: AtomicU64,
    /// Preemptions so far.
    pub preemptions: AtomicU64,
    /// Moves that began here by taking a thread from its computation: it did not ask, nor did it wait.
    pub preempted_moves: AtomicU64,
    /// Monotonic time at which the running thread was given the node.
    pub since_ns: AtomicU64,
    /// Depth of a trace asked for by SIG_TRACE, and its program counters.
    pub trace_len: AtomicU32,
    /// Program counters, innermost first.
    pub trace: [AtomicUsize; 64],
    /// Threads that ran, or were prepared, here since the last image: one bit each.
    pub ran: [AtomicU64; MOST_THREADS / 64],
}

// A load waits for an earlier store to the same place in another page, until the processor sees that the pages differ: 16 ns, which
// is half a switch. Records lie 256 bytes apart, and begin with what a switch reads of the next thread and writes of the last; so
// nothing that it writes elsewhere, or reads, lies at the first bytes of such a block.
const _: () = {
    const fn apart(offset: usize) -> bool {
        offset % size_of::<ThreadRecord>() >= 64
    }
    use core::mem::offset_of;
    assert!(size_of::<ThreadRecord>() == 256);
    assert!(apart(offset_of!(World, pause)));
    let nodes = offset_of!(World, nodes);
    assert!(size_of::<NodeShared>().is_multiple_of(256));
    assert!(apart(nodes + offset_of!(NodeShared, inbox)) && apart(nodes + offset_of!(NodeShared, current)));
    assert!(apart(nodes + offset_of!(NodeShared, switches)));
    use peregrine_thread::carrier::Carrier;
    assert!(apart(offset_of!(Carrier, depth)) && apart(offset_of!(Carrier, header)));
};

impl NodeShared {
    /// Notes that what thread `index` owns may be written by this node.
    #[inline(always)]
    pub fn note_ran(&self, index: u32) {
        let word = &self.ran[index as usize / 64];
        let bit = 1 << (index % 64);
        let old = word.load(Ordering::Relaxed);
        if old & bit == 0 {
            // One writer, the node itself; the supervisor reads and clears only while the node is paused or dead.
            word.store(old | bit, Ordering::Relaxed);
        }
    }
}

impl NodeShared {
    /// Whether thread `index` ran, or was prepared, here since the last image.
    #[inline(always)]
    pub fn has_run(&self, index: u32) -> bool {
        self.ran[index as usize / 64].load(Ordering::Relaxed) & 1 << (index % 64) != 0
    }
}

/// Whether node `index` is a domain: it runs carried calls and nothing else.
pub fn is_domain(index: u32) -> bool {
    index >= world().node_count.load(Ordering::Relaxed)
}

/// The World of this process.
///
/// Sound only where the control memory is mapped: in the supervisor after [`crate::memory::WorldMemory`] was made, and in
/// nodes.
#[inline(always)]
pub fn world() -> &'static World {
    // SAFETY: mapped for the life of these processes; all fields are atomics (S1).
    unsafe { &*(CONTROL as *const World) }
}

/// The imaged head.
#[inline(always)]
pub fn imaged() -> &'static Imaged {
    // SAFETY: as `world`; fields are atomics or behind locks.
    unsafe { &*(IMAGED as *const Imaged) }
}

/// Record of thread `index`.
#[inline(always)]
pub fn record(index: u32) -> &'static ThreadRecord {
    debug_assert!((index as usize) < MOST_THREADS);
    // SAFETY: as `world`; the index is bounded by the callers, who have it from a table or a live thread.
    unsafe { &*(RECORDS as *const ThreadRecord).add(index as usize) }
}

/// Channel `index`.
#[inline(always)]
pub fn channel(index: u32) -> &'static Channel {
    debug_assert!((index as usize) < MAX_CHANNELS);
    // SAFETY: as `record`.
    unsafe { &*(CHANNELS as *const Channel).add(index as usize) }
}

/// End `index`.
#[inline(always)]
pub fn end(index: u32) -> &'static End {
    debug_assert!((index as usize) < MAX_ENDS);
    // SAFETY: as `record`.
    unsafe { &*(ENDS as *const End).add(index as usize) }
}

/// Node `index`.
#[inline(always)]
pub fn node(index: u32) -> &'static NodeShared {
    &world().nodes[index as usize % MAX_NODES]
}

/// Where node `index` lists what it has written.
pub fn dirty_list(index: u32) -> *mut DirtyRun {
    (DIRTY + index as usize * DIRTY_STRIDE) as *mut DirtyRun
}

/// Regions that fit in a node's dirty list.
pub fn dirty_capacity() -> usize {
    world().room.dirty_bytes.load(Ordering::Relaxed) / size_of::<DirtyRun>()
}

/// Place of the free-list link of a thread record.
pub fn thread_link(i: u32) -> *mut u32 {
    // SAFETY: only the address is computed; accesses happen under the list's lock.
    unsafe { &raw mut (*(RECORDS as *mut ThreadRecord).add(i as usize)).next_free }
}

/// Place of the free-list link of an end.
pub fn end_link(i: u32) -> *mut u32 {
    // SAFETY: as above.
    unsafe { &raw mut (*(ENDS as *mut End).add(i as usize)).next_free }
}

/// Place of a record's name, written by whoever makes the thread before anybody knows it.
pub fn name_of(i: u32) -> *mut [u8; 48] {
    // SAFETY: as above.
    unsafe { &raw mut (*(RECORDS as *mut ThreadRecord).add(i as usize)).name }
}

/// Writes the first state of all tables into fresh, zeroed control memory.
///
/// # Safety
/// The memory is mapped and nobody else uses it yet.
pub unsafe fn initialise(node_count: u32, seed: u64) {
    let _ = seed;
    let free = || Lock::new(FreeList { head: NONE, used: 0 });
    // SAFETY: fresh memory of the right size and alignment.
    unsafe {
        (IMAGED as *mut Imaged).write(Imaged {
            threads: [free(), free(), free()],
            channels: free(),
            ends: free(),
            arena: Lock::new(Arena { talc: Talc::new(Manual), end: 0 }),
            arena_end: AtomicUsize::new(0),
            archive: Lock::new(Archive::EMPTY),
            output_tail: Lock::new(0),
            memory_used: AtomicU64::new(0),
            sequence: AtomicU64::new(0),
            nodes: AtomicU32::new(node_count),
            domains: Lock::new(Domains::NONE),
            checkpoints_asked: AtomicU64::new(0),
            main: AtomicU32::new(NONE),
            main_exit: AtomicU32::new(0),
            pristine: AtomicUsize::new(0),
            models: Lock::new(crate::models::Models::NONE),
            regions: Lock::new(crate::region::Table::EMPTY),
            open_numbers: Default::default(),
            dispositions: crate::dispositions::Dispositions::none(),
        });
    }
    let w = world();
    w.node_count.store(node_count, Ordering::Relaxed);
    let mut life = [0; 4];
    peregrine_sys::random::fill(&mut life);
    // Never 0, which is none, however many rollbacks there are.
    w.life.store(u32::from_ne_bytes(life) >> 1 | 1, Ordering::Relaxed);
    #[cfg(feature = "killpoints")]
    crate::killpoint::prepare(seed);
    for n in &w.nodes {
        n.inbox.store(NONE, Ordering::Relaxed);
        n.current.store(NONE, Ordering::Relaxed);
    }
}
