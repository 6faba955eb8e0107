//! A windowed thread's memory as a string of bytes, for when its window belongs to another.
//!
//! ```text
//!  │ head │ own granules of the statics │ live stack │ header, TLS, TCB, dtv │ used heap │
//!           statics_len                   stack_len    header_len              heap_len
//! ```
//!
//! Only what is live is in it: the stack from its pointer on (all of it if the pointer is elsewhere), the heap up to its high
//! water, of the statics what differs from the template. The statics come first so that what names the process can be mended in
//! place when an image is resumed. Each piece begins on a line of the cache, here and in its window: copies between places that lie
//! differently in their lines take up to half as long again.
//!
//! *Between two threads*: no static, no thread-local, no allocation, no panic.

use crate::slot::SlotHeader;
use crate::template::TemplateHeader;

/// Bytes of a line of the cache; pieces are multiples of it long. (The header begins on one, and so does what follows it.)
pub const LINE: usize = 64;

/// Says what follows it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Head {
    /// Granules of the statics that follow: [`SlotHeader::statics_written`].
    pub granules: u64,
    /// Bytes of them, and of what is missing to a whole line.
    pub statics_len: usize,
    /// Bytes of live stack.
    pub stack_len: usize,
    /// Bytes of header, TLS, TCB and dtv.
    pub header_len: usize,
    /// Bytes of used heap.
    pub heap_len: usize,
}

impl Head {
    /// What the thread with this header has. The header may be a copy that lies elsewhere; `at` is where it belongs.
    pub fn of(header: &SlotHeader, at: usize, t: &TemplateHeader) -> Self {
        let (low, high) = (header.stack_low, header.stack_high);
        // A red zone of 128 bytes lies below the stack pointer of a preempted leaf. A thread that waits on a stack of its own
        // making, in its heap, has all of this one: where in it the code was that it will return to, nobody knows.
        let live = if (low..=high).contains(&header.saved_sp) { header.saved_sp - 128 } else { low };
        Self {
            granules: header.statics_written,
            statics_len: granules(t, header.statics_written)
                .map(|(_, len)| len)
                .sum::<usize>()
                .next_multiple_of(LINE),
            stack_len: high - (live.max(low) & !(LINE - 1)),
            header_len: header.statics - at,
            heap_len: header.heap.high_water() - header.heap_base,
        }
    }

    /// Bytes of all that follows.
    pub const fn len(&self) -> usize {
        self.statics_len + self.stack_len + self.header_len + self.heap_len
    }

    /// Whether nothing follows; never so for a thread.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes what follows the head to `to`, reading each piece with `read(address in the window, target, bytes)`.
    ///
    /// # Safety
    /// `to` has room for [`Head::len`] bytes that nobody else uses; `self` was made from `header`, which belongs at `at`, and the
    /// thread is suspended.
    pub unsafe fn gather(
        &self,
        header: &SlotHeader,
        at: usize,
        t: &TemplateHeader,
        to: usize,
        mut read: impl FnMut(usize, usize, usize),
    ) {
        let mut at_next = to;
        for (offset, len) in granules(t, self.granules) {
            read(header.statics + offset, at_next, len);
            at_next += len;
        }
        at_next = to + self.statics_len;
        let pieces = [
            (header.stack_high - self.stack_len, self.stack_len),
            (at, self.header_len),
            (header.heap_base, self.heap_len),
        ];
        for (from, len) in pieces {
            if len != 0 {
                read(from, at_next, len);
                at_next += len;
            }
        }
    }

    /// Puts back what [`Head::gather`] wrote, into the window of thread `number`.
    ///
    /// # Safety
    /// The window is mapped, and nobody is in it; `from` holds [`Head::len`] bytes that `gather` wrote for this thread.
    pub unsafe fn scatter(&self, number: u32, t: &TemplateHeader, from: usize) {
        let at = SlotHeader::of(number);
        let stack = from + self.statics_len;
        let header = stack + self.stack_len;
        // SAFETY: all lie where the caller says; from the first line on the header is in place again.
        unsafe {
            copy(header, at as usize, self.header_len);
            let h = &*at;
            copy(stack, h.stack_high - self.stack_len, self.stack_len);
            copy(header + self.header_len, h.heap_base, self.heap_len);
            let mut next = from;
            for (offset, len) in granules(t, self.granules) {
                copy(next, h.statics + offset, len);
                next += len;
            }
        }
    }

