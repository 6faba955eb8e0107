//! The table of descriptors: which numbers are whose, and what they stand for.

use crate::raw::Errno;
use crate::rustix;
use core::mem::MaybeUninit;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

/// Descriptors from this number on are the runtime's own; a program has those below, unless it has many.
pub const PROGRAMS_BELOW: RawFd = 500;

/// Descriptors that the runtime may need at once: three for each node, and what closes those of the dead.
const FOR_THE_RUNTIME: u64 = 300;

/// What the limit on descriptors (`RLIMIT_NOFILE`) must be at least: with less the runtime's would be among the program's, and come and go.
pub const LEAST_LIMIT: u64 = PROGRAMS_BELOW as u64 + FOR_THE_RUNTIME + 1;

/// What a lower soft limit is raised to, where the hard one allows: what most systems give, and the most that `select` can do with.
pub const USUAL_LIMIT: u64 = 1024;

/// The soft and the hard limit on descriptors of this process (`RLIMIT_NOFILE`); `u64::MAX` for none.
pub fn limits() -> [u64; 2] {
    let now = getrlimit(Resource::Nofile);
    [now.current, now.maximum].map(|limit| limit.unwrap_or(u64::MAX))
}

/// Raises a soft limit on descriptors of less than [`LEAST_LIMIT`] to [`USUAL_LIMIT`], or to the hard one if that is less; the hard one
/// stays.
///
/// # Errors
/// The limit that stays, which is less than [`LEAST_LIMIT`]: the hard one, or the soft one if a filter forbids to raise it.
pub fn have_enough() -> Result<(), u64> {
    let [soft, hard] = limits();
    if soft >= LEAST_LIMIT {
        return Ok(());
    }
    if hard < LEAST_LIMIT {
        return Err(hard);
    }
    let now = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: Some(USUAL_LIMIT.min(hard)), maximum: now.maximum };
    setrlimit(Resource::Nofile, raised).map_err(|_| soft)
}

/// Gives `fd` a number from [`PROGRAMS_BELOW`] on (`F_DUPFD_CLOEXEC`), if there is one: out of the way of a program that shares the table of descriptors,
/// counts on low numbers, or closes one that it had in another life.
pub fn out_of_the_way(fd: OwnedFd) -> OwnedFd {
    rustix::io::fcntl_dupfd_cloexec(&fd, PROGRAMS_BELOW).unwrap_or(fd)
}

/// An open file, as far as the kernel tells one from another: two openings of one file, and all of a kind that has no file
/// (`eventfd`, `epoll`), are the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpenFile {
    device: u64,
    inode: u64,
    /// Open for reading, for writing: the two ends of a pipe differ in that only.
    access: u32,
}

/// The descriptors below [`PROGRAMS_BELOW`] of the process whose `/proc/PID/fd` is `table`, and what they stand for. Of numbers that come
/// or go meanwhile nothing is said.
///
/// # Errors
/// The directory can't be read: EACCES if the process is not the caller's.
pub fn open_files(table: BorrowedFd<'_>) -> Result<Vec<(RawFd, OpenFile)>, Errno> {
    use rustix::fs::{AtFlags, RawDir, SeekFrom, StatxFlags, seek, statx};
    let failed = |e: rustix::io::Errno| Errno(e.raw_os_error());
    seek(table, SeekFrom::Start(0)).map_err(failed)?;
    let mut bytes = [const { MaybeUninit::uninit() }; 4096];
    let mut entries = RawDir::new(table, &mut bytes);
    let mut all = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let Some(number) = name.to_str().ok().and_then(|n| n.parse().ok()).filter(|n| *n < PROGRAMS_BELOW)
        else {
            continue;
        };
        // The name's own mode tells how the file is open. A file's server, which may not answer, is not asked.
        let look =
            |flags| statx(table, name, flags | AtFlags::STATX_DONT_SYNC, StatxFlags::INO | StatxFlags::MODE);
        let (Ok(file), Ok(link)) = (look(AtFlags::empty()), look(AtFlags::SYMLINK_NOFOLLOW)) else {
            continue;
        };
        let device = (u64::from(file.stx_dev_major) << 32) | u64::from(file.stx_dev_minor);
        let access = u32::from(link.stx_mode) & 0o600;
        all.push((number, OpenFile { device, inode: file.stx_ino, access }));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::{AsFd, AsRawFd};

    fn mine() -> Vec<(RawFd, OpenFile)> {
        open_files(File::open("/proc/self/fd").unwrap().as_fd()).unwrap()
    }

    #[test]
    fn ends_of_pipes_and_files_are_told_apart_and_a_copy_is_the_same() {
        let (from, to) = rustix::pipe::pipe().unwrap();
        let (from2, _to2) = rustix::pipe::pipe().unwrap();
        let copy = from.try_clone().unwrap();
        let all = mine();
        let of =
            |fd: &OwnedFd| all.iter().find(|(n, _)| *n == fd.as_raw_fd()).map(|(_, file)| *file).unwrap();
        assert_eq!(of(&from), of(&copy));
        assert_ne!(of(&from), of(&to));
        assert_ne!(of(&from), of(&from2));
    }

    #[test]
    fn many_are_listed_once_each_and_those_of_the_runtime_are_not() {
        let many: Vec<File> = (0..300).map(|_| File::open("/dev/null").unwrap()).collect();
        let high = out_of_the_way(many[0].try_clone().unwrap().into());
        let mut numbers: Vec<RawFd> = mine().iter().map(|(n, _)| *n).collect();
        let listed = numbers.len();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), listed);
        let low = |fd: RawFd| fd < PROGRAMS_BELOW;
        assert!(many.iter().map(AsRawFd::as_raw_fd).filter(|n| low(*n)).all(|n| numbers.contains(&n)));
        assert!(!low(high.as_raw_fd()) && numbers.iter().all(|n| low(*n)));
    }
}
