//! An arena under a model checker: its atomics can't be found in zeroed memory, so each part is made one by one.

use crate::desk::Desk;
use crate::pool::Descriptor;
use crate::radix::Node;
use crate::radix::slot::Line;
use crate::refcache::{self, Epoch};
use crate::sizes::Sizes;
use crate::spaces::{Head, Lone, MAGIC, Recovery, Root, Spaces};
use peregrine_base::sync::{AtomicU32, AtomicU64};

/// The parts.
#[derive(Debug)]
pub(crate) struct Parts {
    head: std::boxed::Box<Head>,
    roots: std::vec::Vec<Root>,
    blocks: std::vec::Vec<refcache::Block>,
    desks: std::vec::Vec<Desk>,
    node_descriptors: std::vec::Vec<Descriptor>,
    nodes: std::vec::Vec<Node>,
    lines: std::vec::Vec<Line>,
    region_descriptors: std::vec::Vec<Descriptor>,
    frames: std::vec::Vec<Descriptor>,
}

impl Parts {
    pub(crate) fn new(sizes: &Sizes) -> Self {
        fn many<T>(count: usize, make: impl Fn() -> T) -> std::vec::Vec<T> {
            (0..count).map(|_| make()).collect()
        }
        let all = [sizes.members, sizes.spaces, sizes.nodes, sizes.regions, sizes.frames];
        Self {
            head: std::boxed::Box::new(Head {
                magic: AtomicU64::new(MAGIC),
                sizes: all.map(|n| AtomicU64::new(n as u64)),
                recovery: Recovery(AtomicU32::new(0)),
                fresh_nodes: Lone(AtomicU32::new(0)),
                fresh_lines: Lone(AtomicU32::new(0)),
                fresh_regions: Lone(AtomicU32::new(0)),
                epoch: Epoch::new(),
            }),
            roots: many(sizes.spaces, || Root { state: AtomicU32::new(0), node: AtomicU32::new(0) }),
            blocks: many(sizes.members, refcache::Block::new),
            desks: many(sizes.members, Desk::new),
            node_descriptors: many(sizes.nodes, Descriptor::new),
            nodes: many(sizes.nodes, Node::new),
            lines: many(sizes.lines(), Line::new),
            region_descriptors: many(sizes.regions, Descriptor::new),
            frames: many(sizes.frames, Descriptor::new),
        }
    }

    pub(crate) fn spaces(&self) -> Spaces<'_> {
        Spaces {
            head: &self.head,
            roots: &self.roots,
            blocks: &self.blocks,
            desks: &self.desks,
            node_descriptors: &self.node_descriptors,
            nodes: &self.nodes,
            lines: &self.lines,
            region_descriptors: &self.region_descriptors,
            frames: &self.frames,
        }
    }
}
