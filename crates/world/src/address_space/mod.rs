//! The World's address space: slots and shared regions are records of `peregrine-space`, and nodes are its members.
//!
//! ```text
//!   AddressSpace (control memory)      one radix slot each: a World's slot spans 64^3 pages
//!     SLOTS  │ slot 0 │ slot 1 │ …     kind, generation; who has it in view: the nodes that prepared or ran the thread
//!     ARENA  … │ region │ …            kind, entry, generation
//!
//!   create  ─▶ take_slot: map, admit           bury ─▶ give_slot: unmap ─▶ out of the views in the set, frames punched
//!   a thread's first switch on a node ─▶ enter_slot: admit        (later ones know: `Local::admitted`)
//! ```
//!
//! **Views.** Every node maps all slots, and the kernel fills a page when it is touched: nothing is filled here but the set. What
//! is taken from views is taken by punching the file. The kernel then drops the pages from the page tables that have them and
//! flushes the processors on which such a process runs, so nobody need be asked or waited for, be it stopped or dead; the record's set says
//! which nodes those are, and they are counted (`NodeShared::unmapped`). Asking a node by signal takes 18 us, a punch 2 to 3.
//!
//! **Deaths.** Neither structures nor sets are part of an image. In a rollback every node drops what it did, so every member's
//! operation is undone or finished by `peregrine-space`'s own recovery ([`repair`]); killed nodes leave the sets, survivors stay,
//! for their page tables are what they were. Then what is mapped is made what the image says. A node joins anew with its first
//! operation afterwards.
//!
//! **A node that is stopped** in the middle of an operation makes those wait that want the same record; they name it ([`stuck`]).
//!
//! **Regions** lie in the arena, whose pages stay the arena's when a region goes; so nothing is taken from views, and no set is kept.
//!
//! *Between two threads*: no static, no thread-local, no allocation, no panic but on broken structures.

mod repair;
mod stuck;
mod views;

#[cfg(feature = "killpoints")]
pub use repair::differences;
pub use repair::{repair, repair_regions, replace};

use crate::control::{MAX_NODES, record, state, world};
use crate::thread::ThreadId;
use core::ptr::NonNull;
use peregrine_base::sync::Ordering;
use peregrine_base::{PageCount, PageRange, Protection, VirtAddr};
use peregrine_space::{AddressSpace, Arena, Backing, Mapping, MemberId, Place, Sizes, Spaces};
use peregrine_thread::layout::{CARRIER, CONTROL, SLOT_BYTES, SLOT_COUNT, slot_base};
use peregrine_thread::stack_kind::StackKind;
use views::{Views, punched};

/// Where the structures lie.
pub const STRUCTURES: usize = CONTROL + (12 << 30);
/// Nodes of the radix array: those above the slots, and for each region the paths to its ends and some for churn.
const NODES: usize = SLOT_COUNT / 64 + SLOT_COUNT / 4096 + 64 + 16 * crate::region::MAX_REGIONS;
const SIZES: Sizes = Sizes { members: MAX_NODES + 1, spaces: 1, nodes: NODES, regions: 1, frames: 0 };
/// Bytes of the structures, most of them never touched.
pub const STRUCTURES_BYTES: usize = SIZES.bytes();
/// The supervisor's number among the members.
const SUPERVISOR: MemberId = MemberId::new(MAX_NODES);
/// Where a process keeps what it holds of the space: private memory, as the rest of `local`.
const HELD: usize = CARRIER + (132 << 20);
/// Whether the operation under way has punched its range in its shootdown: a word apart, for the views write it meanwhile.
const PUNCHED: usize = HELD + 4096;
/// The wait for a lock that is under way: written by the views, too.
const WAIT: usize = PUNCHED + 64;
/// Operations of a member between two ticks.
const TICK_EVERY: u32 = 64;

const _: () = assert!(size_of::<Held>() <= 4096 && PUNCHED + 4096 <= CARRIER + crate::local::LOCAL_BYTES);

/// What a process holds of the space.
struct Held {
    space: AddressSpace<'static, Views, Views>,
    me: MemberId,
    /// `None` until the first operation of a life.
    member: Option<peregrine_space::Member<'static>>,
    /// The life of the World in which it joined.
    life: u32,
    /// Operations until the next tick.
    until_tick: u32,
}

