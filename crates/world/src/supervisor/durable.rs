//! Images on disk: what the store keeps of a World, and how a World begins from it.
//!
//! ```text
//!   shadow (an image in memory) ──▶ commit: changed pages of each thread, arena, tables, new output ──▶ store
//!   store ──▶ shadow ──▶ World: the rollback of recovery, from an image that another life made
//! ```
//!
//! The shadow does not change while the supervisor writes it out, and the nodes run meanwhile. Output leaves after the disk
//! has it; what had left before the death is cut off (a file) or repeated and marked (anything else).

use super::outlet::{Outlet, Sink};
use crate::contract::{Contract, ContractError, build_id};
use crate::control::{self, MAX_NODES, imaged, record, world};
use crate::killpoint::supervisor_at;
use crate::memory::STRINGS;
use crate::output;
use crate::shadow::{Changes, Misfit, Shadow, TableImage};
use crate::windows;
use peregrine_base::VirtAddr;
use peregrine_base::sync::Ordering;
use peregrine_store::{Generation, Pruned, Sequence, Store, StoreError, ThreadId, WorldId, WorldImage};
use peregrine_sys::timer::monotonic_ns;
use peregrine_thread::slot::SlotHeader;
use peregrine_thread::stack_kind::{StackKind, is_windowed};
use peregrine_thread::template::template;
use peregrine_thread::window_image;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Why a store could not be used.
#[derive(Debug, thiserror::Error)]
pub enum DurableError {
    /// The store's own reason.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The image does not fit this process.
    #[error(transparent)]
    Contract(#[from] ContractError),
    /// The image does not fit into what this process maps.
    #[error(transparent)]
    Misfit(#[from] Misfit),
    /// No random number for the World's name.
    #[error("cannot read random bytes: {0}")]
    Random(std::io::Error),
    /// The control part of an image can't be read.
    #[error(
        "the control part of the image can't be understood ({0}): it was made by another version of peregrine; use the executable in the store's bin directory"
    )]
    Control(String),
}

/// The store's names for the arena and the archive.
const ARENA_THREAD: ThreadId = ThreadId::new(u64::MAX);
const ARCHIVE_THREAD: ThreadId = ThreadId::new(u64::MAX - 1);

fn thread_id(slot: u32, generation: u32) -> ThreadId {
    ThreadId::new(u64::from(generation) << 32 | u64::from(slot))
}

/// The part of a disk image that is not pages.
#[derive(Serialize, Deserialize)]
struct Control {
    contract: Contract,
    tables: TableImage,
    /// Argument and environment strings.
    strings: Vec<u8>,
    /// The statics template of the process that made the image.
    statics_template: Vec<u8>,
    /// Monotonic clock at the image.
    clock_ns: u64,
    /// How long the World had run, all lives together, less what was lost with each.
    ran_ns: u64,
    /// Where output goes, and how much of each descriptor's had been committed before and with this image.
    sink: Sink,
}

/// A store in use.
pub(super) struct Durable {
    store: Store,
    generation: Generation,
    contract: Contract,
    strings_len: usize,
    /// When the World would have begun if all that is kept had been done in one life.
    begun_ns: u64,
    /// Output position of the last disk image.
    output_done: u64,
    commits: u64,
}

/// What a resume found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// Sequence of the image.
    pub sequence: u64,
    /// Life that goes on with it.
    pub generation: u64,
    /// Threads in it.
    pub threads: usize,
    /// Pages read.
    pub pages: u64,
    /// How long reading took, ns.
    pub load_ns: u64,
    /// Output bytes written again.
    pub repeated_bytes: u64,
    /// How long the World had run when the image was taken, ns: the work that is kept. All lives together, less what was lost with each.
    pub kept_ns: u64,
}

impl Durable {
    /// Makes a new store in `dir`.
    pub(super) fn create(dir: &Path, contract: Contract, strings_len: usize) -> Result<Self, DurableError> {
        watch_disk();
        let build = build_id()?;
        let exe = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
        let world = WorldId::random().map_err(DurableError::Random)?;
        let mut store = Store::create(dir, world, &exe, build)?;
        let generation = store.claim_generation(None)?;
        let begun_ns = monotonic_ns();
        Ok(Self { store, generation, contract, strings_len, begun_ns, output_done: 0, commits: 0 })
    }

