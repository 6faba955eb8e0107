//! Models: what packed threads of one function have in common is kept once.
//!
//! ```text
//!   model of a function │ stack │ header, TLS, TCB, dtv │ heap │   of the first of its threads that was packed
//!           ⊕                each piece from the header on: stacks downwards, the rest upwards
//!   another's bytes     │ stack │ header, TLS, TCB, dtv │ heap │   ──▶ zeros but for what is its own ──▶ lz4
//! ```
//!
//! A million threads that wait in one function have the same return addresses, the same sizes, the same layout, and addresses into
//! their windows that are equal but for the window. So those are first *renamed* to what they would be in the first window: a
//! suspended thread that held 200 bytes took 840 packed without a model. Both steps are their own inverses: to unpack is to do
//! them once more, in the other order. A model is written once, before its place is known, and stays for the life of the World; as
//! all the arena it is part of every image, so threads packed in an earlier life find theirs.
//!
//! *Between two threads*: no static, no thread-local, no panic, no allocation but in the arena.

use crate::arena;
use crate::control::{imaged, record};
use crate::killpoint::{Point, at as kill_at};
use peregrine_base::sync::Ordering;
use peregrine_thread::slot::SlotHeader;
use peregrine_thread::stack_kind::StackKind;
use peregrine_thread::template::TemplateHeader;
use peregrine_thread::window_image::Head;

/// Most models of a World. The threads of other functions are packed without.
const MOST: usize = 32;
/// Most bytes of one.
const MOST_BYTES: usize = 64 << 10;

/// The models of a World.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Models {
    entries: [Model; MOST],
}

/// A function, and where the bytes of its model lie, behind their [`Head`].
#[repr(C)]
#[derive(Clone, Copy)]
struct Model {
    key: u64,
    at: usize,
}

impl Models {
    /// None yet.
    pub const NONE: Self = Self { entries: [Model { key: 0, at: 0 }; MOST] };
}

/// Tells threads of one function and kind from all others. (If two shared it, they would share a model that suits one of them.)
fn key(number: u32) -> u64 {
    let entry = |i: usize| record(number).entry[i].load(Ordering::Relaxed) as u64;
    // Never 0: a body has an address.
    entry(0) ^ entry(1).rotate_left(20) ^ (StackKind::of(number) as u64) << 60
}

/// Takes from the live bytes at `live` (without statics) what they have in common with their function's model, which they become if
/// there is none. Returns what [`restore`] must be told: 0 if there is no model, or it is no help.
///
/// # Safety
/// `live` holds what [`Head::gather`] wrote for thread `number`, from the stack on, and is aligned to 8 bytes.
pub unsafe fn subtract(number: u32, t: &TemplateHeader, head: &Head, live: usize) -> u64 {
    // SAFETY: as promised; models are complete before they are known, and never change.
    unsafe {
        rename(number, t, head, live);
        let key = key(number);
        let known = imaged().models.with(|m| m.entries.iter().position(|e| e.key == key));
        let Some(id) = known.or_else(|| keep(key, head, live)) else { return 0 };
        let Some(model) = of(id as u64 + 1) else { return 0 };
        let before = words_of_its_own(head, live);
        exclusive_or(head, live, model);
        if words_of_its_own(head, live) < before {
            return id as u64 + 1;
        }
        // It waits elsewhere in the function than the model did.
        exclusive_or(head, live, model);
        0
    }
}

/// Undoes [`subtract`]; `false` if there is no such model.
///
/// # Safety
/// As [`subtract`], of which `id` is the result.
pub unsafe fn restore(number: u32, t: &TemplateHeader, head: &Head, live: usize, id: u64) -> bool {
    // SAFETY: as promised.
    unsafe {
        match of(id) {
            Some(model) => exclusive_or(head, live, model),
            None if id != 0 => return false,
            None => {}
        }
        rename(number, t, head, live);
    }
    true
}

/// Where model `id` (counted from 1) lies.
fn of(id: u64) -> Option<*const Head> {
    let at = imaged().models.with(|m| m.entries.get((id as usize).wrapping_sub(1)).map_or(0, |e| e.at));
    (at != 0).then_some(at as *const Head)
}

/// Makes these bytes the model for `key`, if there is room.
unsafe fn keep(key: u64, head: &Head, live: usize) -> Option<usize> {
    let len = head.len() - head.statics_len;
    if len > MOST_BYTES || imaged().models.with(|m| m.entries.iter().all(|e| e.at != 0)) {
        return None;
    }
    let layout = core::alloc::Layout::from_size_align(size_of::<Head>() + len, 16).ok()?;
    let at = arena::allocate_always(layout)?;
    // SAFETY: just allocated, with room for both.
    unsafe {
        (at as *mut Head).write(*head);
        core::ptr::copy_nonoverlapping(live as *const u8, (at + size_of::<Head>()) as *mut u8, len);
    }
    kill_at(Point::ModelMade);
    // Another node may have been as quick, or have taken the last place.
    let place = imaged().models.with(|m| {
        let place = m.entries.iter().position(|e| e.at == 0 || e.key == key)?;
        let free = m.entries[place].at == 0;
        if free {
            m.entries[place] = Model { key, at };
        }
        Some((place, free))
    });
    kill_at(Point::ModelKnown);
    if !matches!(place, Some((_, true))) {
        // SAFETY: nobody has heard of it.
        unsafe { arena::give_back(at, layout) };
    }
    place.map(|(place, _)| place)
}

