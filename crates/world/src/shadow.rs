//! The last image, in memory: a second copy of every live page, and of the tables.
//!
//! ```text
//!   World     slots │ arena │ tables        what the nodes change
//!                │ commit: pages written since the last image ▼        ▲ rollback: the same pages, the other way
//!   shadow    slots │ arena │ tables        what they all go back to    (mapped by the supervisor alone)
//! ```
//!
//! Both run while every node is paused, so the supervisor has the memory to itself. What was written is the union of the
//! nodes' reports; a node that died took its report with it, so every slot it ran is compared as a whole. Neither
//! direction can be half done for an observer: if the supervisor dies, so does the World, and a store keeps its own copy.

use crate::control::{
    NONE, TABLES, imaged, imaged_tables, numbers, numbers_of, record, state, tables_of, used_now, world,
};
use crate::frames::Frames;
use crate::memory::{MemoryError, map_memfd};
use peregrine_base::sync::Ordering;
use peregrine_base::{PageRange, VirtAddr};
use peregrine_sys::mem::{self, Advice};
use peregrine_thread::layout::{ARENA, SLOT_BYTES, SLOTS, SLOTS_BYTES, slot_base, slot_index_of};
use peregrine_thread::slot::SlotHeader;
use peregrine_thread::stack_kind::{MOST_THREADS, StackKind, is_windowed};
use peregrine_vm::dirty::DirtyRun;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;

/// Where the slots' copies lie.
const SHADOW: usize = SLOTS + SLOTS_BYTES;
/// Where the arena's copy lies.
const SHADOW_ARENA: usize = 0x0b00_0000_0000;
const PAGE: usize = 4096;

/// Address of the copy of `addr`.
pub fn twin(addr: usize) -> usize {
    if slot_index_of(addr).is_some() { addr + (SHADOW - SLOTS) } else { addr - ARENA + SHADOW_ARENA }
}

/// What changed since the last image.
#[derive(Debug, Default)]
pub struct Changes {
    /// Ranges that some node reported as written.
    pub ranges: Vec<(usize, usize)>,
    /// Threads to compare as a whole.
    pub whole: BTreeSet<u32>,
    /// Compare the whole arena.
    pub whole_arena: bool,
}

impl Changes {
    /// Adds a node's report.
    pub fn add_report(&mut self, regions: &[DirtyRun]) {
        self.ranges
            .extend(regions.iter().map(|r| (r.range().start().as_usize(), r.range().end().as_usize())));
    }

    /// Adds the windowed ones of those that a node ran: what it wrote in windows no report tells.
    pub fn add_windowed(&mut self, ran: &[u32]) {
        self.whole.extend(ran.iter().filter(|n| is_windowed(**n)));
    }

    /// Adds all that a node may have written that cannot report.
    pub fn add_unknown(&mut self, ran: impl Iterator<Item = u32>) {
        self.whole.extend(ran);
        self.whole_arena = true;
    }
}

/// The copy.
#[derive(Debug)]
pub struct Shadow {
    _fds: Vec<OwnedFd>,
    /// Frames of alias threads.
    frames: Frames,
    /// Bytes of the tables: address and contents.
    tables: Vec<(usize, Vec<u8>)>,
    /// Used bytes of the arena.
    arena_used: usize,
    /// Generation of the thread whose pages each slot's copy holds.
    live: BTreeMap<u32, u32>,
    /// Position of the output that belongs to the image.
    pub output_tail: u64,
    /// Pages copied by commits since they were last taken, for whoever writes them elsewhere; `None`: nobody does.
    unsaved: Option<BTreeSet<usize>>,
    /// Slots whose copy was punched since, as `(slot, generation)`.
    ended: Vec<(u32, u32)>,
}

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

/// What a commit or rollback moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Pages copied.
    pub pages: u64,
    /// Pages compared.
    pub compared: u64,
}