    /// [`Head::gather`] to `to` of the thread in a window, and [`Head::scatter`] from `from` of another, which `coming` is the head
    /// of, in one pass over the window.
    ///
    /// # Safety
    /// As both of them; the two threads are bound to this window, whose limits are therefore theirs. `header` may lie in the window:
    /// it is read before anything is written.
    pub unsafe fn exchange(
        &self,
        header: *const SlotHeader,
        at: usize,
        t: &TemplateHeader,
        to: usize,
        coming: &Head,
        from: usize,
    ) {
        // SAFETY: the caller's header.
        let (stack_high, statics, heap) =
            unsafe { ((*header).stack_high, (*header).statics, (*header).heap_base) };
        let mut next = to;
        for (offset, len) in granules(t, self.granules) {
            // SAFETY: the caller's window and target.
            unsafe { copy(statics + offset, next, len) };
            next += len;
        }
        let (to, from_stack) = (to + self.statics_len, from + coming.statics_len);
        // Stacks end at the same address: below that of the shorter one, there is only one to copy.
        let both = self.stack_len.min(coming.stack_len);
        let (more, longer) = (self.stack_len - both, coming.stack_len - both);
        let stack =
            Piece { at: stack_high - both, to: to + more, out: both, from: from_stack + longer, into: both };
        let (to_header, from_header) = (to + self.stack_len, from_stack + coming.stack_len);
        let header =
            Piece { at, to: to_header, out: self.header_len, from: from_header, into: coming.header_len };
        let heap = Piece {
            at: heap,
            to: to_header + self.header_len,
            out: self.heap_len,
            from: from_header + coming.header_len,
            into: coming.heap_len,
        };
        // SAFETY: the caller's window, target and source.
        unsafe {
            copy(stack_high - self.stack_len, to, more);
            copy(from_stack, stack_high - coming.stack_len, longer);
            stack.exchange();
            header.exchange();
            heap.exchange();
        }
        let mut next = from;
        for (offset, len) in granules(t, coming.granules) {
            // SAFETY: as above.
            unsafe { copy(next, statics + offset, len) };
            next += len;
        }
    }
}

/// Bytes of a window that are exchanged at once: so many, what they become and where they go are in the processor's first cache
/// (of 32 KiB or more) together. With 4 KiB it is 3 to 20 % slower, with 16 as slow as in two passes.
const AT_ONCE: usize = 8 << 10;

/// A piece of a window that one thread leaves and another takes over; the pieces of both begin at `at`.
struct Piece {
    at: usize,
    to: usize,
    out: usize,
    from: usize,
    into: usize,
}

impl Piece {
    /// Copies `out` bytes to `to`, and `into` bytes from `from`, through the piece once.
    ///
    /// # Safety
    /// The window is mapped and in nobody's use; the three ranges are valid and do not overlap.
    unsafe fn exchange(&self) {
        let mut done = 0;
        while done < self.out.max(self.into) {
            let next = done + AT_ONCE;
            let len = |all: usize| all.min(next).saturating_sub(done);
            // SAFETY: as promised; nothing is written before it was read.
            unsafe {
                copy(self.at + done, self.to + done, len(self.out));
                copy(self.from + done, self.at + done, len(self.into));
            }
            done = next;
        }
    }
}

/// # Safety
/// Both ranges are valid, and do not overlap.
#[inline(always)]
unsafe fn copy(from: usize, to: usize, len: usize) {
    // SAFETY: the caller's.
    unsafe { core::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, len) };
}

