//! The program's statics as a window: the running thread's copy lies in it.
//!
//! ```text
//!   window (.data, .bss)     │ g0 │ g1 │ g2 │ … │ g45 │        granules of one or more cache lines, 64 at most
//!                              =    ≠    =         =
//!   TEMPLATE: pristine copy  │ g0 │ g1 │ g2 │ … │ g45 │        compared with the window when its owner leaves
//!                                   │
//!                                   ▼ save                     only what differs is saved: `statics_written` has
//!   slot A: statics copy     │  - │ g1 │  - │ … │  -  │        a bit for each granule that is the thread's own
//! ```
//!
//! The window keeps its last owner: nothing is copied while the same thread comes back. When another comes, the
//! owner's granules that differ from the template are saved; then those of the newcomer are loaded, and the template's
//! where the last owner had written and the newcomer had not. A thread that never wrote a static costs a compare, and
//! nothing when two such follow each other; one that wrote a counter costs a line out and a line in.
//!
//! Pages that nobody writes are sealed and not compared (`seal`), where the kernel lets us do so without harm. Most of a window is zero in the template (`.bss`, and caches that a program seldom
//! fills): in the longest run of zeros only the window is read. What is left runs at the speed of the loads.
//!
//! All this runs between two threads: it uses no static, no thread-local, and calls nothing.

use crate::carrier::{Carrier, NONE};
use crate::slot::SlotHeader;
use crate::template::TemplateHeader;
use peregrine_base::sync::Ordering;

/// Bytes that are compared and copied at once: a cache line.
const LINE: usize = 64;
/// Lines that are looked at together, without a branch on what is found.
const TOGETHER: usize = 8;

/// Bytes of a granule of a window of `len_bytes`: at most 64 granules cover it.
pub const fn granule_bytes(len_bytes: usize) -> usize {
    len_bytes.div_ceil(64).next_multiple_of(LINE)
}

/// The longest run of whole lines of `bytes` that are zero, as offsets of its start and end.
pub fn zero_run(bytes: &[u8]) -> (usize, usize) {
    let (mut best, mut start) = ((0, 0), 0);
    for (i, line) in bytes.chunks(LINE).enumerate() {
        if line.iter().any(|b| *b != 0) {
            start = (i + 1) * LINE;
        } else if (i + 1) * LINE - start > best.1 - best.0 {
            best = (start, (i + 1) * LINE);
        }
    }
    best
}

/// Saves the window's owner, if any, so that its slot alone holds all its statics. The window stays valid.
///
/// # Safety
/// Runs on the node of `c`; the owner's slot is mapped and not in use elsewhere.
#[inline]
pub unsafe fn save(c: &mut Carrier, t: &TemplateHeader) {
    let owner = c.window_owner.load(Ordering::Relaxed);
    if owner == NONE {
        return;
    }
    c.window_saves += 1;
    // SAFETY: the owner is a live thread of this node (S5), and its slot has room for the window's bytes.
    unsafe {
        let slot = SlotHeader::of(owner);
        let written = match c.seals.open() {
            (0, _) => 0,
            (_, true) => looked_at(c, differing(c.wide_compare, t, (0, t.statics_len))),
            (open, false) => looked_at(c, differing_in(c, t, open)),
        };
        c.window_written = written;
        if (*slot).statics_written != written {
            (*slot).statics_written = written;
        }
        copy_granules(t, written, t.statics_start, (*slot).statics);
    }
}

/// Puts the statics of the thread in `slot` into the window, saving the last owner's.
///
/// # Safety
/// As [`save`]; the caller runs no code that uses statics until the thread is switched to. `slot` is the header of thread `index`.
#[inline(always)]
pub unsafe fn bring(c: &mut Carrier, t: &TemplateHeader, index: u32, slot: *mut SlotHeader) {
    if c.window_owner.load(Ordering::Relaxed) == index {
        return;
    }
    // SAFETY: as the caller promised.
    unsafe {
        if c.seals.open().0 == 0 && (*slot).statics_written == 0 {
            // Every unit is sealed, and was when the owner came, for only `save` seals: it has written nothing, owned nothing,
            // and the newcomer owns nothing.
            c.window_written = 0;
            c.window_owner.store(index, Ordering::Relaxed);
        } else {
            replace(c, t, index, slot);
        }
    }
}

