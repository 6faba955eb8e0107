//! The address space over Linux processes: each member is a process with a page table of its own.
//!
//! ```text
//!   Space ─┬─ table    shared memory: who the members are, what they ask of each other, the radix array and Refcache
//!          ├─ frames   one memfd: page p of the region has frame p, for ever
//!          └─ region   addresses, the same in every member
//!   Member ─┬─ AddressSpace (the structures)        what is mapped, and who may have it in view
//!           └─ Seat ─┬─ View      one mapping of the frames over the region: opened and closed, never split
//!                    ├─ Frames    a second mapping, always open: zeroing, punching, moving
//!                    └─ requests  taking pages from other members' views
//! ```
//!
//! | file | its idea |
//! |---|---|
//! | `table` | what members know of each other, one writer a word |
//! | `ground` | the memory, made once and inherited |
//! | `view` | what this page table shows |
//! | `appetite` | how much a trap fills |
//! | `frames` | frames used again at their home addresses, zeroed between owners |
//! | `shootdown` | asking others: a flag that they poll, then a signal, then cutting off |
//! | `liveness` | asking the kernel whether a member runs, is stopped, or dead |
//! | `mine` | a child of a member is not the member |
//! | `seat` | these together, without records |
//! | `views` | a seat, as an MMU and frames of the address space |
//! | `space`, `member` | with records: what programs use |
//!
//! **How many mappings.** A member has four of the space's: table, region, alias, and a page that a fork wipes. However much is mapped and unmapped, no
//! mapping is split.
//!
//! **No fork and no copy on write here.** The address space has both, over any [`Mmu`](crate::Mmu) that can show a frame at whatever address a
//! record says. A member here has one mapping of one memfd, in which page `p` is frame `p` by the kernel's own page tables: a
//! copy at the same address for one space and not for another would be a second mapping for that page (a `mmap` each time, and a
//! VMA each, of which a process has 65,530), which is what one big mapping is there to avoid. And there is no second space for
//! it to be in: all members are views of *one* space, at the same addresses. A child process that is to have its own copy gets a
//! [`Space`] of its own and copies what it needs.
//!
//! **No read-only pages in a kernel-filled region.** A guard marker stops reads and writes alike, and the one other means
//! that splits no mapping, userfaultfd's write protection, livelocks in Linux 6.18 when a guard is laid over it, or, where it is
//! resolved in a trap, makes system calls that write there fail with EFAULT, which is what kernel-filled regions are there to
//! avoid. So such pages are open or closed, a page that can only be read is closed and traps on every access, and whoever wants
//! rights by the page takes [`Filling::Trap`].
//!
//! **What a touch of a closed page locks.** What it opens: the page and those around it that are mapped alike, without a hole between, and
//! that nobody has locked. In a trap-filled region they lie in a block of 16 pages ([`BLOCK_PAGES`]) at the first trap in a part, up to 512 as
//! traps keep coming there; in a kernel-filled one always in the aligned 512 pages (2 MiB, [`OPEN_PAGES`]), for taking the guards off costs
//! one call however many they are. Pages that were mapped one by one are opened in 64 at most, of one node. While it lasts (some
//! microseconds), other members' operations and touches there wait. Members that are not to meet map with a hole between, or
//! [`open`](Member::open) what they need before they touch it, which locks that alone.
//!
//! **What `unmap` promises.** When it returns, no instruction of any member reaches the frames: members that have the pages in
//! view acknowledged, are dead, or are stopped and have been cut off. It waits for nobody that can't answer. One wait remains: a
//! member that is stopped *inside* an operation holds its range's lock, and what it is about to change can't be known. Others wait for
//! that range for [`PATIENCE`] ([`Member::set_patience`]); then their operation fails, having changed nothing, and the error names the
//! member, its process and what it is doing. A trap can't fail, and waits; [`Member::stopped_holders`] tells a watchman for whom.
//! A holder that is *dead* is taken over by whoever waits for it, and else by whoever calls [`Member::reap`], which some member
//! should do when one of its children dies.

mod appetite;
mod frames;
mod ground;
mod joined;
mod liveness;
mod member;
mod mine;
mod seat;
mod shootdown;
mod space;
mod table;
mod view;
mod views;

pub use frames::{FrameError, PUNCH_PAGES};
pub use ground::{Config, Ground, GroundError, GroundJoinError};
pub use member::{MapRangeError, Member};
pub use seat::{BLOCK_PAGES, FillError, MAP_PAGES, OPEN_PAGES, PATIENCE, Seat, Tally};
pub use shootdown::{SIGNAL, SILENCE_NS};
pub use space::{JoinError, Space, SpaceError};
pub use table::{Lowering, MEMBERS, MemberIndex};
pub use view::{Filling, ViewError};