/// Offset and length, in the statics, of each granule in `which`.
pub fn granules(t: &TemplateHeader, mut which: u64) -> impl Iterator<Item = (usize, usize)> {
    core::iter::from_fn(move || {
        if which == 0 {
            return None;
        }
        let offset = which.trailing_zeros() as usize * t.granule;
        which &= which - 1;
        Some((offset, t.granule.min(t.statics_len.saturating_sub(offset))))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::MaybeUninit;

    const GRANULE: usize = 64;
    const STACK: usize = 3 * AT_ONCE;
    const HEADER: usize = 1024;
    const STATICS: usize = 8 * GRANULE;
    const HEAP: usize = 3 * AT_ONCE;

    /// A window that is a vector: │ stack │ header … │ statics │ heap │.
    struct Window {
        bytes: Vec<u8>,
        header: SlotHeader,
    }

    impl Window {
        fn new(seed: usize) -> Self {
            let bytes: Vec<u8> =
                (0..STACK + HEADER + STATICS + HEAP).map(|i| (i * 7 + seed * 13 + i / 251) as u8).collect();
            let base = bytes.as_ptr() as usize;
            // SAFETY: plain words.
            let mut header: SlotHeader = unsafe { MaybeUninit::zeroed().assume_init() };
            header.stack_high = base + STACK;
            header.statics = base + STACK + HEADER;
            header.heap_base = header.statics + STATICS;
            Self { bytes, header }
        }

        fn at(&self) -> usize {
            self.header.stack_high
        }
    }

    fn head(granules: u64, stack_len: usize, heap_len: usize) -> Head {
        let statics_len = granules.count_ones() as usize * GRANULE;
        Head { granules, statics_len, stack_len, header_len: HEADER, heap_len }
    }

    /// Two passes, one word after the other: what an exchange must come to.
    fn in_two_passes(
        w: &mut Window,
        out: &Head,
        t: &TemplateHeader,
        coming: &Head,
        from: &[u8],
    ) -> (Vec<u8>, Vec<u8>) {
        let mut left = vec![0; out.len()];
        let base = w.bytes.as_ptr() as usize;
        let bytes = w.bytes.clone();
        // SAFETY: the target is as long as the head says; what is read lies in the window.
        unsafe {
            out.gather(&w.header, w.at(), t, left.as_mut_ptr() as usize, |from, to, len| {
                copy(bytes[from - base..][..len].as_ptr() as usize, to, len);
            });
        }
        let mut now = bytes;
        let mut next = from;
        let mut put = |at: usize, len: usize| {
            now[at..at + len].copy_from_slice(&next[..len]);
            next = &next[len..];
        };
        for (offset, len) in granules(t, coming.granules) {
            put(STACK + HEADER + offset, len);
        }
        put(STACK - coming.stack_len, coming.stack_len);
        put(STACK, HEADER);
        put(STACK + HEADER + STATICS, coming.heap_len);
        (left, now)
    }

    #[test]
    fn an_exchange_is_all_out_and_then_all_in() {
        let t = TemplateHeader { statics_len: STATICS, granule: GRANULE, ..Default::default() };
        let sizes = [0, LINE, AT_ONCE - LINE, AT_ONCE, AT_ONCE + LINE, 3 * AT_ONCE];
        let granules = [(0, 0), (0b101, 0), (0, 0b1000_0010), (0b11, 0b110), (u64::MAX >> 56, 1)];
        for (i, out_stack) in sizes.into_iter().enumerate() {
            for (j, in_stack) in sizes.into_iter().enumerate() {
                let (a, b) = granules[(i + j) % granules.len()];
                let (out, coming) =
                    (head(a, out_stack, sizes[(i * 5 + j) % 6]), head(b, in_stack, sizes[(i + j * 5) % 6]));
                let from: Vec<u8> = (0..coming.len()).map(|i| (i * 11 + 3) as u8).collect();
                let mut w = Window::new(i * 6 + j);
                let (left, now) = in_two_passes(&mut w, &out, &t, &coming, &from);
                let mut to = vec![0xee; out.len()];
                // SAFETY: the window is this vector, target and source are as long as the heads say.
                unsafe {
                    let (to, from) = (to.as_mut_ptr() as usize, from.as_ptr() as usize);
                    out.exchange(&raw const w.header, w.at(), &t, to, &coming, from);
                }
                assert!(to == left, "what leaves: {out:?} for {coming:?}");
                assert!(w.bytes == now, "what comes: {coming:?} after {out:?}");
            }
        }
    }
}
