//! Holes: where a mapping goes that does not say where.
//!
//! Members that look in the same place find the same hole, and meet at its lock. So each begins somewhere else, goes on from its
//! own last mapping, and skips well beyond what is in use (the paper skips 4 GiB beyond a used span), so that mappings of
//! different members do not share nodes. Only if that finds nothing is every gap looked at.

use super::{AddressSpace, pages_of};
use crate::desk::Member;
use crate::mmu::{Frames, Mmu};
use peregrine_base::{PAGE_SHIFT, PageCount, PageRange, VirtAddr};

/// Pages in 4 GiB.
const FAR: u64 = 1 << 20;

impl<'m, M: Mmu, F: Frames> AddressSpace<'m, M, F> {
    /// The page at which to begin.
    pub(super) fn first_guess(&self, member: &Member<'m>, within: PageRange, hint: Option<VirtAddr>) -> u64 {
        let Some(pages) = pages_of(within) else { return 0 };
        if let Some(hint) = hint {
            return ((hint.as_usize() >> PAGE_SHIFT) as u64).clamp(pages.start, pages.end);
        }
        if let Some(last) = member.hint.filter(|last| pages.contains(last)) {
            return last;
        }
        let share = (pages.end - pages.start) / self.spaces.desks.len() as u64;
        pages.start + share * member.id().index() as u64
    }

    /// A hole of `count` pages, looked for from `from` to the end and then from the start.
    pub(super) fn find_hole(
        &self,
        member: &mut Member<'m>,
        within: PageRange,
        from: u64,
        count: PageCount,
    ) -> Option<u64> {
        let pages = pages_of(within)?;
        let count = count.get() as u64;
        let far = FAR.min((pages.end - pages.start) / 1024);
        let whole = pages.clone();
        [(from, far), (pages.start, far), (from, 0), (whole.start, 0)]
            .into_iter()
            .find_map(|(from, skip)| self.scan(member, from.max(pages.start)..pages.end, count, skip))
    }

    /// The first gap of `count` pages, `skip` pages beyond the used span before it.
    fn scan(&self, member: &Member<'m>, pages: core::ops::Range<u64>, count: u64, skip: u64) -> Option<u64> {
        let tree = self.tree();
        let (mut start, mut at) = (pages.start, pages.start);
        while at < pages.end {
            let found = tree.look(&member.handle, at);
            at = found.pages.end;
            if found.value.is_mapped() {
                start = at + skip;
                at = at.max(start);
            } else if at.min(pages.end).saturating_sub(start) >= count {
                return Some(start);
            }
        }
        None
    }
}
