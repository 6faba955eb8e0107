//! Sets of dirty pages: of one view by address, of an object by offset.

use peregrine_base::{PAGE_SIZE, PageCount, PageRange, VirtAddr};

/// Pages written through one view, by address: sorted runs that don't touch.
///
/// ```
/// use peregrine_vm::{Capabilities, PAGE_SIZE, PageCount, PrivateMemory, Tracker};
/// let mut memory = PrivateMemory::new(PageCount::new(16))?;
/// let mut tracker = Tracker::of_private(&memory).start(&Capabilities::probe())?;
/// for page in [2, 3, 9] {
///     memory[page * PAGE_SIZE] = 1;
/// }
/// let dirty = tracker.take_dirty()?;
/// println!("{} pages in {} runs", dirty.page_count(), dirty.runs().len()); // 3 pages in 2 runs
/// let indices: Vec<usize> = dirty.indices(memory.range()).collect();
/// assert_eq!(indices, [2, 3, 9]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ViewDirty {
    runs: Vec<PageRange>,
    always: PageCount,
}

impl ViewDirty {
    pub(super) const fn new() -> Self {
        Self { runs: Vec::new(), always: PageCount::new(0) }
    }

    /// Adds pages beyond the last ones.
    pub(super) fn push(&mut self, run: PageRange) {
        match self.runs.last_mut() {
            Some(last) if last.end() == run.start() => {
                *last = PageRange::new(last.start(), PageCount::new(last.pages().get() + run.pages().get()));
            }
            _ => self.runs.push(run),
        }
    }

    pub(super) const fn set_always_dirty(&mut self, pages: PageCount) {
        self.always = pages;
    }

    /// The runs, lowest first.
    pub fn runs(&self) -> &[PageRange] {
        &self.runs
    }

    /// Each page's first address, lowest first.
    pub fn pages(&self) -> impl Iterator<Item = VirtAddr> + '_ {
        self.runs
            .iter()
            .flat_map(|r| (0..r.pages().get()).map(|i| VirtAddr::new(r.start().as_usize() + i * PAGE_SIZE)))
    }

    /// Which pages of `memory` they are, lowest first; pages outside of it are left out.
    pub fn indices(&self, memory: PageRange) -> impl Iterator<Item = usize> + '_ {
        let first = memory.start().as_usize();
        self.pages().filter(move |p| memory.contains(*p)).map(move |p| (p.as_usize() - first) / PAGE_SIZE)
    }

    /// How many pages.
    pub fn page_count(&self) -> PageCount {
        PageCount::new(self.runs.iter().map(|r| r.pages().get()).sum())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Whether the page of `addr` is in it.
    pub fn contains(&self, addr: VirtAddr) -> bool {
        let after = self.runs.partition_point(|r| r.start() <= addr);
        after > 0 && self.runs[after - 1].contains(addr)
    }

    /// How many of the pages are reported every time, because they can't be protected again (`vm.max_map_count` is used up).
    pub const fn always_dirty(&self) -> PageCount {
        self.always
    }
}

/// Consecutive pages of an object.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ObjectRun {
    /// Offset of the first page in the memfd or file.
    pub first: PageCount,
    /// How many.
    pub pages: PageCount,
}

/// Pages of a memfd or file that were written through any of several views: sorted runs that don't touch.
///
/// It has no addresses in it, so it means the same in every process that holds the object.
///
/// ```
/// use peregrine_vm::dirty::{ObjectDirty, ObjectRun};
/// use peregrine_vm::PageCount;
/// let run = |first, pages| ObjectRun { first: PageCount::new(first), pages: PageCount::new(pages) };
/// let mut all = ObjectDirty::from_runs([run(4, 2), run(0, 1)]);
/// all.absorb(&ObjectDirty::from_runs([run(5, 3)])); // what another view saw
/// assert_eq!(all.runs(), [run(0, 1), run(4, 4)]);
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ObjectDirty {
    runs: Vec<ObjectRun>,
}

impl ObjectDirty {
    /// No page.
    pub const fn new() -> Self {
        Self { runs: Vec::new() }
    }

    /// The pages of these runs, in any order.
    pub fn from_runs(runs: impl IntoIterator<Item = ObjectRun>) -> Self {
        let mut set = Self { runs: runs.into_iter().filter(|r| r.pages.get() > 0).collect() };
        set.normalise();
        set
    }

    fn normalise(&mut self) {
        self.runs.sort_unstable();
        let mut out: Vec<ObjectRun> = Vec::with_capacity(self.runs.len());
        for run in self.runs.drain(..) {
            match out.last_mut() {
                Some(last) if run.first.get() <= last.first.get() + last.pages.get() => {
                    let end = (run.first.get() + run.pages.get()).max(last.first.get() + last.pages.get());
                    last.pages = PageCount::new(end - last.first.get());
                }
                _ => out.push(run),
            }
        }
        self.runs = out;
    }

    /// Adds every page of `other`: the set of another view, or one that another process sent.
    pub fn absorb(&mut self, other: &Self) {
        self.runs.extend_from_slice(&other.runs);
        self.normalise();
    }

    /// The runs, lowest first.
    pub fn runs(&self) -> &[ObjectRun] {
        &self.runs
    }

    /// Each page's offset in the object, lowest first.
    pub fn pages(&self) -> impl Iterator<Item = PageCount> + '_ {
        self.runs.iter().flat_map(|r| (0..r.pages.get()).map(|i| PageCount::new(r.first.get() + i)))
    }

    /// How many pages.
    pub fn page_count(&self) -> PageCount {
        PageCount::new(self.runs.iter().map(|r| r.pages.get()).sum())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_page_is_numbered_from_the_start_of_the_memory_and_others_are_left_out() {
        let at = |page: usize, count| PageRange::new(VirtAddr::new(page * PAGE_SIZE), PageCount::new(count));
        let mut set = ViewDirty::new();
        [at(3, 2), at(7, 3)].into_iter().for_each(|run| set.push(run));
        assert_eq!(set.indices(at(4, 5)).collect::<Vec<_>>(), [0, 3, 4]);
        assert_eq!(set.indices(at(0, 20)).collect::<Vec<_>>(), [3, 4, 7, 8, 9]);
        assert_eq!(set.indices(at(5, 0)).count(), 0);
    }

    #[test]
    fn a_union_holds_each_page_once_whatever_the_order() {
        let run = |first, pages| ObjectRun { first: PageCount::new(first), pages: PageCount::new(pages) };
        let runs = [run(7, 2), run(1, 3), run(3, 2), run(9, 1), run(20, 0)];
        let set = ObjectDirty::from_runs(runs);
        let naive: BTreeSet<usize> =
            runs.iter().flat_map(|r| r.first.get()..r.first.get() + r.pages.get()).collect();
        assert_eq!(
            set.pages().map(PageCount::get).collect::<Vec<_>>(),
            naive.into_iter().collect::<Vec<_>>()
        );
        assert_eq!(set.runs(), [run(1, 4), run(7, 3)]);
    }
}
