//! What a thread's heap had no room for, and what would make room: the reason that an abort does not tell.

use super::Supervisor;
use crate::control::{node, world};
use crate::thread;
use peregrine_base::sync::Ordering;
use peregrine_thread::carrier::Refusal;
use peregrine_thread::layout::SLOT_BYTES;
use peregrine_thread::slot::SlotHeader;
use peregrine_thread::stack_kind::is_windowed;
use peregrine_thread::template::template;

impl Supervisor {
    /// The last refusal of this thread's heap, on whatever node it was then, in words that follow those of its crash; none if
    /// there was none since the last rollback.
    pub(super) fn refusal(&self, slot: u32) -> Option<String> {
        let identity = thread::identity(slot);
        let words = |i: usize| node(i as u32).refused.each_ref().map(|word| word.load(Ordering::Relaxed));
        let [_, why] = (0..self.nodes.len()).map(words).find(|words| words[0] == identity)?;
        let place = place(slot, why == Refusal::Grant as u64);
        Some(format!(" after its heap had no room: {place}"))
    }

    /// What went before a rollback did not happen.
    pub(super) fn forget_refusals(&self) {
        (0..self.nodes.len()).for_each(|i| node(i as u32).refused[0].store(0, Ordering::Relaxed));
    }
}

/// What is full, and the setting that enlarges it.
fn place(slot: u32, granted_no_more: bool) -> String {
    if granted_no_more {
        let limit = world().memory_limit.load(Ordering::Relaxed) >> 20;
        format!("all threads together use the {limit} MiB they may; set PEREGRINE_MEMORY higher")
    } else if is_windowed(slot) {
        // SAFETY: a World has a template.
        let window = unsafe { template() }.windows.bytes() >> 10;
        format!(
            "its window of {window} KiB is full; set PEREGRINE_WINDOW higher, or use StackKind::Isomalloc"
        )
    } else {
        let (start, end) = SlotHeader::bounds(slot);
        let limited = if end - start < SLOT_BYTES {
            ", which the limit on address space makes smaller (ulimit -v)"
        } else {
            ""
        };
        format!("its slot of {} MiB is full{limited}", (end - start) >> 20)
    }
}
