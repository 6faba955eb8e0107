//! The naive oracle of tracking: after every image and every rollback, all memory is what the image says, and the
//! records of slots and regions are those of its threads and names.

use super::Shadow;
#[cfg(feature = "killpoints")]
use super::pages::{PAGE, twin};
#[cfg(feature = "killpoints")]
use peregrine_thread::{slot::SlotHeader, stack_kind::is_windowed};
#[cfg(feature = "killpoints")]
use std::collections::BTreeMap;

impl Shadow {
    /// The naive oracle of tracking: every page of the image is what the World has, whoever reported what. For runs in which
    /// kill points are armed: it reads all memory of all threads.
    #[cfg(feature = "killpoints")]
    pub(super) fn check(&mut self, when: &str) {
        if !crate::killpoint::armed() {
            return;
        }
        self.check_archive(when);
        // SAFETY: every node is paused outside of operations, or was reset and its operation mended.
        for what in unsafe { crate::address_space::differences(&self.live) } {
            crate::killpoint::differs(format_args!("{when} {what}"));
        }
        for number in self.live.keys() {
            for (address, ours, copied) in self.frames.differences(*number) {
                // Below the stack pointer nothing means anything. (The last byte of a page that differs is told.)
                if address >= self.frames.stack_pointer(*number) {
                    crate::killpoint::differs(format_args!(
                        "{when} alias thread {number} has {ours:#x} at {address:#x}, {copied:#x} in the image"
                    ));
                }
            }
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
                    // Below the stack pointer nothing means anything, for a suspended thread is in `arch::switch`, which has no red zone.
                    // Extents leave room for one, so their first page may be one that lies below: the thread last wrote it when its
                    // stack was deeper, on a node that does not look after it any more.
                    // SAFETY: the copy of a live slot begins with an intact header.
                    let dead = of.map_or(0, |(slot, _)| unsafe {
                        let sp = (*(twin(SlotHeader::of(slot) as usize) as *const SlotHeader)).saved_sp;
                        match page {
                            _ if sp & !(PAGE - 1) == page => sp - page,
                            _ if (sp - 128) & !(PAGE - 1) == page => PAGE,
                            _ => 0,
                        }
                    });
                    let (a, b) = (&a[dead..], &b[dead..]);
                    if a != b {
                        let first = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(0);
                        crate::killpoint::differs(format_args!(
                            "{when} page {page:#x} of {of:?} differs from byte {first:#x}: {:x?} in the World, {:x?} in the image; extents {:x?}",
                            &a[first..(first + 8).min(a.len())],
                            &b[first..(first + 8).min(a.len())],
                            of.map(|o| self.extents_of(o.0))
                        ));
                    }
                }
            }
        }
    }

    /// What the last image had of the archive, and what is to stay of it, is unchanged: there is no other copy.
    #[cfg(feature = "killpoints")]
    fn check_archive(&mut self, when: &str) {
        // SAFETY: every node is paused; a slot of the archive is mapped.
        let now: BTreeMap<usize, Vec<u8>> = unsafe {
            let bytes =
                |r: &std::ops::Range<usize>| core::slice::from_raw_parts(r.start as *const u8, r.len());
            crate::archive::held().into_iter().map(|r| (r.start, bytes(&r).to_vec())).collect()
        };
        if let Some(then) = self.archive.replace(now) {
            let now = self.archive.as_ref().expect("just put there");
            // A rollback brings all of it back; the next image may have less, and more.
            let other = |at: &usize| match (then.get(at), now.get(at)) {
                (Some(a), Some(b)) => a != b,
                _ => when.ends_with("rollback"),
            };
            for at in then.keys().chain(now.keys()).filter(|at| other(at)) {
                crate::killpoint::differs(format_args!(
                    "{when} the archive has {:x?} at {at:#x}, the image {:x?}",
                    now.get(at),
                    then.get(at)
                ));
            }
        }
    }

    #[cfg(not(feature = "killpoints"))]
    #[inline(always)]
    pub(super) fn check(&self, _: &str) {}
}
