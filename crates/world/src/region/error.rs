//! What can be wrong with a region.

use super::{MAX_REGIONS, NAME_BYTES};
use crate::arena::OutOfMemory;

/// Why there is no region to be had.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum RegionError {
    /// The call came from outside.
    #[error("not in a Peregrine thread: start the program with #[peregrine::main]")]
    NoThread,
    /// A region of that name exists.
    #[error("a region '{name}' of {len_bytes} bytes exists: open it, or choose another name")]
    Exists {
        /// The name.
        name: String,
        /// Its size.
        len_bytes: usize,
    },
    /// There is none.
    #[error("there is no region '{name}': create it first")]
    NotFound {
        /// The name.
        name: String,
    },
    /// It has another size.
    #[error("region '{name}' has {len_bytes} bytes, not {asked_bytes}: remove it first, or ask for its size")]
    Size {
        /// The name.
        name: String,
        /// Its size.
        len_bytes: usize,
        /// The size asked for.
        asked_bytes: usize,
    },
    /// The table is full.
    #[error("all {MAX_REGIONS} regions of the World exist: remove one")]
    TooMany,
    /// Its pages find no room among the World's records: a defect of the runtime.
    #[error("the pages of region '{name}' find no room in the World's address space: please report this")]
    NoRecord {
        /// The name.
        name: String,
    },
    /// Not a name.
    #[error("a region's name has 1 to {NAME_BYTES} bytes, none of them 0; '{name}' does not")]
    Name {
        /// What was given.
        name: String,
    },
    /// No bytes.
    #[error(
        "region '{name}' would have {len_bytes} bytes: it needs at least 1, and at most what an address holds"
    )]
    Empty {
        /// The name.
        name: String,
        /// What was asked for.
        len_bytes: usize,
    },
    /// Somebody uses it.
    #[error("region '{name}' is in use by {handles} handles: drop them first")]
    InUse {
        /// The name.
        name: String,
        /// Handles open.
        handles: u32,
    },
    /// No memory.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
}
