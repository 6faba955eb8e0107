//! A thread's pages from its chain of images: for each address the newest image that lists it.
//!
//! ```text
//!             0x1000  0x2000  0x3000  0x4000
//! full  3       a       b       c       ·         plan, in order of address:
//! delta 4       ·       B       0       ·           (0x1000, full 3) (0x2000, delta 6) (0x4000, delta 6)
//! delta 6       ·       β       ·       d           0x3000 became zero: left out
//! ```
//!
//! First all indexes are read and merged; then pages are read where they lie, neighbours in one call, and each is
//! checked before it is handed out. Pages of zeros are never handed out: memory that is made anew is zero.

use crate::error::{Misuse, Result, StoreError};
use crate::store::Store;
use crate::world::WorldImage;
use core::cmp::Reverse;
use peregrine_base::{PAGE_SIZE, VirtAddr};
use peregrine_image::{BuildId, ImageIndex, Manifest, Member, PageRef, Sequence, Source, ThreadId};
use std::fs::File;
use std::path::PathBuf;

/// Pages read in one call.
const RUN_PAGES: usize = 64;

/// One image of a chain, open.
#[derive(Debug)]
struct Link {
    path: PathBuf,
    file: File,
}

/// The pages of one thread, each once, in ascending order; every page that does not come is zero.
#[derive(Debug)]
pub struct ThreadPages {
    links: Vec<Link>,
    plan: Vec<(u32, PageRef)>,
    /// The next of `plan` to hand out, and where the pages that were read ahead begin and end.
    next: usize,
    read_from: usize,
    read_to: usize,
    run: Vec<u8>,
}

impl ThreadPages {
    /// How many pages will come in all.
    pub fn page_count(&self) -> usize {
        self.plan.len()
    }

    /// The next page, checked. After an error the thread's pages so far are worth nothing.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], which names file and page; [`StoreError::Io`].
    // Not an iterator: the page is lent until the next call.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<(VirtAddr, &[u8; PAGE_SIZE])>> {
        let Some(&(link, page)) = self.plan.get(self.next) else { return Ok(None) };
        if self.next >= self.read_to {
            self.read_run()?;
        }
        let at = (self.next - self.read_from) * PAGE_SIZE;
        let bytes = self.run[at..].first_chunk().expect("a run holds the pages that it was read for");
        page.check(bytes).map_err(StoreError::damaged(&self.links[link as usize].path))?;
        self.next += 1;
        Ok(Some((page.address(), bytes)))
    }

    /// Reads the pages from `next` on that lie one after the other in one file.
    fn read_run(&mut self) -> Result<()> {
        let ahead = &self.plan[self.next..];
        let (link, start) = place(&ahead[0]);
        let pages = (0u64..)
            .zip(ahead.iter().take(RUN_PAGES))
            .take_while(|(n, page)| place(page) == (link, start + n * PAGE_SIZE as u64))
            .count();
        let Link { path, file } = &self.links[link as usize];
        self.run.resize(pages * PAGE_SIZE, 0);
        Source::read_exact_at(file, &mut self.run, start).map_err(StoreError::io("read", path))?;
        (self.read_from, self.read_to) = (self.next, self.next + pages);
        Ok(())
    }
}

/// Where a planned page lies. Zero pages are not planned.
fn place((link, page): &(u32, PageRef)) -> (u32, u64) {
    (*link, page.offset_bytes().unwrap_or(0))
}

impl Store {
    /// The pages of `thread` in `image`.
    ///
    /// # Errors
    /// [`Misuse::NoSuchThread`]; for each image of the chain that it is damaged, missing, foreign or not the one that
    /// was committed.
    pub fn pages(&self, image: &WorldImage, thread: ThreadId) -> Result<ThreadPages> {
        let Manifest { chains, sequence, build, .. } = &image.manifest;
        let at = chains.binary_search_by_key(&thread, |chain| chain.thread);
        let at = at.map_err(|_| Misuse::NoSuchThread { sequence: *sequence, thread })?;
        let mut plan = Vec::new();
        let mut links = Vec::new();
        let mut base = None;
        for (n, member) in (0u32..).zip(&chains[at].members) {
            let expected = Expected { thread, build: *build, base, named_by: *sequence };
            let (path, file, index) = self.open_member(member, &expected)?;
            plan.extend(index.pages().iter().map(|page| (n, *page)));
            links.push(Link { path, file });
            base = Some(member.sequence);
        }
        plan.sort_unstable_by_key(|(n, page)| (page.address(), Reverse(*n)));
        plan.dedup_by_key(|(_, page)| page.address());
        plan.retain(|(_, page)| page.offset_bytes().is_some());
        Ok(ThreadPages { links, plan, next: 0, read_from: 0, read_to: 0, run: Vec::new() })
    }

    /// Opens one image of a chain and checks everything but its pages, and that it is the one that was committed.
    pub(crate) fn open_member(
        &self,
        member: &Member,
        expected: &Expected,
    ) -> Result<(PathBuf, File, ImageIndex)> {
        let path = self.paths.image(expected.thread, member.generation, member.sequence);
        let file = File::open(&path).map_err(StoreError::io("open", &path))?;
        let index = ImageIndex::read(&file).map_err(StoreError::damaged(&path))?;
        let info = *index.info();
        if info.world != self.format.world {
            return Err(StoreError::ForeignWorld { path, found: info.world, expected: self.format.world });
        }
        let seal = (format!("{:#010x}", index.seal()), format!("{:#010x}", member.seal));
        let pairs = [
            ("build", (info.build.to_string(), expected.build.to_string())),
            ("thread", (info.thread.to_string(), expected.thread.to_string())),
            ("generation", (info.generation.to_string(), member.generation.to_string())),
            ("sequence", (info.sequence.to_string(), member.sequence.to_string())),
            ("base", (format!("{:?}", info.base), format!("{:?}", expected.base))),
            ("length", (index.len_bytes().to_string(), member.len_bytes.to_string())),
            ("seal", seal),
        ];
        for (field, (found, expected_value)) in pairs {
            if found != expected_value {
                let sequence = expected.named_by;
                return Err(StoreError::Replaced { path, sequence, field, found, expected: expected_value });
            }
        }
        Ok((path, file, index))
    }
}

/// What a manifest says about one image of a chain besides its [`Member`].
pub(crate) struct Expected {
    pub(crate) thread: ThreadId,
    pub(crate) build: BuildId,
    pub(crate) base: Option<Sequence>,
    pub(crate) named_by: Sequence,
}
