//! The World's memory: memfds mapped at the agreed addresses before the zygote is forked.

use crate::control::CONTROL_BYTES;
use crate::local::LOCAL_BYTES;
use peregrine_base::{PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::mem::{self, Advice, MapOptions, Placement, Source};
use peregrine_sys::memfd;
use peregrine_sys::raw::Errno;
use peregrine_thread::layout::{ARENA, ARENA_BYTES, CARRIER, CONTROL, SLOTS, SLOTS_BYTES, TEMPLATE};
use peregrine_vm::alias;
use std::os::fd::{AsFd, OwnedFd};

/// Room for the templates, and for the argument and environment strings after them.
pub const TEMPLATE_BYTES: usize = 64 << 20;
/// Where the strings lie.
pub const STRINGS: usize = TEMPLATE + (32 << 20);

/// Why there is no World memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A memfd could not be made.
    #[error(
        "cannot make World memory ({what}): {errno}; memfd_create must be allowed (is it blocked by a container's seccomp filter?)"
    )]
    Memfd {
        /// Which part.
        what: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The range is not free, or the limit on address space is too low.
    #[error("cannot map {what} ({bytes} bytes at {addr:#x}): {errno}; {}", remedy(*errno))]
    Map {
        /// Which part.
        what: &'static str,
        /// Where.
        addr: usize,
        /// How much.
        bytes: usize,
        /// The kernel's answer.
        errno: Errno,
    },
}

fn remedy(e: Errno) -> &'static str {
    match e {
        Errno::ENOMEM => {
            "a World reserves about 33 TiB of addresses (not memory): raise RLIMIT_AS with `ulimit -v unlimited`"
        }
        Errno::EEXIST => "the range is taken: a World already exists in this process, or a library mapped it",
        _ => "see mmap(2)",
    }
}

/// The memfds; the memory goes when the last process that maps it ends.
#[derive(Debug)]
pub struct WorldMemory {
    /// Kept open for whoever maps the same memory elsewhere.
    #[allow(dead_code)]
    fds: Vec<OwnedFd>,
}

/// Makes a memfd and maps it at `addr`.
pub fn map_memfd(
    what: &'static str,
    name: &core::ffi::CStr,
    addr: usize,
    bytes: usize,
) -> Result<OwnedFd, MemoryError> {
    let fd = memfd::create(name, PageCount::for_bytes(bytes), memfd::Pages::Base)
        .map_err(|errno| MemoryError::Memfd { what, errno })?;
    let range = PageRange::covering(VirtAddr::new(addr), bytes);
    alias::at(range, fd.as_fd(), PageCount::new(0), Protection::ReadWrite)
        .map_err(|errno| MemoryError::Map { what, addr, bytes, errno })?;
    // SAFETY: only leaves the range out of core dumps.
    let _ = unsafe { mem::advise(range, Advice::DontDump) };
    Ok(fd)
}

impl WorldMemory {
    /// Makes and maps all parts.
    pub fn new() -> Result<Self, MemoryError> {
        let fds = vec![
            map_memfd("the World's tables", c"peregrine-control", CONTROL, CONTROL_BYTES)?,
            map_memfd("the message arena", c"peregrine-arena", ARENA, ARENA_BYTES)?,
            map_memfd("the templates", c"peregrine-template", TEMPLATE, TEMPLATE_BYTES)?,
            map_memfd("the slots", c"peregrine-slots", SLOTS, SLOTS_BYTES)?,
        ];
        let (what, addr, bytes) = ("a node's own state", CARRIER, LOCAL_BYTES);
        let at = Placement::At(VirtAddr::new(addr));
        let options = MapOptions { no_reserve: true, ..MapOptions::default() };
        // SAFETY: replaces nothing.
        unsafe {
            mem::map(PageCount::for_bytes(bytes), Protection::ReadWrite, Source::Anonymous, at, options)
                .map_err(|errno| MemoryError::Map { what, addr, bytes, errno })?;
        }
        Ok(Self { fds })
    }
}
