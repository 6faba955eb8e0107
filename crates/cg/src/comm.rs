//! What the ranks of a run say to each other.
//!
//! The solver needs two collectives, [`Comm`]. [`MessageComm`] builds both from messages between pairs, in
//! ⌈log₂ ranks⌉ rounds (the all-gather of Bruck et al., 1997). In each round a rank passes on all blocks it has
//! to a rank below, and gets as many from a rank above, so what it holds doubles:
//!
//! ```text
//!             round 0 (distance 1)   round 1 (distance 2)    round 2 (distance 4: what is missing)
//!   rank 0:   0 → 0 1                0 1 → 0 1 2 3           0 1 2 3 → 0 1 2 3 4
//!   rank 1:   1 → 1 2                1 2 → 1 2 3 4           1 2 3 4 → 1 2 3 4 0
//!   …
//! ```
//!
//! A sum is a gather of everybody's terms, added up by everybody in the order of the ranks. So all ranks get the same
//! bits, and the same bits in every run, whatever arrives first: no order of arrival ever decides an order of
//! additions.

/// The collectives of one rank. Every rank calls the same ones in the same order.
pub trait Comm {
    /// This rank, below [`Comm::ranks`].
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn ranks(&self) -> usize;

    /// Puts the blocks of all ranks one after the other into `out`, on every rank. Rank `r` brings `counts[r]`
    /// elements; `mine` is what this rank brings.
    fn all_gather(&mut self, mine: &[f64], counts: &[usize], out: &mut [f64]);

    /// Replaces each of `values` by its sum over all ranks. Every rank must get the same bits.
    fn all_sum(&mut self, values: &mut [f64]);
}

/// Messages between pairs of ranks: all that a [`MessageComm`] asks of a system.
///
/// `send` must not wait for the receiver to call `recv`: ranks send to each other before they receive. There is no
/// error to return: a rank whose peer is gone can't go on, so an implementation panics or ends the
/// thread, naming the peer.
pub trait PointToPoint {
    /// This rank, below [`PointToPoint::ranks`].
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn ranks(&self) -> usize;

    /// Sends `data` to rank `to`.
    fn send(&mut self, to: usize, tag: u64, data: Vec<f64>);

    /// Waits for the message with this tag from rank `from`. A pair of ranks never has two messages with the same
    /// tag and direction, and receives them in the order sent; so a system whose channels keep the order may
    /// ignore the tag, or check it.
    fn recv(&mut self, from: usize, tag: u64) -> Vec<f64>;
}

/// [`Comm`] over any [`PointToPoint`].
#[derive(Debug)]
pub struct MessageComm<S> {
    system: S,
    /// The tag of the next round. All ranks count alike, because all take part in every round.
    tag: u64,
    /// Counts and result of the gathers behind sums; kept to allocate once.
    counts: Vec<usize>,
    terms: Vec<f64>,
}

impl<S: PointToPoint> MessageComm<S> {
    /// The collectives of the rank that `system` is.
    ///
    /// # Panics
    /// If `system` claims a rank that doesn't exist.
    pub fn new(system: S) -> Self {
        let (rank, ranks) = (system.rank(), system.ranks());
        assert!(rank < ranks, "rank {rank} of {ranks}: ranks count from 0");
        Self { system, tag: 0, counts: Vec::new(), terms: Vec::new() }
    }

    /// Gives the system back.
    pub fn into_inner(self) -> S {
        self.system
    }
}

impl<S: PointToPoint> Comm for MessageComm<S> {
    fn rank(&self) -> usize {
        self.system.rank()
    }

    fn ranks(&self) -> usize {
        self.system.ranks()
    }

    /// # Panics
    /// If `counts` has not one element a rank, or the lengths of `mine`, `out` or a received message
    /// contradict it: the ranks then disagree about the call.
    fn all_gather(&mut self, mine: &[f64], counts: &[usize], out: &mut [f64]) {
        let (rank, ranks) = (self.rank(), self.ranks());
        assert_eq!(counts.len(), ranks, "one count for each rank");
        assert_eq!(counts[rank], mine.len(), "rank {rank} brings what it announced");
        assert_eq!(counts.iter().sum::<usize>(), out.len(), "room for all blocks");
        let start = |block: usize| counts[..block].iter().sum::<usize>();
        let range = |block: usize| start(block)..start(block) + counts[block];
        // Blocks `first`, `first + 1`, … round the ring are at most two runs of `out`.
        let runs = |first: usize, blocks: usize| {
            let head = blocks.min(ranks - first);
            [start(first)..start(first + head), 0..start(blocks - head)]
        };

        out[range(rank)].copy_from_slice(mine);
        let mut held = 1;
        while held < ranks {
            let blocks = held.min(ranks - held);
            let (below, above) = ((rank + ranks - held) % ranks, (rank + held) % ranks);
            let [head, tail] = runs(rank, blocks);
            let mut message = Vec::with_capacity(head.len() + tail.len());
            message.extend_from_slice(&out[head]);
            message.extend_from_slice(&out[tail]);
            self.system.send(below, self.tag, message);

            let message = self.system.recv(above, self.tag);
            let [head, tail] = runs(above, blocks);
            assert_eq!(message.len(), head.len() + tail.len(), "message {} of rank {above}", self.tag);
            let (first, second) = message.split_at(head.len());
            out[head].copy_from_slice(first);
            out[tail].copy_from_slice(second);
            self.tag += 1;
            held += blocks;
        }
    }

    fn all_sum(&mut self, values: &mut [f64]) {
        if values.is_empty() {
            return;
        }
        let (ranks, width) = (self.ranks(), values.len());
        let (mut counts, mut terms) = (std::mem::take(&mut self.counts), std::mem::take(&mut self.terms));
        counts.clear();
        counts.resize(ranks, width);
        terms.clear();
        terms.resize(ranks * width, 0.0);
        self.all_gather(values, &counts, &mut terms);
        // Rank 0's terms start the sums, not zeros: so with one rank a negative zero stays one.
        let (first, others) = terms.split_at(width);
        values.copy_from_slice(first);
        for of_rank in others.chunks_exact(width) {
            for (value, term) in values.iter_mut().zip(of_rank) {
                *value += term;
            }
        }
        (self.counts, self.terms) = (counts, terms);
    }
}
