//! The shadow as a store sees it: what it has not written yet, the pages and tables to write, and those that it read back.

use super::Shadow;
use super::misfit::{self, Misfit};
use super::pages::{PAGE, arena_bytes, twin};
use super::table::Table;
use crate::archive::{self, CHUNK, Chunk};
use crate::control::{TABLES, world};
use crate::frames::Frames;
use crate::room::room;
use peregrine_base::sync::Ordering;
use peregrine_thread::layout::{ARCHIVE, ARENA, slot_index_of};
use peregrine_thread::slot::SlotHeader;
use peregrine_thread::stack_kind::{StackKind, is_windowed};
use std::collections::{BTreeMap, BTreeSet};

/// What has no copy elsewhere yet.
#[derive(Debug, Default)]
pub struct Unsaved {
    /// Addresses of pages, in the World.
    pub pages: BTreeSet<usize>,
    /// Threads that ended, as `(slot, generation)`.
    pub ended: Vec<(u32, u32)>,
    /// Alias threads whose frames changed.
    pub frames: BTreeSet<u32>,
}

/// The part of an image that is not pages.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct TableImage {
    /// Tables: address and bytes.
    pub tables: Vec<(usize, Vec<u8>)>,
    /// Used bytes of the arena.
    pub arena_used: usize,
    /// Live threads: slot and generation.
    pub live: BTreeMap<u32, u32>,
    /// Position of the output.
    pub output_tail: u64,
}

impl Shadow {
    /// From now on, notes what is copied for somebody who writes it elsewhere.
    pub fn note_unsaved(&mut self) {
        self.unsaved.get_or_insert_default();
        self.frames.note_unsaved();
    }

    /// Takes what was noted.
    pub fn take_unsaved(&mut self) -> Unsaved {
        let pages = self.unsaved.as_mut().map(std::mem::take).unwrap_or_default();
        Unsaved { pages, ended: std::mem::take(&mut self.ended), frames: self.frames.take_unsaved() }
    }

    /// Puts back what could not be written.
    pub fn put_back_unsaved(&mut self, mut unsaved: Unsaved) {
        if let Some(mine) = &mut self.unsaved {
            mine.append(&mut unsaved.pages);
            unsaved.ended.append(&mut self.ended);
            self.ended = unsaved.ended;
            self.frames.put_back_unsaved(unsaved.frames);
        }
    }

    /// Live threads of the image: slot and generation.
    pub fn live(&self) -> &BTreeMap<u32, u32> {
        &self.live
    }

    /// All pages of the image that belong to `slot`: ranges of World addresses.
    pub fn extents_of(&self, slot: u32) -> [(usize, usize); 3] {
        // SAFETY: the copy of a live slot begins with an intact header; nobody writes the shadow but this supervisor.
        unsafe { (*(twin(SlotHeader::of(slot) as usize) as *const SlotHeader)).extents(true) }
    }

    /// The arena's part of the image.
    pub fn arena_extent(&self) -> (usize, usize) {
        (ARENA, ARENA + self.arena_used)
    }

    /// The archive's.
    pub fn archive_extent(&self) -> (usize, usize) {
        let chunks = self.tables.last().map_or(0, Table::len) / size_of::<Chunk>();
        (ARCHIVE, ARCHIVE + chunks * CHUNK)
    }

    /// A page of the image, by its World address. Of one of the archive only what the image has is what it was: nodes write the rest.
    ///
    /// # Safety
    /// `page` lies in one of the extents, and no commit runs meanwhile.
    pub unsafe fn page(&self, page: usize) -> [u8; PAGE] {
        // SAFETY: as promised; S1: a copy, for the archive is written while it is read.
        unsafe { (twin(page) as *const [u8; PAGE]).read() }
    }

    /// The part of the image that is not pages.
    pub fn tables(&self) -> TableImage {
        TableImage {
            tables: self.tables.iter().map(|t| (t.addr(), t.bytes())).collect(),
            arena_used: self.arena_used,
            live: self.live.clone(),
            output_tail: self.output_tail,
        }
    }

