//! Where committed output goes: descriptors 1 and 2 of the supervisor.
//!
//! The records between `released` and the last commit's tail are written out in order. A reader that does not read holds up
//! the output alone: before each write the descriptor is asked whether it takes bytes.

use crate::control::world;
use crate::output;
use peregrine_base::sync::Ordering;
use peregrine_sys::rustix;
use rustix::event::{PollFd, PollFlags, poll};
use std::collections::VecDeque;

/// Largest write that a pipe takes whole or not at all.
const CHUNK: usize = 4096;

/// Output on its way.
#[derive(Debug, Default)]
pub(super) struct Outlet {
    /// Committed and copied from the ring, not yet written.
    waiting: VecDeque<(i32, Vec<u8>)>,
    committed: u64,
}

impl Outlet {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Everything up to `tail` may go out.
    pub(super) fn commit(&mut self, tail: u64) {
        if tail > self.committed {
            self.waiting.extend(output::records(self.committed, tail));
            self.committed = tail;
            // The ring's space is free once the bytes are copied; but a reader that does not read must hold up the writers.
            self.free_ring();
        }
    }

    fn free_ring(&mut self) {
        let held: usize = self.waiting.iter().map(|(_, b)| b.len()).sum();
        if held < 8 << 20 {
            world().released.store(self.committed, Ordering::Release);
        }
    }

    /// After a rollback: what was committed stays committed.
    pub(super) fn rolled_back(&mut self) {}

    /// Whether a reader holds us up.
    pub(super) fn is_stuck(&self) -> bool {
        !self.waiting.is_empty()
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
        while let Some((fd, bytes)) = self.waiting.front_mut() {
            // SAFETY: the process's own standard descriptors.
            let to = unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) };
            if !wait && !takes_bytes(to) {
                return;
            }
            match rustix::io::write(to, &bytes[..bytes.len().min(CHUNK)]) {
                Ok(n) => {
                    bytes.drain(..n);
                    if bytes.is_empty() {
                        self.waiting.pop_front();
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) if !wait => return,
                Err(rustix::io::Errno::AGAIN) => std::thread::sleep(std::time::Duration::from_millis(1)),
                // A closed reader: as with SIGPIPE ignored, the output has nowhere to go.
                Err(_) => {
                    self.waiting.pop_front();
                }
            }
        }
        self.free_ring();
    }
}

fn takes_bytes(fd: std::os::fd::BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::OUT)];
    let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut fds, Some(&now)), Ok(n) if n > 0)
}
