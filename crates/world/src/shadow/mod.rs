//! The last image, in memory: a second copy of every live page, and of the tables.
//!
//! ```text
//!   World     slots │ arena │ tables        what the nodes change
//!                │ commit: pages written since the last image ▼        ▲ rollback: the same pages, the other way
//!   shadow    slots │ arena │ tables        what they all go back to    (mapped by the supervisor alone)
//! ```
//!
//! Both run while every node is paused, so the supervisor has the memory to itself. What was written is the union of the
//! nodes' reports; a node that died took its report with it, so every slot it ran is compared as a whole. The archive has no copy: what an
//! image has of it stays where it is (`archive`). Neither
//! direction can be half done for an observer: if the supervisor dies, so does the World, and a store keeps its own copy.

mod elsewhere;
mod misfit;
mod oracle;
mod pages;
mod table;

use crate::control::{
    NONE, Used, imaged, imaged_tables, numbers, numbers_of, record, state, tables_of, used_now,
};
use crate::frames::Frames;
use crate::memory::{MemoryError, map_memfd};
use crate::room::room;
pub use elsewhere::{TableImage, Unsaved};
pub use misfit::Misfit;
pub use pages::twin;
use pages::{PAGE, SHADOW, SHADOW_ARENA, arena_bytes, compare_and_copy, copy, discard, punch_slot};
use peregrine_base::sync::Ordering;
use peregrine_thread::layout::{ARENA, slot_index_of};
use peregrine_thread::slot::SlotHeader;
use peregrine_thread::stack_kind::{StackKind, is_windowed};
use peregrine_vm::dirty::DirtyRun;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use table::Table;

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
    /// The tables.
    tables: Vec<Table>,
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
    /// What the image has of the archive, for the oracle.
    #[cfg(feature = "killpoints")]
    archive: Option<BTreeMap<usize, Vec<u8>>>,
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
        let slots = room().slots_bytes.load(Ordering::Relaxed);
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
            #[cfg(feature = "killpoints")]
            archive: None,
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
            punch_slot(slot, twin);
            let (low, high) = SlotHeader::bounds(slot);
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
            // Before the tables, which say what is held.
            crate::archive::hold(|range| {
                if let Some(unsaved) = &mut self.unsaved {
                    unsaved.extend((range.start & !(PAGE - 1)..range.end).step_by(PAGE));
                }
            });
            self.arena_used = crate::arena::used_bytes();
            if changes.whole_arena {
                compare_and_copy(ARENA, SHADOW_ARENA, self.arena_used, &mut moved, self.unsaved.as_mut());
            }
            for (i, (addr, len)) in imaged_tables().into_iter().enumerate() {
                let now = core::slice::from_raw_parts(addr as *const u8, len);
                match self.tables.get_mut(i) {
                    Some(table) if table.addr() == addr => table.take(now),
                    _ => {
                        self.tables.truncate(i);
                        self.tables.push(Table::new(addr, now));
                    }
                }
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
        unsafe { crate::address_space::repair(&self.live) };
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
                            punch_slot(slot, |at| at);
                        }
                        // The copy's own header tells its extents; the World's may be torn.
                        let extents = self.extents_of(slot);
                        discard(extents[2].1, SlotHeader::bounds(slot).1);
                        for (start, end) in extents {
                            compare_and_copy(twin(start), start, end - start, &mut moved, None);
                        }
                    }
                    // Its frames go back zeroed (S2), half-made threads' too.
                    None if *state_now != state::FREE => punch_slot(slot, |at| at),
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
            for (table, (_, now)) in self.tables.iter().zip(tables_of(used_now())) {
                if now > table.len() {
                    core::ptr::write_bytes((table.addr() + table.len()) as *mut u8, 0, now - table.len());
                }
            }
            for table in &self.tables {
                table.for_each(|at, bytes| {
                    core::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len());
                });
            }
        }
        // SAFETY: as promised; the tables are the image's now.
        unsafe { crate::address_space::repair_regions(&crate::region::all()) };
        for slot in framed {
            self.frames.roll_back(slot, &mut moved);
        }
        self.check("after a rollback");
        settle_mail();
        moved
    }

    /// How many threads of each kind were ever used when the image was taken.
    fn used(&self) -> Used {
        let records = |kind: StackKind| {
            let bytes = self.tables.get(1 + kind as usize).map_or(0, Table::len);
            bytes / size_of::<crate::control::ThreadRecord>()
        };
        [records(StackKind::Isomalloc), records(StackKind::Alias), records(StackKind::Copy), 0, 0, 0]
    }
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
