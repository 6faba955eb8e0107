//! The address space over Linux processes.
mod frames;
mod ground;
mod joined;
mod liveness;
mod member;
mod seat;
mod shootdown;
mod table;
mod view;

pub use frames::{FrameError, PUNCH_PAGES};
pub use ground::{Config, Ground, GroundError, GroundJoinError};
pub use member::{JoinError, MapRangeError, Member, Space, SpaceError};
pub use seat::{BLOCK_PAGES, FillError, OPEN_PAGES, Seat, Tally};
pub use shootdown::{SIGNAL, SILENCE_NS};
pub use table::{Lowering, MEMBERS, MemberIndex};
pub use view::{Filling, ViewError};
