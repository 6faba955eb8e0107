//! Where committed output goes: descriptors 1 and 2 of the supervisor, or a file.
//!
//! Records that belong to a commit are written in order. A reader that does not read holds up the output alone: before each
//! write the descriptor is asked whether it takes bytes.
//!
//! A life that resumes an image goes on where the old one's output ends. If that went to a file, what the file has beyond
//! the image is cut off first, so it ends up exactly as without the death. Elsewhere the last chunk may be seen twice, and
//! a line on standard error says so.

use crate::control::world;
use crate::output;
use peregrine_base::sync::Ordering;
use peregrine_sys::rustix;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, SeekFrom, fstat, ftruncate, seek};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Largest write that a pipe takes whole or not at all.
const CHUNK: usize = 4096;
/// Bytes that may wait for a slow reader before the threads that write are held up.
const MOST_WAITING: usize = 8 << 20;

/// Where output goes and how much of it there has been; kept in images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sink {
    /// A file named by the user instead of descriptor 1.
    path: Option<PathBuf>,
    /// Device, inode and first offset of what descriptor 1 writes to, if that is a regular file.
    file: Option<(u64, u64, u64)>,
    /// Whether descriptor 2 writes to the same.
    joined: bool,
    /// Bytes of the file's output, all told.
    bytes: u64,
}

/// Output on its way.
#[derive(Debug, Default)]
pub(super) struct Outlet {
    /// Committed, not yet written.
    waiting: VecDeque<(i32, Vec<u8>)>,
    /// Position up to which output was taken over from the ring.
    taken: u64,
    /// Opened by name, in place of descriptor 1.
    named: Option<OwnedFd>,
    sink: Sink,
}

/// The file named for output can't be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot write output to {}: {source}", path.display())]
pub struct OutputError {
    path: PathBuf,
    source: std::io::Error,
}

fn identity(fd: impl AsFd) -> Option<(u64, u64)> {
    let st = fstat(fd).ok()?;
    (FileType::from_raw_mode(st.st_mode) == FileType::RegularFile).then_some((st.st_dev, st.st_ino))
}

fn standard(fd: i32) -> BorrowedFd<'static> {
    // SAFETY: the process's own standard descriptors, never closed here.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

impl Outlet {
    /// Output of a World; to `path`, if there is one. A new World empties the file, one that goes on appends to it, or does
    /// as [`Outlet::continue_from`] says.
    pub(super) fn new(path: Option<&Path>, is_new: bool) -> Result<Self, OutputError> {
        let mut me = Self::default();
        if let Some(path) = path {
            let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
            let file = open(&absolute, is_new)?;
            let _ = seek(&file, SeekFrom::End(0));
            me.named = Some(file);
            me.sink.path = Some(absolute);
        }
        me.sink.file = me.first_offset();
        me.sink.joined = identity(standard(2)).is_some() && identity(standard(2)) == identity(me.target(1));
        Ok(me)
    }

