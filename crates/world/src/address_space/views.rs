//! What nodes have in view, and how it is taken from them.
//!
//! Every node maps all slots, and the kernel fills a page when it is touched: there is nothing to fill. What is taken from views is
//! taken by punching the file, in one call for all of them; the record's set says who loses something, and they are counted.

use super::stuck::{self, Wait};
use super::{PUNCHED, WAIT};
use crate::control::node;
use core::convert::Infallible;
use peregrine_base::sync::{AtomicBool, Ordering};
use peregrine_base::{PageRange, Protection, VirtAddr};
use peregrine_space::{Change, Contents, Frames, MemberId, MemberSet, Mmu, SpaceId};
use peregrine_sys::mem::{self, Advice};
use peregrine_thread::layout::slot_index_of;
use peregrine_thread::slot::SlotHeader;

/// The page tables of the nodes, and the files behind them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Views;

impl Mmu for Views {
    type Error = Infallible;

    /// The kernel fills, page by page.
    fn fill(
        &self,
        _: SpaceId,
        _: MemberId,
        _: PageRange,
        _: Contents,
        _: Protection,
    ) -> Result<(), Infallible> {
        Ok(())
    }

    fn shootdown(&self, _: SpaceId, _: MemberId, range: PageRange, targets: &MemberSet, _: Change) {
        let mut nodes = targets.words()[0];
        while nodes != 0 {
            node(nodes.trailing_zeros()).unmapped.fetch_add(1, Ordering::Relaxed);
            nodes &= nodes - 1;
        }
        punch(range);
        punched().store(true, Ordering::Relaxed);
    }

    fn wait(&self, _: MemberId, _: MemberId) {
        // A holder that died takes this node's reset with it.
        peregrine_sys::io::yield_now();
    }

    /// Never, for the runtime's operations don't fail; but a holder that takes long is named.
    fn gives_up(&self, member: MemberId, owner: MemberId, turns: u32) -> bool {
        // SAFETY: private memory of this process, zeros at first; nothing else lies there.
        unsafe { &*(WAIT as *const Wait) }.turn(member, owner, turns);
        false
    }

    fn process_of(&self, member: MemberId) -> Option<u32> {
        stuck::process_of(member)
    }
}

impl Frames for Views {
    /// Frames go back zeroed (S2), be they in nobody's view.
    fn vacated(&self, _: SpaceId, _: MemberId, range: PageRange) {
        if !punched().swap(false, Ordering::Relaxed) {
            punch(range);
        }
    }
}

pub(super) fn punched() -> &'static AtomicBool {
    // SAFETY: private memory of this process, zeros at first; nothing else lies there.
    unsafe { &*(PUNCHED as *const AtomicBool) }
}

/// Punches what a slot uses. Regions keep their pages.
fn punch(range: PageRange) {
    let base = range.start().as_usize();
    let Some(slot) = slot_index_of(base) else { return };
    // A header that makes no sense tells nothing: then all of the slot goes.
    let all = SlotHeader::bounds(slot).1;
    let end = SlotHeader::extents_of_foreign(slot, false).map_or(all, |parts| parts[2].1);
    let used = PageRange::covering(VirtAddr::new(base), end.min(all) - base);
    // SAFETY: the slot's thread is gone, and its record locked.
    let _ = unsafe { mem::advise(used, Advice::Remove) };
}