/// As [`bring`], whatever is written and open.
///
/// # Safety
/// As [`bring`].
#[inline(never)]
unsafe fn replace(c: &mut Carrier, t: &TemplateHeader, index: u32, slot: *mut SlotHeader) {
    // SAFETY: as the caller promised.
    unsafe {
        save(c, t);
        let (there, own) = (c.window_written, (*slot).statics_written);
        if there | own != 0 {
            if (there | own) & c.seals.sealed_granules != 0 {
                c.seals.open_for(there | own);
            }
            copy_granules(t, own, (*slot).statics, t.statics_start);
            copy_granules(t, there & !own, t.bytes, t.statics_start);
        }
    }
    c.window_owner.store(index, Ordering::Relaxed);
}

/// Saves and forgets the owner: its thread leaves this node.
///
/// # Safety
/// As [`save`].
pub unsafe fn evict(c: &mut Carrier, t: &TemplateHeader, index: u32) {
    if c.window_owner.load(Ordering::Relaxed) == index {
        // SAFETY: as the caller promised.
        unsafe { save(c, t) };
        c.window_owner.store(NONE, Ordering::Relaxed);
    }
}

/// Forgets the owner without saving: its thread has ended, or its memory is about to be replaced.
pub fn forget(c: &mut Carrier) {
    c.window_owner.store(NONE, Ordering::Relaxed);
    c.window_written = c.seals.open_granules();
}

/// Counts a compare, and reviews the seals if that is due.
///
/// # Safety
/// Between two threads; `written` is what was found in all open units.
#[inline(always)]
unsafe fn looked_at(c: &mut Carrier, written: u64) -> u64 {
    if c.seals.count(written) {
        // SAFETY: the caller's promise.
        unsafe { c.seals.review() };
    }
    written
}

/// The granules that differ in the open units, neighbours together.
///
/// # Safety
/// As [`differing`].
unsafe fn differing_in(c: &Carrier, t: &TemplateHeader, mut open: u64) -> u64 {
    let mut found = 0;
    while open != 0 {
        let first = open.trailing_zeros() as usize;
        let last = first + (open >> first).trailing_ones() as usize - 1;
        open &= !(u64::MAX >> (63 - last));
        // SAFETY: the caller's promise.
        found |= unsafe { differing(c.wide_compare, t, c.seals.units.part(t, first, last)) };
    }
    found
}

/// Copies the granules in `which` from one copy of the window to another.
///
/// # Safety
/// Both have the window's length, and nobody else uses the target.
#[inline(always)]
unsafe fn copy_granules(t: &TemplateHeader, mut which: u64, from: usize, to: usize) {
    while which != 0 {
        let mut at = which.trailing_zeros() as usize * t.granule;
        which &= which - 1;
        let end = (at + t.granule).min(t.statics_len);
        while at < end {
            // SAFETY: inside both copies, whose length is a multiple of a line; the two do not overlap.
            unsafe { ((to + at) as *mut [u64; 8]).write(((from + at) as *const [u64; 8]).read()) };
            at += LINE;
        }
    }
}

/// The granules that differ from the template in `range` (offsets of lines in the window).
///
/// # Safety
/// Window and template are mapped; `wide` only where the CPU has AVX2.
#[inline(always)]
unsafe fn differing(wide: bool, t: &TemplateHeader, range: (usize, usize)) -> u64 {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if wide {
            return wide::differing(t, range.0, range.1);
        }
        let _ = wide;
        words::differing(t, range.0, range.1)
    }
}

