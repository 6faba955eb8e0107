//! The thread-pointer register, the clock of the processor, and what the processor can do. Every architecture has the same verbs.

#[cfg(target_arch = "aarch64")]
#[path = "cpu/aarch64.rs"]
mod arch;
#[cfg(target_arch = "x86_64")]
#[path = "cpu/x86_64.rs"]
mod arch;
pub use arch::*;

/// One entry of this process's auxiliary vector, read from `/proc/self/auxv`.
pub fn auxv_entry(kind: u64) -> Option<u64> {
    let bytes = std::fs::read("/proc/self/auxv").ok()?;
    bytes.chunks_exact(16).find_map(|pair| {
        let key = u64::from_ne_bytes(pair[..8].try_into().ok()?);
        let value = u64::from_ne_bytes(pair[8..].try_into().ok()?);
        (key == kind).then_some(value)
    })
}
