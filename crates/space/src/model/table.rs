//! Page tables of the model: private to each core, one for all, or a mixture.
//!
//! Only last-level pages are kept (512 entries, 2 MiB); the levels above are books. Entries are atomics, so that a recording
//! shows which cores write the same line of a table.
//!
//! ```text
//!  Views     core ─▶ its own pages                   shootdown to the record's set
//!  Shared    all cores ─▶ the space's pages          shootdown to every core that uses the space
//!  Hybrid    core ─▶ its own page of 2 MiB, until `share_at` cores have one; from then on new fills there go to
//!            a shared page, and a core that fills through it gives its own up
//!                                                    shootdown to the record's set and the cores linked to shared pages
//! ```
//!
//! The hybrid is what the paper suggests and does not build: what everybody uses costs one page, what few use is still shot
//! down precisely; and a core over its limit of private pages drops the oldest, which costs it faults later.

use super::lock;
use crate::member::{MemberId, MemberSet};
use crate::mmu::{Change, Contents, FrameId, SpaceId};
use core::ops::Range;
use peregrine_base::Protection;
use peregrine_base::sync::{AtomicU64, Ordering};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::vec::Vec;

/// How the cores' page tables are made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tables {
    /// One for each core.
    Views,
    /// One for each space, used by all cores.
    Shared,
    /// Private pages, shared ones for what is widely shared.
    Hybrid {
        /// Cores with a private page of the same 2 MiB that make it worth sharing.
        share_at: usize,
        /// Private pages that a core may have.
        private_limit: usize,
    },
}

const ENTRIES: u64 = 512;

/// A translation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) contents: Contents,
    pub(super) rights: Protection,
    pub(super) life: u32,
}

impl Entry {
    /// present 0, rights 1..3, home 3, frame 4..32, life 32..64
    fn encode(self) -> u64 {
        let (home, frame) = match self.contents {
            Contents::Home => (8, 0),
            Contents::Frame(f) => (0, u64::from(f.get()) << 4),
        };
        1 | (self.rights as u64) << 1 | home | frame | u64::from(self.life) << 32
    }

    fn decode(word: u64) -> Option<Self> {
        let rights = match word >> 1 & 3 {
            0 => Protection::None,
            1 => Protection::Read,
            _ => Protection::ReadWrite,
        };
        let frame = FrameId::new((word as u32) >> 4);
        let contents = if word & 8 != 0 { Contents::Home } else { Contents::Frame(frame) };
        (word & 1 != 0).then_some(Self { contents, rights, life: (word >> 32) as u32 })
    }
}

#[derive(Debug)]
#[repr(align(4096))]
struct Page([AtomicU64; ENTRIES as usize]);

impl Page {
    fn new() -> Arc<Self> {
        Arc::new(Self(core::array::from_fn(|_| AtomicU64::new(0))))
    }

    fn entry(&self, page: u64) -> &AtomicU64 {
        &self.0[(page % ENTRIES) as usize]
    }

    /// Takes a change from the entries of `pages`; `first` is the page of entry 0.
    fn change(&self, first: u64, pages: &Range<u64>, change: Change) {
        for page in pages.start.max(first)..pages.end.min(first + ENTRIES) {
            let word = self.entry(page);
            let Some(mut entry) = Entry::decode(word.load(Ordering::Relaxed)) else { continue };
            let new = match change {
                Change::Drop => 0,
                Change::Restrict(rights) => {
                    entry.rights = entry.rights.min(rights);
                    entry.encode()
                }
            };
            word.store(new, Ordering::Relaxed);
        }
    }
}

type Key = (SpaceId, u64);

#[derive(Debug, Default)]
struct Private {
    pages: HashMap<Key, Arc<Page>>,
    oldest: VecDeque<Key>,
}

#[derive(Debug, Default)]
struct Common {
    /// Cores with a private page here.
    holders: MemberSet,
    page: Option<Arc<Page>>,
    /// Cores whose walks go through the shared page.
    linked: MemberSet,
}

#[derive(Debug)]
pub(super) struct Translations {
    tables: Tables,
    private: Vec<Mutex<Private>>,
    common: Mutex<HashMap<Key, Common>>,
    /// Now, and the most at a time.
    pages: Mutex<(usize, usize)>,
}

impl Translations {
    pub(super) fn new(cores: usize, tables: Tables) -> Self {
        Self {
            tables,
            private: (0..cores).map(|_| Mutex::default()).collect(),
            common: Mutex::default(),
            pages: Mutex::default(),
        }
    }

    pub(super) fn pages(&self) -> (usize, usize) {
        *lock(&self.pages)
    }

    fn made(&self) -> Arc<Page> {
        let mut pages = lock(&self.pages);
        pages.0 += 1;
        pages.1 = pages.1.max(pages.0);
        Page::new()
    }

    fn gone(&self, count: usize) {
        lock(&self.pages).0 -= count;
    }

    /// What the core's page table says of a page.
    pub(super) fn walk(&self, space: SpaceId, core: MemberId, page: u64) -> Option<Entry> {
        let key = (space, page / ENTRIES);
        let own = || lock(&self.private[core.index()]).pages.get(&key).cloned();
        let table = match self.tables {
            Tables::Views => own()?,
            Tables::Shared => {
                let mut common = lock(&self.common);
                let common = common.get_mut(&key)?;
                // From here on the core's TLB may hold any of this page's entries.
                common.linked.insert(core);
                common.page.clone()?
            }
            Tables::Hybrid { .. } => match own() {
                Some(page) => page,
                None => {
                    let common = lock(&self.common);
                    common.get(&key).filter(|c| c.linked.contains(core))?.page.clone()?
                }
            },
        };
        Entry::decode(table.entry(page).load(Ordering::Acquire))
    }

