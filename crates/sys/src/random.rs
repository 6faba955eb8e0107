//! The kernel's random numbers.

use crate::raw::{Errno, check, syscall6};
use linux_raw_sys::general::__NR_getrandom;

/// Fills `bytes` from the kernel's generator (`getrandom(2)`), waiting for it to be seeded if the system has just started.
///
/// # Panics
/// If the kernel has no such call (before 3.17).
pub fn fill(mut bytes: &mut [u8]) {
    while !bytes.is_empty() {
        // SAFETY: the kernel writes at most the slice.
        match check(unsafe { syscall6(__NR_getrandom, bytes.as_mut_ptr() as usize, bytes.len(), 0, 0, 0, 0) })
        {
            Ok(n) => bytes = &mut bytes[n..],
            Err(Errno::EINTR) => {}
            Err(e) => panic!("getrandom: {e}"),
        }
    }
}