/// Start and length in words of stack, header and heap behind `head`, whose bytes lie at `live`.
fn pieces(head: &Head, live: usize) -> [(*mut u64, usize); 3] {
    let header = live + head.stack_len;
    let heap = header + head.header_len;
    [(live, head.stack_len), (header, head.header_len), (heap, head.heap_len)]
        .map(|(at, len)| (at as *mut u64, len / 8))
}

/// How many words are not zero: about what they take when they are packed.
unsafe fn words_of_its_own(head: &Head, live: usize) -> usize {
    let (first, words) = (live as *const u64, (head.len() - head.statics_len) / 8);
    // SAFETY: the caller's bytes.
    (0..words).filter(|i| unsafe { first.add(*i).read() } != 0).count()
}

/// Replaces the words that a thread has in common with the model by zeros, and back.
unsafe fn exclusive_or(head: &Head, live: usize, model: *const Head) {
    // SAFETY: the caller's bytes, and those behind the model's head.
    unsafe {
        let theirs = pieces(&*model, model as usize + size_of::<Head>());
        for (i, ((own, own_len), (other, other_len))) in
            pieces(head, live).into_iter().zip(theirs).enumerate()
        {
            let both = own_len.min(other_len);
            // Stacks end at the header.
            let (own, other) = match i {
                0 => (own.add(own_len - both), other.add(other_len - both)),
                _ => (own, other),
            };
            for word in 0..both {
                own.add(word).write(own.add(word).read() ^ other.add(word).read());
            }
        }
    }
}

/// Exchanges the addresses of the thread's window for those of the first of its kind, header for header, and back.
unsafe fn rename(number: u32, t: &TemplateHeader, head: &Head, live: usize) {
    let (size, own) = (t.windows.bytes(), t.windows.base_of(number));
    let first =
        own.wrapping_sub(SlotHeader::of(number) as usize).wrapping_add(t.windows.first_header_of(number));
    if own == first {
        return;
    }
    for (at, words) in pieces(head, live) {
        for i in 0..words {
            // SAFETY: the caller's bytes.
            unsafe { at.add(i).write(renamed(at.add(i).read(), own as u64, first as u64, size as u64)) };
        }
    }
}

/// `word` with the ranges of `size` from `a` and from `b`, which do not overlap, exchanged.
fn renamed(word: u64, a: u64, b: u64, size: u64) -> u64 {
    match (word.wrapping_sub(a), word.wrapping_sub(b)) {
        (inside, _) if inside < size => b.wrapping_add(inside),
        (_, inside) if inside < size => a.wrapping_add(inside),
        _ => word,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(stack: usize, heap: usize) -> Head {
        Head { granules: 0, statics_len: 0, stack_len: stack * 8, header_len: 64, heap_len: heap * 8 }
    }

    /// `count` words that depend on `seed` and on how far they are from the header.
    fn bytes(head: &Head, seed: u64) -> Vec<u64> {
        let (stack, all) = (head.stack_len / 8, head.len() / 8);
        (0..all)
            .map(|i| {
                let from_header = i as u64 + 1000 - stack as u64;
                if from_header.is_multiple_of(5) { seed } else { from_header * 0x1_0001 }
            })
            .collect()
    }

    #[test]
    fn what_a_thread_has_in_common_with_its_model_is_zero_and_comes_back() {
        for (own, other) in
            [(head(40, 64), head(40, 64)), (head(8, 200), head(90, 3)), (head(90, 0), head(8, 64))]
        {
            let original = bytes(&own, 7);
            let mut live = original.clone();
            let mut model: Vec<u64> = Vec::new();
            // SAFETY: a head is five plain words.
            model.extend(unsafe { core::mem::transmute::<Head, [u64; 5]>(other) });
            model.extend(bytes(&other, 9));
            let (at, model) = (live.as_mut_ptr() as usize, model.as_ptr().cast::<Head>());
            // SAFETY: vectors of the lengths that the heads say.
            unsafe {
                exclusive_or(&own, at, model);
                let both = |a: usize, b: usize| a.min(b) / 8;
                let common = both(own.stack_len, other.stack_len) + 8 + both(own.heap_len, other.heap_len);
                let alone = own.len() / 8 - common;
                let seeds = original.iter().filter(|w| **w == 7).count();
                assert!(words_of_its_own(&own, at) <= alone + seeds, "{own:?} and {other:?}");
                exclusive_or(&own, at, model);
            }
            assert_eq!(live, original);
        }
    }

    #[test]
    fn addresses_of_a_window_become_those_of_the_first_and_back_and_nothing_else_changes() {
        let (own, first, size) = (0x0d00_05b0_0000, 0x0d00_0000_1080, 2 << 20);
        for word in [
            0,
            5,
            u64::MAX,
            own - 1,
            own,
            own + 77,
            own + size - 1,
            own + size,
            first - 1,
            first,
            first + size,
        ] {
            let there = renamed(word, own, first, size);
            assert_eq!(renamed(there, own, first, size), word);
            let inside = |start: u64| (start..start + size).contains(&word);
            assert_eq!(there != word, inside(own) || inside(first), "{word:x}");
        }
        assert_eq!(renamed(own + 77, own, first, size), first + 77);
    }
}