impl Shadow {
    /// Maps an empty copy. In the supervisor, after the zygote was forked.
    pub fn new(window_bytes: usize) -> Result<Self, MemoryError> {
        let slots = world().slot_count.load(Ordering::Relaxed) as usize * SLOT_BYTES;
        let fds = vec![
            map_memfd("the image of the slots", c"peregrine-image", SHADOW, slots)?,
            map_memfd("the image of the arena", c"peregrine-image-arena", SHADOW_ARENA, arena_bytes())?,
        ];
        let frames = Frames::new(window_bytes)?;
        Ok(Self {
            _fds: fds,
            frames,
            tables: Vec::new(),
            arena_used: 0,
            live: BTreeMap::new(),
            output_tail: 0,
            unsaved: None,
            ended: Vec::new(),
        })
    }

    /// Whether the image holds this thread.
    pub fn holds(&self, slot: u32, generation: u32) -> bool {
        self.live.get(&slot) == Some(&generation)
    }

    /// Makes the World's present state the image.
    ///
    /// # Safety
    /// Every node is paused, and `changes` holds all that was written since the last commit.
    pub unsafe fn commit(&mut self, changes: &Changes) -> Moved {
        let mut moved = Moved::default();
        let live_now = |slot: u32| {
            let r = record(slot);
            let alive = state::is_alive(r.state.load(Ordering::Relaxed));
            alive.then(|| r.generation.load(Ordering::Relaxed))
        };
        // Threads that ended, and slots that another thread has now: their old pages go.
        let gone: Vec<u32> =
            self.live.iter().filter(|(s, g)| live_now(**s) != Some(**g)).map(|(s, _)| *s).collect();
        for slot in gone {
            if let Some(generation) = self.live.remove(&slot)
                && self.unsaved.is_some()
            {
                self.ended.push((slot, generation));
            }
            if is_windowed(slot) {
                self.frames.drop_copy(slot);
                continue;
            }
            punch(twin(slot_base(slot)));
            let (low, high) = (slot_base(slot), slot_base(slot) + SLOT_BYTES);
            if let Some(unsaved) = &mut self.unsaved {
                unsaved.retain(|page| !(low..high).contains(page));
            }
        }
        for slot in numbers() {
            if let Some(generation) = live_now(slot) {
                self.live.insert(slot, generation);
            }
        }
        // SAFETY: World and shadow are mapped here, and paused nodes write neither.
        unsafe {
            for &(start, end) in &changes.ranges {
                match slot_index_of(start) {
                    Some(slot) if !self.live.contains_key(&slot) => {}
                    _ => {
                        if let Some(unsaved) = &mut self.unsaved {
                            unsaved.extend((start..end).step_by(PAGE));
                        }
                        moved.pages += copy(start, twin(start), end - start);
                    }
                }
            }
            for slot in changes.whole.iter().filter(|s| self.live.contains_key(s)) {
                if is_windowed(*slot) {
                    self.frames.commit(*slot, &mut moved);
                    continue;
                }
                for (start, end) in (*SlotHeader::of(*slot)).extents(true) {
                    compare_and_copy(start, twin(start), end - start, &mut moved, self.unsaved.as_mut());
                }
            }
            self.arena_used = crate::arena::used_bytes();
            if changes.whole_arena {
                compare_and_copy(ARENA, SHADOW_ARENA, self.arena_used, &mut moved, self.unsaved.as_mut());
            }
            self.tables.clear();
            for (addr, len) in imaged_tables() {
                self.tables.push((addr, core::slice::from_raw_parts(addr as *const u8, len).to_vec()));
            }
        }
        self.output_tail = imaged().output_tail.with(|t| *t);
        self.check("after an image");
        moved
    }