/// The pass over a range, for one kind of register: `same` compares lines with the template's, `zero` with nothing, where
/// the template is zero. A macro, because a generic function would not be compiled for the features of its user.
macro_rules! passes {
    ($(#[$feature:meta])? $sum:ty, $nothing:expr) => {
        /// As [`super::differing`].
        $(#[$feature])?
        pub unsafe fn differing(t: &TemplateHeader, from: usize, to: usize) -> u64 {
            let (zero, rest) = (t.zero.0.clamp(from, to), t.zero.1.clamp(from, to));
            // SAFETY: the caller's range, in three parts.
            unsafe { same(t, from, zero) | self::zero(t, zero, rest) | same(t, rest, to) }
        }

        #[inline]
        $(#[$feature])?
        unsafe fn same(t: &TemplateHeader, from: usize, to: usize) -> u64 {
            let (window, template, mut found, mut at) = (t.statics_start, t.bytes, 0, from);
            while at < to {
                let end = (at + TOGETHER * LINE).min(to);
                let mut sum: $sum = $nothing;
                for line in (at..end).step_by(LINE) {
                    // SAFETY: a line of the window and its template's.
                    sum = unsafe { add_difference(sum, window + line, template + line) };
                }
                if any(sum) {
                    // SAFETY: as above.
                    found |= unsafe { each(t, at, end) };
                }
                at = end;
            }
            found
        }

        #[inline]
        $(#[$feature])?
        unsafe fn zero(t: &TemplateHeader, from: usize, to: usize) -> u64 {
            let (window, mut found, mut at) = (t.statics_start, 0, from);
            while at < to {
                let mut sum: $sum = $nothing;
                // A last group that would not be whole takes in lines of the one before it.
                let group = if at + TOGETHER * LINE <= to || to - from < TOGETHER * LINE { at } else { to - TOGETHER * LINE };
                if group + TOGETHER * LINE <= to {
                    for i in 0..TOGETHER {
                        // SAFETY: a line of the window.
                        sum = unsafe { add(sum, window + group + i * LINE) };
                    }
                } else {
                    for line in (group..to).step_by(LINE) {
                        // SAFETY: a line of the window.
                        sum = unsafe { add(sum, window + line) };
                    }
                }
                at = (group + TOGETHER * LINE).min(to);
                if any(sum) {
                    // SAFETY: as above.
                    found |= unsafe { each(t, group, at) };
                }
            }
            found
        }

        #[cold]
        #[inline(never)]
        $(#[$feature])?
        unsafe fn each(t: &TemplateHeader, from: usize, to: usize) -> u64 {
            let (window, template, mut found) = (t.statics_start, t.bytes, 0);
            for line in (from..to).step_by(LINE) {
                // SAFETY: a line of the window and its template's.
                found |= u64::from(any(unsafe { add_difference($nothing, window + line, template + line) })) << (line / t.granule);
            }
            found
        }
    };
}

/// With 32 bytes at once. Two sums, so that one addition need not wait for the last: the compare then runs at the speed of
/// the loads, a line a cycle (so 64 bytes at once are no faster).
#[cfg(target_arch = "x86_64")]
mod wide {
    use super::*;
    use core::arch::x86_64::*;

    type Sum = [__m256i; 2];
    passes!(
        #[target_feature(enable = "avx2")]
        Sum,
        [_mm256_setzero_si256(); 2]
    );

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn add(s: Sum, at: usize) -> Sum {
        let at = at as *const __m256i;
        // SAFETY: the caller's line, which is aligned.
        let (x, y) = unsafe { (_mm256_load_si256(at), _mm256_load_si256(at.add(1))) };
        [_mm256_or_si256(s[0], x), _mm256_or_si256(s[1], y)]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn add_difference(s: Sum, a: usize, b: usize) -> Sum {
        let (a, b) = (a as *const __m256i, b as *const __m256i);
        // SAFETY: the caller's lines, which are aligned.
        let (x, y) = unsafe {
            (
                _mm256_xor_si256(_mm256_load_si256(a), _mm256_load_si256(b)),
                _mm256_xor_si256(_mm256_load_si256(a.add(1)), _mm256_load_si256(b.add(1))),
            )
        };
        [_mm256_or_si256(s[0], x), _mm256_or_si256(s[1], y)]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn any(s: Sum) -> bool {
        let all = _mm256_or_si256(s[0], s[1]);
        _mm256_testz_si256(all, all) == 0
    }
}

/// With what every processor has.
mod words {
    use super::*;

    passes!(u64, 0);

    #[inline(always)]
    unsafe fn add(s: u64, at: usize) -> u64 {
        // SAFETY: the caller's line, which is aligned.
        unsafe { (at as *const [u64; 8]).read() }.iter().fold(s, |s, w| s | w)
    }

    #[inline(always)]
    unsafe fn add_difference(s: u64, a: usize, b: usize) -> u64 {
        // SAFETY: the caller's lines, which are aligned.
        let (a, b) = unsafe { ((a as *const [u64; 8]).read(), (b as *const [u64; 8]).read()) };
        a.iter().zip(b).fold(s, |s, (x, y)| s | (x ^ y))
    }

    #[inline(always)]
    fn any(s: u64) -> bool {
        s != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(64))]
    struct Copy3<const N: usize>([u8; N]);

    /// A window and a template of `N` bytes; the oracle compares granule by granule.
    fn check<const N: usize>(template: &mut Copy3<N>, window: &mut Copy3<N>) {
        let granule = granule_bytes(N);
        let t = TemplateHeader {
            statics_start: window.0.as_ptr() as usize,
            statics_len: N,
            granule,
            zero: zero_run(&template.0),
            bytes: template.0.as_ptr() as usize,
            ..TemplateHeader::default()
        };
        let pairs = window.0.chunks(granule).zip(template.0.chunks(granule)).enumerate();
        let expected = pairs.filter(|(_, (a, b))| a != b).fold(0u64, |m, (i, _)| m | 1 << i);
        // SAFETY: both copies are live, aligned and of this length.
        unsafe {
            assert_eq!(differing(false, &t, (0, N)), expected, "by words");
            #[cfg(target_arch = "x86_64")]
            if std::is_x86_feature_detected!("avx2") {
                assert_eq!(differing(true, &t, (0, N)), expected, "by AVX2");
            }
            let mut saved = Copy3([0xeeu8; N]);
            saved.0.copy_from_slice(&template.0);
            copy_granules(&t, expected, t.statics_start, saved.0.as_mut_ptr() as usize);
            assert!(saved.0 == window.0, "template and differing granules make up the window");
        }
    }

    fn any_byte_that_differs_is_found<const N: usize>() {
        let mut template = Copy3([0u8; N]);
        // Some granules zero, some not, as in a program.
        for i in (0..N).filter(|i| i / 192 % 3 == 1 && i % 8 == 0) {
            template.0[i] = 7;
        }
        let mut window = Copy3(template.0);
        check(&mut template, &mut window);
        for i in (0..N).step_by(if N > 4096 { 61 } else { 1 }) {
            window.0[i] ^= 1;
            check(&mut template, &mut window);
            window.0[i] ^= 1;
        }
        for i in (0..N).step_by(97) {
            window.0[i] ^= 0x80;
        }
        check(&mut template, &mut window);
    }

    #[test]
    fn any_byte_that_differs_is_found_in_windows_of_every_shape() {
        any_byte_that_differs_is_found::<64>();
        any_byte_that_differs_is_found::<{ 46 * 64 }>();
        any_byte_that_differs_is_found::<4096>();
        any_byte_that_differs_is_found::<{ 4096 + 64 }>();
        any_byte_that_differs_is_found::<{ 331 * 64 }>();
    }
}
