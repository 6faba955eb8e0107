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
//! | `frames` | frames used again at their home addresses, zeroed between owners |
//! | `shootdown` | asking others: a flag that they poll, then a signal, then cutting off |
//! | `liveness` | asking the kernel whether a member runs, is stopped, or dead |
//! | `mine` | a child of a member is not the member |
//! | `seat` | these together, without records |
//! | `views` | a seat, as an MMU and frames of the address space |
//! | `space`, `member` | with records: what programs use |
//!
//! **How many mappings.** A member has four of the space's: table, region, alias, and a page that a fork wipes. However much is mapped and unmapped, no
//! mapping is split. A frame can't be at a second address, so `fork` and copy on write are not offered here.
//!
//! **What `unmap` promises.** When it returns, no instruction of any member reaches the frames: members that have the pages in
//! view acknowledged, are dead, or are stopped and have been cut off. It waits for nobody that can't answer. One wait remains: a
//! member that is stopped *inside* an operation holds its range's lock, and others wait for that range until it goes on
//! or is killed; a member that died there is mended by whoever calls [`Member::reap`], which some member should do when one of
//! its children dies.

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
pub use seat::{BLOCK_PAGES, FillError, OPEN_PAGES, Seat, Tally};
pub use shootdown::{SIGNAL, SILENCE_NS};
pub use space::{JoinError, Space, SpaceError};
pub use table::{Lowering, MEMBERS, MemberIndex};
pub use view::{Filling, ViewError};
