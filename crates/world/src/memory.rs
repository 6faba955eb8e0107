//! The World's memory: memfds mapped at the agreed addresses before the zygote is forked.

use crate::control::{CONTROL_BYTES, control_parts, world};
use crate::local::LOCAL_BYTES;
use crate::room::Room;
use peregrine_base::sync::{AtomicUsize, Ordering};
use peregrine_base::{PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::descriptors::out_of_the_way;
use peregrine_sys::mem::{self, Advice, MapOptions, Placement, Source};
use peregrine_sys::memfd;
use peregrine_sys::raw::Errno;
use peregrine_thread::layout::{ARCHIVE, ARENA, CARRIER, CONTROL, SLOTS, TEMPLATE};
use peregrine_thread::stack_kind::MOST_WINDOWED;
use peregrine_vm::alias;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

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
            "a World reserves a gigabyte of addresses (not memory) for each slot, and as much for its image: raise RLIMIT_AS with `ulimit -v unlimited`, or lower PEREGRINE_SLOTS (with one slot, which gets less then, 1.5 GiB do)"
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

/// The file of the alias threads' frames, `window_bytes` for each; mapped nowhere but in windows.
pub fn frames(name: &core::ffi::CStr, window_bytes: usize) -> Result<OwnedFd, MemoryError> {
    let what = "the frames of alias threads";
    memfd::create(name, PageCount::for_bytes(MOST_WINDOWED * window_bytes), memfd::Pages::Base)
        .map_err(|errno| MemoryError::Memfd { what, errno })
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
    map_part(what, &fd, addr, bytes, 0)?;
    Ok(fd)
}

fn map_part(
    what: &'static str,
    fd: &OwnedFd,
    addr: usize,
    bytes: usize,
    offset: u64,
) -> Result<(), MemoryError> {
    let range = PageRange::covering(VirtAddr::new(addr), bytes);
    alias::at(range, fd.as_fd(), PageCount::for_bytes(offset as usize), Protection::ReadWrite)
        .map_err(|errno| MemoryError::Map { what, addr, bytes, errno })?;
    // SAFETY: only leaves the range out of core dumps.
    let _ = unsafe { mem::advise(range, Advice::DontDump) };
    Ok(())
}

impl WorldMemory {
    /// Makes and maps all parts, for `slots` slots and `nodes` nodes.
    pub fn new(slots: usize, nodes: u32) -> Result<Self, MemoryError> {
        let what = "the World's tables";
        let control =
            memfd::create(c"peregrine-control", PageCount::for_bytes(CONTROL_BYTES), memfd::Pages::Base)
                .map_err(|errno| MemoryError::Memfd { what, errno })?;
        // Only what is used of the tables' address range, for a limit on address space counts it all.
        let room = Room::for_this_process(slots);
        for (addr, bytes) in control_parts(nodes, &room) {
            map_part(what, &control, addr, bytes, (addr - CONTROL) as u64)?;
        }
        let bytes = |of: &AtomicUsize| of.load(Ordering::Relaxed);
        let archive = map_memfd("the archive", c"peregrine-archive", ARCHIVE, bytes(&room.archive_bytes))?;
        let archive = out_of_the_way(archive);
        let w = world();
        w.archive_fd.store(archive.as_raw_fd() as u32, Ordering::Relaxed);
        let fds = vec![
            control,
            map_memfd("the message arena", c"peregrine-arena", ARENA, bytes(&room.arena_bytes))?,
            map_memfd("the templates", c"peregrine-template", TEMPLATE, TEMPLATE_BYTES)?,
            map_memfd("the slots", c"peregrine-slots", SLOTS, bytes(&room.slots_bytes))?,
        ];
        let fds = fds.into_iter().map(out_of_the_way).chain([archive]).collect();
        w.slot_count.store(slots as u32, Ordering::Relaxed);
        w.room.set(&room);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::initialise;

    /// A supervisor that resumes a World in a container often has the process id of the one that was killed.
    #[test]
    fn a_world_that_is_made_again_has_another_life() {
        let _memory = WorldMemory::new(1, 1).expect("World memory");
        let lives = [(); 4].map(|()| {
            // SAFETY: mapped, and this test alone uses it.
            unsafe { initialise(1, 0) };
            world().life.load(Ordering::Relaxed)
        });
        assert!(!lives.contains(&0) && lives.iter().any(|life| *life != lives[0]), "{lives:?}");
    }
}