    /// Opens the store in `dir` and reads its latest image, or the one that is `wanted`, into the shadow; all of it must then be
    /// rolled back to.
    pub(super) fn resume(
        dir: &Path,
        wanted: Option<u64>,
        contract: Contract,
        shadow: &mut Shadow,
        outlet: &mut Outlet,
    ) -> Result<(Self, Resumed, u64), DurableError> {
        let begun = monotonic_ns();
        watch_disk();
        let build = build_id()?;
        let mut store = Store::open(dir)?;
        let image = match wanted.and_then(Sequence::new) {
            None => store.latest(build)?,
            Some(sequence) => store.go_back_to(sequence, build)?,
        };
        let control: Control =
            postcard::from_bytes(image.control()).map_err(|e| DurableError::Control(e.to_string()))?;
        contract.check(&control.contract)?;
        Shadow::has_room_for(&control.tables)?;
        let pages = read_pages(&store, &image, shadow).map_err(|e| match e {
            DurableError::Store(damage @ (StoreError::Damaged { .. } | StoreError::Replaced { .. })) => {
                store.latest_damaged(image.sequence(), damage).into()
            }
            other => other,
        })?;
        let (old_statics, strings_len) = (control.statics_template, control.strings.len());
        shadow.adopt(control.tables)?;
        put_strings(&control.strings);
        let mend = Mend { then: &old_statics, vdso_then: control.contract.vdso(), vdso_now: contract.vdso() };
        for number in shadow.live().keys() {
            mend.thread(shadow, *number);
        }
        supervisor_at("image read");
        let repeated_bytes = release_again(&store, &image, control.sink, outlet)?;
        supervisor_at("old output cut");
        // What is released again counts as released when it is out, not before: this life too may be killed.
        let generation = store.claim_generation(Some(&image))?;
        let resumed = Resumed {
            sequence: image.sequence().get(),
            generation: generation.get(),
            threads: shadow.live().len(),
            pages,
            load_ns: monotonic_ns() - begun,
            repeated_bytes,
            kept_ns: control.ran_ns,
        };
        world().released.store(shadow.output_tail, Ordering::Release);
        let output_done = shadow.output_tail;
        // On a machine that was started a moment ago this may lie before its start.
        let begun_ns = monotonic_ns().wrapping_sub(control.ran_ns);
        let me = Self { store, generation, contract, strings_len, begun_ns, output_done, commits: 0 };
        Ok((me, resumed, control.clock_ns))
    }

    /// Writes the shadow out. On an error the World goes on with the images it has; the caller says so.
    pub(super) fn commit(&mut self, shadow: &mut Shadow, outlet: &Outlet) -> Result<u64, StoreError> {
        let unsaved = shadow.take_unsaved();
        let mut written = self.write(shadow, &unsaved, outlet);
        // On a full disk there may be images that nothing needs any more.
        if written.as_ref().is_err_and(StoreError::is_full)
            && self.store.prune().is_ok_and(|p| p != Pruned::default())
        {
            written = self.write(shadow, &unsaved, outlet);
        }
        match written {
            Ok(bytes) => {
                self.output_done = shadow.output_tail;
                self.commits += 1;
                if self.commits.is_multiple_of(64) {
                    let _ = self.store.prune();
                }
                Ok(bytes)
            }
            Err(e) => {
                shadow.put_back_unsaved(unsaved);
                Err(e)
            }
        }
    }

