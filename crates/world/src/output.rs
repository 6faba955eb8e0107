//! Program output, held until a commit: nobody sees what a crash could undo.
//!
//! ```text
//!   ring (OUTPUT, 4 MiB)   … │ released │ committed, on its way out │ written since the last image │ free …
//!                            ▲ World::released                      ▲ tail at the last image       ▲ Imaged::output_tail
//! ```
//!
//! A record is descriptor (1 byte), length (3 bytes), bytes. `output_tail` is imaged, so a rollback takes back what was
//! written after the image; `released` only grows and never passes a committed tail, so what an image promised to write is
//! still in the ring.

use crate::control::{OUTPUT, OUTPUT_BYTES, imaged, request, wait, world};
use crate::sched::{self, in_thread};
use peregrine_base::sync::Ordering;
use peregrine_sys::timer::monotonic_ns;

const HEAD: usize = 4;
/// Longest record.
pub const MOST: usize = 64 << 10;

fn put(at: u64, bytes: &[u8]) {
    for (i, b) in bytes.iter().enumerate() {
        let place = OUTPUT + ((at as usize + i) & (OUTPUT_BYTES - 1));
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
            let done = in_thread(|_| {
                let (fits, filling) = imaged().output_tail.with(|tail| {
                    let used = (*tail - w.released.load(Ordering::Acquire)) as usize;
                    let need = HEAD + part.len();
                    if used + need > OUTPUT_BYTES {
                        return (false, true);
                    }
                    let len = part.len() as u32;
                    put(*tail, &[fd as u8, len as u8, (len >> 8) as u8, (len >> 16) as u8]);
                    put(*tail + HEAD as u64, part);
                    *tail += need as u64;
                    (true, used > OUTPUT_BYTES / 2)
                });
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
pub fn parse(mut bytes: &[u8]) -> Vec<(i32, Vec<u8>)> {
    let mut list = Vec::new();
    while let [fd, a, b, c, rest @ ..] = bytes {
        let len = u32::from_le_bytes([*a, *b, *c, 0]) as usize;
        let Some(text) = rest.get(..len) else { break };
        list.push((i32::from(*fd), text.to_vec()));
        bytes = &rest[len..];
    }
    list
}