    /// Makes the image the World's state again.
    ///
    /// # Safety
    /// Every living node is paused and has dropped what it ran; `changes` holds all that was written since the commit.
    pub unsafe fn roll_back(&mut self, changes: &Changes) -> Moved {
        let mut moved = Moved::default();
        // First: what it unmaps it punches.
        // SAFETY: as promised.
        unsafe { crate::records::repair(&self.live) };
        // The tables may be torn by the node that died: they are read with suspicion (S4).
        let arena_used_now = crate::arena::used_bytes().min(arena_bytes());
        let (now, then) = (used_now(), self.used());
        let either = core::array::from_fn(|i| now[i].max(then[i]));
        let now: Vec<(u32, u32, u32)> = numbers_of(either)
            .map(|n| {
                (n, record(n).state.load(Ordering::Relaxed), record(n).generation.load(Ordering::Relaxed))
            })
            .collect();
        // Alias threads that must get back their frames once the tables tell whether they have any.
        let mut framed = Vec::new();
        // SAFETY: as in `commit`.
        unsafe {
            for (slot, state_now, generation_now) in &now {
                let slot = *slot;
                let alive_now = state::is_alive(*state_now);
                match self.live.get(&slot) {
                    Some(g) if alive_now && g == generation_now && !changes.whole.contains(&slot) => {}
                    Some(_) if is_windowed(slot) => framed.push(slot),
                    None if StackKind::of(slot) == StackKind::Alias && *state_now != state::FREE => {
                        crate::windows::punch_frames(slot);
                    }
                    None if is_windowed(slot) => {}
                    Some(_) => {
                        if !alive_now || self.live[&slot] != *generation_now {
                            punch(slot_base(slot));
                        }
                        // The copy's own header tells its extents; the World's may be torn.
                        let extents = self.extents_of(slot);
                        discard(extents[2].1, slot_base(slot) + SLOT_BYTES);
                        for (start, end) in extents {
                            compare_and_copy(twin(start), start, end - start, &mut moved, None);
                        }
                    }
                    // Its frames go back zeroed (S2), half-made threads' too.
                    None if *state_now != state::FREE => punch(slot_base(slot)),
                    None => {}
                }
            }
            for &(start, end) in &changes.ranges {
                match slot_index_of(start) {
                    Some(slot) => {
                        let Some(_) = self.live.get(&slot) else { continue };
                        let extents = self.extents_of(slot);
                        discard(start.max(extents[2].1), end);
                        for (low, high) in extents {
                            let (from, to) = (start.max(low), end.min(high));
                            if from < to {
                                moved.pages += copy(twin(from), from, to - from);
                            }
                        }
                    }
                    None => {
                        let used = ARENA + self.arena_used;
                        discard(start.max(used), end);
                        let to = end.min(used);
                        if start < to {
                            moved.pages += copy(twin(start), start, to - start);
                        }
                    }
                }
            }
            if changes.whole_arena {
                discard(ARENA + self.arena_used, ARENA + arena_used_now);
                compare_and_copy(SHADOW_ARENA, ARENA, self.arena_used, &mut moved, None);
            }
            // Entries that were first used after the image hold what they did before: nothing. (Locks that the dead held, too.)
            for ((addr, bytes), (_, now)) in self.tables.iter().zip(tables_of(used_now())) {
                if now > bytes.len() {
                    core::ptr::write_bytes((addr + bytes.len()) as *mut u8, 0, now - bytes.len());
                }
            }
            for (addr, bytes) in &self.tables {
                core::ptr::copy_nonoverlapping(bytes.as_ptr(), *addr as *mut u8, bytes.len());
            }
        }
        // SAFETY: as promised; the tables are the image's now.
        unsafe { crate::records::repair_regions(&crate::region::all()) };
        for slot in framed {
            self.frames.roll_back(slot, &mut moved);
        }
        self.check("after a rollback");
        settle_mail();
        moved
    }