    fn target(&self, fd: i32) -> BorrowedFd<'_> {
        match &self.named {
            Some(file) if fd == 1 => file.as_fd(),
            _ => standard(fd),
        }
    }

    fn first_offset(&self) -> Option<(u64, u64, u64)> {
        let to = self.target(1);
        let (dev, ino) = identity(to)?;
        let appends = rustix::fs::fcntl_getfl(to).is_ok_and(|f| f.contains(rustix::fs::OFlags::APPEND));
        let at =
            if appends { fstat(to).ok()?.st_size as u64 } else { seek(to, SeekFrom::Current(0)).ok()? };
        Some((dev, ino, at))
    }

    /// Goes on with an old life's output: `records` may have left already.
    pub(super) fn continue_from(&mut self, old: Sink, position: u64, records: Vec<(i32, Vec<u8>)>) {
        let again: u64 = records.iter().filter(|(fd, _)| old.counts(*fd)).map(|(_, b)| b.len() as u64).sum();
        if let Some(path) = &old.path
            && self.named.is_none()
            && let Ok(file) = open(path, false)
        {
            self.named = Some(file);
        }
        let mut exact = false;
        if let (Some((dev, ino, from)), to) = (old.file, self.target(1))
            && identity(to) == Some((dev, ino))
        {
            let keep = from + old.bytes.saturating_sub(again);
            // A file that was emptied meanwhile has nothing to cut off.
            if fstat(to).is_ok_and(|st| st.st_size as u64 >= keep) && ftruncate(to, keep).is_ok() {
                let _ = seek(to, SeekFrom::Start(keep));
                exact = true;
            }
        }
        if again > 0 && !exact {
            eprintln!("peregrine: the next {again} bytes of output may have been shown before");
        }
        self.sink = Sink { bytes: old.bytes, ..old };
        if !exact {
            self.sink.file =
                self.first_offset().map(|(d, i, at)| (d, i, at.saturating_sub(old_total(&self.sink, again))));
        }
        self.taken = position;
        self.waiting = records.into();
    }

    /// The sink as it will be once everything up to `tail` is out.
    pub(super) fn sink_after(&self, tail: u64) -> Sink {
        let mut sink = self.sink.clone();
        for (fd, bytes) in output::parse(&output::raw(self.taken.min(tail), tail)) {
            if sink.counts(fd) {
                sink.bytes += bytes.len() as u64;
            }
        }
        sink
    }

    /// Everything up to `tail` may go out.
    pub(super) fn commit(&mut self, tail: u64) {
        if tail > self.taken {
            self.sink = self.sink_after(tail);
            self.waiting.extend(output::parse(&output::raw(self.taken, tail)));
            self.taken = tail;
        }
        self.free_ring();
    }

    fn free_ring(&mut self) {
        let held: usize = self.waiting.iter().map(|(_, b)| b.len()).sum();
        if held < MOST_WAITING {
            world().released.store(self.taken, Ordering::Release);
        }
    }

    /// Whether a reader holds us up.
    pub(super) fn is_stuck(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Position up to which output has left, if all that was taken has.
    pub(super) fn done(&self) -> Option<u64> {
        self.waiting.is_empty().then_some(self.taken)
    }

    /// Writes what can be written without waiting.
    pub(super) fn flush_some(&mut self) {
        self.flush(false);
    }

    /// Writes everything.
    pub(super) fn flush_all(&mut self) {
        self.flush(true);
    }

    fn flush(&mut self, wait: bool) {
        while let Some((fd, mut bytes)) = self.waiting.pop_front() {
            let to = self.target(fd);
            if !wait && !takes_bytes(to) {
                self.waiting.push_front((fd, bytes));
                return;
            }
            match rustix::io::write(to, &bytes[..bytes.len().min(CHUNK)]) {
                Ok(n) => {
                    bytes.drain(..n);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) if !wait => {
                    self.waiting.push_front((fd, bytes));
                    return;
                }
                Err(rustix::io::Errno::AGAIN) => std::thread::sleep(std::time::Duration::from_millis(1)),
                // A closed reader: as with SIGPIPE ignored, the output has nowhere to go.
                Err(_) => bytes.clear(),
            }
            if !bytes.is_empty() {
                self.waiting.push_front((fd, bytes));
            }
        }
        self.free_ring();
    }
}

impl Sink {
    fn counts(&self, fd: i32) -> bool {
        fd == 1 || (fd == 2 && self.joined)
    }
}

fn old_total(sink: &Sink, again: u64) -> u64 {
    sink.bytes.saturating_sub(again)
}

fn open(path: &Path, empty: bool) -> Result<OwnedFd, OutputError> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(empty);
    options.open(path).map(OwnedFd::from).map_err(|source| OutputError { path: path.to_path_buf(), source })
}

/// Whether a write would not wait.
pub(super) fn takes_bytes(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::OUT)];
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut fds, Some(&now)), Ok(n) if n > 0)
}
