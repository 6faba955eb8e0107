//! Windows: ranges of addresses that many threads share, one at a time on each node.
//!
//! ```text
//!  window (a power of two of bytes)
//!  │ guard │ stack ↓ ……………………… │ gap │ header │ TLS + TCB + dtv │ statics copy │ heap ↑ …        │
//!     no    ▲ stack_low  stack_high ▲   ▲ colour                               ▲ heap_base      ▲ end of the window
//!   access  └────────── mapped as one piece, on each node when the first of its threads comes ──────┘
//! ```
//!
//! **The gap** is there in alias windows alone, and nothing is ever written in it. A remap has the kernel forget what the processor
//! remembers of the pages from the first that was touched to the last: one by one up to 33 pages, everything at once beyond that. In a virtual
//! machine the first page of them costs 1 us more than everything, and each further one 0.12; so what every thread touches, its stack and
//! its header, lies farther apart than that.
//!
//! The parts are those of a slot in another order, so that one mapping holds all of a thread and the guard lies outside
//! of it: nothing is ever mapped there on any node, or what is mapped has no access. Thus a remap is one system call, and the live part of a thread,
//! from its stack pointer up to the end of its heap, is nearly one piece.
//!
//! Alias and copy windows lie in regions of their own: the first is mapped from a file, thread by thread, the second is
//! private memory of the node. Windows are a cache: who is in one is the node's private knowledge, and everything here is
//! arithmetic on numbers and addresses.

use crate::slot::{GUARD_BYTES, SlotHeader};
use crate::stack_kind::{FIRST_ALIAS, FIRST_COPY, StackKind, is_windowed};
use crate::template::TemplateHeader;

/// The alias windows.
pub const ALIAS_WINDOWS: usize = 0x0c00_0000_0000;
/// The copy windows.
pub const COPY_WINDOWS: usize = 0x0d00_0000_0000;
/// Most bytes of each of the two regions.
pub const REGION_BYTES: usize = 1 << 40;
/// Most windows of a kind.
pub const MOST_WINDOWS: usize = 1 << 16;
/// Room for colours: pages by which the headers of neighbouring windows are shifted against each other.
const COLOURS: usize = 16;
/// What one page table of the processor maps.
pub const PAGE_TABLE_BYTES: usize = 2 << 20;
/// Pages of the gap, where there is room for it: as many as the kernel lets go of one by one (`tlb_single_page_flush_ceiling`), and one.
pub const GAP_PAGES: usize = 34;
/// Least room for a heap.
const MIN_HEAP_BYTES: usize = 64 << 10;

/// Shape of a World's windows; the same for both kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Windows {
    /// Their number, less one; the number is a power of two.
    pub mask: u32,
    /// Binary logarithm of the bytes of each.
    pub shift: u32,
    /// Bytes for the stack.
    pub stack_bytes: usize,
    /// Bytes between stack and header in an alias window: none if they do not fit.
    pub gap_bytes: usize,
}

/// Windows that can't be had.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
pub enum WindowsError {
    /// The number is no power of two, or too large.
    #[error(
        "{0} windows can't be had: a power of two from 1 to {MOST_WINDOWS} is needed (PEREGRINE_WINDOWS)"
    )]
    Count(usize),
    /// The size is no power of two.
    #[error("windows of {0} bytes can't be had: a power of two from 512 KiB on is needed (PEREGRINE_WINDOW)")]
    Size(usize),
    /// Stack and the rest do not fit.
    #[error(
        "a stack of {stack_bytes} bytes does not fit into a window of {window_bytes}: at most {most} do; make windows larger (PEREGRINE_WINDOW)"
    )]
    Stack {
        /// Asked for.
        stack_bytes: usize,
        /// Size of a window.
        window_bytes: usize,
        /// What would fit.
        most: usize,
    },
    /// All of them are too much.
    #[error(
        "{count} windows of {window_bytes} bytes are more than the {REGION_BYTES} bytes there are for windows"
    )]
    Region {
        /// Windows.
        count: usize,
        /// Size of each.
        window_bytes: usize,
    },
}

