//! The address space over Linux processes.
mod local;
mod frames;
mod ground;
mod joined;
mod liveness;
mod shootdown;
mod table;
mod view;
pub use local::FillError;
pub use frames::{FrameError, PUNCH_PAGES};
pub use ground::{Config, GroundError, GroundJoinError};
pub use shootdown::{SIGNAL, SILENCE_NS};
pub use table::{MEMBERS, MemberIndex};
pub use view::{Filling, ViewError};
