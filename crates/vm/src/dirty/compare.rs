//! DIRTY by comparing with a copy: the last resort, and the only one that sees every view.

use super::ViewDirty;
use crate::mapping::Mapping;
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, VirtAddr};

pub(super) struct Compare {
    range: PageRange,
    shadow: Box<[u8]>,
    /// Pages that count as written whatever they hold (given back).
    forced: Box<[bool]>,
}

impl Compare {
    pub(super) fn start(range: PageRange, mapping: &Mapping) -> Self {
        let mut shadow = vec![0; range.len_bytes()].into_boxed_slice();
        let offset = range.start().as_usize() - mapping.range().start().as_usize();
        mapping
            .bytes()
            .read(offset, &mut shadow)
            .expect("the builder checked that the part lies in the mapping");
        let forced = vec![false; range.pages().get()].into_boxed_slice();
        Self { range, shadow, forced }
    }

    pub(super) fn take(&mut self, part: PageRange, mapping: &Mapping, found: &mut dyn FnMut(PageRange)) {
        let mut now = [0; PAGE_SIZE];
        let first = (part.start().as_usize() - self.range.start().as_usize()) / PAGE_SIZE;
        let mut run = 0;
        let end = first + part.pages().get();
        for index in first..=end {
            let changed = index < end && {
                let page = self.range.start().as_usize() + index * PAGE_SIZE;
                let offset = page - mapping.range().start().as_usize();
                mapping.bytes().read(offset, &mut now).expect("the part lies in the mapping");
                let old = &mut self.shadow[index * PAGE_SIZE..][..PAGE_SIZE];
                // A page that changes while it is read is copied as it was read: what comes later differs from that.
                let changed = std::mem::take(&mut self.forced[index]) || now != *old;
                if changed {
                    old.copy_from_slice(&now);
                }
                changed
            };
            if changed {
                run += 1;
            } else if run > 0 {
                let start = self.range.start().as_usize() + (index - run) * PAGE_SIZE;
                found(PageRange::new(VirtAddr::new(start), PageCount::new(run)));
                run = 0;
            }
        }
    }

    pub(super) fn give_back(&mut self, set: &ViewDirty) {
        for page in set.pages() {
            let index = page.as_usize().wrapping_sub(self.range.start().as_usize()) / PAGE_SIZE;
            if let Some(forced) = self.forced.get_mut(index) {
                *forced = true;
            }
        }
    }
}
