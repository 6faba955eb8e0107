//! After a death: what members left is mended, and what is mapped is made what the image says.

use super::{Record, SUPERVISOR, held, slot_range};
use crate::control::world;
use peregrine_base::sync::Ordering;
use peregrine_base::{PageRange, VirtAddr};
use peregrine_space::{Backing, MemberId, MemberSet, Place, Stopped};
use peregrine_thread::layout::{ARENA, SLOT_BYTES, SLOT_COUNT, SLOTS, slot_index_of};
use peregrine_thread::stack_kind::is_windowed;
use std::collections::BTreeMap;

/// After deaths, or before an image from disk is made the World's state: finishes or undoes what every member was doing, and maps
/// the slots of `live` threads (by number, with their generations) and no others. Regions follow ([`repair_regions`]).
///
/// # Safety
/// In the supervisor, while every living node is paused and has dropped what it did; memory is rolled back after this, for what
/// is unmapped here is punched.
pub unsafe fn repair(live: &BTreeMap<u32, u32>) {
    // SAFETY: as promised.
    unsafe { held() }.operate(|space, me| {
        let mut reset = me.spaces().members();
        reset.remove(SUPERVISOR);
        // The killed among them leave the sets when their successors are made ([`replace`]).
        space.recover_all(me, Stopped { reset, ..Stopped::default() });
        let wanted = |slot: u32| live.get(&slot).map(|g| Record::Slot { generation: *g }.mapping().backing);
        let all = PageRange::covering(VirtAddr::new(SLOTS), SLOT_COUNT * SLOT_BYTES);
        let mut missing = live.clone();
        missing.retain(|slot, _| !is_windowed(*slot));
        let mut surplus = Vec::new();
        for entry in space.entries(me, all) {
            let Some(slot) = slot_index_of(entry.range.start().as_usize()) else { continue };
            if wanted(slot) == Some(entry.backing) {
                missing.remove(&slot);
            } else {
                surplus.push(slot);
            }
        }
        for slot in surplus {
            let _ = space.unmap(me, slot_range(slot));
        }
        for (slot, generation) in missing {
            let (range, mapping) = (slot_range(slot), Record::Slot { generation }.mapping());
            let mapped = space.map(me, Place::FixedNoReplace(range.start()), range.pages(), &mapping);
            debug_assert!(mapped.is_ok(), "nothing else lies there");
        }
    });
}

/// Maps the regions of the restored table and no others.
///
/// # Safety
/// As [`repair`], once the tables are the image's.
pub unsafe fn repair_regions(wanted: &[(PageRange, u32, u32)]) {
    let mut missing: BTreeMap<usize, (PageRange, Backing, Record)> = wanted
        .iter()
        .map(|(range, entry, generation)| {
            let record = Record::Region { entry: *entry, generation: *generation };
            (range.start().as_usize(), (*range, record.mapping().backing, record))
        })
        .collect();
    // SAFETY: as promised.
    unsafe { held() }.operate(|space, me| {
        let all = PageRange::covering(VirtAddr::new(ARENA), world().room.arena_bytes.load(Ordering::Relaxed));
        let mut surplus = Vec::new();
        for entry in space.entries(me, all) {
            // One mapping may be several records, each as wide as its place in the array.
            let of = wanted.iter().find(|(range, ..)| range.contains(entry.range.start()));
            let fits = of.and_then(|(range, ..)| missing.get(&range.start().as_usize()));
            match fits {
                Some((range, backing, _))
                    if *backing == entry.backing && entry.range.end() <= range.end() => {}
                _ => surplus.push(entry.range),
            }
        }
        for range in surplus {
            let _ = space.unmap(me, range);
        }
        missing.retain(|_, (range, ..)| space.query(me, range.start()).is_none());
        for (range, _, record) in missing.into_values() {
            let mapped =
                space.map(me, Place::FixedNoReplace(range.start()), range.pages(), &record.mapping());
            debug_assert!(mapped.is_ok(), "nothing else lies there");
        }
    });
}

/// The processes of these nodes are gone or not yet made: they have nothing in view, and their places are free.
///
/// # Safety
/// In the supervisor, while every other node is paused outside of operations.
pub unsafe fn replace(nodes: impl Iterator<Item = u32>) {
    let killed: MemberSet = nodes.map(|n| MemberId::new(n as usize)).collect();
    if !killed.is_empty() {
        // SAFETY: as promised.
        unsafe { held() }.operate(|space, me| {
            space.recover_all(me, Stopped { killed, views_are_gone: true, ..Stopped::default() })
        });
    }
}

/// What is mapped and should not be, or should be and is not, when these threads live and the table of regions is what it is: for the
/// oracle.
///
/// # Safety
/// In the supervisor, while every living node is paused outside of operations.
#[cfg(feature = "killpoints")]
pub unsafe fn differences(live: &BTreeMap<u32, u32>) -> Vec<String> {
    let slots = live
        .iter()
        .filter(|(slot, _)| !is_windowed(**slot))
        .map(|(slot, generation)| (slot_range(*slot), Record::Slot { generation: *generation }));
    let regions = crate::region::all()
        .into_iter()
        .map(|(range, entry, generation)| (range, Record::Region { entry, generation }));
    let wanted: Vec<_> =
        slots.chain(regions).map(|(range, record)| (range, record, record.mapping())).collect();
    let mut found = Vec::new();
    let mut mapped = vec![0; wanted.len()];
    // SAFETY: as promised.
    unsafe { held() }.operate(|space, me| {
        let arena = world().room.arena_bytes.load(Ordering::Relaxed);
        for (start, bytes) in [(SLOTS, SLOT_COUNT * SLOT_BYTES), (ARENA, arena)] {
            for entry in space.entries(me, PageRange::covering(VirtAddr::new(start), bytes)) {
                // One mapping may be several records.
                let owner = wanted.iter().position(|(range, _, mapping)| {
                    range.intersect(entry.range) == Some(entry.range) && mapping.backing == entry.backing
                });
                match owner {
                    Some(owner) => mapped[owner] += entry.range.pages().get(),
                    None => found
                        .push(format!("{:?} is mapped as {:?}, and is nobody's", entry.range, entry.backing)),
                }
            }
        }
    });
    for ((range, record, _), mapped) in wanted.iter().zip(mapped) {
        if mapped != range.pages().get() {
            found.push(format!("of {range:?}, {record:?}, {mapped} pages are mapped"));
        }
    }
    found
}