impl Windows {
    /// `count` windows of `window_bytes` with a stack of `stack_bytes` each, for a program with this template.
    ///
    /// # Errors
    /// [`WindowsError`] tells which setting is wrong and what would do.
    pub fn new(
        count: usize,
        window_bytes: usize,
        stack_bytes: usize,
        t: &TemplateHeader,
    ) -> Result<Self, WindowsError> {
        if !count.is_power_of_two() || count > MOST_WINDOWS {
            return Err(WindowsError::Count(count));
        }
        if !window_bytes.is_power_of_two() || window_bytes < 512 << 10 {
            return Err(WindowsError::Size(window_bytes));
        }
        if count.checked_mul(window_bytes).is_none_or(|b| b > REGION_BYTES) {
            return Err(WindowsError::Region { count, window_bytes });
        }
        // A page of it for the tail.
        let besides = GUARD_BYTES
            + (COLOURS + 3) * 4096
            + size_of::<SlotHeader>()
            + t.tls_area_len()
            + t.tls_align
            + t.statics_len
            + MIN_HEAP_BYTES;
        let most = window_bytes.saturating_sub(besides) & !4095;
        let stack_bytes = stack_bytes.next_multiple_of(4096);
        if !(crate::slot::MIN_STACK_BYTES..=most).contains(&stack_bytes) {
            return Err(WindowsError::Stack { stack_bytes, window_bytes, most });
        }
        let gap_bytes = if stack_bytes + GAP_PAGES * 4096 <= most { GAP_PAGES * 4096 } else { 0 };
        Ok(Self { mask: count as u32 - 1, shift: window_bytes.trailing_zeros(), stack_bytes, gap_bytes })
    }

    /// Bytes of a window.
    #[inline(always)]
    pub const fn bytes(&self) -> usize {
        1 << self.shift
    }

    /// Number of windows of each kind.
    pub const fn count(&self) -> usize {
        self.mask as usize + 1
    }

    /// The window, among those of its kind, that thread `number` is bound to.
    #[inline(always)]
    pub const fn window_of(&self, number: u32) -> u32 {
        // Threads that are made one after the other get different windows.
        number & self.mask
    }

    /// First address of the window of thread `number`.
    #[inline(always)]
    pub const fn base_of(&self, number: u32) -> usize {
        let region = if number < FIRST_COPY { ALIAS_WINDOWS } else { COPY_WINDOWS };
        region + ((self.window_of(number) as usize) << self.shift)
    }

    /// The part of that window that threads are mapped to, `(start, end)`.
    #[inline(always)]
    pub const fn mapped_of(&self, number: u32) -> (usize, usize) {
        let base = self.base_of(number);
        (base + GUARD_BYTES, base + self.bytes() - self.tail_bytes())
    }

    /// Bytes at the end of a window that nothing is mapped to, so that the last of its page tables can be kept as the first is (by
    /// what lies in the guard); none if that is the only one.
    #[inline(always)]
    pub const fn tail_bytes(&self) -> usize {
        if self.bytes() > PAGE_TABLE_BYTES { 4096 } else { 0 }
    }

    /// Where the frames of alias thread `number` begin in their file: the byte that its window's first address shows.
    pub const fn file_offset(&self, number: u32) -> u64 {
        ((number - FIRST_ALIAS) as u64) << self.shift
    }

    /// Bytes between stack and header of a window that begins at `base`.
    #[inline(always)]
    const fn gap_at(&self, base: usize) -> usize {
        if base < COPY_WINDOWS { self.gap_bytes } else { 0 }
    }

    /// Start of the header of the window that begins at `base`; its stack ends there, or a gap below it.
    #[inline(always)]
    const fn header_at(&self, base: usize) -> usize {
        let w = (base >> self.shift) % (COLOURS * 8);
        base + GUARD_BYTES
            + self.stack_bytes
            + self.gap_at(base)
            + w % COLOURS * 4096
            + (w / COLOURS + w) % 8 * 128
    }

    /// Header of whoever is in the window of thread `number`.
    #[inline(always)]
    pub const fn header_of(&self, number: u32) -> usize {
        self.header_at(self.base_of(number))
    }

    /// Header of whoever is in the first window of the kind of thread `number`. It lies a window or more below that of any other.
    pub const fn first_header_of(&self, number: u32) -> usize {
        self.header_at(if number < FIRST_COPY { ALIAS_WINDOWS } else { COPY_WINDOWS })
    }

    /// Header of whoever is in the window that holds `addr`, if a window does.
    #[inline(always)]
    pub const fn header_around(&self, addr: usize) -> Option<usize> {
        let region = addr & !(REGION_BYTES - 1);
        if (region == ALIAS_WINDOWS || region == COPY_WINDOWS)
            && (addr - region) >> self.shift <= self.mask as usize
        {
            Some(self.header_at(addr & !(self.bytes() - 1)))
        } else {
            None
        }
    }
}

const _: () = {
    assert!(ALIAS_WINDOWS.is_multiple_of(REGION_BYTES) && COPY_WINDOWS.is_multiple_of(REGION_BYTES));
};

/// Number of the thread whose window, or slot, holds `addr`: for a window, of the thread that is in it on this node.
///
/// # Safety
/// If `addr` lies in a window, that window is mapped here: it is the running thread's stack pointer, thread pointer or heap.
#[inline(always)]
pub unsafe fn number_at(addr: usize) -> Option<u32> {
    if let Some(slot) = crate::layout::slot_index_of(addr) {
        return Some(slot);
    }
    // SAFETY: as promised; a header begins with its thread's number.
    unsafe { windowed_header_at(addr).map(|h| (*h).index) }
}

