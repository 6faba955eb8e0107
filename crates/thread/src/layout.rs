//! Where everything lies: the addresses that mean the same in every process of a World.
//!
//! ```text
//!  0x0000_5555…  the executable (or 0x20_0000 when it is linked at a fixed address)
//!  0x0600_0000_0000  PROCESS_HEAP   this process's own allocations, made outside threads       private
//!  0x0700_0000_0000  CARRIER        this node's own state: what runs, what is pending          private
//!  0x0800_0000_0000  CONTROL        the World's tables                                          shared
//!  0x0900_0000_0000  ARENA          messages under way                                          shared
//!  0x0980_0000_0000  ARCHIVE        idle threads, packed                                       shared
//!  0x0a00_0000_0000  TEMPLATE       what a new thread's statics and TLS start from              shared
//!  0x1000_0000_0000  SLOTS          32 TiB of slots                                             shared
//!  0x3000_0000_0000  (peregrine-world keeps the last image of the slots here, in the supervisor)
//!  0x7f…             shared libraries, the process's first stack
//! ```
//!
//! The ranges are claimed with `MAP_FIXED_NOREPLACE` before any node exists; a clash is an error at start.

/// Allocations made where no Peregrine thread runs.
pub const PROCESS_HEAP: usize = 0x0600_0000_0000;
/// Bytes reserved for [`PROCESS_HEAP`].
pub const PROCESS_HEAP_BYTES: usize = 64 << 30;
/// One node's own state.
pub const CARRIER: usize = 0x0700_0000_0000;
/// The World's tables.
pub const CONTROL: usize = 0x0800_0000_0000;
/// Messages under way.
pub const ARENA: usize = 0x0900_0000_0000;
/// Bytes reserved for [`ARENA`].
pub const ARENA_BYTES: usize = 64 << 30;
/// What is written once: idle threads, packed. Behind the arena, and before the slots.
pub const ARCHIVE: usize = 0x0980_0000_0000;
/// Bytes reserved for [`ARCHIVE`].
pub const ARCHIVE_BYTES: usize = 8 << 30;
/// Templates for new threads.
pub const TEMPLATE: usize = 0x0a00_0000_0000;
/// The slots.
pub const SLOTS: usize = 0x1000_0000_0000;
/// Bytes reserved for [`SLOTS`].
pub const SLOTS_BYTES: usize = 32 << 40;
/// Bytes of one slot, which bound a thread's stack and heap together.
pub const SLOT_BYTES: usize = 1 << 30;
/// Slots in a World.
pub const SLOT_COUNT: usize = SLOTS_BYTES / SLOT_BYTES;

/// Index of the slot that holds `addr`, if one does.
#[inline(always)]
pub const fn slot_index_of(addr: usize) -> Option<u32> {
    let off = addr.wrapping_sub(SLOTS);
    if off < SLOTS_BYTES { Some((off / SLOT_BYTES) as u32) } else { None }
}

/// Room at the start of a slot for the stack that ends at its header. The odd half puts the header into the middle of what one
/// table of pages maps, so that all that is near it is found through that table.
const STACK_ROOM: usize = NEAR_STACK_BYTES + (2 << 20) + (640 << 10);
/// The largest stack that lies right below its slot's header.
pub const NEAR_STACK_BYTES: usize = 8 << 20;

/// Where in its slot thread `index` keeps its header: at a table of pages, a page and a line of its own colour.
///
/// Slots are a power of two apart, so without colours all headers, all TLS blocks and all stack tops would compete for
/// the same few sets of the caches and of the TLB, and their tables of pages for the same few entries of what the processor
/// remembers of such tables: with 1,000 threads that cost more than the switch itself.
#[inline(always)]
pub const fn header_offset(index: u32) -> usize {
    let i = index as usize;
    // 32 tables, 256 pages, and 8 places of two lines in the middle of the page: the top of the stack, the header and the
    // thread control block are on one page. Neighbours are three places apart: with one, a switch reads the header of one where
    // it has just written the stack of the other but for the page, and the processor waits to see that they differ (4 ns).
    STACK_ROOM + (i % 32) * (2 << 20) + (i % 256) * 4096 + 1024 + (i * 3 % 8) * 128
}

/// First address of slot `index`.
#[inline(always)]
pub const fn slot_base(index: u32) -> usize {
    SLOTS + index as usize * SLOT_BYTES
}