/// This process's part.
///
/// # Safety
/// [`make`] was called in this process or in one that it was forked from, and the caller holds no other reference.
unsafe fn held() -> &'static mut Held {
    // SAFETY: written by `make`; one thread a process, which uses it in runtime sections only.
    unsafe { &mut *(HELD as *mut Held) }
}

/// What a record says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Record {
    /// The slot of a thread.
    Slot {
        /// Which use of the slot.
        generation: u32,
    },
    /// A shared region.
    Region {
        /// Its place in the table of names.
        entry: u32,
        /// Which use of that place.
        generation: u32,
    },
}

const NUMBER: u32 = (1 << 30) - 1;
const REGION: u32 = 1 << 31;
const ENTRY_BITS: u32 = 7;
const _: () = assert!(crate::region::MAX_REGIONS <= 1 << ENTRY_BITS);

impl Record {
    /// The name that `peregrine-space` keeps; never 0.
    fn mapping(self) -> Mapping {
        let object = match self {
            Self::Slot { generation } => 1 << 30 | generation & NUMBER,
            Self::Region { entry, generation } => REGION | (generation << ENTRY_BITS | entry) & NUMBER,
        };
        Mapping { backing: Backing::Home { object: object.into() }, rights: Protection::ReadWrite }
    }
}

/// Makes the space, and the supervisor its first member.
///
/// # Safety
/// In the supervisor, once the control memory is mapped, and before any other process has it.
pub unsafe fn make() {
    let at = NonNull::new(STRUCTURES as *mut u8).expect("not at address 0");
    // SAFETY: the memory is zeros, mapped as long as the World at this address, and nobody else's.
    let spaces =
        unsafe { Spaces::create(&Arena::new(at, STRUCTURES_BYTES), &SIZES) }.expect("sizes that fit");
    let mut member = spaces.join_at(SUPERVISOR).expect("nobody has joined");
    let space = AddressSpace::create(&mut member, Views, Views).expect("room for one space");
    let held = Held { space, me: SUPERVISOR, member: Some(member), life: u32::MAX, until_tick: TICK_EVERY };
    // SAFETY: private memory that `WorldMemory` mapped; nothing lies there yet.
    unsafe { (HELD as *mut Held).write(held) };
}

/// This process is node `index` from here on.
///
/// # Safety
/// In a fresh child of the zygote, before it does anything else here.
pub unsafe fn become_node(index: u32) {
    // SAFETY: as promised. What is dropped is a copy of the supervisor's membership, which dropping leaves alone.
    let held = unsafe { held() };
    (held.me, held.member, held.life) = (MemberId::new(index as usize), None, 0);
}

impl Held {
    /// Runs an operation.
    fn operate<R>(
        &mut self,
        f: impl FnOnce(&AddressSpace<'static, Views, Views>, &mut peregrine_space::Member<'static>) -> R,
    ) -> R {
        let life = world().life.load(Ordering::Acquire);
        if self.me != SUPERVISOR && self.life != life {
            // What this process was in the last life has been mended by `repair`.
            self.member = None;
            self.life = life;
        }
        if self.member.is_none() {
            let spaces = open();
            let mut member = spaces.join_at(self.me).expect("a node's place is free once it was mended");
            member.on_step(HOOK);
            self.member = Some(member);
        }
        let member = self.member.as_mut().expect("just joined");
        punched().store(false, Ordering::Relaxed);
        let result = f(&self.space, member);
        // A reset may come between any two of these.
        if self.until_tick <= 1 {
            self.until_tick = TICK_EVERY;
            member.tick(&Views);
        } else {
            self.until_tick -= 1;
        }
        result
    }
}

fn open() -> Spaces<'static> {
    let at = NonNull::new(STRUCTURES as *mut u8).expect("not at address 0");
    // SAFETY: made by `make`, mapped as long as the World.
    Spaces::open(&unsafe { Arena::new(at, STRUCTURES_BYTES) }).expect("made at the World's start")
}

#[cfg(not(feature = "killpoints"))]
const HOOK: Option<peregrine_space::Hook> = None;
#[cfg(feature = "killpoints")]
const HOOK: Option<peregrine_space::Hook> = Some(at_step);