    /// The naive oracle of tracking: every page of the image is what the World has, whoever reported what. For runs in which
    /// kill points are armed: it reads all memory of all threads.
    #[cfg(feature = "killpoints")]
    fn check(&self, when: &str) {
        if !crate::killpoint::armed() {
            return;
        }
        let slots = self
            .live
            .iter()
            .filter(|(slot, _)| !is_windowed(**slot))
            .map(|(slot, generation)| (Some((*slot, *generation)), self.extents_of(*slot).to_vec()));
        let arena = [(None, vec![self.arena_extent()])];
        for (of, extents) in slots.chain(arena) {
            for (start, end) in extents {
                for page in (start..end).step_by(PAGE) {
                    // SAFETY: World and shadow are mapped here, and every node is paused.
                    let (a, b) =
                        unsafe { (&*(page as *const [u8; PAGE]), &*(twin(page) as *const [u8; PAGE])) };
                    // Below the stack pointer nothing means anything.
                    // SAFETY: the copy of a live slot begins with an intact header.
                    let dead = of.map_or(0, |(slot, _)| unsafe {
                        let sp = (*(twin(SlotHeader::of(slot) as usize) as *const SlotHeader)).saved_sp;
                        if sp & !(PAGE - 1) == page || (sp - 128) & !(PAGE - 1) == page {
                            (sp - 128).saturating_sub(page)
                        } else {
                            0
                        }
                    });
                    let (a, b) = (&a[dead..], &b[dead..]);
                    if a != b {
                        let first = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(0);
                        eprintln!(
                            "peregrine: {when} page {page:#x} of {of:?} differs from byte {first:#x}: {:x?} in the World, {:x?} in the image; extents {:x?}",
                            &a[first..(first + 8).min(a.len())],
                            &b[first..(first + 8).min(a.len())],
                            of.map(|o| self.extents_of(o.0))
                        );
                    }
                }
            }
        }
    }

    #[cfg(not(feature = "killpoints"))]
    #[inline(always)]
    fn check(&self, _: &str) {}

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

    /// A page of the image, by its World address.
    ///
    /// # Safety
    /// `page` lies in one of the extents, and no commit runs while the reference lives.
    pub unsafe fn page(&self, page: usize) -> &[u8; PAGE] {
        // SAFETY: as promised; S1: only this supervisor writes the shadow.
        unsafe { &*(twin(page) as *const [u8; PAGE]) }
    }

    /// The part of the image that is not pages.
    pub fn tables(&self) -> TableImage {
        TableImage {
            tables: self.tables.clone(),
            arena_used: self.arena_used,
            live: self.live.clone(),
            output_tail: self.output_tail,
        }
    }

    /// Makes an image read from elsewhere this one: pages first, by [`Shadow::set_page`], then this.
    ///
    /// # Errors
    /// The name of what does not fit this World.
    pub fn adopt(&mut self, image: TableImage) -> Result<(), &'static str> {
        let fits = |(addr, bytes): &(usize, Vec<u8>)| {
            crate::control::table_bounds(*addr).is_some_and(|most| bytes.len() <= most)
        };
        if image.tables.len() != TABLES || !image.tables.iter().all(fits) {
            return Err("tables");
        }
        if image.arena_used > arena_bytes() || image.live.keys().any(|s| !is_here(*s)) {
            return Err("extents");
        }
        (self.tables, self.arena_used, self.live) = (image.tables, image.arena_used, image.live);
        self.output_tail = image.output_tail;
        Ok(())
    }

    /// Puts a page into the image; `false` if there is no such page in a World.
    pub fn set_page(&mut self, page: usize, bytes: &[u8; PAGE]) -> bool {
        let inside = page.is_multiple_of(PAGE)
            && (slot_index_of(page).is_some_and(is_here) || (ARENA..ARENA + arena_bytes()).contains(&page));
        if inside {
            // SAFETY: inside the shadow, which only this supervisor writes.
            unsafe { (twin(page) as *mut [u8; PAGE]).write(*bytes) };
        }
        inside
    }

    /// How many threads of each kind were ever used when the image was taken.
    fn used(&self) -> [usize; 5] {
        let records = |kind: StackKind| {
            let bytes = self.tables.get(1 + kind as usize).map_or(0, |(_, b)| b.len());
            bytes / size_of::<crate::control::ThreadRecord>()
        };
        [records(StackKind::Isomalloc), records(StackKind::Alias), records(StackKind::Copy), 0, 0]
    }

    /// What `ThreadRecord::stored` of `number` was in the image.
    pub fn stored_of(&self, number: u32) -> usize {
        use crate::control::ThreadRecord;
        let kind = StackKind::of(number);
        let at = (number - kind.first()) as usize * size_of::<ThreadRecord>()
            + core::mem::offset_of!(ThreadRecord, stored);
        let bytes = self.tables.get(1 + kind as usize).and_then(|(_, b)| b.get(at..at + 8));
        usize::from_ne_bytes(bytes.and_then(|b| b.try_into().ok()).unwrap_or([0; 8]))
    }

    /// Whether a thread's block at `at` lies in the image's part of the arena (S4).
    pub fn holds_block(&self, at: usize) -> bool {
        use crate::windows::Block;
        let end = ARENA + self.arena_used;
        if !(ARENA..end.saturating_sub(size_of::<Block>())).contains(&at) || !at.is_multiple_of(16) {
            return false;
        }
        // SAFETY: inside the arena's copy.
        let head = unsafe { (*(twin(at) as *const Block)).head };
        head.statics_len <= end - at - size_of::<Block>()
    }

    /// The image's frames of alias threads.
    pub fn frames(&self) -> &Frames {
        &self.frames
    }
}

