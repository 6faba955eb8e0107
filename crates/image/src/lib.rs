#![doc = include_str!("../FORMAT.md")]

#[cfg(test)]
mod crafted;
mod error;
mod ids;
mod image;
mod index;
mod layout;
mod manifest;
mod manifest_bytes;
mod open;
mod output;
mod source;
mod writer;

pub use error::{FileKind, ImageError, Part, WriteError};
pub use ids::{BuildId, Generation, ParseIdError, Sequence, ThreadId, WorldId};
pub use image::Image;
pub use index::{ImageIndex, PageRef};
pub use layout::{FORMAT_VERSION, Field, RECORDS, RecordLayout, render_tables};
pub use manifest::{Chain, ChunkRef, Manifest, Member};
pub use output::{Chunk, Mark};
pub use source::Source;
pub use writer::{ImageInfo, ImageWriter, Written, ZERO_PAGE};
