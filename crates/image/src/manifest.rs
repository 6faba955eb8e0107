//! One commit of the whole world: which images make it up, what output it made visible, and the control state.
//!
//! ```text
//! thread 1   [full 3] ← [delta 4] ← [delta 6]      each member: generation, sequence, length, seal
//! thread 2   [full 6]
//! output     …released…┃ chunk 5 │ chunk 6 ┃ output_end
//! control    bytes that the world's owner understands
//! ```
//!
//! A manifest names its images by length and seal too, so an intact image of the same name that belongs to another
//! commit is noticed.

use crate::ids::{BuildId, Generation, Sequence, ThreadId, WorldId};

/// One image in a thread's chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Member {
    /// Generation in the image's header.
    pub generation: Generation,
    /// Sequence in the image's header.
    pub sequence: Sequence,
    /// Bytes in the image file.
    pub len_bytes: u64,
    /// [`Written::seal`](crate::Written::seal) of the image.
    pub seal: u32,
}

/// A thread and the images that give its pages: a full one, then deltas, the oldest first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chain {
    /// The thread.
    pub thread: ThreadId,
    /// Its images, with strictly rising sequences. Never empty in a manifest that was read.
    pub members: Vec<Member>,
}

/// A chunk of output that the commit holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChunkRef {
    /// Offset of its first byte in all output of the world.
    pub start: u64,
    /// Bytes of output.
    pub len_bytes: u64,
    /// Generation in the chunk's header.
    pub generation: Generation,
    /// Sequence in the chunk's header.
    pub sequence: Sequence,
    /// CRC-32C of the output.
    pub body_crc: u32,
}

/// One commit of the whole world.
///
/// # Examples
/// ```
/// # use peregrine_image::*;
/// let manifest = Manifest {
///     build: BuildId::from_bytes([1; 32]),
///     world: WorldId::from_bytes([2; 16]),
///     generation: Generation::new(1),
///     sequence: Sequence::FIRST,
///     previous: None,
///     released: 0,
///     output_end: 0,
///     chains: vec![],
///     chunks: vec![],
///     control: b"run queues".to_vec(),
/// };
/// let bytes = manifest.to_bytes();
/// assert_eq!(Manifest::parse(&bytes)?, manifest);
/// assert!(Manifest::parse(&bytes[..bytes.len() - 1]).is_err());
/// # Ok::<(), ImageError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifest {
    /// The executable of the world.
    pub build: BuildId,
    /// The world.
    pub world: WorldId,
    /// The life that wrote it.
    pub generation: Generation,
    /// Its place in line.
    pub sequence: Sequence,
    /// The world image that it continues.
    pub previous: Option<Sequence>,
    /// Bytes of output that were known to have left the store when it was written.
    pub released: u64,
    /// Bytes of output that are committed with it and before it.
    pub output_end: u64,
    /// The threads, in ascending order.
    pub chains: Vec<Chain>,
    /// Chunks without a gap that hold at least `released..output_end`.
    pub chunks: Vec<ChunkRef>,
    /// Control state, opaque here.
    pub control: Vec<u8>,
}
