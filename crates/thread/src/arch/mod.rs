//! What differs between processors: the switch. Every file here has the same verbs.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!(
    "peregrine-thread has a context switch for x86-64 only; see the portability table in the README"
);
