//! `query`, `entries` and `viewers`: looking without a lock.

use super::{AddressSpace, pages_of, range_of};
use crate::desk::Member;
use crate::member::MemberSet;
use crate::mmu::{Frames, Mmu};
use crate::radix::PAGES;
use crate::record::Entry;
use core::ops::Range;
use peregrine_base::{PAGE_SHIFT, PageRange, VirtAddr};

impl<'m, M: Mmu, F: Frames> AddressSpace<'m, M, F> {
    /// What is mapped at `addr`: the page's entry, or `None` if it is not mapped. Takes no lock, writes nothing, waits for nobody
    /// (not for a member that is stopped in the middle of changing it), and is atomic with every operation.
    pub fn query(&self, member: &mut Member<'m>, addr: VirtAddr) -> Option<Entry> {
        let page = (addr.as_usize() >> PAGE_SHIFT) as u64;
        if page >= PAGES {
            return None;
        }
        let found = self.tree().look(&member.handle, page);
        let range = range_of(&(page..page + 1));
        found.value.is_mapped().then(|| found.value.entry(range, found.object, found.base))
    }

    /// The members that may have the page at `addr` in view, by its record: nobody else is asked when it is unmapped. Out of date
    /// once it is returned, if anybody faults or unmaps there meanwhile. Takes no lock.
    pub fn viewers(&self, member: &mut Member<'m>, addr: VirtAddr) -> MemberSet {
        let page = (addr.as_usize() >> PAGE_SHIFT) as u64;
        if page >= PAGES { MemberSet::EMPTY } else { self.tree().viewers(&member.handle, page) }
    }

    /// What is mapped in `range`, from left to right. Each entry by itself is a lookup: operations that take effect while the
    /// iteration is under way are seen in the part that it has not come to. An entry is as long as the record it is in; one
    /// mapping may be several.
    pub fn entries<'a>(&'a self, member: &'a mut Member<'m>, range: PageRange) -> Entries<'a, 'm, M, F> {
        let pages = pages_of(range).unwrap_or(0..0);
        Entries { space: self, member, pages }
    }
}

/// Entries of a range: see [`AddressSpace::entries`].
#[derive(Debug)]
pub struct Entries<'a, 'm, M, F> {
    space: &'a AddressSpace<'m, M, F>,
    member: &'a mut Member<'m>,
    pages: Range<u64>,
}

impl<M: Mmu, F: Frames> Iterator for Entries<'_, '_, M, F> {
    type Item = Entry;

    fn next(&mut self) -> Option<Entry> {
        while !self.pages.is_empty() {
            let found = self.space.tree().look(&self.member.handle, self.pages.start);
            let here = self.pages.start..found.pages.end.min(self.pages.end);
            self.pages.start = here.end;
            if found.value.is_mapped() {
                return Some(found.value.entry(range_of(&here), found.object, found.base));
            }
        }
        None
    }
}