    fn write(
        &mut self,
        shadow: &Shadow,
        unsaved: &crate::shadow::Unsaved,
        outlet: &Outlet,
    ) -> Result<u64, StoreError> {
        let sequence = self.store.next_sequence()?;
        let control = Control {
            contract: self.contract.clone(),
            tables: shadow.tables(),
            strings: strings(self.strings_len),
            statics_template: statics_template(),
            clock_ns: monotonic_ns(),
            ran_ns: monotonic_ns().wrapping_sub(self.begun_ns),
            sink: outlet.sink_after(shadow.output_tail),
        };
        let new_output = output::raw(self.output_done, shadow.output_tail);
        let mut commit = self.store.begin(self.generation, sequence)?;
        for (slot, generation) in &unsaved.ended {
            commit.forget(thread_id(*slot, *generation))?;
        }
        let mut pages = unsaved.pages.iter().copied().peekable();
        for number in &unsaved.frames {
            write_frames(&mut commit, shadow, *number)?;
        }
        // In the order of their addresses.
        let whole = |extent: (usize, usize)| (extent, vec![extent]);
        let slot =
            |slot: u32| (peregrine_thread::slot::SlotHeader::bounds(slot), shadow.extents_of(slot).to_vec());
        let parts =
            [(ARENA_THREAD, whole(shadow.arena_extent())), (ARCHIVE_THREAD, whole(shadow.archive_extent()))]
                .into_iter()
                .chain(
                    shadow
                        .live()
                        .iter()
                        .filter(|(s, _)| !is_windowed(**s))
                        .map(|(s, g)| (thread_id(*s, *g), slot(*s))),
                );
        for (thread, ((low, high), extents)) in parts {
            let mut changed = Vec::new();
            while let Some(page) = pages.next_if(|p| *p < high) {
                if page >= low {
                    changed.push(page);
                }
            }
            let full = commit.wants_full(thread);
            if changed.is_empty() && (!full || low == high) {
                continue;
            }
            let list = if full {
                extents.into_iter().flat_map(|(start, end)| (start..end).step_by(4096)).collect()
            } else {
                changed
            };
            let base = if full { None } else { commit.base_of(thread) };
            let mut image = commit.thread_image(thread, base)?;
            for page in list {
                // SAFETY: a page of the image; no commit to the shadow runs meanwhile.
                image.page(VirtAddr::new(page), &unsafe { shadow.page(page) })?;
            }
            image.finish()?;
        }
        commit.output(&new_output);
        let control = postcard::to_allocvec(&control).unwrap_or_default();
        Ok(commit.finish(control)?.bytes)
    }

    /// Says that output up to `position` has left.
    pub(super) fn released(&mut self, position: u64) {
        let to = position.min(self.output_done);
        if self.store.released().is_ok_and(|r| r < to) {
            let _ = self.store.mark_released(to);
        }
    }

    /// Sequence of the next image on disk.
    pub(super) fn sequence(&self) -> u64 {
        self.store.next_sequence().map_or(0, |s| s.get())
    }
}

/// Shows each step that touches the disk to who counts them.
fn watch_disk() {
    #[cfg(feature = "killpoints")]
    core::mem::forget(peregrine_store::step::watch(|step| {
        supervisor_at(step.name);
        Ok(())
    }));
}

/// Writes all that an alias thread has: a few pages, always in full, for what it gave back must not come again.
fn write_frames(
    commit: &mut peregrine_store::Commit<'_>,
    shadow: &Shadow,
    number: u32,
) -> Result<(), StoreError> {
    let Some(generation) = shadow.live().get(&number) else { return Ok(()) };
    let pages = shadow.frames().pages_of(number);
    let id = thread_id(number, *generation);
    if pages.is_empty() {
        return commit.forget(id);
    }
    let pages = pages.iter().map(|(address, bytes)| (VirtAddr::new(*address), bytes));
    commit.thread(id, None, pages)
}

/// Writes the output that may not have left, where the old life's went.
fn release_again(
    store: &Store,
    image: &WorldImage,
    sink: Sink,
    outlet: &mut Outlet,
) -> Result<u64, DurableError> {
    let unreleased = store.unreleased(image)?;
    let records = output::parse(&unreleased.bytes);
    outlet.continue_from(sink, image.output_end(), records);
    Ok(unreleased.bytes.len() as u64)
}

/// Reads all pages of all threads; how many.
fn read_pages(store: &Store, image: &WorldImage, shadow: &mut Shadow) -> Result<u64, DurableError> {
    let mut pages = 0;
    for thread in image.threads() {
        let mut list = store.pages(image, thread)?;
        let number = thread.get() as u32;
        let framed =
            ![ARENA_THREAD, ARCHIVE_THREAD].contains(&thread) && StackKind::of(number) == StackKind::Alias;
        while let Some((address, page)) = list.next()? {
            let known = if framed {
                shadow.frames().set_page(number, address.as_usize(), page)
            } else {
                shadow.set_page(address.as_usize(), page)
            };
            if !known {
                return Err(Misfit::of_page(address.as_usize()).into());
            }
            pages += 1;
        }
    }
    Ok(pages)
}

fn strings(len: usize) -> Vec<u8> {
    // SAFETY: mapped, written before any node existed.
    unsafe { core::slice::from_raw_parts(STRINGS as *const u8, len) }.to_vec()
}

