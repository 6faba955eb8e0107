//! How much a trap fills: more each time in a part of the region to which traps keep coming, and nothing twice.
//!
//! ```text
//!   part   512 pages, 32 blocks of 16                 word = part │ step │ one bit a block: filled since the last taking away
//!   first trap in it   ▕██▏            16 pages       step 1
//!   the next           ▕░░██████▏      up to 64       step 2: the blocks around the trap that no trap has filled
//!   …                  up to 256, up to 512
//! ```
//!
//! To map a page that is there already takes two system calls for nothing, so a block that grew over the last one would cost more
//! than it saves. When pages of a part are taken from the view, all of it is forgotten: whoever filled much there got what is
//! another's now.
//!
//! Words are only a guess: one that is wrong costs a trap more, or a page filled for nothing. They are read and written whole, for
//! a handler that takes pages away may come in between (S3).

use super::seat::{BLOCK_PAGES, MAP_PAGES, OPEN_PAGES};
use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, VirtAddr};

/// Parts that are remembered.
const PARTS: usize = 8;
const PART_BYTES: usize = OPEN_PAGES * PAGE_SIZE;
const BLOCK_BYTES: usize = BLOCK_PAGES * PAGE_SIZE;
const BLOCKS: usize = OPEN_PAGES / BLOCK_PAGES;
const _: () = assert!(BLOCKS == 32, "one bit each in half a word");
const STEPS: u64 = 0xf;

/// What traps filled lately.
#[derive(Debug)]
pub(crate) struct Appetite([AtomicU64; PARTS]);

impl Appetite {
    pub(crate) fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    fn word(&self, part: usize) -> &AtomicU64 {
        &self.0[part % PARTS]
    }

    /// Pages that the trap at `at` fills at most: a power of two, from [`BLOCK_PAGES`] to [`OPEN_PAGES`].
    pub(crate) fn grow(&self, at: VirtAddr) -> usize {
        let part = at.as_usize() / PART_BYTES;
        let word = self.word(part);
        let was = word.load(Ordering::Relaxed);
        let (step, filled) = if was >> 36 == part as u64 { (was >> 32 & STEPS, was as u32) } else { (0, 0) };
        let pages = (BLOCK_PAGES << (2 * step)).min(OPEN_PAGES);
        let next = if pages == OPEN_PAGES { step } else { step + 1 };
        word.store((part as u64) << 36 | next << 32 | u64::from(filled), Ordering::Relaxed);
        pages
    }

    /// The pages to be filled for the trap at `at`: of the aligned `pages` around it, the run of blocks that no trap has filled.
    pub(crate) fn block(&self, at: VirtAddr, pages: usize) -> PageRange {
        let part = at.as_usize() / PART_BYTES;
        let word = self.word(part);
        let was = word.load(Ordering::Relaxed);
        let filled = if was >> 36 == part as u64 { was as u32 } else { 0 };
        let mine = at.as_usize() % PART_BYTES / BLOCK_BYTES;
        let (mut first, mut last) = (mine, mine);
        // A trap in a filled block has another reason: its own block is enough.
        if filled >> mine & 1 == 0 {
            let blocks = pages.clamp(BLOCK_PAGES, OPEN_PAGES) / BLOCK_PAGES;
            let low = mine / blocks * blocks;
            while first > low && filled >> (first - 1) & 1 == 0 {
                first -= 1;
            }
            while last + 1 < low + blocks && filled >> (last + 1) & 1 == 0 {
                last += 1;
            }
        }
        let bits = (u32::MAX >> (BLOCKS - 1 - (last - first))) << first;
        if was >> 36 == part as u64 {
            word.store(was | u64::from(bits), Ordering::Relaxed);
        }
        let start = VirtAddr::new(part * PART_BYTES + first * BLOCK_BYTES);
        PageRange::new(start, PageCount::new((last - first + 1) * BLOCK_PAGES))
    }

    /// The first [`MAP_PAGES`] pages of a mapping were filled: who comes back to it wants more of it.
    pub(crate) fn note_mapped(&self, start: VirtAddr) {
        let part = start.as_usize() / PART_BYTES;
        let step = (MAP_PAGES / BLOCK_PAGES).trailing_zeros() as u64 / 2 + 1;
        // The blocks that are filled whole.
        let (from, to) =
            (start.as_usize() % PART_BYTES, start.as_usize() % PART_BYTES + MAP_PAGES * PAGE_SIZE);
        let whole = from.div_ceil(BLOCK_BYTES)..(to / BLOCK_BYTES).min(BLOCKS);
        let bits = whole.fold(0, |bits, block| bits | 1u64 << block);
        self.word(part).store((part as u64) << 36 | step << 32 | bits, Ordering::Relaxed);
    }

    /// Pages of `range` were taken from the view. Trap code.
    pub(crate) fn forget(&self, range: PageRange) {
        let (first, last) =
            (range.start().as_usize() / PART_BYTES, (range.end().as_usize() - 1) / PART_BYTES);
        for part in first..=last.min(first + PARTS - 1) {
            self.word(part).store(0, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(part: usize, number: usize) -> VirtAddr {
        VirtAddr::new(part * PART_BYTES + number * PAGE_SIZE)
    }

    fn run(part: usize, first: usize, pages: usize) -> PageRange {
        PageRange::new(page(part, first), PageCount::new(pages))
    }

    #[test]
    fn traps_in_any_order_fill_every_page_of_a_part_once() {
        let mut rng = testkit::Rng::new(7);
        for _ in 0..200 {
            let appetite = Appetite::new();
            let mut there = [false; OPEN_PAGES];
            let mut traps = 0;
            while there.iter().any(|t| !t) {
                let at = rng.below(OPEN_PAGES);
                if there[at] {
                    continue;
                }
                traps += 1;
                let pages = appetite.grow(page(5, at));
                let filled = appetite.block(page(5, at), pages);
                assert!(filled.contains(page(5, at)), "the page that trapped");
                let first = (filled.start().as_usize() - page(5, 0).as_usize()) / PAGE_SIZE;
                for is_there in &mut there[first..first + filled.pages().get()] {
                    assert!(!std::mem::replace(is_there, true), "a page that is there already");
                }
            }
            assert!(traps <= 10, "{traps} traps");
        }
    }

    #[test]
    fn blocks_grow_until_pages_are_taken_away() {
        let appetite = Appetite::new();
        let trap = |at| appetite.block(page(9, at), appetite.grow(page(9, at)));
        assert_eq!(trap(3), run(9, 0, 16));
        assert_eq!(trap(40), run(9, 16, 48), "the rest of the 64 around it");
        assert_eq!(trap(300), run(9, 256, 256));
        assert_eq!(trap(300), run(9, 288, 16), "filled, and yet it traps");
        appetite.forget(run(9, 17, 1));
        assert_eq!(trap(300), run(9, 288, 16));
        assert_eq!(trap(3), run(9, 0, 64));
        // Another part with the same place.
        assert_eq!(appetite.block(page(17, 0), appetite.grow(page(17, 0))), run(17, 0, 16));
        assert_eq!(trap(3), run(9, 0, 16));
    }

    #[test]
    fn after_a_large_mapping_the_next_trap_fills_what_is_behind_it() {
        let appetite = Appetite::new();
        appetite.note_mapped(page(4, 8));
        assert_eq!(appetite.grow(page(4, 100)), 256);
        assert_eq!(appetite.block(page(4, 100), 256), run(4, 64, 192));
        assert_eq!(appetite.grow(page(4, 300)), 512);
    }
}