/// Whether `addr` lies in the slot or the window of thread `number`.
#[inline(always)]
pub fn holds(number: u32, addr: usize) -> bool {
    if is_windowed(number) {
        let header = SlotHeader::of(number);
        in_regions(addr) && windowed_header_at(addr) == Some(header)
    } else {
        crate::layout::slot_index_of(addr) == Some(number)
    }
}

/// Header of the slot or window that holds `addr`.
///
/// # Safety
/// As [`number_at`].
#[inline(always)]
pub unsafe fn header_at(addr: usize) -> Option<*mut SlotHeader> {
    match crate::layout::slot_index_of(addr) {
        Some(slot) => Some(SlotHeader::of(slot)),
        None => windowed_header_at(addr),
    }
}

/// Whether an address lies where windows can be, so that no World's shape need be known.
#[inline(always)]
const fn in_regions(addr: usize) -> bool {
    addr.wrapping_sub(ALIAS_WINDOWS) < COPY_WINDOWS + REGION_BYTES - ALIAS_WINDOWS
}

#[inline(always)]
fn windowed_header_at(addr: usize) -> Option<*mut SlotHeader> {
    if !in_regions(addr) {
        return None;
    }
    // SAFETY: only a World's node has anything there, and it has a template.
    unsafe { crate::template::template() }.windows.header_around(addr).map(|a| a as *mut SlotHeader)
}

/// Whether `addr` lies in the guard of the window of thread `number`.
pub fn is_guard(w: &Windows, number: u32, addr: usize) -> bool {
    let base = w.base_of(number);
    is_windowed(number) && (base..base + GUARD_BYTES).contains(&addr)
}

/// Where the parts of a windowed thread's memory go: start and end of its stack, and end of its heap.
pub(crate) fn limits(w: &Windows, number: u32) -> (usize, usize, usize) {
    let (low, end) = w.mapped_of(number);
    debug_assert!(StackKind::of(number) != StackKind::Isomalloc);
    // The stack ends where the header begins, or whole pages below: at a multiple of 128, too.
    (low, w.header_of(number) - w.gap_at(w.base_of(number)), end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(count: usize, bytes: usize, stack: usize) -> Result<Windows, WindowsError> {
        let t = TemplateHeader { tls_len: 1024, pthread_len: 2304, statics_len: 8192, ..Default::default() };
        Windows::new(count, bytes, stack, &t)
    }

    #[test]
    fn a_thread_and_its_window_find_each_other() {
        for (count, bytes, stack) in
            [(1, 512 << 10, 64 << 10), (128, 2 << 20, 1 << 20), (1 << 15, 16 << 20, 9 << 20)]
        {
            let w = shape(count, bytes, stack).unwrap();
            for number in [FIRST_ALIAS, FIRST_ALIAS + 77, FIRST_COPY, FIRST_COPY + 4097, FIRST_COPY - 1] {
                let (low, end) = w.mapped_of(number);
                assert_eq!(end - low, bytes - GUARD_BYTES - w.tail_bytes());
                for addr in [low, low + stack, end - 1] {
                    assert_eq!(w.header_around(addr), Some(w.header_of(number)));
                }
                let (stack_low, stack_high, _) = limits(&w, number);
                assert!(stack_high - stack_low >= stack && w.header_of(number) < end);
                let apart = (w.header_of(number) - stack_high) / 4096;
                assert_eq!(apart, if number < FIRST_COPY { GAP_PAGES } else { 0 });
                assert!(is_guard(&w, number, low - 1) && !is_guard(&w, number, low));
                let (first, own) = (w.first_header_of(number), w.header_of(number));
                assert!(own == first || own - first >= bytes, "addresses of two windows are told apart");
            }
            assert_eq!(w.header_around(ALIAS_WINDOWS + count * bytes), None, "behind the last window");
            assert_eq!(w.window_of(FIRST_COPY + 5) as usize, 5 % count);
        }
    }

    #[test]
    fn settings_that_cannot_be_are_refused_with_what_would_do() {
        assert_eq!(shape(3, 2 << 20, 1 << 20), Err(WindowsError::Count(3)));
        assert_eq!(shape(4, 3 << 20, 1 << 20), Err(WindowsError::Size(3 << 20)));
        assert!(matches!(shape(1 << 16, 64 << 20, 1 << 20), Err(WindowsError::Region { .. })));
        let Err(WindowsError::Stack { most, .. }) = shape(4, 2 << 20, 2 << 20) else { panic!() };
        let tight = shape(4, 2 << 20, most).expect("it was said to fit");
        assert_eq!(tight.gap_bytes, 0, "a stack comes before the gap");
        assert_eq!(limits(&tight, FIRST_ALIAS).1, tight.header_of(FIRST_ALIAS));
    }
}
