//! Program output, held until a commit: nobody sees what a crash could undo.
//!
//! ```text
//!   ring (OUTPUT, 4 MiB)   … │ released │ committed, on its way out │ written since the last image │ free …
//!                            ▲ World::released                      ▲ tail at the last image       ▲ Imaged::output_tail
//! ```
//!
//! A record is descriptor (1 byte), 0, slot of the writer (2 bytes), length (4 bytes), bytes. `output_tail` is imaged, so a rollback takes back what was
//! written after the image; `released` only grows and never passes a committed tail, so what an image promised to write is
//! still in the ring.

use crate::control::{OUTPUT, OUTPUT_BYTES, imaged, request, wait, world};
use crate::killpoint::{Point, at};
use crate::sched::{self, in_thread};
use peregrine_base::sync::Ordering;
use peregrine_sys::timer::monotonic_ns;

const HEAD: usize = 8;
/// Longest record.
pub const MOST: usize = 64 << 10;

fn put(position: u64, bytes: &[u8]) {
    for (i, b) in bytes.iter().enumerate() {
        let place = OUTPUT + ((position as usize + i) & (OUTPUT_BYTES - 1));
        // SAFETY: inside the ring, past `released`, under the tail's lock.
        unsafe { (place as *mut u8).write_volatile(*b) };
    }
}

/// Appends program output; waits while the ring is full. `false` if output is not held in this World.
pub fn write(fd: i32, bytes: &[u8]) -> bool {
    let w = world();
    if !w.hold_output.load(Ordering::Relaxed) {
        return false;
    }
    for part in bytes.chunks(MOST) {
        loop {
            let done = in_thread(|slot| {
                let (fits, filling) = imaged().output_tail.with(|tail| {
                    let used = (*tail - w.released.load(Ordering::Acquire)) as usize;
                    let need = HEAD + part.len();
                    if used + need > OUTPUT_BYTES {
                        return (false, true);
                    }
                    let (s, len) = ((slot as u16).to_le_bytes(), (part.len() as u32).to_le_bytes());
                    put(*tail, &[fd as u8, 0, s[0], s[1], len[0], len[1], len[2], len[3]]);
                    at(Point::OutputHead);
                    put(*tail + HEAD as u64, part);
                    at(Point::OutputBytes);
                    *tail += need as u64;
                    at(Point::OutputTail);
                    (true, used > OUTPUT_BYTES / 2)
                });
                at(Point::OutputWritten);
                if filling {
                    crate::thread::notify(request::OUTPUT);
                }
                if !fits {
                    // SAFETY: in a section.
                    unsafe { sched::park(monotonic_ns() + 2_000_000, wait::OUTPUT, 0) };
                }
                fits
            });
            match done {
                Some(true) => break,
                Some(false) => {}
                None => return false,
            }
        }
    }
    true
}

/// The bytes between two positions.
pub fn raw(from: u64, to: u64) -> Vec<u8> {
    let byte = |at: u64| {
        // SAFETY: inside the ring; the range is committed and not released, so nobody overwrites it.
        unsafe { ((OUTPUT + (at as usize & (OUTPUT_BYTES - 1))) as *const u8).read_volatile() }
    };
    (from..to).map(byte).collect()
}

/// The records in `bytes`: descriptor and contents of each.
pub fn parse(bytes: &[u8]) -> Vec<(i32, Vec<u8>)> {
    records(bytes).map(|(fd, _, text)| (fd, text.to_vec())).collect()
}

/// The records in `bytes`: descriptor, slot of the writer, and contents of each.
pub fn records(mut bytes: &[u8]) -> impl Iterator<Item = (i32, u32, &[u8])> {
    std::iter::from_fn(move || {
        let [fd, _, s0, s1, a, b, c, d, rest @ ..] = bytes else { return None };
        let text = rest.get(..u32::from_le_bytes([*a, *b, *c, *d]) as usize)?;
        bytes = &rest[text.len()..];
        Some((i32::from(*fd), u32::from(u16::from_le_bytes([*s0, *s1])), text))
    })
}

/// Position behind the last record, read without the lock, which a dead node may hold. The tail is written last, as a whole.
pub fn tail_now() -> u64 {
    // SAFETY: a mapped word; what lies before it is complete.
    unsafe { imaged().output_tail.as_ptr().read_volatile() }
}