    /// Writes entries for `core`; tells ranges of pages whose entries it lost by that.
    pub(super) fn fill(
        &self,
        space: SpaceId,
        core: MemberId,
        pages: &Range<u64>,
        entry: Entry,
    ) -> Vec<Range<u64>> {
        let mut dropped = Vec::new();
        for page in pages.clone() {
            let key = (space, page / ENTRIES);
            let table = match self.tables {
                Tables::Views => self.own_page(core, key, usize::MAX, &mut dropped),
                Tables::Shared => self.common_page(core, key),
                Tables::Hybrid { share_at, private_limit } => {
                    if self.is_worth_sharing(core, key, share_at) {
                        self.give_up(core, key, &mut dropped);
                        self.common_page(core, key)
                    } else {
                        self.own_page(core, key, private_limit, &mut dropped)
                    }
                }
            };
            table.entry(page).store(entry.encode(), Ordering::Release);
        }
        dropped
    }

    fn is_worth_sharing(&self, core: MemberId, key: Key, share_at: usize) -> bool {
        let mut common = lock(&self.common);
        let common = common.entry(key).or_default();
        common.holders.insert(core);
        common.page.is_some() || common.holders.len() >= share_at
    }

    fn common_page(&self, core: MemberId, key: Key) -> Arc<Page> {
        let mut common = lock(&self.common);
        let common = common.entry(key).or_default();
        common.linked.insert(core);
        common.page.get_or_insert_with(|| self.made()).clone()
    }

    fn own_page(&self, core: MemberId, key: Key, limit: usize, dropped: &mut Vec<Range<u64>>) -> Arc<Page> {
        let mut own = lock(&self.private[core.index()]);
        if let Some(page) = own.pages.get(&key) {
            return page.clone();
        }
        while own.pages.len() >= limit {
            let Some(oldest) = own.oldest.pop_front() else { break };
            if own.pages.remove(&oldest).is_some() {
                self.gone(1);
                dropped.push(oldest.1 * ENTRIES..(oldest.1 + 1) * ENTRIES);
                if let Some(common) = lock(&self.common).get_mut(&oldest) {
                    common.holders.remove(core);
                }
            }
        }
        let page = self.made();
        own.pages.insert(key, page.clone());
        own.oldest.push_back(key);
        page
    }

    fn give_up(&self, core: MemberId, key: Key, dropped: &mut Vec<Range<u64>>) {
        let mut own = lock(&self.private[core.index()]);
        if own.pages.remove(&key).is_some() {
            own.oldest.retain(|k| *k != key);
            self.gone(1);
            dropped.push(key.1 * ENTRIES..(key.1 + 1) * ENTRIES);
        }
    }

    /// Takes a change from all that `core` walks through.
    pub(super) fn change(&self, space: SpaceId, core: MemberId, pages: &Range<u64>, change: Change) {
        let meets =
            |key: &Key| key.0 == space && key.1 * ENTRIES < pages.end && pages.start < (key.1 + 1) * ENTRIES;
        let keys = pages.start / ENTRIES..pages.end.div_ceil(ENTRIES);
        let few = keys.end - keys.start <= 4;
        {
            let own = lock(&self.private[core.index()]);
            if few {
                for index in keys.clone() {
                    if let Some(page) = own.pages.get(&(space, index)) {
                        page.change(index * ENTRIES, pages, change);
                    }
                }
            } else {
                for (key, page) in own.pages.iter().filter(|(key, _)| meets(key)) {
                    page.change(key.1 * ENTRIES, pages, change);
                }
            }
        }
        if self.tables != Tables::Views {
            let common = lock(&self.common);
            for (key, common) in common.iter().filter(|(key, _)| meets(key)) {
                if let Some(page) = &common.page {
                    page.change(key.1 * ENTRIES, pages, change);
                }
            }
        }
    }

    /// Who must be shot down, when `set` have filled these pages.
    pub(super) fn targets(&self, space: SpaceId, pages: &Range<u64>, set: &MemberSet) -> MemberSet {
        let mut targets = *set;
        match self.tables {
            Tables::Views => {}
            Tables::Shared => {
                // Which core has loaded which entry is not known: all that use the space.
                for (_, common) in lock(&self.common).iter().filter(|(key, _)| key.0 == space) {
                    targets.union_with(&common.linked);
                }
            }
            Tables::Hybrid { .. } => {
                for (key, common) in lock(&self.common).iter() {
                    let meets = key.1 * ENTRIES < pages.end && pages.start < (key.1 + 1) * ENTRIES;
                    if key.0 == space && meets && common.page.is_some() {
                        targets.union_with(&common.linked);
                    }
                }
            }
        }
        targets
    }

    pub(super) fn forget(&self, core: MemberId) {
        let mut own = lock(&self.private[core.index()]);
        self.gone(own.pages.len());
        *own = Private::default();
        for common in lock(&self.common).values_mut() {
            common.holders.remove(core);
            common.linked.remove(core);
        }
    }
}
