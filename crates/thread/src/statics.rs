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
//! Comparing was chosen over write-protecting the window because a protected page makes system calls that write into
//! a static fail with EFAULT. Most of a window is zero in the template (`.bss`, and caches that a program seldom
//! fills): where four granules are, only the window is read, which halves what the compare costs.
//!
//! All this runs between two threads: it uses no static, no thread-local, and calls nothing.

use crate::carrier::{Carrier, NONE};
use crate::slot::SlotHeader;
use crate::template::TemplateHeader;
use peregrine_base::sync::Ordering;

/// Bytes that are compared and copied at once: a cache line.
const LINE: usize = 64;
/// Granules that are first looked at together.
const TOGETHER: usize = 4;
/// The bits of so many granules.
const GROUP: u64 = (1 << TOGETHER) - 1;
/// Every granule.
const ALL: u64 = u64::MAX;

/// Bytes of a granule of a window of `len_bytes`: at most 64 granules cover it.
pub const fn granule_bytes(len_bytes: usize) -> usize {
    len_bytes.div_ceil(64).next_multiple_of(LINE)
}

/// Which granules of `bytes`, cut into granules of `granule` bytes, are zero.
pub fn zero_granules(bytes: &[u8], granule: usize) -> u64 {
    bytes
        .chunks(granule)
        .enumerate()
        .filter(|(_, g)| g.iter().all(|b| *b == 0))
        .fold(0, |m, (i, _)| m | 1 << i)
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
    // SAFETY: the owner is a live thread of this node (S5), and its slot has room for the window's bytes.
    unsafe {
        let slot = SlotHeader::of(owner);
        let written = differing(c.wide_compare, t);
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
/// As [`save`]; the caller runs no code that uses statics until the thread is switched to.
#[inline]
pub unsafe fn bring(c: &mut Carrier, t: &TemplateHeader, index: u32) {
    if c.window_owner.load(Ordering::Relaxed) == index {
        return;
    }
    // SAFETY: as the caller promised.
    unsafe {
        save(c, t);
        let slot = SlotHeader::of(index);
        let (there, own) = (c.window_written, (*slot).statics_written);
        if there | own != 0 {
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
    c.window_written = ALL;
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

/// The granules of the window that differ from the template.
///
/// # Safety
/// Window and template are mapped; `wide` only where the CPU has AVX2.
#[inline(always)]
unsafe fn differing(wide: bool, t: &TemplateHeader) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { if wide { differing_wide(t) } else { differing_words(t) } }
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn differing_wide(t: &TemplateHeader) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { differing_words(t) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn differing_wide(t: &TemplateHeader) -> u64 {
    use core::arch::x86_64::*;
    // SAFETY: each line read lies in the window or the template.
    unsafe {
        let load = |p: usize| _mm256_load_si256(p as *const __m256i);
        find_differing(
            t,
            _mm256_setzero_si256(),
            #[inline(always)]
            |sum, a| _mm256_or_si256(sum, _mm256_or_si256(load(a), load(a + 32))),
            #[inline(always)]
            |sum, a, b| {
                let (x, y) =
                    (_mm256_xor_si256(load(a), load(b)), _mm256_xor_si256(load(a + 32), load(b + 32)));
                _mm256_or_si256(sum, _mm256_or_si256(x, y))
            },
            #[inline(always)]
            |sum| _mm256_testz_si256(sum, sum) == 0,
        )
    }
}

unsafe fn differing_words(t: &TemplateHeader) -> u64 {
    // SAFETY: each line read lies in the window or the template.
    let line = |a: usize| unsafe { (a as *const [u64; 8]).read() };
    find_differing(
        t,
        0u64,
        |sum, a| line(a).iter().fold(sum, |s, w| s | w),
        |sum, a, b| line(a).iter().zip(line(b)).fold(sum, |s, (x, y)| s | (x ^ y)),
        |sum| sum != 0,
    )
}

/// One pass over the window: several granules together, without a branch on what is found; then one by one those
/// that differ.
#[inline(always)]
fn find_differing<S: Copy>(
    t: &TemplateHeader,
    nothing: S,
    add_line: impl Fn(S, usize) -> S,
    add_difference: impl Fn(S, usize, usize) -> S,
    any: impl Fn(S) -> bool,
) -> u64 {
    // The usual case is compiled apart, with a constant.
    if t.granule == LINE {
        find_by(LINE, t, nothing, add_line, add_difference, any)
    } else {
        find_by(t.granule, t, nothing, add_line, add_difference, any)
    }
}

#[inline(always)]
fn find_by<S: Copy>(
    granule: usize,
    t: &TemplateHeader,
    nothing: S,
    add_line: impl Fn(S, usize) -> S,
    add_difference: impl Fn(S, usize, usize) -> S,
    any: impl Fn(S) -> bool,
) -> u64 {
    let (window, template, step) = (t.statics_start, t.bytes, granule * TOGETHER);
    let (mut suspects, mut zero, mut at, mut bit) = (0u64, t.zero, 0, 1u64);
    while at + step <= t.statics_len {
        let (mut left, mut right) = (nothing, nothing);
        let mut i = at;
        // A granule has at least one line, so each turn has four.
        while i < at + step {
            if zero & GROUP == GROUP {
                left = add_line(add_line(left, window + i), window + i + LINE);
                right = add_line(add_line(right, window + i + 2 * LINE), window + i + 3 * LINE);
            } else {
                for line in (i..i + 4 * LINE).step_by(2 * LINE) {
                    left = add_difference(left, window + line, template + line);
                    right = add_difference(right, window + line + LINE, template + line + LINE);
                }
            }
            i += 4 * LINE;
        }
        // Both are asked and neither branched upon.
        suspects |= bit * u64::from(any(left) | any(right));
        bit <<= TOGETHER;
        zero >>= TOGETHER;
        at += step;
    }
    let mut rest = nothing;
    for line in (at..t.statics_len).step_by(LINE) {
        rest = add_difference(rest, window + line, template + line);
    }
    suspects |= bit * u64::from(at < t.statics_len && any(rest));
    let mut found = 0;
    while suspects != 0 {
        let first = suspects.trailing_zeros();
        suspects &= suspects - 1;
        for g in first..(first + TOGETHER as u32).min(64) {
            let start = g as usize * granule;
            let mut sum = nothing;
            for line in (start..(start + granule).min(t.statics_len)).step_by(LINE) {
                sum = add_difference(sum, window + line, template + line);
            }
            found |= u64::from(any(sum)) << g;
        }
    }
    found
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
            zero: zero_granules(&template.0, granule),
            bytes: template.0.as_ptr() as usize,
            ..TemplateHeader::default()
        };
        let pairs = window.0.chunks(granule).zip(template.0.chunks(granule)).enumerate();
        let expected = pairs.filter(|(_, (a, b))| a != b).fold(0u64, |m, (i, _)| m | 1 << i);
        // SAFETY: both copies are live, aligned and of this length.
        unsafe {
            assert_eq!(differing(false, &t), expected, "by words");
            if std::is_x86_feature_detected!("avx2") {
                assert_eq!(differing(true, &t), expected, "by AVX2");
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