fn put_strings(bytes: &[u8]) {
    let n = bytes.len().min(32 << 20);
    // SAFETY: no node exists yet; the region has room for 32 MiB.
    unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), STRINGS as *mut u8, n) };
}

fn statics_template() -> Vec<u8> {
    // SAFETY: installed before any node existed and read-only since.
    unsafe { core::slice::from_raw_parts(template().statics(), template().statics_len) }.to_vec()
}

/// A thread's statics hold words that name the process that made the image: the loader's and libc's. Each one that still equals
/// the old process's template is replaced by this process's own. Addresses in the vDSO, which crates keep after looking them up
/// once, are moved along with it.
struct Mend<'a> {
    /// The old process's template.
    then: &'a [u8],
    vdso_then: [usize; 2],
    vdso_now: [usize; 2],
}

impl Mend<'_> {
    /// Mends the statics of thread `number` in the image, wherever they are.
    fn thread(&self, shadow: &Shadow, number: u32) {
        // SAFETY: the shadow's copies of a live thread's memory, before any node exists; blocks lie in the arena's copy, which
        // was checked to hold them.
        unsafe {
            let t = template();
            if !is_windowed(number) {
                let header = &*(crate::shadow::twin(SlotHeader::of(number) as usize) as *const SlotHeader);
                let bytes = crate::shadow::twin(header.statics) as *mut u8;
                return self.words(0, core::slice::from_raw_parts_mut(bytes, t.statics_len));
            }
            let block = shadow.stored_of(number);
            if block == windows::IN_FRAMES {
                shadow.frames().mend_statics(number, |offset, bytes| self.words(offset, bytes));
            } else if shadow.holds_block(block) {
                let at = crate::shadow::twin(block);
                let head = (*(at as *const crate::blocks::Block)).head;
                let mut next = at + size_of::<crate::blocks::Block>();
                for (offset, len) in window_image::granules(t, head.granules) {
                    self.words(offset, core::slice::from_raw_parts_mut(next as *mut u8, len));
                    next += len;
                }
            }
        }
    }

    /// Mends `bytes` of a thread's statics that lie at `offset`, a multiple of 8.
    fn words(&self, offset: usize, bytes: &mut [u8]) {
        // SAFETY: installed before any node exists, and read-only since.
        let now = unsafe { core::slice::from_raw_parts(template().statics(), template().statics_len) };
        let word = |b: &[u8]| usize::from_ne_bytes(b.try_into().unwrap_or([0; 8]));
        for (i, own) in bytes.chunks_exact_mut(8).enumerate() {
            let at = offset + i * 8..offset + i * 8 + 8;
            let (Some(then), Some(new)) = (self.then.get(at.clone()), now.get(at)) else { return };
            let value = word(own);
            if value == word(then) {
                own.copy_from_slice(new);
            } else if self.vdso_then != self.vdso_now
                && (self.vdso_then[0]..self.vdso_then[1]).contains(&value)
            {
                own.copy_from_slice(&(value - self.vdso_then[0] + self.vdso_now[0]).to_ne_bytes());
            }
        }
    }
}

/// Gives every thread a node that exists, and a deadline that will come: sleepers wake by the monotonic clock, which starts
/// over when the machine does. `then_ns` is what it showed when the image was made.
pub(super) fn settle_in(nodes: u32, then_ns: u64) {
    debug_assert!(nodes as usize <= MAX_NODES);
    let restarted_by = then_ns.saturating_sub(monotonic_ns());
    let then = imaged().nodes.swap(nodes, Ordering::Relaxed);
    for slot in control::numbers() {
        let r = record(slot);
        let at = r.node.load(Ordering::Relaxed);
        // One on a carried call stays in its domain, whose number follows the nodes'.
        let now = if at < then { at % nodes } else { at - then + nodes };
        r.node.store(now, Ordering::Relaxed);
        let wake_at = r.wake_at.load(Ordering::Relaxed);
        r.wake_at.store(wake_at.saturating_sub(restarted_by), Ordering::Relaxed);
    }
}

/// Everything that an image from disk holds.
pub(super) fn all_of(shadow: &Shadow) -> Changes {
    Changes { ranges: Vec::new(), whole: shadow.live().keys().copied().collect(), whole_arena: true }
}