/// Here a test kills the node.
#[cfg(feature = "killpoints")]
fn at_step(step: peregrine_space::Step) {
    use crate::killpoint::{Point, at};
    use peregrine_space::Step;
    at(match step {
        Step::Intended => Point::RecordIntended,
        Step::Locked => Point::RecordLocked,
        Step::ShotDown => Point::RecordShotDown,
        Step::Committed => Point::RecordCommitted,
        Step::Changed => Point::RecordChanged,
        Step::Dropped => Point::RecordDropped,
        Step::Filled => Point::RecordAdmitted,
        Step::Unlocked => Point::RecordUnlocked,
        // Counts, epochs and nodes of the array.
        _ => Point::RecordCounted,
    });
}

fn slot_range(slot: u32) -> PageRange {
    PageRange::new(VirtAddr::new(slot_base(slot)), PageCount::for_bytes(SLOT_BYTES))
}

/// The slot is a thread's from here on, and this node has it in view. `false` if the structures have no room.
///
/// # Safety
/// In a runtime section, or in the supervisor; the slot was just taken off the free list.
pub unsafe fn take_slot(slot: u32, generation: u32) -> bool {
    // SAFETY: as promised.
    unsafe { held() }.operate(|space, me| {
        let (range, mapping) = (slot_range(slot), Record::Slot { generation }.mapping());
        let place = Place::FixedNoReplace(range.start());
        space.map_and_admit(me, place, range.pages(), &mapping).is_ok()
    })
}

/// This node has the slot in view from here on: before its thread first runs here.
///
/// # Safety
/// On a node, in a runtime section or between two threads.
pub unsafe fn enter_slot(slot: u32) {
    // SAFETY: as promised.
    let admitted = unsafe { held() }.operate(|space, me| space.admit(me, slot_range(slot)).is_ok());
    debug_assert!(admitted, "the kernel fills");
}

/// The slot is nobody's: when this returns its pages are in no node's page table, and its frames are free.
///
/// # Safety
/// As [`take_slot`]; the slot's thread has ended.
pub unsafe fn give_slot(slot: u32) {
    // SAFETY: as promised.
    let done = unsafe { held() }.operate(|space, me| space.unmap(me, slot_range(slot)));
    debug_assert!(done.is_ok(), "unmapping a whole record takes no memory");
}

/// The pages are a region's. `false` if they are somebody's, or the structures have no room.
///
/// # Safety
/// As [`take_slot`].
pub unsafe fn take_region(range: PageRange, entry: u32, generation: u32) -> bool {
    // SAFETY: as promised.
    unsafe { held() }.operate(|space, me| {
        let mapping = Record::Region { entry, generation }.mapping();
        space.map(me, Place::FixedNoReplace(range.start()), range.pages(), &mapping).is_ok()
    })
}

/// The pages are the arena's again. `false` if the structures had no room to split a record, which does not happen to whole ones.
///
/// # Safety
/// As [`take_slot`].
pub unsafe fn give_region(range: PageRange) -> bool {
    // SAFETY: as promised.
    unsafe { held() }.operate(|space, me| space.unmap(me, range).is_ok())
}

/// The nodes that may have the thread's slot in view: those that made it or ran it. When it ends, its pages are taken from
/// their page tables, and from no other. Empty if it has ended, or has no slot.
///
/// # Panics
/// Outside a Peregrine thread.
pub fn in_view_of(thread: ThreadId) -> Vec<u32> {
    let nodes = crate::sched::in_thread(|_| {
        let r = record(thread.slot);
        let lives = r.generation.load(Ordering::Relaxed) == thread.generation
            && state::is_alive(r.state.load(Ordering::Acquire));
        if !lives || StackKind::of(thread.slot) != StackKind::Isomalloc {
            return 0;
        }
        // SAFETY: in a runtime section.
        unsafe { held() }
            .operate(|space, me| space.viewers(me, VirtAddr::new(slot_base(thread.slot))).words()[0])
    });
    let nodes = nodes.expect("in_view_of() was called outside a Peregrine thread");
    (0..MAX_NODES as u32).filter(|n| nodes & 1 << n != 0).collect()
}

/// How many slots that `node` had in view were unmapped so far. It only grows, as [`tally`](crate::tally()).
///
/// # Panics
/// Outside a Peregrine thread.
pub fn unmapped_from(node: u32) -> u64 {
    assert!(crate::current().is_some(), "unmapped_from() was called outside a Peregrine thread");
    crate::control::node(node).unmapped.load(Ordering::Relaxed)
}
