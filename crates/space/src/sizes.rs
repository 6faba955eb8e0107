//! How much an arena holds, and where its parts lie.

use crate::desk::Desk;
use crate::member::MAX_MEMBERS;
use crate::pool::{BATCH, Descriptor};
use crate::radix::slot::Line;
use crate::radix::{FANOUT, Node};
use crate::refcache;
use crate::spaces::{Head, Root};

/// How much an arena is to hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    /// Members at a time.
    pub members: usize,
    /// Address spaces at a time.
    pub spaces: usize,
    /// Nodes of all trees. Each has 5.2 KiB set aside, and touches 1.1 KiB of them when used; the rest as several members come to
    /// work in it.
    pub nodes: usize,
    /// Mappings of objects at a time, in all spaces (they are shared by the records of one `map`).
    pub regions: usize,
    /// Frames that the embedder has.
    pub frames: usize,
}

/// Why an arena can't be made or opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ArenaError {
    /// The memory is too small.
    #[error("the arena needs {needed} bytes and has {given}: give more memory or smaller sizes")]
    TooSmall {
        /// Bytes that the sizes need.
        needed: usize,
        /// Bytes given.
        given: usize,
    },
    /// The memory is not aligned to a page.
    #[error("the arena begins at {0:#x}: align it to 4096 bytes")]
    Unaligned(usize),
    /// A size is beyond what words have room for.
    #[error(
        "sizes beyond the limits (256 members, 65535 spaces, 2^25 - 1 nodes, 2^24 - 2 regions, 2^32 - 2 objects in all)"
    )]
    TooLarge,
    /// No arena was made here, or by another version.
    #[error("no arena of this version lies here (found {0:#x}): create it first")]
    NotAnArena(u64),
}

impl Sizes {
    /// Bytes that an arena of these sizes needs, most of them never touched.
    ///
    /// ```
    /// use peregrine_space::Sizes;
    /// let sizes = Sizes { members: 4, spaces: 2, nodes: 1000, regions: 100, frames: 1000 };
    /// assert!(sizes.bytes() > 1000 * 4096);
    /// ```
    pub const fn bytes(&self) -> usize {
        self.offsets()[8]
    }

    pub(crate) const fn is_within_limits(&self) -> bool {
        let objects = self.nodes + self.regions + self.frames;
        self.members > 0
            && self.members <= MAX_MEMBERS
            && self.spaces < 1 << 16
            && self.nodes < 1 << 25
            && self.regions < (1 << 24) - 1
            && objects < u32::MAX as usize - 1
    }

    /// Lines: one for each slot of each node, and for each member those that it takes from the pool at once, so that a slot never
    /// has to do without.
    pub(crate) const fn lines(&self) -> usize {
        self.nodes * FANOUT + self.members * BATCH as usize
    }

    /// Where each part begins after the head, and where the last one ends.
    pub(crate) const fn offsets(&self) -> [usize; 9] {
        const fn after(offset: usize, count: usize, size: usize, next_align: usize) -> usize {
            (offset + count * size).next_multiple_of(next_align)
        }
        let roots = size_of::<Head>().next_multiple_of(128);
        let blocks = after(roots, self.spaces, size_of::<Root>(), 128);
        let desks = after(blocks, self.members, size_of::<refcache::Block>(), 128);
        let node_descriptors = after(desks, self.members, size_of::<Desk>(), 4096);
        let nodes = after(node_descriptors, self.nodes, size_of::<Descriptor>(), 4096);
        let lines = after(nodes, self.nodes, size_of::<Node>(), 4096);
        let regions = after(lines, self.lines(), size_of::<Line>(), 4096);
        let frames = after(regions, self.regions, size_of::<Descriptor>(), 4096);
        let end = after(frames, self.frames, size_of::<Descriptor>(), 4096);
        [roots, blocks, desks, node_descriptors, nodes, lines, regions, frames, end]
    }
}
