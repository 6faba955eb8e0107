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
        let copy = |from: usize, to: usize, len: usize| {
            // SAFETY: both lie where the caller says.
            unsafe { core::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, len) };
        };
        let stack = from + self.statics_len;
        let header = stack + self.stack_len;
        copy(header, at as usize, self.header_len);
        // SAFETY: the header is in place again.
        let h = unsafe { &*at };
        copy(stack, h.stack_high - self.stack_len, self.stack_len);
        copy(header + self.header_len, h.heap_base, self.heap_len);
        let mut next = from;
        for (offset, len) in granules(t, self.granules) {
            copy(next, h.statics + offset, len);
            next += len;
        }
    }
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