fn arena_bytes() -> usize {
    world().arena_bytes.load(Ordering::Relaxed)
}

/// Whether this World has room for thread `number`.
fn is_here(number: u32) -> bool {
    (number as usize) < MOST_THREADS
        && (is_windowed(number) || number < world().slot_count.load(Ordering::Relaxed))
}

/// Posts were under way when the image was taken; the inboxes they lay in are gone, so they take effect now.
pub fn settle_mail() {
    use crate::control::{mail, wait};
    for slot in numbers() {
        let r = record(slot);
        let bits = r.mail.swap(0, Ordering::Relaxed);
        let waits = matches!(r.state.load(Ordering::Relaxed), state::PARKED | state::SLEEPING);
        if waits && (bits & mail::WAKE != 0 || r.waiting.load(Ordering::Relaxed) == wait::CHECKPOINT) {
            r.state.store(state::RUNNABLE, Ordering::Relaxed);
        } else if bits & mail::WAKE != 0 {
            r.mail.store(mail::WAKE, Ordering::Relaxed);
        }
        r.move_to.store(NONE, Ordering::Relaxed);
        if r.state.load(Ordering::Relaxed) == state::RUNNING {
            r.state.store(state::RUNNABLE, Ordering::Relaxed);
        }
    }
}

fn punch(slot_start: usize) {
    discard(slot_start, slot_start + SLOT_BYTES);
}

/// Gives the frames of `[start, end)` back: what grew after the image reads as zero when it grows again (S2).
fn discard(start: usize, end: usize) {
    if start < end {
        // SAFETY: the range belongs to no thread, or to one that is about to be replaced there.
        let _ =
            unsafe { mem::advise(PageRange::covering(VirtAddr::new(start), end - start), Advice::Remove) };
    }
}

unsafe fn copy(from: usize, to: usize, len: usize) -> u64 {
    // SAFETY: the caller's.
    unsafe { core::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, len) };
    (len / PAGE) as u64
}

unsafe fn compare_and_copy(
    from: usize,
    to: usize,
    len: usize,
    moved: &mut Moved,
    mut copied: Option<&mut BTreeSet<usize>>,
) {
    for off in (0..len).step_by(PAGE) {
        let n = PAGE.min(len - off);
        // SAFETY: the caller's; S1: these slices live for the comparison only, while nobody writes.
        unsafe {
            let a = core::slice::from_raw_parts((from + off) as *const u8, n);
            let b = core::slice::from_raw_parts((to + off) as *const u8, n);
            moved.compared += 1;
            if a != b {
                moved.pages += copy(from + off, to + off, n);
                if let Some(copied) = &mut copied {
                    copied.insert(from + off);
                }
            }
        }
    }
}