    /// Whether there is room for an image, as far as its tables tell.
    ///
    /// # Errors
    /// What does not fit this World.
    pub fn has_room_for(image: &TableImage) -> Result<(), Misfit> {
        let fits = |(addr, bytes): &(usize, Vec<u8>)| {
            crate::control::table_bounds(*addr).is_some_and(|most| bytes.len() <= most)
        };
        if image.tables.len() != TABLES || !image.tables.iter().all(fits) {
            return Err(Misfit::of("threads and channels"));
        }
        let chunks = image.tables.last().map_or(0, |t| t.1.len()) / size_of::<Chunk>();
        if chunks * CHUNK > room().archive_bytes.load(Ordering::Relaxed) {
            return Err(Misfit::of(misfit::PACKED));
        }
        if image.arena_used > arena_bytes() {
            return Err(Misfit::of(misfit::MESSAGES));
        }
        // The last one: its slot tells how many there must be.
        image
            .live
            .keys()
            .rev()
            .find(|s| !is_here(**s))
            .map_or(Ok(()), |number| Err(Misfit::of_thread(*number)))
    }

    /// Makes an image read from elsewhere this one: pages first, by [`Shadow::set_page`], then this.
    ///
    /// # Errors
    /// What does not fit this World.
    pub fn adopt(&mut self, image: TableImage) -> Result<(), Misfit> {
        Self::has_room_for(&image)?;
        for slot in image.live.keys().filter(|s| !is_windowed(**s)) {
            let end = SlotHeader::bounds(*slot).1;
            let header = twin(SlotHeader::of(*slot) as usize) as *mut SlotHeader;
            // SAFETY: inside the shadow, which only this supervisor writes; the limit of a heap is a plain word.
            if !unsafe { (*header).heap.set_limit(end) } {
                return Err(Misfit::of(misfit::HEAP));
            }
        }
        self.tables = image.tables.iter().map(|(addr, bytes)| Table::new(*addr, bytes)).collect();
        (self.arena_used, self.live) = (image.arena_used, image.live);
        self.output_tail = image.output_tail;
        Ok(())
    }

    /// Puts a page into the image; `false` if there is no such page in a World.
    pub fn set_page(&mut self, page: usize, bytes: &[u8; PAGE]) -> bool {
        let inside = page.is_multiple_of(PAGE)
            && (slot_index_of(page).is_some_and(|s| is_here(s) && page < SlotHeader::bounds(s).1)
                || (ARENA..ARENA + arena_bytes()).contains(&page)
                || (ARCHIVE..ARCHIVE + room().archive_bytes.load(Ordering::Relaxed)).contains(&page));
        if inside {
            // SAFETY: inside the shadow, or the archive before any node exists: only this supervisor writes there.
            unsafe { (twin(page) as *mut [u8; PAGE]).write(*bytes) };
        }
        inside
    }

    /// What `ThreadRecord::stored` of `number` was in the image.
    pub fn stored_of(&self, number: u32) -> usize {
        use crate::control::ThreadRecord;
        let kind = StackKind::of(number);
        let at = (number - kind.first()) as usize * size_of::<ThreadRecord>()
            + core::mem::offset_of!(ThreadRecord, stored);
        let word = self.tables.get(1 + kind as usize).and_then(|t| t.word(at));
        usize::from_ne_bytes(word.unwrap_or([0; 8]))
    }

    /// Whether a thread's block at `at` lies in the image's part of the arena, or of the archive (S4).
    pub fn holds_block(&self, at: usize) -> bool {
        use crate::blocks::Block;
        let (start, end) = if archive::contains(at) { self.archive_extent() } else { self.arena_extent() };
        if !(start..end.saturating_sub(size_of::<Block>())).contains(&at) || !at.is_multiple_of(16) {
            return false;
        }
        // SAFETY: inside the copy of one or the other.
        let head = unsafe { (*(twin(at) as *const Block)).head };
        head.statics_len <= end - at - size_of::<Block>()
    }

    /// The image's frames of alias threads.
    pub fn frames(&self) -> &Frames {
        &self.frames
    }
}

/// Whether this World has room for thread `number`.
fn is_here(number: u32) -> bool {
    let kind = StackKind::of(number);
    match kind {
        StackKind::Isomalloc => number < world().slot_count.load(Ordering::Relaxed),
        _ => ((number - kind.first()) as usize) < room().records(kind),
    }
}
